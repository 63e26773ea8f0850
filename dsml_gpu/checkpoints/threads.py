"""Work on files, beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """The result of `work`, which runs in a thread of its own.

    Not one of a pool: storage that hangs must neither keep others from their files nor the process from its end. A future
    that is cancelled does not end the thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
            future.exception()  # nobody may wait for it any more
        else:
            future.set_result(result)  # type: ignore[arg-type]  # it is a T where there is no error

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            failure = error
        with suppress(RuntimeError):  # the loop has ended, and with it the one who waited
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="checkpoint-files", daemon=True).start()
    return future
