"""Pictures in parallel: one thread computes one picture.

Threads inside the network would wait for each other after every layer. Threads that each take
a picture of their own never do, and while one decodes or writes, another computes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["chunks", "keep_freed_memory", "ordered_map", "share_threads"]

T = TypeVar("T")
R = TypeVar("R")

# More would wait for Python's lock: each call of a layer takes it for a moment.
_MAX_WORKERS = 8


def share_threads(threads: int, tasks: int | None = None) -> tuple[int, int]:
    """How many workers, and how many threads each has inside the network.

    threads: CPU threads in all; tasks: how many there are to do, None if unknown. Where there
    are fewer tasks than threads, or more threads than workers are good for, the rest work
    inside the network.
    """
    workers = max(1, min(threads, _MAX_WORKERS, threads if tasks is None else tasks))
    return workers, max(1, threads // workers)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], workers: int, inner_threads: int = 1
) -> Generator[R, None, None]:
    """function of each item, in `workers` threads; the results in the order of the items.

    inner_threads: what torch may use inside each worker. Items are taken as they are needed, a
    few ahead of the results. The first exception of an item is raised in its turn. When the
    caller stops early, or is interrupted, what has been begun is finished and nothing more is
    begun: close the iterator (`contextlib.closing`) to wait for that.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers, "sodfast", initializer=torch.set_num_threads, initargs=(inner_threads,)
    )
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # A worker's setting is its own, but it is also the first setting of every new thread.
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, up to a limit, instead of giving it back to the system.

    For programs, as it holds for the whole process. A network's tensors come and go with every
    layer, and the page faults of getting the same memory again cost a third of its time.
    Blocks of 15 MiB and more still go back: large arrays, and the blocks of nearly 16 MiB that
    Pillow makes its pictures of.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 15 << 20)  # M_MMAP_THRESHOLD: larger blocks are mapped, and given back
        mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD: how much may lie idle
