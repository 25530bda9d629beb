"""Audio inside tar shards (WebDataset's layout), read in place like any other file.

An uncompressed tar holds each file as one run of bytes. The scan notes where each begins, and crops
are decoded from there: nothing is unpacked, and order, crops and resuming are those of a folder.
"""

import io
import json
import logging
import os
import re
import stat
import tarfile

from speechbrain_jepa.files import write_text

logger = logging.getLogger(__name__)

EXTENSION = ".tar"
INDEX = ".index.json"  # in the place of .tar: where the members of a shard are
INDEX_VERSION = 1
SEPARATOR = "::"  # between the path of the shard and the name inside
LONGEST_NAME = 4096  # as in the file systems; a longer one is a damaged tar
LARGEST_HEADER = 2**20  # bytes, of what a tar says about a member beside its name
_INSIDE = re.compile(f"(?<={re.escape(EXTENSION)}){SEPARATOR}.*", re.IGNORECASE | re.DOTALL)
_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class ShardMember(str):
    """The path of a file in a shard, `folder/shard.tar::name`, that knows where its bytes are.

    Arguments
    ---------
    path : str
    offset, size : int
        In bytes.

    Example
    -------
    >>> shard = getfixture("tmp_path") / "a.tar"
    >>> _ = shard.write_bytes(b"head" + b"audio" + b"tail")
    >>> with ShardMember(f"{shard}::a.flac", offset=4, size=5).open() as file:
    ...     file.read()
    b'audio'
    """

    offset: int
    size: int

    def __new__(cls, path: str, offset: int, size: int):
        member = super().__new__(cls, path)
        member.offset, member.size = offset, size
        return member

    def __getnewargs__(self):
        return str(self), self.offset, self.size

    @property
    def shard(self) -> str:
        """Path of the tar."""
        return _INSIDE.sub("", self)

    def open(self) -> io.BufferedReader:
        """The member's bytes, as a seekable file."""
        return io.BufferedReader(_Part(self.shard, self.offset, self.size))


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, path: str, offset: int, size: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (see close)
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(begin + place, 0)
        return self._place

    def readinto(self, buffer) -> int:
        wanted = max(min(len(buffer), self._size - self._place), 0)
        self._file.seek(self._offset + self._place)
        read = self._file.readinto(memoryview(buffer)[:wanted])
        self._place += read
        return read

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Checked(tarfile.TarInfo):
    """A member whose sizes are looked at before tarfile believes them: it would read a name of
    gigabytes into memory, and go back in the file, for ever, by a negative size."""

    def _proc_member(self, tar):
        if self.size < 0:
            raise tarfile.ReadError(f"a member of {self.size} bytes")
        if self.type in _HEADERS and self.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a name or header of {self.size} bytes")
        return super()._proc_member(tar)


def list_members(shard: str, extensions) -> tuple[dict[str, tuple[int, int]], str | None]:
    """The files in a tar whose names end in one of the extensions: {name: (offset, size)}, and what
    is wrong with the tar, if something is. What is hidden or climbs (`..`) is passed over; what
    comes before a damaged place can be used."""
    members, problem = {}, None
    try:
        found = os.stat(shard)
        if not stat.S_ISREG(found.st_mode):
            return {}, "not a regular file"
        end, place = found.st_size, -1
        with tarfile.open(shard, "r:", tarinfo=_Checked) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
                if member.size < 0 or tar.offset <= place:  # a pax header can still say so
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                place = tar.offset
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse():
                    continue
                if any(part.startswith(".") for part in name.split("/")):
                    continue
                if os.path.splitext(name)[1].lower() not in extensions:
                    continue
                if len(name) > LONGEST_NAME or "\0" in name:
                    problem = f"damaged: a name of {len(name)} characters, or with a NUL"
                elif member.offset_data + member.size > end:
                    problem = f"truncated: ends inside {name}"
                else:  # of two of the same name the second counts, as when unpacking
                    members[name] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            # tarfile takes a damaged header for the end
            if problem is None and tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                problem = f"damaged: no member begins at byte {tar.offset}"
    except Exception as error:  # a tar can make tarfile raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        problem = problem or f"cannot be read as a tar: {' '.join(reason.split())}"
    return members, problem


def index_of(shard: str | os.PathLike) -> str:
    """Path of the index that belongs to a shard."""
    return os.path.splitext(shard)[0] + INDEX


def write_index(
    shard: str | os.PathLike, members: dict[str, tuple[int, int, int]], sample_rate: int
) -> None:
    """Say beside a tar where its members are, so that it need not be read to be scanned.

    Arguments
    ---------
    shard : str or path
    members : dict
        {name: (offset, size, samples)}, in bytes and samples.
    sample_rate : int
        Of all, in Hz.
    """
    content = {
        "format_version": INDEX_VERSION,
        "size": os.path.getsize(shard),
        "sample_rate": sample_rate,
        "members": [[name, *place] for name, place in members.items()],
    }
    write_text(index_of(shard), json.dumps(content))


def read_index(shard: str) -> dict[str, tuple[int, int, int, int]] | None:
    """The members of a tar by its index, {name: (offset, size, samples, sample rate)}.

    None where there is no index. One that is damaged, or of another tar, is passed over with a
    warning: the tar itself says what is in it.
    """
    try:
        with open(index_of(shard), encoding="utf-8") as file:
            content = json.load(file)
        end, rate = content["size"], int(content["sample_rate"])
        if content["format_version"] != INDEX_VERSION or end != os.path.getsize(shard):
            raise ValueError("of another version of the tar, or of this package")
        members = {}
        for name, offset, size, samples in content["members"]:
            places = (offset, size, samples)
            if not all(type(place) is int and place >= 0 for place in places):
                raise ValueError(f"{name}: {places}")
            is_hidden = any(part.startswith(".") for part in name.split("/"))
            if is_hidden or "\0" in name or len(name) > LONGEST_NAME or offset + size > end:
                raise ValueError(f"{name[:99]}: bytes {offset} to {offset + size} of {end}")
            members[name] = (*places, rate)
        return members
    except FileNotFoundError:
        return None
    except Exception as error:  # json of any shape
        logger.warning("%s is passed over (%s)", index_of(shard), error)
        return None


def join(folder: str | os.PathLike, path: str) -> str:
    """`os.path.join` that leaves a member of a shard one."""
    joined = os.path.join(folder, path)
    return ShardMember(joined, path.offset, path.size) if isinstance(path, ShardMember) else joined
