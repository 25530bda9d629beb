"""Which crops make a batch, in which order; and the processes that read them."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from speechbrain_jepa.data.crops import DURATIONS, ORDER, Key, random_at
from speechbrain_jepa.data.workers import LoaderAdvice, available_cpus

logger = logging.getLogger(__name__)


class CropSampler(Sampler[list[Key]]):
    """Batches of keys (epoch, item), in an order that depends on (seed, epoch) alone.

    Process `rank` of a distributed run takes every `world_size`-th item of that order. With several
    passes through the items, a key's epoch counts passes, so that each pass draws other crops.
    With several crops of a file, a list of keys stands for as many batches, each of which has one
    crop of every key (`crop_loader` takes them apart): no file is twice in a batch.

    Arguments
    ---------
    num_items : int
    batch_size : int
        Per process.
    seed : int
        Default 0.
    rank, world_size : int
        Default 0 and 1.
    shuffle : bool
        Default True: `passes` permutations an epoch, incomplete batches left out; a corpus
        smaller than one global batch is gone through as often as fills it. False, for
        validation: every item once over all processes, in order, the last batch smaller.
    passes : int
        How often a shuffled epoch goes through the items. Default 1.
    crops_per_file : int
        Of each item at each pass, and so batches of a list of keys. Default 1.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Example
    -------
    >>> sampler = CropSampler(num_items=10, batch_size=4, seed=0)
    >>> sampler.set_epoch(3, batches_done=1)
    >>> len(sampler), [len(batch) for batch in sampler]
    (2, [4])
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        passes: int = 1,
        crops_per_file: int = 1,
    ):
        for name, value in {
            "num_items": num_items,
            "batch_size": batch_size,
            "passes": passes,
            "crops_per_file": crops_per_file,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must lie between 0 and world_size={world_size}")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.crops_per_file = crops_per_file
        self.passes = max(passes, math.ceil(batch_size * world_size / num_items)) if shuffle else 1
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """The next iteration is this epoch's, after its first `batches_done` batches."""
        self.epoch = epoch
        self.batches_done = batches_done

    def __len__(self) -> int:
        """Batches of a whole epoch, for this process."""
        items = self.num_items * self.passes
        if self.shuffle:
            return items // (self.batch_size * self.world_size) * self.crops_per_file
        own = len(range(self.rank, items, self.world_size))
        return math.ceil(own / self.batch_size) * self.crops_per_file

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        own = np.arange(self.rank, len(order), self.world_size)
        epochs = self.epoch * self.passes + own // self.num_items
        items = order[own]
        rounds = len(self) // self.crops_per_file
        for number in range(self.batches_done // self.crops_per_file, rounds):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            yield list(zip(epochs[part].tolist(), items[part].tolist()))

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_items)
        random = random_at(self.seed, ORDER, self.epoch)
        return np.concatenate([random.permutation(self.num_items) for _ in range(self.passes)])


def mixed_batch_sizes(batch_size: int, frames: Sequence[int]) -> list[int]:
    """Crops in a batch of each duration, as many tokens in all: `batch_size` of the longest."""
    return [batch_size * max(frames) // own for own in frames]


class MixedCropSampler(Sampler[list[Key]]):
    """Batches of several durations with as many tokens each, for one encoder of all of them.

    Every round has one batch of each duration, in an order that depends on (seed, epoch, round):
    all processes take a step with the same duration, and each duration has an equal share of the
    tokens.

    Arguments
    ---------
    num_items : int
    batch_size : int
        Crops of the longest duration, per process; batches of shorter ones have as many more.
    frames : sequence of int
        Durations of the crops, in frames.
    **sampling
        seed, rank, world_size and passes of `CropSampler`.

    Raises
    ------
    ValueError
        If a number is out of its range, or a duration is there twice.

    Example
    -------
    >>> sampler = MixedCropSampler(num_items=100, batch_size=4, frames=(104, 208), seed=0)
    >>> [(len(batch), batch[0][2]) for batch in sampler][:4]
    [(4, 208), (8, 104), (4, 208), (8, 104)]
    """

    def __init__(self, num_items: int, batch_size: int, frames: Sequence[int], **sampling):
        if not frames or min(frames) < 1 or len(set(frames)) < len(frames):
            raise ValueError(f"mixed_frames={list(frames)}: needs different positive durations")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.frames = tuple(frames)
        self.sizes = mixed_batch_sizes(batch_size, frames)
        self.rounds = CropSampler(num_items, sum(self.sizes), **sampling)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """The next iteration is this epoch's, after its first `batches_done` batches."""
        rounds, self.skipped = divmod(batches_done, len(self.frames))
        self.rounds.set_epoch(epoch, rounds)

    def __len__(self) -> int:
        """Batches of a whole epoch, for this process."""
        return len(self.rounds) * len(self.frames)

    def __iter__(self) -> Iterator[list[Key]]:
        skipped = self.skipped
        for number, keys in enumerate(self.rounds, self.rounds.batches_done):
            random = random_at(self.rounds.seed, DURATIONS, self.rounds.epoch, number)
            start = 0
            for place, which in enumerate(random.permutation(len(self.frames))):
                part = keys[start : start + self.sizes[which]]
                start += len(part)
                if place >= skipped:
                    yield [(epoch, item, self.frames[which]) for epoch, item, *_ in part]
            skipped = 0


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)


def _only(batch: Any) -> Any:
    """`CropDataset` fetches whole batches: there is nothing left to collate."""
    return batch


class CropLoader(DataLoader):
    """Batches of one crop of each file, where the sampler's lists of keys stand for several; and
    how many processes it takes to keep up, said once."""

    batch_sampler: CropSampler
    advice: LoaderAdvice | None = None

    def __iter__(self):  # type: ignore[override]  # DataLoader's is typed as its own iterator
        left = time.perf_counter()
        for batch in self._batches():
            came = time.perf_counter()
            yield batch
            if self.advice is not None:
                now = time.perf_counter()
                if self.advice.add(batch.seconds, came - left, now - came):
                    logger.info(self.advice.sentence(available_cpus()))
                    self.advice = None
            left = time.perf_counter()

    def _batches(self):
        sampler = self.batch_sampler
        if getattr(sampler, "crops_per_file", 1) == 1:
            yield from super().__iter__()
            return
        done = sampler.batches_done % sampler.crops_per_file  # of the first list, before a resume
        for batch in super().__iter__():
            rest = batch.split(sampler.crops_per_file)[done:]
            rest[0].failures = batch.failures
            yield from rest
            done = 0


def crop_loader(
    dataset: Dataset,
    sampler: Iterable[list[Key]],
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    keep_workers: bool = True,
    advise_after: int | None = None,
) -> CropLoader:
    """A loader of `CropBatch`es.

    Workers live as long as the loader, or one round; each decodes whole batches on one thread. The
    sampler stays in the main process, so `sampler.set_epoch` holds for the next iteration.

    Arguments
    ---------
    dataset : CropDataset, or another whose `__getitems__` takes a batch's keys
    sampler : CropSampler, MixedCropSampler, or a list of batches of keys
    num_workers : int
        Default 0: read in the main process.
    prefetch_factor : int
        Batches that each worker keeps ready. Default 2: one of 2048 crops takes 0.26 GiB. With
        several crops of a file, lists of `crops_per_file` batches; half as many, at least 1.
    pin_memory : bool
        For CUDA devices. Default False.
    keep_workers : bool
        From one round to the next. Default True.
    advise_after : int or None
        Log, after so many batches (20 at least), how many workers would keep up with whoever takes
        them. None (default): do not.

    Raises
    ------
    ValueError
        If dataset and sampler have different `crops_per_file`.
    """
    of_dataset, of_sampler = (getattr(part, "crops_per_file", 1) for part in (dataset, sampler))
    if of_dataset != of_sampler:
        raise ValueError(
            f"crops_per_file={of_dataset} of the dataset, {of_sampler} of the sampler: give both "
            "the same"
        )
    if of_dataset > 1:
        prefetch_factor = max(prefetch_factor // 2, 1)
    workers: dict[str, Any] = dict(
        prefetch_factor=prefetch_factor,
        persistent_workers=keep_workers,
        worker_init_fn=_start_worker,
    )
    loader = CropLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_only,
        num_workers=num_workers,
        pin_memory=pin_memory,
        **(workers if num_workers else {}),
    )
    if advise_after is not None and num_workers:
        loader.advice = LoaderAdvice(num_workers, advise_after)
    return loader
