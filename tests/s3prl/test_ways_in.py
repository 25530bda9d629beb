"""The ways in: registration by import, the startup file and the launcher.

The startup file is opt-in, reversible, free, and harmless wherever something is missing.
"""

import numpy as np
import pytest
import soundfile

from speechbrain_jepa.s3prl import startup

LAUNCHER = ("-m", "speechbrain_jepa.s3prl")
ENTRIES = tuple(f"audio_jepa{entry}" for entry in ("", "_20ms", "_40ms", "_hf", "_local", "_url"))
IMPORT_HUB = "import s3prl.hub; print(*sorted(n for n in vars(s3prl.hub) if 'jepa' in n))"


@pytest.fixture
def stub(environment):
    """An s3prl that imports at once, in place of the real one."""
    folder = environment.site_packages / "s3prl"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "hub.py").write_text("def fbank():\n    pass\n")
    return folder


def test_importing_the_package_registers_the_entries_before_or_after(environment, stub):
    before = f"import speechbrain_jepa.s3prl; {IMPORT_HUB}"
    after = f"import s3prl.hub, speechbrain_jepa.s3prl; {IMPORT_HUB}"
    for code in (before, after):
        assert environment.run("-c", code).stdout.split() == [*ENTRIES]


def test_importing_the_package_imports_neither_s3prl_nor_torch(environment, stub):
    environment.run(
        "-c",
        "import speechbrain_jepa.s3prl, sys\n"
        "assert not {'s3prl', 'torch', 'torchaudio'} & sys.modules.keys()",
    )


def test_enable_and_disable(environment, stub):
    assert environment.run("-c", IMPORT_HUB).stdout.split() == []
    file = environment.site_packages / startup.FILE

    for _ in range(2):
        assert str(file) in environment.run(*LAUNCHER, "enable").stdout
    assert environment.run("-c", IMPORT_HUB).stdout.split() == [*ENTRIES]

    assert environment.run(*LAUNCHER, "disable").stdout == "disabled\n"
    assert not file.exists()
    assert environment.run("-c", IMPORT_HUB).stdout.split() == []
    assert "was not enabled" in environment.run(*LAUNCHER, "disable").stdout


def test_enabled_scripts_of_s3prl_have_what_they_import_before_s3prl(environment, stub, tmp_path):
    """As espnet-s3prl's run_downstream.py does; other programs are left alone."""
    environment.run(*LAUNCHER, "enable")
    script, other = stub / "run_downstream.py", tmp_path / "other.py"
    lacking = "import torchaudio, huggingface_hub, sys\n"
    script.write_text(
        f"{lacking}from huggingface_hub import HfFolder\n{IMPORT_HUB}; torchaudio.info\n"
    )
    other.write_text(f"{lacking}assert not [name for name in sys.modules if 'jepa' in name]\n")
    assert environment.run(script, cwd=tmp_path).stdout.split() == [*ENTRIES]
    environment.run(other, cwd=tmp_path)


def test_an_interpreter_that_starts_imports_nothing_more(environment):
    code = "import sys; print(*sorted(sys.modules))"
    before = environment.run("-c", code).stdout
    environment.run(*LAUNCHER, "enable")
    assert environment.run("-c", code).stdout == before
    assert "speechbrain_jepa" not in before


def test_without_s3prl(environment):
    environment.run(*LAUNCHER, "enable")
    environment.share(environment.home)  # sees no packages
    done = environment.run("-c", "import json, email, xml.dom.minidom; print('fine')")
    assert (done.stdout, done.stderr) == ("fine\n", "")
    done = environment.run("-c", "import s3prl", check=False)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 's3prl'\n")


def test_with_speechbrain_jepa_uninstalled(environment, stub):
    environment.run(*LAUNCHER, "enable")
    environment.share(environment.home)
    done = environment.run("-c", f"{IMPORT_HUB}; s3prl.hub.fbank(); print('fine')")
    assert (done.stdout, done.stderr) == ("\nfine\n", "")


def test_looking_for_s3prl_does_not_import_anything_heavy(environment, stub):
    environment.run(*LAUNCHER, "enable")
    environment.run(
        "-c",
        "import sys; from importlib.util import find_spec\n"
        "assert find_spec('s3prl').origin\n"
        "assert not {'s3prl', 'torch', 'torchaudio'} & sys.modules.keys()",
    )
    done = environment.run(
        "-c", f"from importlib.util import find_spec as f; f('s3prl'); {IMPORT_HUB}"
    )
    assert done.stdout.split() == [*ENTRIES]


def test_site_packages_of_somebody_else(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr(startup.Path, "write_text", refuse)
    with pytest.raises(PermissionError, match="use a virtual environment, or the launcher"):
        startup.enable()


# The launcher


def test_a_script_is_run_as_python_runs_it(launch, tmp_path):
    script = tmp_path / "scripts" / "show.py"
    script.parent.mkdir()
    (script.parent / "neighbour.py").write_text("NAME = 'neighbour'\n")
    script.write_text(
        "import sys, neighbour\nprint(__name__, neighbour.NAME, *sys.argv)\nsys.exit(7)\n"
    )
    arguments = ("-m", "train", "-k", "a b", "--help", "enable")
    done = launch("scripts/show.py", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 7
    assert (
        done.stdout.split() == f"__main__ neighbour scripts/show.py {' '.join(arguments)}".split()
    )


def test_a_script_that_is_nowhere(launch, tmp_path):
    done = launch("run_upstream.py", cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.startswith("run_upstream.py: no such file")


def test_help(launch, tmp_path):
    for arguments in ([], ["-h"], ["--help"]):
        assert "SCRIPT" in launch(*arguments, cwd=tmp_path).stdout


def test_a_script_of_a_clone(launch, s3prl_folder, tmp_path):
    """By its path, where a name is that of the installed one (tests/s3prl/test_emotion.py)."""
    script = tmp_path / "clone" / "run_downstream.py"
    script.parent.mkdir()
    script.write_bytes((s3prl_folder / script.name).read_bytes())
    shown = launch("clone/run_downstream.py", "--help", cwd=tmp_path).stdout
    assert "--upstream_trainable" in shown and "'audio_jepa_url'" in shown


SHOW = """\
import subprocess, sys
import s3prl
print(s3prl.__file__)
code = "import s3prl.hub; print(s3prl.__file__, hasattr(s3prl.hub, 'audio_jepa'))"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
"""


def test_a_script_of_a_clone_uses_the_package_of_the_clone(launch, s3prl_folder, tmp_path):
    """It has what the installed one lacks; the scripts that it starts use it, too."""
    package = tmp_path / "clone" / "s3prl"
    (package / "preprocess").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "hub.py").write_text("")
    (package / "preprocess" / "show.py").write_text(SHOW)
    init = str(package / "__init__.py")
    for script, folder in (("preprocess/show.py", package), ("show.py", package / "preprocess")):
        shown = launch(script, cwd=folder).stdout.split()
        assert shown == [init, init, "True"]


LENGTHS = """\
import multiprocessing, subprocess, sys
import torchaudio
from joblib import Parallel, delayed

def length(path):
    torchaudio.set_audio_backend("sox_io")
    return torchaudio.info(path).num_frames

if __name__ == "__main__":
    path = sys.argv[1]
    print(length(path), *Parallel(n_jobs=2)(delayed(length)(path) for _ in range(2)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(length, [path]))
    code = "import sys, torchaudio; print(torchaudio.info(sys.argv[1]).num_frames)"
    subprocess.run([sys.executable, "-c", code, path])
"""


def test_what_is_missing_is_supplied_to_any_script_and_to_its_processes(launch, tmp_path):
    """As preprocess/generate_len_for_bucket.py, which does not import s3prl, measures files."""
    soundfile.write(tmp_path / "a.flac", np.zeros(1234), 16_000)
    (tmp_path / "lengths.py").write_text(LENGTHS)
    done = launch("lengths.py", tmp_path / "a.flac", cwd=tmp_path)
    assert done.stdout.split() == ["1234"] * 5


def test_another_sitecustomize_is_run_as_well(environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine')\n")
    (tmp_path / "show.py").write_text(
        "import os, subprocess, sys\n"
        f"os.environ['PYTHONPATH'] += os.pathsep + {str(tmp_path)!r}\n"
        "subprocess.run([sys.executable, '-c', 'import sys; "
        "print(type(sys.meta_path[0]).__module__)'])\n"
    )
    done = environment.run(*LAUNCHER, "show.py", cwd=tmp_path)
    assert done.stdout.split() == ["mine", "speechbrain_jepa.s3prl.registration"]


def test_on_the_cpu_no_gpu_is_asked_for(launch, tmp_path):
    (tmp_path / "show.py").write_text(
        "import os, torch\n"
        "print(repr(os.environ['CUDA_VISIBLE_DEVICES']), torch.zeros(3).cuda().device)\n"
    )
    done = launch("show.py", "--device", "cpu", cwd=tmp_path)
    assert done.stdout.split() == ["''", "cpu"]
