"""Embeddings as points of a plane."""

import numpy as np

MAPS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
PRINCIPAL_DIMS = 50  # that t-SNE and UMAP start from
FEWEST = 4  # clips


def lay_out(vectors: np.ndarray, method: str, seed: int = 0) -> np.ndarray:
    """A place for each embedding: similar ones lie close to each other.

    Arguments
    ---------
    vectors : array [n, C], float32
        At least 4. They are standardised; t-SNE and UMAP start from their 50 principal components.
    method : str
        "pca", "tsne" or "umap" (which needs umap-learn, the extra `[umap]`).
    seed : int
        Default 0.

    Returns
    -------
    array [n, 2], float32
        Centred, the longer side 1.

    Raises
    ------
    ModuleNotFoundError
        If umap-learn is not installed and asked for.
    ValueError
        If there are too few embeddings, or there is no such method.

    Example
    -------
    >>> places = lay_out(np.random.default_rng(0).normal(size=(20, 8)).astype("f4"), "pca")
    >>> places.shape, round(float(np.ptp(places, 0).max()), 3)
    ((20, 2), 1.0)
    """
    from sklearn.decomposition import PCA

    if method not in MAPS:
        raise ValueError(f"map={method!r}: choose one of {', '.join(MAPS)}")
    if len(vectors) < FEWEST:
        raise ValueError(f"{len(vectors)} clips are too few for a map: give at least {FEWEST}")
    x = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-6)
    dims = min(PRINCIPAL_DIMS, *x.shape)
    x = PCA(dims, svd_solver="randomized", random_state=seed).fit_transform(x)
    x = np.pad(x, ((0, 0), (0, max(2 - dims, 0))))
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(x) - 1) / 3)
        # the first two components, made small, are where it starts
        start = 1e-4 * x[:, :2] / max(float(x[:, 0].std()), 1e-12)
        x = TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(x)
    elif method == "umap":
        x = _umap(x, seed)
    x = x[:, :2]
    low, high = x.min(0), x.max(0)
    side = max(float((high - low).max()), 1e-12)
    return ((x - (low + high) / 2) / side).astype(np.float32)


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this map needs umap-learn: in a clone, pip install '.[umap]'; or take --map tsne"
        ) from error
    # a seed wants one thread, and umap-learn warns where it is not told
    return UMAP(n_neighbors=min(15, len(x) - 1), random_state=seed, n_jobs=1).fit_transform(x)
