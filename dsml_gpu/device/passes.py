"""Runs passes over memory: reductions and copies between the memories of ranks, all of which this device has opened.

A pass reads each source once and writes each destination once, whoever's they are, and no other rank takes part. So there
is nothing to wait for within an operation: the coordinator gives each rank a part of the whole, and when all have answered
it is done.

A device that runs passes writes to the memory of others. One that freezes in the middle may go on when it has long been
given up; before that memory is used for anything else, the coordinator has it moved (``ShareMemory.move``).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsml_gpu.device.device import Device
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.reduction import Operator

log = logging.getLogger(__name__)

#: Bytes that are read and written in one piece, after which a pass can be given up: some 10 ms.
_PIECE_BYTES = 64 << 20
#: What is copied to several destinations goes piece by piece of this size.
_CACHED_BYTES = 256 << 10
#: Passes that touch up to so many bytes together stop the event loop for less time than a thread would cost.
_INLINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over ranges of equal length.

    Attributes:
        sources, destinations: ranges, as uint8 arrays. A destination may be one of the sources.
        weights: of each source; empty: none.
        divisor: what the result is divided by.
    """

    dtype: np.dtype[Any]
    operator: Operator
    sources: tuple[DeviceNDArray, ...]
    destinations: tuple[DeviceNDArray, ...]
    weights: tuple[np.generic, ...] = ()
    divisor: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        return int(self.sources[0].nbytes) * (len(self.sources) + len(self.destinations))


async def run_passes(device: Device, passes: Sequence[Pass | Callable[[], None]]) -> None:
    """Runs passes, in order; returns when they are done.

    Args:
        passes: and what is called between them, perhaps in another thread; on a GPU when work is queued, not done. What
            takes long has `nbytes` as passes have.

    Cancelled, it returns (with the cancellation) when the device has stopped writing.

    Raises:
        InternalError: from the device's memory.
    """
    on_host = device.arena.backend.name == "numpy"
    if on_host and sum(getattr(one, "nbytes", 0) for one in passes) > _INLINE_BYTES:
        given_up = threading.Event()
        await _to_the_end(asyncio.to_thread(_run_all, device, passes, given_up), given_up.set)
        return
    try:
        for one in passes:
            if isinstance(one, Pass):
                _run(device, one)
            else:
                one()
    finally:
        if not on_host:  # also what was queued before one that failed
            await _to_the_end(device.arena.memory.finish())


async def _to_the_end(work: Coroutine[Any, Any, None], give_up: Callable[[], None] = lambda: None) -> None:
    """Waits for work that cannot be cancelled: where the one who waits is, it is told, and waited for all the same."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        give_up()
        while not task.done():
            with suppress(asyncio.CancelledError):  # whoever cancels once more is to wait as well
                await asyncio.wait([task])
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.warning("work that was given up failed: %s", failure)
        raise


def _run_all(device: Device, passes: Sequence[Pass | Callable[[], None]], given_up: threading.Event) -> None:
    for one in passes:
        if given_up.is_set():
            return
        if not isinstance(one, Pass):
            one()
            continue
        length = one.sources[0].nbytes
        # Whole elements, and whole cache lines.
        step = max(_PIECE_BYTES // (len(one.sources) + len(one.destinations)) // 64 * 64, 64)
        for start in range(0, length, step):
            if given_up.is_set():
                return
            _run(device, one if length <= step else piece_of(one, slice(start, start + step)))


def piece_of(one: Pass, part: slice) -> Pass:
    """A pass over some bytes of each range."""
    return Pass(
        one.dtype,
        one.operator,
        tuple(source[part] for source in one.sources),
        tuple(destination[part] for destination in one.destinations),
        one.weights,
        one.divisor,
    )


def _run(device: Device, one: Pass) -> None:
    memory, sources = device.arena.memory, one.sources
    if one.weights:
        weighed = [memory.scratch(source.nbytes) for source in sources]
        for source, target, weight in zip(sources, weighed, one.weights, strict=True):
            device.reducer.weigh(one.dtype, source, target, weight)
        sources = tuple(weighed)
    if len(sources) > 1 or one.divisor > 1:
        device.reducer.reduce(one.operator, one.dtype, sources, one.destinations, one.divisor)
        return
    source = sources[0]
    if len(one.destinations) > 1 and device.arena.backend.name == "numpy":
        # Read from memory once, and for the other destinations from the cache.
        for start in range(0, source.nbytes, _CACHED_BYTES):
            for destination in one.destinations:
                memory.copy(destination[start : start + _CACHED_BYTES], source[start : start + _CACHED_BYTES])
        return
    for destination in one.destinations:
        memory.copy(destination, source)
