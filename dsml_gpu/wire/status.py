"""Exceptions to gRPC status and back."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from dsml_gpu.errors import DsmlError, NoAnswer, error_from

#: Trailing metadata key that carries the name of the refusal.
REFUSAL_KEY = "dsml-refusal"
#: gRPC sends messages as a header; servers and proxies limit headers to 8 KiB.
MAX_MESSAGE_CHARACTERS = 1500


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: DsmlError) -> NoReturn:
    """Ends the call with the status that stands for `error`."""
    await context.abort(
        grpc.StatusCode[error.code],
        str(error)[:MAX_MESSAGE_CHARACTERS],
        trailing_metadata=((REFUSAL_KEY, error.refusal),),
    )
    raise AssertionError("abort raises")


def error_of(failure: grpc.RpcError) -> DsmlError:
    """The exception that a failed call stands for."""
    if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED and refusal_of(failure) is None:
        return NoAnswer("no answer before the call's deadline")
    return error_from(failure.code().name, failure.details() or "", refusal_of(failure))


def refusal_of(failure: grpc.RpcError) -> str | None:
    """Name of the refusal that the server gave; None where gRPC itself ended the call."""
    trailing: Any = failure.trailing_metadata() or ()
    return next((str(value) for key, value in trailing if key == REFUSAL_KEY), None)
