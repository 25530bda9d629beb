"""`speechbrain-jepa COMMAND ...`, which is `python -m speechbrain_jepa.COMMAND ...`."""

import runpy
import sys
from importlib.metadata import version

COMMANDS = {
    "prepare": "a corpus decoded once into tar shards, on one machine or many",
    "embed": "embeddings of audio files and folders",
    "similar": "the clips most similar to one",
    "explore": "embeddings as a page to look at and listen to",
    "tag": "labels of audio files and folders, by a fine-tuned classifier",
    "report": "the page of a pretraining run",
    "export": "a training run's encoder as a pretrained folder, any encoder as an ONNX file",
    "convert": "weights of M2D, MATPAC or the paper's released code as a pretrained folder",
    "push": "a pretrained folder published at the Hugging Face Hub",
    "hear": "HEAR's tasks, embedded and scored by heareval",
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
