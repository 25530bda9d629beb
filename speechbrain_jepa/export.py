"""Write a training run's encoder as a pretrained folder.

python -m speechbrain_jepa.export results/jepa_unstructured/1234 my_encoder
"""

import argparse

from speechbrain_jepa.checkpoints import export_experiment
from speechbrain_jepa.files import FolderInUse
from speechbrain_jepa.read_out import add_read_out


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument("experiment_folder", help="output_folder of the training run")
    parser.add_argument("out", help="pretrained folder to write")
    parser.add_argument(
        "--target-encoder",
        action="store_true",
        help="export the target encoder (the moving average) instead of the context encoder",
    )
    parser.add_argument("--half", action="store_true", help="float16 parameters: half the size")
    add_read_out(parser, "as the training run has it")
    options = parser.parse_args(arguments)
    which = "target" if options.target_encoder else "context"
    try:
        folder = export_experiment(
            options.experiment_folder,
            options.out,
            which,
            options.half,
            options.layers,
            options.pooling,
        )
    except (OSError, ValueError, FolderInUse) as error:
        raise SystemExit(f"export: {error}") from error
    print(f"{which} encoder written to {folder}")


if __name__ == "__main__":
    main()
