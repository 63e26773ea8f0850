"""Servicers to gRPC handlers, from the contract's own descriptors.

What the generated registration does not do and this does:

- a request that is no message of its type is refused as MalformedMessage; gRPC would answer INTERNAL;
- a `DsmlError` that a method raises becomes the call's status;
- `DataChunk` goes through the zero-copy codec.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dsml_gpu.errors import DsmlError, MalformedMessage
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import decode_chunk, encode_chunk
from dsml_gpu.wire.status import abort
from dsml_gpu.wire.timeouts import in_time

log = logging.getLogger(__name__)

#: A stream whose other end neither sends nor takes a message for so long is given up.
STREAM_STALL_TIMEOUT_S = 120.0


class _Malformed:
    """Stands for request bytes that could not be decoded, until a method can refuse them."""

    def __init__(self, message: str) -> None:
        self.message = message


def service_handler(service: str, servicer: Any) -> grpc.GenericRpcHandler:
    """The handler of one service of the contract, to be added to a server.

    Args:
        service: name in the contract, for example ``"GPUDevice"``.
        servicer: an object with one coroutine method ``(request, context)`` per RPC (an async generator where the answer
            is a stream); a request stream is given as an async iterator.
    """
    descriptor = pb.DESCRIPTOR.services_by_name[service]
    handlers = {method.name: _method_handler(method, getattr(servicer, method.name)) for method in descriptor.methods}
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


def _method_handler(method: Any, call: Callable[..., Any]) -> Any:
    decode = _total(method.input_type.name, _decoder(method.input_type))
    encode = _encoder(method.output_type)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(_stream_unary(call), decode, encode)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_unary_stream(call), decode, encode)
    return grpc.unary_unary_rpc_method_handler(_unary_unary(call), decode, encode)


def _unary_unary(call: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(request: Any, context: Any) -> Any:
        try:
            return await call(_well_formed(request), context)
        except Exception as error:  # noqa: BLE001  becomes the call's status
            return await _refuse(context, error)

    return handler


def _stream_unary(call: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(requests: AsyncIterator[Any], context: Any) -> Any:
        try:
            return await call(_well_formed_stream(requests), context)
        except Exception as error:  # noqa: BLE001  becomes the call's status
            return await _refuse(context, error)

    return handler


def _unary_stream(call: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(request: Any, context: Any) -> None:
        try:
            async for response in call(_well_formed(request), context):
                await in_time(context.write(response), STREAM_STALL_TIMEOUT_S, "the client to take a message")
        except Exception as error:  # noqa: BLE001  becomes the call's status
            await _refuse(context, error)

    return handler


async def _refuse(context: Any, error: Exception) -> Any:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, DsmlError):
        await abort(context, error)
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


def _total(name: str, decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode_or_keep(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError as error:
            return _Malformed(f"the {len(message)} bytes of the request are not a {name}: {error}")

    return decode_or_keep


def _well_formed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise MalformedMessage(request.message)
    return request


async def _well_formed_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    while (request := await _next(requests)) is not None:
        yield _well_formed(request)


async def _next(requests: AsyncIterator[Any]) -> Any:
    return await in_time(anext(requests, None), STREAM_STALL_TIMEOUT_S, "the client's next message")
