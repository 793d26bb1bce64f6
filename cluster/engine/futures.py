"""What becomes of a future: the one place that runs a function for somebody who waits."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def settle(future: Future[T], function: Callable[[], T]) -> None:
    """Give a future what a function returns or raises; do not call it if nobody waits any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
