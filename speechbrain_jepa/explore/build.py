"""The page of a collection: map, neighbours, near-duplicates, pictures, sounds.

<page>.parts/        held by one process (files.folder_lock), removed when the page is written
  plan.json          what the parts depend on
  neighbours.npz     of each clip
  <map>.npy          places of the clips
  sounds-000000.npz  pictures and sounds of some clips each
"""

import hashlib
import json
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from plotly.offline import get_plotlyjs
from tqdm import tqdm

from speechbrain_jepa.embedded import Embedded
from speechbrain_jepa.explore.columns import Column, csv_columns, folder_columns
from speechbrain_jepa.explore.maps import FEWEST, MAPS, lay_out
from speechbrain_jepa.explore.sounds import ACROSS, HEIGHT, PER_SHEET, WIDTH, read_sounds
from speechbrain_jepa.files import folder_lock, whole_file, write_text
from speechbrain_jepa.neighbours import near_duplicates, nearest, unit
from speechbrain_jepa.pages import asset, printable, write_page

AUDIO = ("link", "embed", "none")
EMBEDDED_BYTES = 200e6  # of audio in a page: browsers get slow beyond
LISTED_GROUPS = 1000  # of near-duplicates


@dataclass(frozen=True)
class Explored:
    """What became of a page.

    Arguments
    ---------
    page : Path
    clips : int
    duplicates : list of (float, list of str)
        Groups of near-duplicate files and the highest cosine in each.
    problems : list of str
        A line for each file without picture and sound.
    """

    page: Path
    clips: int
    duplicates: list[tuple[float, list[str]]]
    problems: list[str]


class _Parts:
    """Arrays that took long to make, kept until the page is written.

    A start with another plan begins anew.
    """

    def __init__(self, folder: Path, plan: dict):
        self.folder = folder
        path, text = folder / "plan.json", json.dumps(plan)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            for part in folder.glob("*.np[yz]"):
                part.unlink()
            write_text(path, text)

    def get(self, name: str, make: Callable[[], dict]) -> dict:
        """The arrays that `make` gives, or gave before an interruption."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            with whole_file(path) as partial:
                np.savez(partial, **make())
        with np.load(path) as arrays:
            return dict(arrays)


def explore(
    embedded: Embedded,
    out: str | os.PathLike,
    maps: Sequence[str] = ("tsne", "pca"),
    k: int = 10,
    threshold: float = 0.999,
    tables: Sequence[str | os.PathLike] = (),
    colour: str | None = None,
    audio: str = "link",
    pictures: bool = True,
    title: str | None = None,
    root: str | os.PathLike | None = None,
    num_workers: int = 2,
    progress: bool = False,
) -> Explored:
    """Write the page. An interrupted call is continued by the same call.

    Arguments
    ---------
    embedded : Embedded
        See `read_embedded`.
    out : str or Path
        The page, .html. One that is there is replaced when the new one is complete.
    maps : sequence of str
        "pca", "tsne", "umap": the first is shown, the others are chosen on the page.
        Default t-SNE and PCA.
    k : int
        Neighbours of each clip. Default 10.
    threshold : float
        Cosine from which clips are near-duplicates. Default 0.999.
    tables : sequence of str or Path
        csv files with the columns `file` and others to colour by.
    colour : str or None
        Name of the column shown first. Default None: the first of the tables, else the folder.
    audio : str
        "link" (default): the page plays the files where they are, by their path relative to the
        page. "embed": an MP3 of each is in the page, at most 200 MB. "none".
    pictures : bool
        Mel pictures, for which every file is read. Default True.
    title : str or None
        Default: the name of the embeddings.
    root : str, Path or None
        See `Embedded.paths`.
    num_workers : int
        Decoding threads. Default 2.
    progress : bool
        Show progress bars. Default False.

    Returns
    -------
    Explored

    Raises
    ------
    FolderInUse
        If another process is writing the same page.
    OSError
        If the disk is full: the message names it.
    ValueError
        If an option does not fit, a csv names none of the clips, or no file can be read.
    """
    out = Path(os.path.abspath(out))
    _check(embedded, out, maps, k, threshold, audio)
    paths = embedded.paths(root)
    base, names = _relative(paths)
    columns = [column for table in tables for column in csv_columns(table, paths)]
    columns += folder_columns(names)
    if colour is not None:
        if colour not in [column.name for column in columns]:
            known = ", ".join(column.name for column in columns)
            raise ValueError(f"colour={colour!r}: choose one of {known}")
        columns.sort(key=lambda column: column.name != colour)
    stat = embedded.path.stat()
    plan = {
        "embeddings": [str(embedded.path.resolve()), stat.st_size, stat.st_mtime_ns],
        "files": hashlib.sha256(os.fsencode("\0".join(paths))).hexdigest(),
        "k": k,
        "audio": audio == "embed",
    }
    folder = out.with_name(f"{out.name}.parts")
    with folder_lock(folder, fix="wait for it, or name another --out"):
        parts = _Parts(folder, plan)
        k = min(k, len(embedded) - 1)
        found = parts.get("neighbours", lambda: _neighbours(embedded, k, progress))
        places = {name: parts.get(name, partial(_place, embedded, name, progress)) for name in maps}
        sounds: list = []
        problems: list = []
        if pictures or audio == "embed":
            sounds, problems = _sounds(parts, paths, audio == "embed", num_workers, progress)
        groups = near_duplicates(found["index"], found["cosine"], threshold)
        title = title or embedded.path.name
        data = {
            "title": title,
            "names": [printable(name) for name in names],
            "base": _url(os.path.relpath(base, out.parent)),
            "odd": {i: _url(name) for i, name in enumerate(names) if printable(name) != name},
            "maps": [{"id": name, "name": MAPS[name]} for name in maps],
            "columns": [{"name": c.name, "categories": c.categories} for c in columns],
            "k": k,
            "audio": audio,
            "pictures": pictures,
            "sheet": {"across": ACROSS, "count": PER_SHEET, "width": WIDTH, "height": HEIGHT},
            "threshold": threshold,
            "groups": len(groups),
            "duplicates": groups[:LISTED_GROUPS],
        }
        write_page(
            out,
            title,
            asset("explore.html"),
            asset("explore.css"),
            data,
            _blobs(found, places, columns, sounds, pictures),
            (get_plotlyjs(), asset("explore.js")),
        )
        shutil.rmtree(folder)
    duplicates = [(cosine, [embedded.files[i] for i in clips]) for cosine, clips in groups]
    return Explored(out, len(embedded), duplicates, problems)


def _check(embedded: Embedded, out: Path, maps, k: int, threshold: float, audio: str) -> None:
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out}: the name must end in .html")
    if len(embedded) < FEWEST:
        raise ValueError(f"{len(embedded)} clips are too few for a map: give at least {FEWEST}")
    unknown = [name for name in maps if name not in MAPS]
    if unknown or not maps:
        raise ValueError(f"map={unknown}: choose among {', '.join(MAPS)}")
    if k < 1:
        raise ValueError(f"k={k}: ask for at least 1 neighbour")
    if not -1 <= threshold <= 1:
        raise ValueError(f"duplicates={threshold}: a cosine is between -1 and 1")
    if audio not in AUDIO:
        raise ValueError(f"audio={audio!r}: choose one of {', '.join(AUDIO)}")


def _relative(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all files are below, and their names from there."""
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    return base, [os.path.relpath(path, base) for path in paths]


def _url(path: str) -> str:
    return urllib.parse.quote(os.fsencode(path))


def _neighbours(embedded: Embedded, k: int, progress: bool) -> dict:
    vectors = unit(embedded.vectors)
    index, cosine = nearest(vectors, vectors, k, without_self=True, progress=progress)
    return {"index": index, "cosine": cosine}


def _place(embedded: Embedded, method: str, progress: bool) -> dict:
    if progress:
        tqdm.write(f"{MAPS[method]} of {len(embedded)} clips")
    return {"places": lay_out(embedded.vectors, method)}


def _sounds(
    parts: _Parts, paths: list[str], with_audio: bool, num_workers: int, progress: bool
) -> tuple[list[dict], list[str]]:
    """Pictures and sounds by the sheet, and what cannot be read."""
    sounds, problems, size = [], [], 0
    starts = range(0, len(paths), PER_SHEET)
    with tqdm(total=len(paths), disable=not progress, desc="pictures") as bar:
        for first in starts:
            chosen = paths[first : first + PER_SHEET]

            def make(chosen=chosen):
                (block,) = read_sounds(chosen, with_audio, num_workers)
                return {
                    "seconds": block.seconds,
                    "sheet": np.frombuffer(block.sheet, np.uint8),
                    "audio": np.frombuffer(b"".join(block.audio), np.uint8),
                    "lengths": np.array([len(sound) for sound in block.audio]),
                    "problems": np.array(block.problems, dtype=np.str_),
                }

            block = parts.get(f"sounds-{first:06d}", make)
            sounds.append(block)
            problems += block["problems"].tolist()
            size += block["audio"].nbytes
            if size > EMBEDDED_BYTES:
                raise ValueError(
                    f"the sound of {first + len(chosen)} of {len(paths)} clips is "
                    f"{size / 1e6:.0f} MB, {EMBEDDED_BYTES / 1e6:.0f} fit into a page: "
                    "take --audio link"
                )
            bar.update(len(chosen))
    if len(problems) == len(paths):
        for part in parts.folder.glob("sounds-*"):  # they are looked for again
            part.unlink()
        raise ValueError(
            f"none of {len(paths)} files can be read, the first: {problems[0]}. If the names are "
            "relative, say with --root where they start; --audio none --no_pictures reads none"
        )
    return sounds, problems


def _blobs(
    found: dict, places: dict, columns: list[Column], sounds: list[dict], pictures: bool
) -> Iterator[tuple[str, bytes]]:
    """Arrays as explore.js reads them, little-endian."""
    yield "index", found["index"].astype("<u4").tobytes()
    yield "cosine", found["cosine"].astype("<f4").tobytes()
    for name, map_ in places.items():
        yield f"map-{name}", map_["places"].astype("<f4").tobytes()
    for number, column in enumerate(columns):
        yield f"column-{number}", column.values.astype("<f4").tobytes()
    if sounds:
        yield (
            "seconds",
            np.concatenate([block["seconds"] for block in sounds]).astype("<f4").tobytes(),
        )
    clip = 0
    for number, block in enumerate(sounds):
        if pictures:
            yield f"sheet-{number}", block["sheet"].tobytes()
        ends = block["lengths"].cumsum()
        for end, length in zip(ends.tolist(), block["lengths"].tolist()):
            if length:
                yield f"audio-{clip}", block["audio"][end - length : end].tobytes()
            clip += 1
