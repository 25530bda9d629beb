"""What an installed package needs and brings."""

import subprocess
import sys

# an environment without them: their folders are taken from where packages are looked for
BLOCKED = """
import importlib.machinery

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name in {"sklearn", "pandas", "matplotlib"} else find(name, path, target)
)
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, timeout=120
    )


def test_embedding_and_pretraining_need_none_of_the_evaluation_libraries():
    modules = ("encoder", "embed", "export", "convert", "hear", "inference", "brain", "data")
    process = run("".join(f"import speechbrain_jepa.{module}\n" for module in modules))
    assert process.returncode == 0, process.stderr


def test_evaluation_without_its_libraries_says_what_to_install():
    process = run("import speechbrain_jepa.evaluation.quick_probe")
    assert process.returncode
    assert "pip install '.[evaluation]'" in process.stderr.splitlines()[-1]
