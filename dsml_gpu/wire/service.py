"""Servicers to gRPC handlers, from the contract's own descriptors.

What the generated registration does not do and this does:

- a request that is no message of its type is refused as MalformedMessage; gRPC would answer INTERNAL;
- a `DsmlError` that a method raises becomes the call's status;
- `DataChunk` goes through the zero-copy codec.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dsml_gpu.errors import DsmlError, MalformedMessage, OperationTimeout
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import decode_chunk, encode_chunk
from dsml_gpu.wire.status import abort
from dsml_gpu.wire.timeouts import in_time
from dsml_gpu.wire.trim import MessageMemory

log = logging.getLogger(__name__)

#: How long the rest of a refused stream is taken.
_DISCARD_S = 0.5


class _Malformed:
    """Stands for request bytes that could not be decoded, until a method can refuse them."""

    def __init__(self, message: str) -> None:
        self.message = message


def service_handler(service: str, servicer: Any, stall_timeout_s: float, memory: MessageMemory) -> grpc.GenericRpcHandler:
    """The handler of one service of the contract, to be added to a server.

    Args:
        service: name in the contract, for example ``"GPUDevice"``.
        servicer: an object with one coroutine method ``(request, context)`` per RPC (an async generator where the answer
            is a stream); a request stream is given as an async iterator.
        stall_timeout_s: a stream whose client neither sends nor takes a message for so long is given up.
        memory: counts what passes.
    """
    descriptor = pb.DESCRIPTOR.services_by_name[service]
    handlers = {
        method.name: _Method(method, getattr(servicer, method.name), stall_timeout_s, memory).handler()
        for method in descriptor.methods
        if hasattr(servicer, method.name)
    }
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


class _Method:
    """One RPC: what stands between gRPC and the servicer's method."""

    def __init__(self, method: Any, call: Callable[..., Any], stall_timeout_s: float, memory: MessageMemory) -> None:
        self._method = method
        self._call = call
        self._stall_timeout_s = stall_timeout_s
        self._memory = memory
        self._decode = _decoder(method.input_type)
        self._encode = _encoder(method.output_type)

    def handler(self) -> Any:
        if self._method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._stream_unary, self._decoded, self._encoded)
        if self._method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._unary_stream, self._decoded, self._encoded)
        return grpc.unary_unary_rpc_method_handler(self._unary_unary, self._decoded, self._encoded)

    def _decoded(self, message: bytes) -> Any:
        self._memory.count(len(message))
        try:
            return self._decode(message)
        except DecodeError as error:
            name = self._method.input_type.name
            return _Malformed(f"the {len(message)} bytes of the request are not a {name}: {error}")

    def _encoded(self, message: Any) -> bytes:
        encoded = self._encode(message)
        self._memory.count(len(encoded))
        return encoded

    async def _unary_unary(self, request: Any, context: Any) -> Any:
        try:
            return await self._call(_well_formed(request), context)
        except Exception as error:  # noqa: BLE001  becomes the call's status
            await _refuse(context, error)
        finally:
            self._memory.call_ended()

    async def _stream_unary(self, requests: AsyncIterator[Any], context: Any) -> Any:
        try:
            return await self._call(self._well_formed_stream(requests), context)
        except Exception as error:  # noqa: BLE001  becomes the call's status
            if self._method.name != "StreamSend":  # whose sender is to hear of it at once, whatever it hears
                await _discard_rest(requests)
            await _refuse(context, error)
        finally:
            self._memory.call_ended()

    async def _unary_stream(self, request: Any, context: Any) -> None:
        try:
            async with aclosing(self._call(_well_formed(request), context)) as responses:
                async for response in responses:
                    await in_time(context.write(response), self._stall_timeout_s, "the client to take a message")
        except Exception as error:  # noqa: BLE001  becomes the call's status
            await _refuse(context, error)
        finally:
            self._memory.call_ended()

    async def _well_formed_stream(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        while (request := await self._next(requests)) is not None:
            yield _well_formed(request)

    async def _next(self, requests: AsyncIterator[Any]) -> Any:
        return await in_time(anext(requests, None), self._stall_timeout_s, "the client's next message")


async def _discard_rest(requests: AsyncIterator[Any]) -> None:
    """Takes what the client of a refused stream still sends, for a while.

    A client of grpc.aio whose next message meets the closed stream never learns the status.
    """

    async def discard() -> None:
        async for _ in requests:
            pass

    with suppress(OperationTimeout, grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        await in_time(discard(), _DISCARD_S, "the end of the stream")


async def _refuse(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, DsmlError):
        await abort(context, error)
    if context.done():
        log.debug("the client went away: %r", error)
        return
    log.error("a request met a defect of the server", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"defect of the server: {type(error).__name__}: {error}")


def _decoder(message_type: Any) -> Callable[[bytes], Any]:
    if message_type.name == "DataChunk":
        return decode_chunk
    decoder: Callable[[bytes], Any] = getattr(pb, message_type.name).FromString
    return decoder


def _encoder(message_type: Any) -> Callable[[Any], bytes]:
    if message_type.name == "DataChunk":
        return encode_chunk
    encoder: Callable[[Any], bytes] = getattr(pb, message_type.name).SerializeToString
    return encoder


def _well_formed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise MalformedMessage(request.message)
    return request
