"""Threads: several trainings at once, and the next item made while one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def beside_each_other(function: Callable, items: Iterable, threads: int) -> list:
    """`map` over threads, each with one thread of its own for the products."""
    if threads < 2:
        return list(map(function, items))
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(before)


def ahead(items: Iterable) -> Iterator:
    """The items; a thread makes the next one while one is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = reader.submit(next, items, None)
            yield item
