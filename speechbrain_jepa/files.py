"""Writing that survives kills, full disks and a second process in the same folder."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np

logger = logging.getLogger(__name__)

LOCK = ".lock"
HOLDER = ".lock-holder.json"  # which process holds the lock, for the message of the others
PARTIAL = ".partial-"  # how the names of unfinished files and folders begin
WRITING = ".writing-"  # how the names of folders begin in which another is written
FULL = (errno.ENOSPC, errno.EDQUOT)
LOW = 2**20  # bytes: with less left, any write error is put down to a full disk
CHILDREN_SECONDS = 30.0  # for the children of a killed process to end


class FolderInUse(RuntimeError):
    """Another process holds the lock of a folder."""


def partial_path(path: str | os.PathLike) -> Path:
    """A name beside `path`, on the same disk, that nobody else uses. It keeps the suffix.

    Example
    -------
    >>> partial_path("folder/features.npy").match("folder/.partial-*.npy")
    True
    """
    path = Path(path)
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}{path.suffix[:32]}")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under another name; it appears as `path` when it is complete and on the disk.

    What was there before stays until then. If writing fails, the unfinished file is removed.

    Arguments
    ---------
    path : str or path
        Its folder exists.

    Yields
    ------
    Path
        Where to write: in the same folder, with the same suffix.

    Raises
    ------
    OSError
        If the disk is full: the message names it (`full_disk_named`).

    Example
    -------
    >>> path = getfixture("tmp_path") / "state.json"
    >>> with whole_file(path) as partial:
    ...     _ = partial.write_text("{}")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('{}', 1)
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        with full_disk_named(path.parent):
            yield partial
            sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all (`whole_file`)."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Write a folder under another name; it appears as `path` when it is complete.

    A folder that was there is replaced as a whole, and is there again if writing fails. The other
    name follows from the path and is locked, so that what a killed process left of the same folder
    is removed, or put back, at the next start, and nothing of anybody else's is touched.

    Arguments
    ---------
    path : str or path
        The folder above it is made if need be.

    Yields
    ------
    Path
        An empty folder on the same disk.

    Raises
    ------
    FolderInUse
        If another process is writing the same folder.
    OSError
        If the disk is full: the message names it (`full_disk_named`).

    Example
    -------
    >>> path = getfixture("tmp_path") / "encoder"
    >>> with whole_folder(path) as partial:
    ...     _ = (partial / "config.json").write_text("{}")
    >>> [file.name for file in path.iterdir()], len(list(path.parent.iterdir()))
    (['config.json'], 1)
    """
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # as long for any name
    workplace = path.with_name(f"{WRITING}{digest}")
    new, old = workplace / "new", workplace / "old"
    fix = f"it is writing {path}: wait for it, or name another folder"
    with folder_lock(workplace, fix), full_disk_named(path.parent):
        try:
            if old.exists() and not path.exists():  # killed between the two renames
                old.rename(path)
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir()
            yield new
            for file in new.iterdir():
                sync(file)
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(workplace, ignore_errors=True)


def sync(path: str | os.PathLike) -> None:
    """Wait until what was written to a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_array(path: str | os.PathLike, dtype, shape: tuple[int, ...]) -> np.memmap:
    """A .npy file of zeros, memory-mapped to be written: the disk has all of it (`allocate`).

    Arguments
    ---------
    path : str or path
    dtype : numpy dtype
    shape : tuple of int

    Example
    -------
    >>> array = new_array(getfixture("tmp_path") / "a.npy", "float16", (2, 3))
    >>> array.shape, float(array.sum())
    ((2, 3), 0.0)
    """
    dtype = np.dtype(dtype)
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    allocate(path, len(header.getvalue()) + math.prod(shape) * dtype.itemsize)
    with open(path, "r+b") as file:
        file.write(header.getvalue())
    return np.load(path, mmap_mode="r+")


def allocate(path: str | os.PathLike, size: int) -> None:
    """Make a file of `size` bytes, all of which the disk has for it.

    A memory map of a file with holes ends the process with SIGBUS when the disk is full.

    Raises
    ------
    OSError
        If the disk has not that much left; the file is then removed again.
    """
    with full_disk_named(Path(path).parent, size), open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            file.truncate(size)
        except OSError:
            os.unlink(path)
            raise


@contextlib.contextmanager
def full_disk_named(folder: str | os.PathLike, needed: int | None = None) -> Iterator[None]:
    """Turn whatever a library says when the disk is full into one sentence that names the disk.

    torch.save reports "unexpected pos" and libsndfile "System error", so beside the error's number
    the space left on the disk is looked at.

    Arguments
    ---------
    folder : str or path
        Where is written to.
    needed : int or None
        Bytes, if they are known.

    Raises
    ------
    OSError
        With errno ENOSPC, in place of an OSError or RuntimeError that a full disk caused.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        try:
            left = shutil.disk_usage(folder).free
        except OSError:
            raise error from None
        is_write_error = not isinstance(error, OSError) or error.errno in (None, errno.EIO)
        if getattr(error, "errno", None) in FULL or (is_write_error and left < LOW):
            wanted = "" if needed is None else f", {needed / 2**20:.1f} MiB needed"
            raise OSError(
                errno.ENOSPC,
                f"the disk of {os.path.abspath(folder)} is full ({left / 2**20:.1f} MiB left"
                f"{wanted}): free some space, or name a folder on another disk",
            ) from error
        raise


def remove_partials(folder: str | os.PathLike) -> list[Path]:
    """Remove what killed processes left unfinished in a folder; the lock of the folder is held.

    Returns
    -------
    list of Path
        What was removed.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = partial_path(folder / "a.npy").write_bytes(b"half")
    >>> len(remove_partials(folder)), list(folder.iterdir())
    (1, [])
    """
    leftovers = sorted(Path(folder).glob(f"{PARTIAL}*"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike, fix: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process alone, and remove what killed ones left unfinished in it.

    The lock goes with the process, however it ends. If the holder was killed, its children
    (loader processes) are given some seconds to notice. A thread never waits for itself, where one
    folder was given as two: it holds it twice.

    Arguments
    ---------
    folder : str or path
        Made if need be.
    fix : str
        Ends the message: what to do instead of waiting.
    wait : float
        Seconds to wait for another process to finish; a warning says that it waits. Default 0.

    Raises
    ------
    FolderInUse
        If another process holds it: the message says which, since when, and `fix`.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "cache"
    >>> with folder_lock(folder, fix="name another --cache_folder"):
    ...     folder.is_dir()
    True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(os.path.realpath(folder / LOCK), is_singleton=True)
    holder_file = folder / HOLDER
    if lock.is_locked:  # by this thread
        if not wait:
            raise FolderInUse(f"{folder} is in use by {_named(_read_holder(holder_file))}: {fix}")
        yield
        return
    began, has_told = time.monotonic(), False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            holder = _read_holder(holder_file)
            patience = wait if _is_running(holder) else max(wait, CHILDREN_SECONDS)
            if time.monotonic() - began >= patience:
                raise FolderInUse(f"{folder} is in use by {_named(holder)}: {fix}") from None
            if wait and holder and not has_told:
                logger.warning("%s is in use by %s: waiting for it", folder, _named(holder))
                has_told = True
            time.sleep(0.1)
    try:
        remove_partials(folder)
        # on a full disk the lock holds all the same, without a name
        with contextlib.suppress(OSError):
            write_text(holder_file, json.dumps(_this_process()))
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:500],
    }


def _read_holder(path: Path) -> dict:
    """Who wrote the holder file; empty in the moment before it is written."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_running(holder: dict) -> bool:
    """Whether the holder is a process that may still be at work."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)  # processes of another machine cannot be looked up
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _named(holder: dict) -> str:
    if not holder:
        return "another process"
    return (
        f"process {holder.get('pid')} on {holder.get('host')} "
        f"since {holder.get('since')} ({holder.get('command')})"
    )
