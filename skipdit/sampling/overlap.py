"""One kind of work beside another: while an item is worked on in the background, the next one is being made."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["overlapped"]

Item, Result = TypeVar("Item"), TypeVar("Result")


def overlapped(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(work, items)` with the work in a thread of its own, one item behind the making of items.

    Results come in order. At most two items wait or are worked on, so memory stays small. What the work raises is
    raised here, when its result is due; whatever ends the iteration, the thread has ended before it does.

    Args:
        work: Called on one item at a time.
        items: Made in the thread of the caller.

    Example:
        >>> list(overlapped(abs, iter([-1, 2, -3])))
        [1, 2, 3]
    """
    pool, pending, result = ThreadPoolExecutor(max_workers=1), None, None
    try:
        for item in items:
            result = pool.submit(work, item)
            if pending is not None:
                yield pending.result()
            pending = result
        if pending is not None:
            yield pending.result()
    finally:
        pool.shutdown(cancel_futures=True)
        pending = result = None  # an error in one of them would hold this frame, and it the error
        if isinstance(items, Generator):
            items.close()
