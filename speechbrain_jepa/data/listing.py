"""The audio files below a folder, found by their extensions."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import soundfile

# what libsndfile opens, and the other names under which such files go around
EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *(name.lower() for name in soundfile.available_formats() if name != "RAW"),
        *("aif", "aifc", "opus", "oga", "mp2", "m1a", "snd", "wave", "sph", "nist"),
    )
)
NUM_THREADS = 16  # that look at files; on a network share each look is a wait
CHUNK = 256  # files that a thread takes at once


class _Listing(NamedTuple):
    """What one folder holds."""

    identity: tuple[int, int] | None  # None: it cannot be listed
    folders: list[str]
    links: list[str]  # to folders; the last one first
    files: list[str]
    problems: list[tuple[str, str]]


def list_audio(
    folder: str,
    extensions: frozenset[str] = EXTENSIONS,
    num_threads: int = NUM_THREADS,
    keep: Callable[[str], bool] | None = None,
) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """Every audio file below a folder (relative path, size, modification time), sorted; and what
    could not be looked at (relative path, reason). What is hidden is passed over, and so is what
    `keep`, told the relative path, says no to: nothing is asked about it. Folders are listed and
    files looked at in threads."""
    folder = os.path.join(folder, "")
    names: list[str] = []
    problems: list[tuple[str, str]] = []
    visited: set[tuple[int, int] | None] = set()
    with ThreadPoolExecutor(num_threads) as pool:
        wave, links = [folder], list[str]()
        linked: list[tuple[list[str], list[str]]] = []
        while wave or links:
            # linked folders last: what is also there under its real name is found under that name,
            # once, and a link to a folder above ends here
            wave = wave or [links.pop()]
            below: list[str] = []
            for current, found in zip(wave, pool.map(lambda x: _list(x, extensions), wave)):
                if found.identity is not None and found.identity in visited:
                    continue
                visited.add(found.identity)
                problems += [(path[len(folder) :], reason) for path, reason in found.problems]
                names += [path[len(folder) :] for path in found.files]
                below += found.folders
                linked.append((current.split(os.sep), found.links))
            wave = below
            if not wave:
                links += [link for _, some in sorted(linked) for link in some]
                linked.clear()
        if keep is not None:
            names = list(filter(keep, names))
        found_files = []
        for name, stat in zip(names, stat_files(folder, names, pool)):
            if isinstance(stat, str):
                problems.append((name, f"cannot be opened: {stat}"))
            else:
                found_files.append((name, *stat))
    return sorted(found_files), sorted(problems)


def stat_files(folder: str, names: list[str], pool) -> list[tuple[int, int] | str]:
    """Size and modification time of each file, or why it cannot be looked at; by a pool."""

    def look(chunk: list[str]) -> list[tuple[int, int] | str]:
        looks: list[tuple[int, int] | str] = []
        for name in chunk:
            try:
                stat = os.stat(os.path.join(folder, name))
                looks.append((stat.st_size, stat.st_mtime_ns))
            except OSError as error:  # a link to nowhere, or to itself
                looks.append(str(error.strerror))
        return looks

    chunks = [names[begin : begin + CHUNK] for begin in range(0, len(names), CHUNK)]
    return [look for looks in pool.map(look, chunks) for look in looks]


def _list(current: str, extensions: frozenset[str]) -> _Listing:
    found = _Listing(None, [], [], [], [])
    try:
        stat = os.stat(current)
        entries = sorted(os.scandir(current), key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        found.problems.append((current, f"cannot be listed: {error.strerror}"))
        return found
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir():
                (found.links if entry.is_symlink() else found.folders).append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in extensions:
                found.files.append(entry.path)
        except OSError as error:  # a link to itself
            found.problems.append((entry.path, f"cannot be opened: {error.strerror}"))
    return found._replace(identity=(stat.st_dev, stat.st_ino))
