"""`python -m speechbrain_jepa.s3prl`: run s3prl's scripts with `audio_jepa` among the upstreams."""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from speechbrain_jepa.s3prl import startup

USAGE = """\
python -m speechbrain_jepa.s3prl SCRIPT [arguments of the script ...]
    Run a script of s3prl with audio_jepa among the upstreams. SCRIPT is a path, or the name of a
    script in the installed s3prl, as in:
    python -m speechbrain_jepa.s3prl run_downstream.py -m train -u audio_jepa -k FOLDER -d TASK ...
python -m speechbrain_jepa.s3prl enable
    Let plain `python run_downstream.py -u audio_jepa ...` work in this environment.
python -m speechbrain_jepa.s3prl disable
    Take that back."""


def main() -> None:
    match sys.argv[1:]:
        case [] | ["-h" | "--help"]:
            print(USAGE)
        case ["enable"]:
            print(f"enabled in this environment, by {startup.enable()}")
        case ["disable"]:
            print("disabled" if startup.disable() else "was not enabled in this environment")
        case [script, *arguments]:
            run(find_script(script), arguments)


def find_script(name: str) -> Path:
    """A script by its path, or by its name in the installed s3prl."""
    if Path(name).is_file():
        return Path(name)
    spec = find_spec("s3prl")
    if spec is None or spec.origin is None:  # not installed, or a folder of that name
        sys.exit(f"{name}: no such file, and s3prl is not installed (docs/s3prl.md says how)")
    script = Path(spec.origin).parent / name
    if not script.is_file():
        sys.exit(f"{name}: no such file, neither here nor in {script.parent}")
    return script


def run(script: Path, arguments: list[str]) -> None:
    """What `python SCRIPT arguments` does."""
    sys.argv = [os.fspath(script), *arguments]
    sys.path[0] = os.fspath(script.parent.resolve())
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
