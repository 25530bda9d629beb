"""What each way of loading gains over the one it took the place of, in one run.

    python benchmarks/loading.py

Two ways take turns, and the quickest of each counts, in milliseconds of CPU time, which other work
on the machine changes little: resampling by torchaudio's convolution and by its filter without
zeros (soxr beside them, where it is installed); a crop as it was read with the first, as it is read
now, and as one of eight from one opening; a crop anywhere in a long mp3, and in the FLAC that
`speechbrain_jepa.prepare` makes of it; a folder listed by one thread and by 16 where each look at a
file is a wait (a sleep in the place of a network share; seconds of the clock); what a start and a
resume spend on the held-out files; the first scan of a corpus as files, in tars, and prepared.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from speechbrain_jepa.data import audio, crops, listing, scan_folder, shards, split_held_out
from speechbrain_jepa.data.audio import open_audio
from speechbrain_jepa.data.crops import read_crop, read_crops
from speechbrain_jepa.data.listing import list_audio
from speechbrain_jepa.data.resampling import resample, resampling_ratio
from speechbrain_jepa.prepare import prepare

FRAMES = 208
RATES = (48_000, 44_100, 22_050)
CROPS = 8
FORMATS = {"wav": {}, "flac": {}, "mp3": {}, "ogg": {}}


def quickest(*ways, rounds: int) -> list[float]:
    """Milliseconds of each way, which take turns: the quickest of so many rounds."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, spent in zip(ways, times):
            began = time.process_time()
            way()
            spent.append(1000 * (time.process_time() - began))
    return [min(spent[1:]) for spent in times]  # the first builds what is kept


def noise(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (round(seconds * rate), channels))


def resampling(rounds: int) -> None:
    print(f"Resampling {FRAMES / 100} s to 16 kHz, ms\n")
    print("| from | torchaudio | without zeros | ratio | soxr |\n|---|---|---|---|---|")
    has_soxr = importlib.util.find_spec("soxr") is not None
    for rate in RATES:
        old, new = resampling_ratio(rate)
        periods = math.ceil(2.1 * 16_000 / new)
        wav = noise(periods * old / rate, rate)[: periods * old, 0].astype(np.float32)
        theirs = torchaudio.transforms.Resample(old, new)
        ways = [lambda: theirs(torch.from_numpy(wav)), lambda: resample(wav, rate)]  # noqa: B023
        if has_soxr:
            import soxr

            ways.append(lambda: soxr.resample(wav, rate, 16_000))  # noqa: B023
        before, after, *other = quickest(*ways, rounds=rounds)
        soxr_ms = f"{other[0]:.2f}" if other else "not installed"
        print(f"| {rate} Hz | {before:.2f} | {after:.2f} | {before / after:.1f} | {soxr_ms} |")


@contextlib.contextmanager
def as_before():
    """Resampling by torchaudio's convolution, channels averaged by numpy's mean."""
    filters: dict[int, torchaudio.transforms.Resample] = {}

    def convolved(wav, rate, blocks):
        old, new = resampling_ratio(rate)
        if rate not in filters:
            filters[rate] = torchaudio.transforms.Resample(old, new)
        wav = np.pad(wav, (0, blocks * old - len(wav)))
        return filters[rate](torch.from_numpy(wav)).numpy()[: blocks * new]

    def mono(file, count):
        wav = file.read(count, dtype="float32", always_2d=True)
        return wav[:, 0] if wav.shape[1] == 1 else wav.mean(1)

    kept = audio._mono, crops.resample
    audio._mono, crops.resample = mono, convolved
    try:
        yield
    finally:
        audio._mono, crops.resample = kept


def reading(root: Path, rounds: int) -> None:
    print(f"\nCrops of {FRAMES} frames of a 10-second file, ms a crop\n")
    print(f"| file | before | now | ratio | {CROPS} from one opening | ratio |")
    print("|---|---|---|---|---|---|")
    for rate, number in ((16_000, 1), (44_100, 2)):
        firsts = np.random.default_rng(1).integers(0, 1001 - FRAMES, CROPS).tolist()
        for name in FORMATS:
            path = root / f"{rate}.{name}"
            soundfile.write(path, noise(10, rate, number), rate)
            place = (FRAMES, rate, 0, 10 * rate)

            def one_by_one(path=path, place=place):
                return [read_crop(path, first, *place) for first in firsts]  # noqa: B023

            def before(one_by_one=one_by_one):
                with as_before():
                    one_by_one()

            def together(path=path, place=place):
                read_crops(path, firsts, *place)  # noqa: B023

            spent = quickest(before, one_by_one, together, rounds=rounds)
            old, now, eight = (milliseconds / CROPS for milliseconds in spent)
            kind = f"{name}, {rate / 1000:g} kHz {'stereo' if number == 2 else 'mono'}"
            row = f"{old:.2f} | {now:.2f} | {old / now:.1f} | {eight:.2f} | {old / eight:.1f}"
            print(f"| {kind} | {row} |", flush=True)


@contextlib.contextmanager
def quiet():
    """Without what mpg123 says of frames that lack their bit reservoir after a seek."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def long_mp3(root: Path, minutes: float, rounds: int) -> str:
    folder = root / "long"
    folder.mkdir()
    path, rate = folder / "long.mp3", 22_050
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for minute in range(round(minutes)):
            file.write(noise(60, rate, seed=minute))
    length = soundfile.info(path).frames
    began = time.process_time()
    prepare(root / "prepared", folder, progress=False, num_threads=1)
    took = time.process_time() - began
    manifest, _ = scan_folder(root / "prepared", root / "cache", progress=False)
    member = shards.join(root / "prepared", manifest.path(0))
    firsts = np.random.default_rng(0).integers(0, round(minutes * 6000) - FRAMES, CROPS).tolist()
    before, together, after = quickest(
        lambda: [read_crop(path, first, FRAMES, rate, 0, length) for first in firsts],
        lambda: read_crops(path, firsts, FRAMES, rate, 0, length),
        lambda: [
            read_crop(member, first, FRAMES, 16_000, 0, int(manifest.length[0])) for first in firsts
        ],
        rounds=max(rounds // 10, 3),
    )
    return (
        f"\nA crop anywhere in {minutes:.0f} minutes of mp3: {before / CROPS:.1f} ms, of {CROPS} "
        f"from one opening {together / CROPS:.1f} ms; in the prepared FLAC {after / CROPS:.2f} ms: "
        f"{before / after:.0f} times less (prepared in {took:.0f} s)\n"
    )


def slow_looks(root: Path, files: int, wait: float) -> None:
    folder = root / "many"
    for number in range(files):
        place = folder / f"{number // 5000}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.wav").touch()
    look = os.stat

    def slow(path, *args, **options):
        time.sleep(wait)
        return look(path, *args, **options)

    spent = {}
    try:
        listing.os.stat = slow
        for threads in (1, 16):
            began = time.perf_counter()
            assert len(list_audio(str(folder), num_threads=threads)[0]) == files
            spent[threads] = time.perf_counter() - began
    finally:
        listing.os.stat = look
    print(
        f"{files} files listed, {1000 * wait:g} ms a look: {spent[1]:.1f} s by one thread, "
        f"{spent[16]:.1f} s by 16: {spent[1] / spent[16]:.1f} times as fast; 2 million: "
        f"{spent[1] / files * 2e6 / 60:.0f} and {spent[16] / files * 2e6 / 60:.1f} minutes\n"
    )


def whole_files(manifest, folder, items) -> None:
    """How held-out files were judged: each decoded to its end, one after the other."""
    for item in items:
        with open_audio(os.path.join(folder, manifest.path(item))) as file:
            while len(file.read(2**16, dtype="float32")):
                pass


def held_out(root: Path, files: int, minutes: float) -> None:
    folder = root / "held"
    folder.mkdir()
    first = folder / "0.flac"
    soundfile.write(first, noise(60 * minutes, 16_000), 16_000)
    for number in range(1, files):
        os.link(first, folder / f"{number}.flac")
    manifest, _ = scan_folder(folder, root / "held cache", progress=False)
    options = dict(valid_share=0.5, data_folder=folder, crop_frames=FRAMES)
    verdicts, spent = root / "verdicts.json", []
    for _ in range(2):
        began = time.process_time()
        _, valid = split_held_out(manifest, verdicts=verdicts, **options)
        spent.append(time.process_time() - began)
    began = time.process_time()
    whole_files(manifest, folder, valid)
    before = time.process_time() - began
    print(
        f"{len(valid)} held-out files of {minutes:g} minutes: {before:.1f} s decoded whole at "
        f"every start, {spent[0]:.2f} s now ({before / spent[0]:.0f} times less), "
        f"{spent[1]:.3f} s at a resume\n"
    )


def first_scan(root: Path, files: int) -> None:
    folder = root / "corpus"
    folder.mkdir()
    for number in range(files):
        soundfile.write(folder / f"{number}.flac", noise(1, 16_000, seed=number), 16_000)
    prepare(root / "out", folder, progress=False, num_threads=2, shard_bytes=10_000_000)
    for index in (False, True):
        if not index:
            kept = {path: path.read_bytes() for path in (root / "out").rglob("*.index.json")}
            for path in kept:
                path.unlink()
        else:
            for path, content in kept.items():
                path.write_bytes(content)
        began = time.process_time()
        found, _ = scan_folder(root / "out", root / f"scan {index}", progress=False)
        spent = time.process_time() - began
        assert len(found) == files
        if not index:
            by_tar = spent
    began = time.process_time()
    scan_folder(folder, root / "scan files", progress=False)
    by_file = time.process_time() - began
    print(
        f"First scan of {files} files: {by_file:.2f} s as files, {by_tar:.2f} s in tars without an "
        f"index, {spent:.2f} s prepared ({by_file / spent:.0f} times less than files)"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="of each pair")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the long mp3")
    parser.add_argument("--files", type=int, default=4000, help="to list and to scan")
    parser.add_argument("--held_out", type=int, default=32, help="files, half of them held out")
    parser.add_argument("--wait", type=float, default=0.0005, help="seconds a look takes")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        resampling(args.rounds)
        reading(root, args.rounds)
        with quiet():
            said = long_mp3(root, args.minutes, args.rounds)
        print(said, flush=True)
        slow_looks(root, args.files, args.wait)
        held_out(root, args.held_out, 10.0)
        first_scan(root, args.files)


if __name__ == "__main__":
    main()
