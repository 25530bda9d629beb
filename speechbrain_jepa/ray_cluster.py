"""The Ray cluster that commands with `--engine ray` work on."""

from collections.abc import Iterator
from contextlib import contextmanager

LOCAL = "local"  # the address that stands for this machine alone


@contextmanager
def on_cluster(address: str) -> Iterator:
    """The module ray, connected to a cluster; one that the caller is connected to is taken.

    Arguments
    ---------
    address : str
        "auto": that of this machine, or of the variable RAY_ADDRESS; "host:port" of its head; or
        "local": started here and ended afterwards.

    Raises
    ------
    ValueError
        If Ray is not installed.
    OSError
        If there is no cluster at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            f"--engine ray needs Ray ({error}): in a clone, pip install '.[ray]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise OSError(f"no Ray cluster at --address {address}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def cause_of(error: BaseException) -> BaseException:
    """What went wrong in a worker: at the bottom of what Ray wraps around it."""
    while (below := getattr(error, "cause", None) or error.__cause__) is not None:
        error = below
    return error
