"""The sending side of a client-streaming call, without the surprises of grpc.aio when the other side ends it early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from dsml_gpu.errors import DsmlError, OperationAborted
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.status import error_of, refusal_of

#: What grpc.aio says of a call that this process cancelled, by `cancel` or by cancelling a task that waits for it.
_CANCELLED_HERE = "Locally cancelled by application!"


class OutgoingStream:
    """One call of StreamSend or StreamHostToDevice.

    Every method raises `DsmlError` when the call has ended; which one is known only when the other side's status came
    before our next message met the closed stream.

    Args:
        call: what the stub's method gave, called without a request iterator.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, chunk: Chunk | bytes) -> None:
        """Sends one message, or the wire bytes of one (`codec.encode_chunk`); they are copied before this returns."""
        await self._guard(self._call.write(chunk))

    async def end(self) -> None:
        """Says that no message follows."""
        await self._guard(self._call.done_writing())

    async def response(self) -> Any:
        """Waits for the answer."""
        return await self._guard(self._call)

    async def metadata(self) -> Any:
        """Waits for the metadata with which the other side's answer begins."""
        return await self._guard(self._call.initial_metadata())

    def on_end(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when the call has ended, well or not."""
        self._call.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Ends the call. Idempotent."""
        self._call.cancel()

    async def _guard(self, step: Any) -> Any:
        try:
            return await step
        except asyncio.InvalidStateError:  # the call had ended before this step
            raise await self.why_ended() from None
        except grpc.RpcError as failure:
            raise _error(failure) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also where nobody cancelled the task that waits, but the other side the call.
            if self._call.done() and await self._call.details() != _CANCELLED_HERE:
                raise OperationAborted("the other side cancelled the stream") from None
            raise

    async def why_ended(self) -> DsmlError:
        """For a call that has ended before its time: the error that stands for its status."""
        try:
            await self._call
        except grpc.RpcError as failure:
            return _error(failure)
        except asyncio.CancelledError:
            pass
        return OperationAborted("the other side ended the stream early")


def _error(failure: grpc.RpcError) -> DsmlError:
    if failure.code() is grpc.StatusCode.INTERNAL and refusal_of(failure) is None:
        # grpc.aio's own words for a message that met a closed stream; they replace the status that the server sent.
        return OperationAborted("the other side ended the stream early")
    return error_of(failure)
