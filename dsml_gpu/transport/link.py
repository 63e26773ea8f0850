"""The interface of a transport: a one-way, ordered stream of slices from one rank to another.

Both ends know from the schedule which slices come in which order and how long each is, so slices carry no headers.
Links live in one event loop and end by `end` and `finish` (all is well) or `abort` (with the reason).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

from dsml_gpu.errors import DsmlError
from dsml_gpu.memory.device_memory import DeviceNDArray


def new_stream_id() -> int:
    """A stream id that nobody else draws, on any device, and that nobody guesses; never 0.

    Below 2**53, for JavaScript's numbers.
    """
    return secrets.randbelow((1 << 53) - 1) + 1


class SendLink(Protocol):
    """The sending end.

    Attributes:
        needs_drain: slices move only while `drain` runs; otherwise the other end fetches them by itself.
    """

    needs_drain: bool

    def send(self, data: DeviceNDArray, on_sent: Callable[[], None]) -> None:
        """Queues one slice, which stays where it is until it leaves. Never waits.

        Args:
            data: uint8 array in device memory; must not change before `on_sent` is called.
            on_sent: called once, when the slice has been read.

        Raises:
            DsmlError: the stream has ended; as `drain`.
        """

    def end(self) -> None:
        """Says that no slice follows."""

    async def drain(self) -> None:
        """Carries the slices to the other end; returns when, after `end`, it has taken all. Called once.

        Raises:
            PeerUnavailable: the connection broke.
            OperationAborted: the other end gave up.
        """

    def abort(self, error: DsmlError) -> None:
        """Gives up; the other end's calls raise."""


class RecvLink(Protocol):
    """The receiving end.

    Attributes:
        lends: slices are the peer's own memory, or memory that the next ones need: either waits for `release`, so a
            receiver that cannot use a slice at once must copy it and release it, or two ranks that wait for each other
            would never end.
    """

    lends: bool

    async def recv(self, nbytes: int) -> DeviceNDArray:
        """The next slice, as a uint8 array; valid until `release`, which must come before the next `recv`.

        Raises:
            PeerUnavailable: the connection broke.
            OperationAborted: the other end gave up.
            StreamLength: the slice has another length than `nbytes`.
        """

    def release(self) -> None:
        """Gives the slice of the last `recv` back."""

    async def finish(self) -> None:
        """Checks that no slice follows, and tells the other end that all was taken. Raises as `recv`."""

    def abort(self, error: DsmlError) -> None:
        """Gives up; the other end's calls raise."""
