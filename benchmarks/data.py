"""Crops read per second and loader process, and the memory of loaders over two million files.

    python benchmarks/data.py

Ten-second files of noise, mono at 16 kHz and stereo at 44.1 kHz, lie in the page cache; one loader
process reads crops of them, then, in the same run, whole files from which it cuts the crop (what
plain loaders do), then crops of the same files in a tar shard. The memory is that of each of two
loader processes over a manifest of 2 million rows, beside one of 100: resident as the system counts
it, shared pages included, and private, which is what another process costs.
"""

import argparse
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from speechbrain_jepa.data import CropDataset, CropSampler, Manifest, crop_loader, scan_folder
from speechbrain_jepa.data.crops import read_segment
from speechbrain_jepa.features import crop_samples

SECONDS = 10
FORMATS = {  # name: format and subtype of soundfile
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
RATES = {16_000: 1, 44_100: 2}  # Hz: channels
BATCH = 32


class WholeFiles(CropDataset):
    """Decodes and resamples all of a file for each crop."""

    def _crops(self, item, frames, randoms):
        manifest = self.manifest
        segment = (manifest.sample_rate[item], manifest.start[item], manifest.length[item])
        wav = read_segment(Path(self.data_folder, manifest.path(item)), *map(int, segment))
        samples = crop_samples(frames)
        starts = [int(random.integers(len(wav) - samples + 1)) for random in randoms]
        return np.stack([wav[start : start + samples] for start in starts])


def write_files(folder: Path, name: str, rate: int, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    kind, subtype = FORMATS[name]
    for number in range(count):
        noise = rng.normal(0, 0.05, (SECONDS * rate, RATES[rate]))
        soundfile.write(folder / f"{number}.{name}", noise, rate, format=kind, subtype=subtype)


def packed(folder: Path, shards: Path) -> Path:
    """A folder with the same files in one tar shard."""
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as tar:
        tar.add(folder, arcname="")
    return shards


def crops_per_second(dataset: CropDataset, seconds: float) -> float:
    """Of one loader process, after its first two batches."""
    sampler = CropSampler(len(dataset), BATCH, passes=10_000)
    batches = iter(crop_loader(dataset, sampler, num_workers=1))
    for _ in range(4):  # the one it starts with and those it has prefetched
        next(batches)
    start, crops = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        crops += len(next(batches))
    return crops / (time.perf_counter() - start)


def worker_memory(dataset: CropDataset, looks: tuple[int, ...]) -> list[list[tuple]]:
    """Resident and private MiB of each of two loader processes after so many batches."""
    passes = -(-(looks[-1] + 8) * BATCH // len(dataset))  # 8: those that are prefetched
    loader = crop_loader(dataset, CropSampler(len(dataset), BATCH, passes=passes), num_workers=2)
    batches, usage = iter(loader), []
    for number in range(1, looks[-1] + 1):
        next(batches)
        if number in looks:
            usage.append([memory_of(worker.pid) for worker in loader._iterator._workers])
    return usage


def memory_of(process: int) -> tuple[float, float]:
    """Resident and private MiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return kib["Rss"] / 1024, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024


def repeated(manifest: Manifest, rows: int, folder: Path) -> Manifest:
    """So many rows, kept on disk and mapped as training does it."""
    manifest.subset(np.arange(rows) % len(manifest)).save(folder)
    return Manifest.load(folder)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=208, help="of a crop: 208, 320 or 640")
    parser.add_argument("--files", type=int, default=32, help="of each format and rate")
    parser.add_argument("--seconds", type=float, default=4.0, help="to measure each speed for")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the large manifest")
    parser.add_argument("--batches", type=int, default=1000, help="read before the last look")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        print(f"Crops of {args.frames} frames from {SECONDS}-second files, one loader process\n")
        print(
            "| file | crops/s | whole file first | ratio | in a tar shard |\n|---|---|---|---|---|"
        )
        for rate in RATES:
            for name in FORMATS:
                folder = root / f"{name}{rate}"
                write_files(folder, name, rate, args.files)
                speeds = []
                for number, (kind, place) in enumerate(
                    [
                        (CropDataset, folder),
                        (WholeFiles, folder),
                        (CropDataset, packed(folder, root / f"{name}{rate}.tars")),
                    ]
                ):
                    cache = root / f"{name}{rate}.cache{number}"
                    manifest, _ = scan_folder(place, cache, progress=False)
                    dataset = kind(manifest, place, args.frames)
                    speeds.append(crops_per_second(dataset, args.seconds))
                channels = "mono" if RATES[rate] == 1 else "stereo"
                print(
                    f"| {name}, {rate / 1000:g} kHz {channels} | {speeds[0]:.0f} | {speeds[1]:.0f} "
                    f"| {speeds[0] / speeds[1]:.1f} | {speeds[2]:.0f} |",
                    flush=True,
                )

        folder = root / f"wav{min(RATES)}"
        manifest, _ = scan_folder(folder, root / "again", progress=False)
        print(f"\nMemory of two loader processes, batches of {BATCH}\n")
        print("| rows | batches | resident, MiB | private, MiB |\n|---|---|---|---|")
        for rows in (100, args.rows):
            dataset = CropDataset(repeated(manifest, rows, root / f"{rows}"), folder, args.frames)
            looks = (args.batches // 2, args.batches)
            for batches, usage in zip(looks, worker_memory(dataset, looks)):
                resident, private = (" and ".join(f"{x:.0f}" for x in part) for part in zip(*usage))
                print(f"| {rows:,} | {batches} | {resident} | {private} |", flush=True)


if __name__ == "__main__":
    main()
