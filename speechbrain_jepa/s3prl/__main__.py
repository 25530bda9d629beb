"""`python -m speechbrain_jepa.s3prl`: run s3prl's scripts with `audio_jepa` among the upstreams."""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from speechbrain_jepa.s3prl import startup
from speechbrain_jepa.s3prl.tasks import option

WORKERS = Path(__file__).parent / "workers"  # its sitecustomize.py

USAGE = """\
python -m speechbrain_jepa.s3prl SCRIPT [arguments of the script ...]
    Run a script of s3prl with audio_jepa among the upstreams. SCRIPT is a path, or the name of a
    script in the installed s3prl, as in:
    python -m speechbrain_jepa.s3prl run_downstream.py -m train -u audio_jepa -k FOLDER -d TASK ...
    A script of a clone uses the clone's s3prl, whatever is installed.
python -m speechbrain_jepa.s3prl superb --data TASK=FOLDER ... --encoders FOLDER ...
    Tasks of SUPERB one after another, and a table at the end: see superb --help.
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
        case ["superb", *arguments]:
            from speechbrain_jepa.s3prl import superb

            sys.exit(superb.main(arguments))
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
    """What `python SCRIPT arguments` does, with what s3prl lacks, also in processes it starts."""
    sys.argv = [os.fspath(script), *arguments]
    sys.path[0] = os.fspath(script.parent.resolve())
    on_path = [os.fspath(WORKERS)]
    if clone := clone_of(script):
        sys.path.insert(1, os.fspath(clone))
        on_path.append(os.fspath(clone))
    on_path += filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(on_path)

    from speechbrain_jepa.s3prl import compat

    compat.supply()
    if option(arguments, "--device") == "cpu":
        compat.hide_cuda()
    runpy.run_path(sys.argv[0], run_name="__main__")


def clone_of(script: Path) -> Path | None:
    """Where to import s3prl from, if the script lies in another one than the installed."""
    packages = (folder for folder in script.resolve().parents if folder.name == "s3prl")
    package = next((folder for folder in packages if (folder / "hub.py").is_file()), None)
    found = find_spec("s3prl")
    installed = Path(found.origin).resolve().parent if found and found.origin else None
    return package.parent if package and package != installed else None


if __name__ == "__main__":
    main()
