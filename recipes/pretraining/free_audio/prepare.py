"""Make the free corpus: real and rendered audio from Debian packages, the same from the same seed.

    python recipes/pretraining/free_audio/prepare.py /data/free_audio --workers 8

Needs Debian 12 (or a container of it) with `apt-get install fluidsynth espeak-ng`. The other
packages are downloaded by name with `apt-get download`, unless --packages holds them, and are not
installed. Writes pieces of up to 10 s, mono 16 kHz FLAC, as <output>/audio/<domain>/...,
`files.csv` (which piece came from which package) and `packages.md` (package, licence, hours).
Killed and started again, it goes on with the piece of work it was in; with a larger --scale it adds
to what is there, and mixes anew. A folder has one seed.
"""

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import render
import soundfile
import torch
from sources import (
    HELD_OUT_PROGRAMS,
    RECORDED,
    RENDERED_HOURS,
    SOUND_FONT,
    SPEAKER,
    TEXTS,
    TOOLS,
    Package,
)
from tqdm import tqdm

from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import folder_lock, partial_path, whole_file, write_text

PIECE = round(render.PIECE_SECONDS * SAMPLE_RATE)
SHORTEST = 2 * SAMPLE_RATE  # of a track's last piece
SILENCE = 1e-3  # root mean square: -60 dB
PIECES_PER_JOB = 12  # of what is rendered
COLUMNS = ("file", "package", "seconds")
PACKAGES = sorted({package.name for package in RECORDED} | {SOUND_FONT.name, TEXTS})


# Packages


def fetch(name: str, packages: Path) -> Path:
    """The .deb file of a package, downloaded if it is not there."""
    found = sorted(packages.glob(f"{name}_*.deb"))
    if not found:
        try:
            command = ["apt-get", "download", name]
            subprocess.run(command, cwd=packages, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise SystemExit(
                f"apt-get download {name} failed: {said.strip()[-300:]}\nRun apt-get update, or "
                f"put the package of Debian 12 into {packages}"
            ) from error
        found = sorted(packages.glob(f"{name}_*.deb"))
    return found[-1]


def unpack(name: str, packages: Path, unpacked: Path) -> Path:
    """The folder with a package's files."""
    folder = unpacked / name
    if not folder.exists():
        partial_folder = partial_path(folder)
        subprocess.run(
            ["dpkg-deb", "-x", str(fetch(name, packages)), str(partial_folder)], check=True
        )
        partial_folder.rename(folder)
    return folder


@dataclass(frozen=True, order=True)
class Sound:
    """An audio file in a package: its path, through an archive where it is in one."""

    path: str
    archive: Path | None = None
    start: int = 0  # in an archive that is not a zip file
    size: int = 0
    folder: Path = field(default=Path(), compare=False)

    def read(self) -> np.ndarray:
        """Mono at 16 kHz."""
        if self.archive is None:
            return render.to_16k(*soundfile.read(self.folder / self.path, dtype="float32"))
        if self.size:
            with open(self.archive, "rb") as file:
                file.seek(self.start)
                content = file.read(self.size)
        else:
            with zipfile.ZipFile(self.archive) as archive:
                content = archive.read(self.path.split("//")[1])
        return render.to_16k(*soundfile.read(io.BytesIO(content), dtype="float32"))


def sounds_of(package: Package, folder: Path) -> list[Sound]:
    """The package's files that its pattern names and that are not held out, in order."""
    sounds = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pk3":
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.namelist())
            sounds += [Sound(f"{name}//{member}", path, folder=folder) for member in members]
        elif path.suffix == ".cat":
            content = path.read_bytes()
            starts = [match.start() for match in re.finditer(b"RIFF....WAVE", content, re.DOTALL)]
            for number, start in enumerate(starts):
                size = 8 + int.from_bytes(content[start + 4 : start + 8], "little")
                sounds.append(Sound(f"{name}//{number:03d}.wav", path, start, size, folder))
        elif not path.is_symlink():
            sounds.append(Sound(name, folder=folder))
    wanted = [sound for sound in sounds if re.search(package.pattern, sound.path)]
    return [sound for sound in wanted if plain_name(package, sound.path) not in package.held_out]


def plain_name(package: Package, path: str) -> str:
    """What a file is called in `Package.held_out`."""
    name = re.split(package.root, path, maxsplit=1)[-1] if package.root else path.split("/")[-1]
    return re.sub(r"[/_ ]", "-", name.rsplit(".", 1)[0])


def group_of(package: Package, sound: Sound) -> str:
    """What the first group of the package's pattern matches (a speaker, a kit), or "all"."""
    match = re.search(package.pattern, sound.path)
    return match[1] if match is not None and match.re.groups else "all"


def check_held_out(folders: dict[str, Path]) -> None:
    """Every name that must stay out is that of a file: a misspelt one would let it in."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for package in RECORDED:
        sounds = sounds_of(replace(package, held_out=()), folders[package.name])
        found[package.held_out] |= {plain_name(package, sound.path) for sound in sounds}
    for names, there in found.items():
        if missing := sorted(set(names) - there):
            raise SystemExit(
                f"held out in sources.py, but in none of the packages: {', '.join(missing)}. Other "
                "versions of the packages than Debian 12's? Put those into --packages"
            )


def sentences(folder: Path, languages: list[str]) -> dict[str, list[str]]:
    """Texts by espeak-ng language: the translated descriptions of Tux Paint's stamps."""
    texts = defaultdict(set)
    english = [language for language in languages if language.startswith("en")]
    for path in sorted(folder.rglob("*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        first, *translations = lines or [""]
        for language in english:
            texts[language].add(first.strip())
        for line in translations:
            code, _, text = line.partition(".utf8=")
            for language in languages:
                if language.split("-")[0] == code and language not in english:
                    texts[language].add(text.strip())
    return {language: sorted(found - {""}) for language, found in texts.items() if len(found) > 50}


# Pieces of work


@dataclass(frozen=True)
class Job:
    """Something that makes pieces; `name` gives it its random numbers and its files their names."""

    name: str
    domain: str
    package: str
    make: partial  # of a function of (rng) -> iterable of pieces


def cut(wav: np.ndarray):
    """Pieces of 10 s and a rest, without the silent ones."""
    for start in range(0, len(wav), PIECE):
        piece = wav[start : start + PIECE]
        if len(piece) >= SHORTEST and np.sqrt(np.square(piece).mean()) > SILENCE:
            yield piece


def readable(sounds: list[Sound]):
    """The sounds read, without the broken ones."""
    for sound in sounds:
        try:
            yield sound.read()
        except (soundfile.SoundFileError, EOFError) as error:
            tqdm.write(f"Skipped {sound.path}: {error}", file=sys.stderr)


def recording(rng, sound: Sound):
    for wav in readable([sound]):
        yield from cut(wav)


def joined(rng, sounds: list[Sound]):
    """Short sounds one after the other in a random order, with pauses."""
    parts = []
    for wav in readable([sounds[number] for number in rng.permutation(len(sounds))]):
        parts += [wav, np.zeros(round(rng.uniform(0.05, 0.6) * SAMPLE_RATE), np.float32)]
    yield from cut(np.concatenate(parts))


def music(rng, kind: str, sound_font: Path):
    yield from render.music(rng, kind, PIECES_PER_JOB, sound_font)


def speech(rng, texts, variants):
    for _ in range(PIECES_PER_JOB):
        yield render.speech(rng, texts, variants)


def drums(rng, sounds: list[Sound]):
    hits = [wav[: 2 * SAMPLE_RATE] for wav in readable(sounds)]
    for _ in range(PIECES_PER_JOB):
        yield render.drum_pattern(rng, hits)


def mixtures(rng, pieces: dict[str, list[Path]]):
    """Of two or three domains each; the domains are equally likely."""
    for _ in range(PIECES_PER_JOB):
        domains = rng.permutation(sorted(pieces))[: rng.integers(2, 4)]
        chosen = [pieces[domain][rng.integers(len(pieces[domain]))] for domain in domains]
        yield render.mixture(rng, [soundfile.read(path, dtype="float32")[0] for path in chosen])


def written(job: Job, output: Path) -> Path:
    """What a job has made; the file is there when it is done."""
    return output / "jobs" / f"{job.name}.csv"


def do(job: Job, output: Path, seed: int) -> None:
    """Make a job's pieces, and write down that it is done."""
    done = written(job, output)
    if done.exists():
        return
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, zlib.crc32(job.name.encode())])
    rows = []
    for number, piece in enumerate(job.make(rng)):
        if np.sqrt(np.square(piece).mean()) <= SILENCE / 10:
            continue
        file = f"{job.domain}/{job.name}_{number:03d}.flac"
        with whole_file(output / "audio" / file) as partial_file:
            partial_file.write_bytes(render.encode_flac(piece))
        rows.append((file, job.package, f"{len(piece) / SAMPLE_RATE:.3f}"))
    write_text(done, "".join(",".join(row) + "\n" for row in rows))


def recorded_jobs(folders: dict[str, Path]) -> list[Job]:
    """One for each long file, one for each group of short ones."""
    jobs = []
    for package in RECORDED:
        sounds = sounds_of(package, folders[package.name])
        if not package.joined:
            for sound in sounds:
                stem = re.sub(r"\W", "-", sound.path.split("/")[-1].rsplit(".", 1)[0])
                name, make = f"{package.name}_{stem}", partial(recording, sound=sound)
                jobs.append(Job(name, package.domain, package.name, make))
            continue
        groups = defaultdict(list)
        for sound in sounds:
            groups[re.sub(r"\W", "-", group_of(package, sound))].append(sound)
        for group, members in sorted(groups.items()):
            name = f"{package.name}_{package.domain}_{group}"
            jobs.append(Job(name, package.domain, package.name, partial(joined, sounds=members)))
    return jobs


def count(hours: float) -> int:
    """Jobs that make that many hours."""
    return round(hours * 3600 / render.PIECE_SECONDS / PIECES_PER_JOB)


def rendered_jobs(folders: dict[str, Path], hours: dict[str, float]) -> list[Job]:
    """Music, speech and drums, in the order of their numbers: more hours add to fewer."""
    jobs = []
    (sound_font,) = folders[SOUND_FONT.name].rglob("*.sf2")
    for kind in ("notes", "bands"):
        make = partial(music, kind=kind, sound_font=sound_font)
        names = (f"{kind}_{number:04d}" for number in range(count(hours[kind])))
        jobs += [Job(name, kind, SOUND_FONT.name, make) for name in names]
    languages, variants = render.voices()
    make = partial(speech, texts=sentences(folders[TEXTS], languages), variants=variants)
    names = (f"tts_{number:04d}" for number in range(count(hours["tts"])))
    jobs += [Job(name, "tts", SPEAKER.name, make) for name in names]
    kits = []
    for package in RECORDED:
        if package.name in ("hydrogen-drumkits", "sonic-pi-samples"):
            groups = defaultdict(list)
            for sound in sounds_of(package, folders[package.name]):
                groups[group_of(package, sound)].append(sound)
            kits += [
                (package.name, group)
                for name, group in sorted(groups.items())
                if name not in ("loop", "ambi") and len(group) > 3
            ]
    for number in range(count(hours["drums"])):
        name, kit = kits[number % len(kits)]
        jobs.append(Job(f"drums_{number:04d}", "percussion", name, partial(drums, sounds=kit)))
    return jobs


def mixture_jobs(output: Path, hours: float) -> list[Job]:
    """Mixtures of everything made before them."""
    pieces = defaultdict(list)
    for file, _, _ in rows_of(output):
        if not file.startswith("mixtures/"):
            pieces[file.split("/")[0]].append(output / "audio" / file)
    make = partial(mixtures, pieces=dict(pieces))
    names = (f"mixture_{number:04d}" for number in range(count(hours)))
    return [Job(name, "mixtures", "mixtures", make) for name in names]


def rows_of(output: Path) -> list[list[str]]:
    """File, package and seconds of every piece, by file."""
    rows: list[list[str]] = []
    for path in sorted((output / "jobs").glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows += csv.reader(file)
    return sorted(rows)


def run(jobs: list[Job], output: Path, seed: int, workers: int, title: str) -> None:
    """Do what is not done yet."""
    (output / "jobs").mkdir(exist_ok=True)
    for domain in {job.domain for job in jobs}:
        (output / "audio" / domain).mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not written(job, output).exists()]
    left.sort(key=lambda job: zlib.crc32(job.name.encode()))  # a mixed order: times can be foretold
    work = partial(do, output=output, seed=seed)
    with tqdm(total=len(left), desc=title, disable=None) as bar:
        if workers == 1:
            for job in left:
                work(job)
                bar.update()
            return
        with get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(work, left):
                bar.update()


def table(rows: list[list[str]]) -> str:
    """Package, licence, domain, pieces and hours, in Markdown."""
    licences = {(p.name, p.domain): p.licence for p in (*RECORDED, SPEAKER)}
    pieces: Counter[tuple[str, str]] = Counter()
    hours: dict[tuple[str, str], float] = defaultdict(float)
    for file, package, seconds in rows:
        key = (package, file.split("/")[0])
        pieces[key] += 1
        hours[key] += float(seconds) / 3600
    lines = ["| package | licence | domain | pieces | hours |", "| --- | --- | --- | --- | --- |"]
    for (package, domain), number in sorted(pieces.items()):
        licence = licences.get((package, domain), "of the others")
        if package == SOUND_FONT.name:
            licence = SOUND_FONT.licence
        elif domain == "percussion" and package == "sonic-pi-samples":
            licence = licences[package, "effects"]
        lines.append(
            f"| {package} | {licence} | {domain} | {number} | {hours[package, domain]:.2f} |"
        )
    lines.append(f"| all | | | {sum(pieces.values())} | {sum(hours.values()):.2f} |")
    return "\n".join(lines) + "\n"


def check_seed(output: Path, seed: int) -> None:
    """A folder's pieces are all of one seed."""
    path = output / "seed.txt"
    begun = path.read_text(encoding="utf-8").strip() if path.exists() else str(seed)
    if begun != str(seed):
        raise SystemExit(
            f"{output} was begun with --seed {begun}, not {seed}: give another output folder"
        )
    write_text(path, f"{seed}\n")


def forget_mixtures_of_less(output: Path, jobs: list[Job]) -> None:
    """Mixtures are drawn from all other pieces: where some of these are to come, they go."""
    if all(written(job, output).exists() for job in jobs):
        return
    for path in sorted((output / "jobs").glob("mixture_*.csv")):
        path.unlink()


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="the corpus; some 3 GB")
    parser.add_argument("--packages", type=Path, help="folder of .deb files (default: in output)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rendered hours")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options = parse(arguments)
    missing = [tool for tool in (*TOOLS, "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not found. apt-get install {' '.join(TOOLS)}")
    output = options.output.resolve()
    packages = (options.packages or output / "packages").resolve()
    packages.mkdir(parents=True, exist_ok=True)
    with folder_lock(output, "give another output folder, or wait for it"):
        check_seed(output, options.seed)
        unpacked = output / "unpacked"
        unpacked.mkdir(exist_ok=True)
        folders = {name: unpack(name, packages, unpacked) for name in PACKAGES}
        check_held_out(folders)
        hours = {kind: hours * options.scale for kind, hours in RENDERED_HOURS.items()}
        settings = (output, options.seed, options.workers)
        jobs = recorded_jobs(folders) + rendered_jobs(folders, hours)
        forget_mixtures_of_less(output, jobs)
        run(jobs, *settings, "recorded, rendered")
        run(mixture_jobs(output, hours["mixtures"]), *settings, "mixtures")
        rows = rows_of(output)
        with whole_file(output / "files.csv") as path, open(path, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        write_text(output / "packages.md", table(rows))
    print(table(rows), end="")
    programs = ", ".join(map(str, sorted(HELD_OUT_PROGRAMS)))
    print(f"General MIDI programs held out, from 0: {programs}", file=sys.stderr)


if __name__ == "__main__":
    main()
