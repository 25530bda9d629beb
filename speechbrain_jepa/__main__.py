"""`speechbrain-jepa COMMAND ...`, which is `python -m speechbrain_jepa.COMMAND ...`."""

import runpy
import sys
from importlib.metadata import version

COMMANDS = {
    "embed": "embeddings of audio files and folders",
    "tag": "labels of audio files and folders, by a fine-tuned classifier",
    "export": "a training run's encoder as a pretrained folder",
    "convert": "weights of M2D, MATPAC or the paper's released code as a pretrained folder",
    "s3prl": "s3prl's scripts with audio_jepa among the upstreams",
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(("usage: speechbrain-jepa COMMAND [--help] ...", "", *lines))


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    match arguments:
        case [] | ["-h" | "--help"]:
            print(usage())
        case ["--version"]:
            print(version("speechbrain-jepa"))
        case [command, *rest] if command in COMMANDS:
            sys.argv = [f"speechbrain-jepa {command}", *rest]
            runpy.run_module(f"speechbrain_jepa.{command}", run_name="__main__", alter_sys=False)
        case [command, *_]:
            sys.exit(f"{command}: no such command\n{usage()}")


if __name__ == "__main__":
    main()
