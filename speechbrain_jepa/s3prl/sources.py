"""From what s3prl's -k says to what `load_pretrained` reads.

An archive is a zip or tar of a pretrained folder. Two files are taken out of it, by their base
names; no path in it is followed.
"""

import hashlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from speechbrain_jepa.checkpoints import WEIGHTS
from speechbrain_jepa.config import CONFIG


def is_url(source) -> bool:
    """Whether it begins with a scheme that can be downloaded.

    Example
    -------
    >>> is_url("https://example.org/encoder.zip"), is_url("encoder.zip")
    (True, False)
    """
    return str(source).startswith(("https://", "http://"))


def download(url: str, refresh: bool = False) -> Path:
    """Download an archive, or a folder's model.safetensors with the config.json beside it.

    They are kept in `torch.hub.get_dir()`, which s3prl's --cache_dir sets; processes that ask for
    the same URL wait for each other.

    Arguments
    ---------
    url : str
    refresh : bool
        Download again. Default False.

    Returns
    -------
    Path
        Of the archive, or of model.safetensors in a pretrained folder.

    Raises
    ------
    ValueError
        If it is no URL.
    OSError
        If it cannot be downloaded.
    """
    from filelock import FileLock  # these two only for downloads
    from torch.hub import download_url_to_file, get_dir

    if not is_url(url):
        raise ValueError(f"{url}: audio_jepa_url takes a URL, https://...")
    folder = Path(get_dir()) / "speechbrain_jepa" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    parts = urlsplit(url)
    if PurePosixPath(parts.path).name == WEIGHTS:
        config = parts._replace(path=parts.path.removesuffix(WEIGHTS) + CONFIG).geturl()
        urls = {folder / CONFIG: config, folder / WEIGHTS: url}
    else:
        urls = {folder / "archive": url}
    with FileLock(folder / "lock"):
        for file, source in urls.items():
            if refresh or not file.exists():
                try:
                    download_url_to_file(source, str(file))
                except OSError as error:
                    raise OSError(f"{source} could not be downloaded: {error}") from error
    return file


@contextmanager
def open_source(source) -> Iterator:
    """What `load_pretrained` takes, for as long as the context lasts.

    Arguments
    ---------
    source : str or Path
        An archive, or a pretrained folder's model.safetensors; anything else (and None) is given
        as it is.

    Raises
    ------
    ValueError
        If the file is neither, or the archive is not of one pretrained folder.
    """
    file = None if source is None else Path(source).expanduser()
    if file is None or not file.is_file():
        yield source
    elif file.name == WEIGHTS:
        yield file.parent
    else:
        with tempfile.TemporaryDirectory(prefix=f"{file.name}-") as folder:
            _unpack(file, Path(folder))
            yield folder


def _unpack(archive: Path, folder: Path) -> None:
    """Take config.json and model.safetensors out of a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            _copy_out(archive, opened.namelist(), opened.open, folder)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            files = [member.name for member in opened.getmembers() if member.isfile()]
            _copy_out(archive, files, opened.extractfile, folder)
    else:
        raise ValueError(
            f"{archive} is no zip or tar of a pretrained folder, and not a {WEIGHTS}: give one of "
            "these, or the folder. A download that was cut short is made again with -r"
        )


def _copy_out(archive: Path, files: list[str], read, folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        found = [file for file in files if PurePosixPath(file).name == name]
        if len(found) != 1:
            raise ValueError(
                f"{archive} holds {len(found)} files {name}: it should hold one pretrained folder, "
                f"with one {CONFIG} and one {WEIGHTS}"
            )
        with read(found[0]) as member, (folder / name).open("wb") as out:
            shutil.copyfileobj(member, out)
