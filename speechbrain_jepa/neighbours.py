"""Nearest neighbours by cosine: exact, approximate for millions, and groups of near-duplicates."""

import json
import os

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_jepa.embedded import Embedded
from speechbrain_jepa.files import whole_file, write_text

BLOCK = 512  # queries at once: with 50,000 clips their cosines take 100 MB
LINKS = 32  # of a clip in the graph (HNSW's M)
EFFORT_BUILDING, EFFORT_SEARCHING = 80, 256  # HNSW's efConstruction and efSearch
ADDED_AT_ONCE = 10_000


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector over its length; zero stays zero.

    Arguments
    ---------
    vectors : array [n, C]

    Returns
    -------
    array [n, C], float32
    """
    lengths = np.sqrt(np.einsum("nc,nc->n", vectors, vectors, dtype=np.float64))
    lengths = np.maximum(lengths, np.finfo(np.float32).tiny).astype(vectors.dtype)
    return (vectors / lengths[:, None]).astype(np.float32, copy=False)


def nearest(
    queries: np.ndarray, vectors: np.ndarray, k: int, without_self: bool = False, progress=False
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of all vectors, by comparing with every one.

    Arguments
    ---------
    queries : array [q, C], float32
        Of unit length (`unit`).
    vectors : array [n, C], float32
        Of unit length.
    k : int
        At most n (n - 1 without self).
    without_self : bool
        The queries are the vectors, and none is its own neighbour. Default False.
    progress : bool
        Show a progress bar. Default False.

    Returns
    -------
    index : array [q, k], int64
        The nearest first.
    cosine : array [q, k], float32

    Example
    -------
    >>> vectors = unit(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    >>> index, cosine = nearest(vectors[:1], vectors, k=2)
    >>> index, cosine.round(3)
    (array([[0, 1]]), array([[1.   , 0.707]], dtype=float32))
    >>> nearest(vectors, vectors, k=1, without_self=True)[0].ravel()[:2]
    array([1, 0])
    """
    keys = torch.from_numpy(vectors).T
    found = []
    with tqdm(total=len(queries), disable=not progress, desc="neighbours") as bar:
        for rows in torch.arange(len(queries)).split(BLOCK):
            block = torch.from_numpy(queries[rows[0] : rows[-1] + 1]) @ keys
            if without_self:
                block[torch.arange(len(rows)), rows] = -torch.inf
            found.append(block.topk(k))
            bar.update(len(rows))
    cosine = torch.cat([block.values for block in found]).numpy()
    return torch.cat([block.indices for block in found]).numpy(), cosine.clip(-1, 1)


def near_duplicates(
    index: np.ndarray, cosine: np.ndarray, threshold: float
) -> list[tuple[float, list[int]]]:
    """Groups of clips that are linked by a cosine of at least the threshold.

    Arguments
    ---------
    index, cosine : array [n, k]
        What `nearest` gives without self. Clips with more than k such neighbours are linked to the
        nearest k.
    threshold : float

    Returns
    -------
    list of (float, list of int)
        The highest cosine inside a group and its clips, ascending. Highest cosine first.

    Example
    -------
    >>> index, cosine = np.array([[1], [0], [1]]), np.array([[0.999], [0.999], [0.3]])
    >>> near_duplicates(index, cosine, 0.99)
    [(0.999, [0, 1])]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.nonzero(cosine >= threshold)
    links = coo_array(
        (np.ones(len(rows), np.int8), (rows, index[rows, columns])), (len(index), len(index))
    )
    _, group = connected_components(links, directed=False)
    highest = np.full(group.max() + 1, -np.inf)
    np.maximum.at(highest, group[rows], cosine[rows, columns])
    members: dict[int, list[int]] = {}
    for clip in np.unique(np.concatenate([rows, index[rows, columns]])).tolist():
        members.setdefault(int(group[clip]), []).append(clip)
    groups = [(float(highest[number]), clips) for number, clips in members.items()]
    return sorted(groups, key=lambda pair: (-pair[0], pair[1]))


class ApproximateIndex:
    """A graph (HNSW: Malkov and Yashunin, 2018) of the embeddings of one file, kept beside it.

    Needs faiss, the extra `[faiss]`.

    Arguments
    ---------
    embedded : Embedded
        The graph is `<its file>.faiss`; it is made anew when the file changes.
    progress : bool
        Show a progress bar while it is made. Default False.

    Raises
    ------
    ModuleNotFoundError
        If faiss is not installed.
    OSError
        If the disk is full: the message names it.
    """

    def __init__(self, embedded: Embedded, progress: bool = False):
        try:
            import faiss
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "approximate search needs faiss: in a clone, pip install '.[faiss]'"
            ) from error
        path = embedded.path
        graph, note = (path.with_name(f"{path.name}.faiss{end}") for end in ("", ".json"))
        state = json.dumps([path.stat().st_size, path.stat().st_mtime_ns, LINKS, EFFORT_BUILDING])
        if graph.exists() and note.exists() and note.read_text(encoding="utf-8") == state:
            self.graph = faiss.read_index(os.fspath(graph))
        else:
            self.graph = self._make(faiss, unit(embedded.vectors), progress)
            note.unlink(missing_ok=True)
            with whole_file(graph) as partial:
                faiss.write_index(self.graph, os.fspath(partial))
            write_text(note, state)
        self.graph.hnsw.efSearch = EFFORT_SEARCHING  # type: ignore[attr-defined]  # of its subclass

    @staticmethod
    def _make(faiss, vectors: np.ndarray, progress: bool):
        graph = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EFFORT_BUILDING
        with tqdm(total=len(vectors), disable=not progress, desc="graph") as bar:
            for first in range(0, len(vectors), ADDED_AT_ONCE):
                block = vectors[first : first + ADDED_AT_ONCE]
                graph.add(block)
                bar.update(len(block))
        return graph

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """About the k nearest, as `nearest` gives them; the cosines are exact."""
        cosine, index = self.graph.search(queries, k)
        return index, cosine.clip(-1, 1)
