"""Write a training run's encoder as a pretrained folder, any encoder as an ONNX file.

python -m speechbrain_jepa.export results/jepa_unstructured/1234 my_encoder
python -m speechbrain_jepa.export my_encoder --onnx encoder.onnx
"""

import argparse
import tempfile
from pathlib import Path

from speechbrain_jepa.checkpoints import export_experiment
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.files import FolderInUse
from speechbrain_jepa.read_out import add_read_out

ONNX_ONLY = {"step": None, "flat": False, "normalization": "pretraining"}


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "source",
        help="output_folder of a training run; for --onnx alone also a pretrained folder, a "
        "Hugging Face repo id or the name of an encoder of the package",
    )
    parser.add_argument("out", nargs="?", help="pretrained folder to write")
    parser.add_argument(
        "--target-encoder",
        action="store_true",
        help="export the target encoder (the moving average) instead of the context encoder",
    )
    parser.add_argument("--half", action="store_true", help="float16 parameters: half the size")
    parser.add_argument(
        "--onnx", metavar="FILE", help="write an ONNX file, log-mel included (docs/deploy.md)"
    )
    add_read_out(parser, "as the training run or folder has it")
    onnx = parser.add_argument_group("what the ONNX file computes, as AudioJEPA does")
    onnx.add_argument("--step", type=float, help="seconds of a time step, finer than the patches'")
    onnx.add_argument(
        "--flat", action="store_true", help="average the frequency patches of a time step"
    )
    onnx.add_argument(
        "--normalization",
        choices=("pretraining", "instance"),
        default="pretraining",
        help="of the log-mel; default: the pair stored with the encoder",
    )
    options = parser.parse_args(arguments)
    if not options.out and not options.onnx:
        parser.error("name a pretrained folder to write, or --onnx FILE")
    for name, default in ONNX_ONLY.items():
        if not options.onnx and getattr(options, name) != default:
            parser.error(f"--{name} is for --onnx FILE: a pretrained folder serves any")
    which = "target" if options.target_encoder else "context"
    try:
        if options.out:
            folder = export_experiment(
                options.source, options.out, which, options.half, options.layers, options.pooling
            )
            print(f"{which} encoder written to {folder}")
        if options.onnx:
            print(f"{which} encoder written to {_export_onnx(options, which)}")
    except (ImportError, OSError, RuntimeError, ValueError, FolderInUse) as error:
        raise SystemExit(f"export: {error}") from error


def _export_onnx(options, which: str):
    from speechbrain_jepa.onnx_export import export_onnx  # its libraries are an extra

    with tempfile.TemporaryDirectory() as folder:
        # the folder just written, where there is one: training may have gone on since
        source = options.out or options.source
        if options.target_encoder and not options.out:
            source = export_experiment(source, Path(folder) / "encoder", which)
        model = AudioJEPA(
            source,
            layers=options.layers,
            pooling=options.pooling,
            step_seconds=options.step,
            flat=options.flat,
            normalization=options.normalization,
        )
    return export_onnx(model, options.onnx, options.half)


if __name__ == "__main__":
    main()
