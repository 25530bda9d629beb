"""How many loader processes: chosen at the start, and judged by what a run measures."""

import math
import os
import statistics

CPU_WORKERS = 2  # where the CPU trains, and has little left
MOST_WORKERS = 32  # each holds some batches and its own copy of Python
FEWEST_BATCHES = 20
ENOUGH = 0.05  # of the time may be spent waiting for data


def available_cpus() -> int:
    """CPUs that this process may use: not those that its affinity or its cgroup forbids.

    Example
    -------
    >>> 1 <= available_cpus() <= os.cpu_count()
    True
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:  # a container's share, in microseconds of each period (cgroup v2)
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            cpus = min(cpus, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        pass
    return cpus


def choose_workers(num_workers: int | str, on_gpu: bool) -> int:
    """Loader processes of one training process.

    Arguments
    ---------
    num_workers : int or "auto"
        "auto": where a GPU trains, this process' part of the CPUs less one for itself, 32 at most
        (torchrun says how many processes share the machine); where the CPU trains, 2.
    on_gpu : bool
        Whether a GPU trains.

    Raises
    ------
    ValueError
        If it is neither "auto" nor a number from 0 on.

    Example
    -------
    >>> choose_workers("auto", on_gpu=False), choose_workers(6, on_gpu=True)
    (2, 6)
    """
    if num_workers == "auto":
        if not on_gpu:
            return CPU_WORKERS
        own = available_cpus() // max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
        return min(max(own - 1, 1), MOST_WORKERS)
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
        raise ValueError(f"num_workers={num_workers}: give a number from 0 on, or auto")
    return num_workers


class LoaderAdvice:
    """Says, from the first batches, how many loader processes would feed the device.

    A worker needs a certain time to read a batch, and the device another to learn from it: their
    ratio is the number of workers, whatever the number of those that were measured.

    Arguments
    ---------
    num_workers : int
        From 1 on.
    batches : int
        To measure; 20 at least, of which the first ones do not count. Default 20.

    Example
    -------
    >>> advice = LoaderAdvice(num_workers=5)
    >>> while not advice.add(reading=14.0, waited=1.7, stepped=1.0):
    ...     pass
    >>> advice.sentence(cpus=16)
    'data wait 63 %: 14 loader processes would feed this device (num_workers=5)'
    """

    def __init__(self, num_workers: int, batches: int = FEWEST_BATCHES):
        self.num_workers = num_workers
        self.wanted = max(batches, FEWEST_BATCHES)
        self.batches: list[tuple[float, float, float]] = []

    def add(self, reading: float, waited: float, stepped: float) -> bool:
        """Seconds that a worker read a batch, that the loop waited for it, and worked on it; tells
        whether there are enough."""
        self.batches.append((reading, waited, stepped))
        return len(self.batches) >= self.wanted

    def sentence(self, cpus: int) -> str:
        """What to say of these batches.

        Arguments
        ---------
        cpus : int
            That this process may use.
        """
        # the first ones wait for the workers to start, and for kernels to be chosen
        batches = self.batches[len(self.batches) // 4 :]
        reading, _, stepped = map(statistics.median, zip(*batches))
        waited = sum(batch[1] for batch in batches)
        share = waited / (waited + sum(batch[2] for batch in batches))
        needed = max(math.ceil(reading / stepped), 1)
        said = f"data wait {100 * share:.0f} %: "
        if share <= ENOUGH or needed <= self.num_workers:
            return f"{said}{self.num_workers} loader processes feed this device"
        said += f"{needed} loader processes would feed this device (num_workers={self.num_workers})"
        if needed <= cpus:
            return said
        return (
            f"{said}; this process has {cpus} CPUs: several crops of a file from one opening "
            "(crops_per_file), or a corpus decoded once (python -m speechbrain_jepa.prepare), take "
            "less"
        )
