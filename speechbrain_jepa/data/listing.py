"""The audio files below a folder, found by their extensions."""

import os

import soundfile

# what libsndfile opens, and the other names under which such files go around
EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *(name.lower() for name in soundfile.available_formats() if name != "RAW"),
        *("aif", "aifc", "opus", "oga", "mp2", "m1a", "snd", "wave", "sph", "nist"),
    )
)


def list_audio(
    folder: str, extensions: frozenset[str] = EXTENSIONS
) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """Every audio file below a folder (relative path, size, modification time), sorted; and what
    could not be looked at (relative path, reason). What is hidden is passed over."""
    found: list[tuple[str, int, int]] = []
    unreadable: list[tuple[str, str]] = []
    folder = os.path.join(folder, "")
    pending, links = [folder], list[str]()
    visited = set()
    while pending or links:
        # linked folders last: what is also there under its real name is found under that name,
        # once, and a link to a folder above ends here
        current = pending.pop() if pending else links.pop()
        try:
            stat = os.stat(current)
            if (stat.st_dev, stat.st_ino) in visited:
                continue
            visited.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append((current[len(folder) :], f"cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = entry.path[len(folder) :]
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else pending).append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in extensions:
                    stat = entry.stat()
                    found.append((path, stat.st_size, stat.st_mtime_ns))
            except OSError as error:  # a link to nowhere, or to itself
                unreadable.append((path, f"cannot be opened: {error.strerror}"))
    return sorted(found), unreadable
