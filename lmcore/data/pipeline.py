"""Two small engines of the data path: read ahead in order, and map in parallel in order. Both are bounded.

Threads and not processes: reading, decompressing, parsing parquet and encoding all happen outside the interpreter lock,
nothing has to be copied between processes, and a killed program leaves no orphans. Results come out in the order in
which the work went in, whatever the number of threads, so that nothing behind them depends on it.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_POLL_S = 0.1


class _Channel(Generic[T]):
    """Items of one task on their way from its thread to the consumer: bounded, ends with a mark, carries an error."""

    def __init__(self, depth: int) -> None:
        self.queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)


def read_ahead(
    tasks: Iterable[Callable[[], Iterator[T]]], *, threads: int, depth: int = 2, ahead: int | None = None
) -> Generator[T]:
    """Run tasks (each an iterator of items) on threads; yield all items of the first, then all of the second, ...

    ahead: tasks begun before the consumer needs them (default: `threads`). depth: items that wait per task. An error of
    a task is raised when its turn comes; what was read before it is yielded first.
    """
    stop = threading.Event()

    def put(channel: _Channel[T], kind: str, value: T | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                channel.queue.put((kind, value), timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def work(task: Callable[[], Iterator[T]], channel: _Channel[T]) -> None:
        try:
            for item in task():
                if not put(channel, "item", item):
                    return
            put(channel, "end", None)
        except BaseException as error:
            put(channel, "error", error)

    waiting: collections.deque[_Channel[T]] = collections.deque()
    pending = iter(tasks)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def refill() -> None:
        while len(waiting) < (ahead or threads):
            task = next(pending, None)
            if task is None:
                return
            channel: _Channel[T] = _Channel(depth)
            waiting.append(channel)
            pool.submit(work, task, channel)

    try:
        refill()
        while waiting:
            kind, value = waiting[0].queue.get()
            if kind == "item":
                yield value  # type: ignore[misc]
            elif kind == "error":
                assert isinstance(value, BaseException)
                raise value
            else:
                waiting.popleft()
                refill()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, weight: Callable[[T], int], limit: int
) -> Generator[R]:
    """`function` over items on threads, results in order. At most `limit` of summed `weight` is under way (at least one
    item), so that memory does not grow with the number of threads or the size of the corpus."""
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
        window: collections.deque[tuple[Future[R], int]] = collections.deque()
        held = 0
        try:
            for item in items:
                size = weight(item)
                while window and (held + size > limit or len(window) > 2 * threads or window[0][0].done()):
                    future, freed = window.popleft()
                    held -= freed
                    yield future.result()
                window.append((pool.submit(function, item), size))
                held += size
            while window:
                yield window.popleft()[0].result()
        finally:
            for future, _ in window:
                future.cancel()
