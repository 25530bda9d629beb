"""Linear probes: ours, a plain one, and scikit-learn's logistic regression, side by side.

    python benchmarks/probe.py
    python benchmarks/probe.py --shape nsynth
    python benchmarks/probe.py --device cuda --probes ours plain

Synthetic features in the shape of ESC-50 (2000 x 3840, 50 classes, 5 folds x 5 seeds) or of a tenth
of NSynth (28 920 x 3840, 11 classes, one split). The plain probe is what one writes first: for each
fold and seed a DataLoader, an nn.Linear and torch.optim.Adam, with the same protocol (rate 3e-5,
batch 200, at most 200 epochs, patience 20 on validation accuracy). It is slow: `--plain_trials` of
the trainings are timed, spread evenly, and the total is theirs times the share they are of all.
CPU seconds are those of all threads: they say more where the machine does other things as well.
Memory is the peak of the process, each probe in a process of its own, without that of a GPU.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from speechbrain_jepa.evaluation.labelled import Features, LabelledClips
from speechbrain_jepa.evaluation.linear_probe import Protocol, probe

DIMS, CAUSES = 3840, 64  # embeddings are a few independent causes, mixed, and noise
SHAPES = {  # clips, classes, folds, seeds, distance of classes
    "esc50": (2000, 50, 5, 5, 0.45),
    "nsynth": (28_920, 11, 0, 1, 0.35),
}


def synthetic(shape: str) -> tuple[np.ndarray, LabelledClips]:
    """Features [n, C], and labels that are neither easy nor hopeless to tell apart."""
    count, classes, folds, _, distance = SHAPES[shape]
    rng = np.random.default_rng(0)
    label = rng.integers(classes, size=count)
    causes = distance * rng.normal(size=(classes, CAUSES))[label] + rng.normal(size=(count, CAUSES))
    x = causes.astype(np.float32) @ rng.normal(size=(CAUSES, DIMS)).astype(np.float32) / 8
    x += rng.standard_normal(x.shape, np.float32)
    split = rng.choice(["train", "valid", "test"], p=[0.8, 0.1, 0.1], size=count)
    names = np.arange(count).astype(str).tolist()
    clips = LabelledClips(
        names,
        names,
        [f"{number:02d}" for number in label],
        [""] * count if folds else split.tolist(),
        (np.arange(count) % folds).tolist() if folds else [None] * count,
    )
    return x.astype(np.float16), clips


def divisions(clips: LabelledClips, seeds: int) -> list:
    return [(seed, rows) for seed in range(seeds) for rows in clips.divide(seed)]


def standardised(features: Features, rows) -> list[torch.Tensor]:
    """Train, valid and test features by the statistics of train."""
    train = features.array[0][rows.train].astype(np.float32)
    mean, deviation = train.mean(0), train.std(0)
    parts = (
        features.array[0][part].astype(np.float32) for part in (rows.train, rows.valid, rows.test)
    )
    return [torch.from_numpy((part - mean) / deviation) for part in parts]


def plain_training(features, clips, seed, rows, protocol: Protocol, device) -> tuple[float, int]:
    """One training as one writes it first: test accuracy and epochs."""
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(seed)
    parts = (rows.train, rows.valid, rows.test)
    sets = [
        TensorDataset(x.to(device), clips.targets[part].to(device))
        for x, part in zip(standardised(features, rows), parts)
    ]
    train, valid, test = (
        DataLoader(part, batch_size=protocol.batch_size, shuffle=part is sets[0]) for part in sets
    )
    model = torch.nn.Linear(DIMS, len(clips.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.learning_rate)

    def accuracy(loader):
        with torch.no_grad():
            hits = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
        return hits / len(loader.dataset)

    best, waited, state = -1.0, 0, None
    epochs = 0
    while epochs < protocol.epochs and waited < protocol.patience:
        for x, y in train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        score = accuracy(valid)
        epochs, waited = epochs + 1, waited + 1
        if score > best:
            best, waited = score, 0
            state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return accuracy(test), epochs


def ours(features, clips, seeds, args, kind="paper", precision="auto"):
    protocol = Protocol(kind, neighbours=0, precision=precision, epochs=args.epochs)
    if kind == "logistic":
        protocol = Protocol(kind, neighbours=0, inverse_penalties=(args.inverse_penalty,))
    start = time.perf_counter()
    outcomes = probe(features, clips, range(seeds), protocol, device=args.device)
    seconds = time.perf_counter() - start
    trainings = len(outcomes)
    return (
        seconds,
        [outcome.score for outcome in outcomes],
        sum(o.epochs for o in outcomes),
        trainings,
    )


def plain(features, clips, seeds, args):
    trials = divisions(clips, seeds)
    chosen = trials[:: max(len(trials) // args.plain_trials, 1)][: args.plain_trials]
    protocol = Protocol(epochs=args.epochs)
    start = time.perf_counter()
    scores, epochs = zip(
        *(plain_training(features, clips, *trial, protocol, args.device) for trial in chosen)
    )
    seconds = (time.perf_counter() - start) * len(trials) / len(chosen)
    return seconds, scores, sum(epochs), len(chosen)


def scikit_learn(features, clips, seeds, args):
    from sklearn.linear_model import LogisticRegression

    trials = divisions(clips, seeds)
    chosen = trials[:: max(len(trials) // args.plain_trials, 1)][: args.plain_trials]
    start, scores, iterations = time.perf_counter(), [], 0
    for _, rows in chosen:
        train, _, test = (x.numpy() for x in standardised(features, rows))
        labels = clips.targets.numpy()
        model = LogisticRegression(C=args.inverse_penalty, max_iter=300)
        model.fit(train, labels[rows.train])
        scores.append(model.score(test, labels[rows.test]))
        iterations += int(model.n_iter_[0])
    seconds = (time.perf_counter() - start) * len(trials) / len(chosen)
    return seconds, scores, iterations, len(chosen)


PROBES = {
    "ours": ours,
    "ours, fp32": lambda *args: ours(*args, precision="fp32"),
    "plain": plain,
    "ours, logistic": lambda *args: ours(*args, kind="logistic"),
    "scikit-learn": scikit_learn,
}


def peak_memory() -> int:
    """Bytes. Linux only: getrusage's peak goes back to before a spawned process was itself."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(name, args, path, clips, queue) -> None:
    """In a process of its own: seconds, scores, epochs, trainings, and the peak of memory."""
    if args.threads:
        torch.set_num_threads(args.threads)
    array = np.load(path, mmap_mode="r")[None]
    features = Features(array, np.ones(len(clips), bool), [-1], folder=None)
    before = peak_memory()
    seeds = args.seeds or SHAPES[args.shape][3]
    start = time.process_time()
    results = PROBES[name](features, clips, seeds, args)
    cpu_seconds = (time.process_time() - start) * len(divisions(clips, seeds)) / results[-1]
    queue.put((*results, cpu_seconds, (peak_memory() - before) / 1e9))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="esc50")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, help="default: 5 of esc50, 1 of nsynth")
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--plain_trials", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--inverse_penalty", type=float, default=1e-3, help="scikit-learn's C")
    parser.add_argument("--threads", type=int, help="default: torch's")
    return parser.parse_args()


def main():
    args = parse_arguments()
    context = multiprocessing.get_context("spawn")
    print(f"{args.shape}: {' x '.join(map(str, (SHAPES[args.shape][0], DIMS)))} features\n")
    print(
        "| probe | seconds | CPU seconds | test accuracy | epochs a training | trained | GB more |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "features.npy")
        array, clips = synthetic(args.shape)
        np.save(path, array)
        for name in args.probes:
            queue = context.Queue()
            process = context.Process(target=measure, args=(name, args, path, clips, queue))
            process.start()
            seconds, scores, epochs, trained, cpu_seconds, memory = queue.get()
            process.join()
            cells = [
                name,
                f"{seconds:.1f}",
                f"{cpu_seconds:.1f}",
                f"{100 * np.mean(scores):.2f}",
                f"{epochs / trained:.0f}",
                str(trained),
                f"{memory:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
