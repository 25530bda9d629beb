"""The clips most similar to one, by the cosine of their embeddings.

python -m speechbrain_jepa.similar query.wav embeddings/ -k 10

The embeddings are an output of `speechbrain_jepa.embed`, or a folder that holds one. The query is
embedded by the same encoder, or is one of the files. docs/explore.md has more.
"""

import argparse
import os
import sys
from dataclasses import dataclass

import torch

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.embedded import Embedded, read_embedded
from speechbrain_jepa.neighbours import ApproximateIndex, nearest, unit


@dataclass(frozen=True)
class Found:
    """A clip and its cosine with the query."""

    file: str
    cosine: float


def find_similar(
    query: str | os.PathLike,
    embedded: Embedded,
    k: int = 10,
    encoder=None,
    approximate: bool = False,
    progress: bool = False,
) -> list[Found]:
    """The k clips nearest to an audio file.

    Arguments
    ---------
    query : str or Path
        If it is one of the embedded files, its stored embedding is taken, and it is left out of
        what is found.
    embedded : Embedded
        See `read_embedded`.
    k : int
        At most as many as there are clips. Default 10.
    encoder : str, Path or None
        See `Embedded.load_encoder`. Default None: the one that made the embeddings.
    approximate : bool
        Search a graph that is made once and kept (`ApproximateIndex`). Default False: compare with
        every clip.
    progress : bool
        Show a progress bar where it takes long. Default False.

    Returns
    -------
    list of Found
        The nearest first.

    Raises
    ------
    UnreadableAudio
        If the query cannot be read.
    ValueError
        If k is below 1, or the encoder does not fit (see `Embedded.load_encoder`).
    """
    if k < 1:
        raise ValueError(f"k={k}: ask for at least 1 neighbour")
    own = os.path.realpath(query)
    names = [number for number, path in enumerate(embedded.paths()) if _is_same(path, own)]
    if names:
        vector = unit(embedded.vectors[names[:1]])
    else:
        wav = read_audio(query)
        model = embedded.load_encoder(encoder)
        with torch.inference_mode():
            vector = unit(model.embed(wav[None]).float().numpy())
    wanted = min(k + len(names), len(embedded))
    if approximate:
        index, cosine = ApproximateIndex(embedded, progress).nearest(vector, wanted)
    else:
        index, cosine = nearest(vector, unit(embedded.vectors), wanted)
    pairs = zip(index[0].tolist(), cosine[0].tolist())
    found = [
        Found(embedded.files[clip], value) for clip, value in pairs if clip not in {-1, *names}
    ]
    return found[:k]


def _is_same(path: str, own: str) -> bool:
    """Whether a path is the file `own`, asking the disk only where the names agree."""
    return os.path.basename(path) == os.path.basename(own) and os.path.realpath(path) == own


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.similar",
        description="The clips most similar to one, by the cosine of their embeddings.",
    )
    add = parser.add_argument
    add("query", help="audio file")
    add("embeddings", help="what speechbrain_jepa.embed wrote, or a folder that holds it")
    add("-k", type=int, default=10, help="so many (default 10)")
    add("--encoder", help="that made the embeddings (default: as noted beside them)")
    add("--approximate", action="store_true", help="for millions: a graph, needs faiss")
    options = parser.parse_args(arguments)
    try:
        found = find_similar(
            options.query,
            read_embedded(options.embeddings),
            options.k,
            options.encoder,
            options.approximate,
            progress=sys.stderr.isatty(),
        )
    except (OSError, ValueError, UnreadableAudio, ModuleNotFoundError) as error:
        raise SystemExit(f"similar: {error}") from error
    for clip in found:
        name = os.fsencode(clip.file).decode("utf-8", "backslashreplace")
        print(f"{clip.cosine:.4f}  {name}")


if __name__ == "__main__":
    main()
