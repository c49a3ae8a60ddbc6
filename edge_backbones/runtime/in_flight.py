"""Keep several calls running at once, and return their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from edge_backbones.errors import InputError

_Result = TypeVar("_Result")


def in_order(call: Callable[[Any], _Result], items: Iterable[Any], in_flight: int) -> Iterator[_Result]:
    """Yield ``call(item)`` for every item, in order, while up to ``in_flight`` calls run in threads of their own.

    Items are taken in the caller's thread, and only as results are asked for: at most ``in_flight`` of them are taken and not
    yielded. An error of a call is raised in its place. An error of ``items`` is raised behind the results of the items before
    it. Whatever ends the iteration, calls that run are waited for and the others never begin.

    Raises InputError if ``in_flight`` is less than 1.
    """
    require_some(in_flight)
    return _in_order(call, iter(items), in_flight)


def require_some(in_flight: int) -> None:
    """Raise InputError if nothing may be in flight."""
    if in_flight < 1:
        raise InputError(f"in_flight must be 1 or more, got {in_flight}")


def _in_order(call: Callable[[Any], _Result], items: Iterator[Any], in_flight: int) -> Iterator[_Result]:
    running: deque[Future[_Result]] = deque()
    ended: BaseException | None = None
    with ThreadPoolExecutor(in_flight, thread_name_prefix="edge_backbones.map") as threads:
        try:
            while True:
                while ended is None and len(running) < in_flight:
                    try:
                        item = next(items)
                    except Exception as error:  # StopIteration is the usual end
                        ended = error
                    else:
                        running.append(threads.submit(call, item))
                if not running:
                    break
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
    if ended is not None and not isinstance(ended, StopIteration):
        raise ended
