"""All that a GPU has to show, in one command of at most nine minutes that needs no network.

    python benchmarks/gpu.py --out results/gpu
    python benchmarks/gpu.py --out results/gpu --parts compiled
    python benchmarks/gpu.py --toy --out results/toy

Each part is a command of its own with a time limit of its own: one that fails or is slow costs the
others nothing but its time, and what does not fit in `--minutes` is named and left out. The folder
gets report.md (every part's command and output, and one table of all steps), parts.csv and
steps.csv (a row as soon as it is measured), output.txt (whatever was printed besides) and
metrics.csv of the pretraining. `--toy` takes the same ways at sizes for two CPU cores; its numbers
mean nothing.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from pretrain_step import STRATEGIES, append

from speechbrain_jepa.data import make_demo_corpus
from speechbrain_jepa.files import write_text

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 10  # a part does not begin with less time left
STEPS_TITLE = "## All steps"
LAST_LINES = 30  # of a log, in the report


@dataclass(frozen=True)
class Part:
    """One command, and how long it may take."""

    name: str
    limit: int  # seconds
    command: list[str]
    prints_tables: bool = True  # else a log


def plan(args, work: Path) -> list[Part]:
    """What there is to run, the most telling first."""
    toy, out = args.toy, args.out.resolve()
    device = ["--device", args.device]

    def script(name, *arguments):
        return [sys.executable, f"benchmarks/{name}.py", *device, *map(str, arguments)]

    def step(size, strategy, batches, *arguments):
        repeats = 2 if toy else 7
        return script(
            *("pretrain_step", "--size", size, "--strategy", strategy, "--batch", *batches),
            *("--precision", "bf16", "--repeats", repeats, "--csv", out / "steps.csv", *arguments),
        )

    sizes = ["toy"] if toy else ["base", "tiny"]
    batches = [2, 4] if toy else [256, 512, 1024, 2048]
    tests = ["tests/test_devices.py", "tests/test_attention.py", "-k", "real or cuda or flash"]
    parts = [
        Part(
            "tests",
            120 if toy else 90,
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            prints_tables=False,
        )
    ]
    parts += [
        Part(f"step-{size}-{strategy}", 75, step(size, strategy, batches))
        for size in sizes
        for strategy in STRATEGIES
    ]
    parts += [
        Part("pretraining", 150, pretraining(args, work), prints_tables=False),
        Part("attention", 45, script("attention", *sized(toy, batch=(2, 2048), repeats=(1, 15)))),
        Part("embedding", 60, script("embed", *embedding(toy))),
        Part("probes", 75, script("probe", "--probes", "ours", "plain", *probing(toy))),
    ]
    parts += [  # compiling takes longest, and every new batch size compiles again
        Part(
            f"compiled-{size}-{strategy}",
            300 if toy else 150,
            step(size, strategy, [batches[-1], batches[0]][: 1 if toy else 2], "--compile"),
        )
        for strategy in list(STRATEGIES)[: 1 if toy else 3]
        for size in sizes
    ]
    return [part for part in parts if any(part.name.startswith(name) for name in args.parts)]


def sized(toy: bool, **pairs) -> list[str]:
    """Options whose values are (toy, real)."""
    return [x for name, pair in pairs.items() for x in (f"--{name}", str(pair[0 if toy else 1]))]


def embedding(toy: bool) -> list[str]:
    sizes = ["--sizes", "ViT-Tiny"] if toy else []
    return [*sized(toy, seconds=(10, 36_000), repeats=(1, 5)), *sizes]


def probing(toy: bool) -> list[str]:
    return ["--seeds", "1", *sized(toy, epochs=(2, 200), plain_trials=(1, 2))]


def pretraining(args, work: Path) -> list[str]:
    """The quickstart, whole: it trains, exports the encoder, reads it back, embeds and probes."""
    small = []
    if args.toy:
        corpus = make_demo_corpus(work / "corpus", clips_per_sound=8)
        small = ["--data_folder", corpus, "--tasks_folder", corpus, "--encoder_dim", 48]
        small += ["--predictor_dim", 24, "--optimizer_step_limit", 4, "--batch_size", 4]
        small += ["--log_interval", 2, "--norm_crops", 32]
    command = ["train.py", "hparams/quickstart.yaml", "--device", args.device, "--noprogressbar"]
    command += ["--output_folder", work / "pretraining", "--num_workers", 1 if args.toy else 8]
    return [sys.executable, *map(str, command + small)]


def run(part: Part, limit: float, log: Path) -> tuple[str, float, str]:
    """Outcome, seconds, and what it printed; at the limit the part ends with all its children."""
    start = time.monotonic()
    with open(log, "a", encoding="utf-8") as errors, tempfile.TemporaryFile("w+") as printed:
        errors.write(f"\n===== {part.name}\n")
        errors.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=printed,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:  # also where this program is interrupted, and for children that outlive the part
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(0)
        return outcome, time.monotonic() - start, printed.read()


def described(part: Part, outcome: str, seconds: float, printed: str, log: Path) -> str:
    """A part's section of the report."""
    command = shlex.join(["python", *part.command[1:]])
    if not part.prints_tables:
        printed = fenced(printed.splitlines()[-LAST_LINES:])
    if outcome.startswith("failed"):
        printed += "\n\n" + fenced(log.read_text(encoding="utf-8").splitlines()[-LAST_LINES:])
    title = f"## {part.name}: {outcome}, {seconds:.0f} s"
    return f"{title}\n\n{fenced([command])}\n\n{printed.strip()}\n"


def fenced(lines: list[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def all_steps(path: Path) -> str:
    """steps.csv as a table: one row for each size, strategy, batch and way."""
    if not path.exists():
        return ""
    table = pd.read_csv(path, dtype=str)
    rows = [table.columns, ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join([STEPS_TITLE, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(os.environ.get("OUT", "results/gpu"))
    parser.add_argument("--out", type=Path, default=default, help="folder, default $OUT")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=[""], help="those whose names begin so")
    parser.add_argument("--toy", action="store_true", help="sizes to try this file itself with")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu with --toy")
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.toy else "cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --toy tries this file on the CPU")
    return args


def main():
    args = parse_arguments()
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    log, steps, report = (args.out / name for name in ("output.txt", "steps.csv", "report.md"))
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    head = f"# {card}, torch {torch.__version__}{', toy sizes' if args.toy else ''}\n"
    before = report.read_text(encoding="utf-8").split(STEPS_TITLE)[0] if report.exists() else ""
    sections = [before + head]  # a second call goes on where the first has ended
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        for part in plan(args, Path(work)):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                outcome, seconds, printed = "not run, no time left", 0.0, ""
            else:
                outcome, seconds, printed = run(part, min(part.limit, left), log)
            failed += outcome.startswith("failed")
            print(f"{part.name}: {outcome}, {seconds:.0f} s", flush=True)
            row = {"part": part.name, "outcome": outcome, "seconds": f"{seconds:.1f}"}
            append(args.out / "parts.csv", row)
            sections.append(described(part, outcome, seconds, printed, log))
            write_text(report, "\n".join([*sections, all_steps(steps)]))
        metrics = Path(work) / "pretraining" / "metrics.csv"
        if metrics.exists():
            shutil.copy(metrics, args.out / "metrics.csv")
    print(report)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
