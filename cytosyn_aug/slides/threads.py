"""Ordered results of threads that work ahead of their use, whatever the number of threads.

Only for what leaves the interpreter while it works: reading slides, numpy, compression.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_order(
    function: Callable[[_In], _Out], items: Iterable[_In], num_threads: int
) -> Generator[_Out]:
    """Yield the function of each item, in the order of items.

    At most twice as many results as threads are under way or wait. An error comes up in its place,
    and what has not begun by then is not done. Closed early, it waits for what has begun.

    Args:
        function: Called in threads.
        items: Arguments, taken one at a time.
        num_threads: At least 1.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, expected at least 1")
    pending: deque[Future[_Out]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
