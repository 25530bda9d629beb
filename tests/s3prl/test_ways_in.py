"""The ways in: registration by import, the startup file and the launcher.

The startup file is opt-in, reversible, free, and harmless wherever something is missing.
"""

import pytest

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
