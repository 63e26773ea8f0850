"""One exception class per refusal.

A server raises these, the wire carries class and message (gRPC status code, message, and the trailing metadata key
``dsml-refusal``), and the client raises the same class again. The names and codes are those of ``enum Refusal`` in
``proto/gpu_sim.proto``, which says what each means.

This module imports nothing, so every layer may use it.
"""

from __future__ import annotations

from typing import ClassVar

#: Codes of errors that say what is wrong with a request, or with what it is made to: nothing was done.
REFUSALS = ("INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED")


class DsmlError(Exception):
    """Base of everything that dsml_gpu refuses or fails with.

    Attributes:
        code: name of the canonical gRPC status code, for example ``"NOT_FOUND"``.
        refusal: name in ``enum Refusal``.
    """

    code: ClassVar[str] = "UNKNOWN"
    refusal: ClassVar[str] = "REFUSAL_UNSPECIFIED"


class InvalidArgument(DsmlError, ValueError):
    """A request that no state of the server could make valid."""

    code = "INVALID_ARGUMENT"
    refusal = "INVALID_VALUE"


class MalformedMessage(InvalidArgument):
    refusal = "MALFORMED_MESSAGE"


class MissingField(InvalidArgument):
    refusal = "MISSING_FIELD"


class InvalidValue(InvalidArgument):
    refusal = "INVALID_VALUE"


class CountNotMultiple(InvalidArgument):
    refusal = "COUNT_NOT_MULTIPLE"


class RankMismatch(InvalidArgument):
    refusal = "RANK_MISMATCH"


class ScheduleNotProved(InvalidArgument):
    """A schedule of the caller's own that is not proved; `schedules.InvalidSchedule` is the same where it is built."""

    refusal = "INVALID_SCHEDULE"


class BufferOverlap(InvalidArgument):
    refusal = "BUFFER_OVERLAP"


class NotFound(DsmlError, LookupError):
    """An id that names nothing (any more)."""

    code = "NOT_FOUND"


class CommNotFound(NotFound):
    refusal = "COMM_NOT_FOUND"


class DeviceNotFound(NotFound):
    refusal = "DEVICE_NOT_FOUND"


class StreamNotFound(NotFound):
    refusal = "STREAM_NOT_FOUND"


class AllocationNotFound(NotFound):
    refusal = "ALLOCATION_NOT_FOUND"


class CheckpointNotFound(NotFound):
    """There is no complete checkpoint under a URL."""

    refusal = "CHECKPOINT_NOT_FOUND"


class AddressOutOfRange(DsmlError, IndexError):
    code = "OUT_OF_RANGE"
    refusal = "ADDRESS_OUT_OF_RANGE"


class FailedPrecondition(DsmlError):
    """A valid request at a moment when it is not allowed."""

    code = "FAILED_PRECONDITION"


class GroupMisuse(FailedPrecondition):
    refusal = "GROUP_MISUSE"


class CommNotReady(FailedPrecondition):
    refusal = "COMM_NOT_READY"


class MemoryNotShared(FailedPrecondition):
    refusal = "MEMORY_NOT_SHARED"


class StaleEpoch(FailedPrecondition):
    """A request for another epoch of a communicator than the device is in."""

    refusal = "STALE_EPOCH"


class RanksLost(FailedPrecondition):
    """What cannot be done without the ranks that a communicator has lost."""

    refusal = "RANKS_LOST"


class AmbiguousStream(FailedPrecondition):
    refusal = "AMBIGUOUS_STREAM"


class StreamInUse(DsmlError):
    code = "ALREADY_EXISTS"
    refusal = "STREAM_IN_USE"


class ResourceExhausted(DsmlError):
    """A limit was reached: memory, devices, message size, streams."""

    code = "RESOURCE_EXHAUSTED"


class OutOfDevices(ResourceExhausted):
    refusal = "OUT_OF_DEVICES"


class OutOfMemory(ResourceExhausted, MemoryError):
    refusal = "OUT_OF_MEMORY"


class MessageTooLarge(ResourceExhausted):
    refusal = "MESSAGE_TOO_LARGE"


class TooManyStreams(ResourceExhausted):
    refusal = "TOO_MANY_STREAMS"


class Unavailable(DsmlError, ConnectionError):
    """The other side cannot be reached (any more)."""

    code = "UNAVAILABLE"


class PeerUnavailable(Unavailable):
    refusal = "PEER_UNAVAILABLE"


class StorageUnavailable(Unavailable):
    """Files of a checkpoint cannot be written or read."""

    refusal = "STORAGE_UNAVAILABLE"


class OperationTimeout(DsmlError, TimeoutError):
    code = "DEADLINE_EXCEEDED"
    refusal = "OPERATION_TIMEOUT"


class NoAnswer(OperationTimeout):
    """Nobody answered before the deadline; not even a server that says so."""


class InternalError(DsmlError):
    """A defect of the server."""

    code = "INTERNAL"


class BuffersUndefined(InternalError):
    """An operation was begun, and nobody could bring it to its end: what is in its buffers is not defined."""


class OperationAborted(DsmlError):
    code = "ABORTED"
    refusal = "OPERATION_ABORTED"


class StreamLength(DsmlError):
    code = "DATA_LOSS"
    refusal = "STREAM_LENGTH"


class CheckpointDamaged(DsmlError):
    """A file of a checkpoint is not what was written; the message names it and the place."""

    code = "DATA_LOSS"
    refusal = "CHECKPOINT_DAMAGED"


def _classes(cls: type[DsmlError]) -> list[type[DsmlError]]:
    found = [cls]
    for sub in cls.__subclasses__():
        found += _classes(sub)
    return found


#: Refusal name -> the class that has it as its own; of InvalidArgument and InvalidValue, which share one, the latter.
BY_REFUSAL: dict[str, type[DsmlError]] = {cls.refusal: cls for cls in _classes(DsmlError) if "refusal" in vars(cls)}
#: gRPC code name -> the most general class, for errors that carry no refusal (an older server, gRPC itself).
BY_CODE: dict[str, type[DsmlError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AddressOutOfRange,
        FailedPrecondition,
        StreamInUse,
        ResourceExhausted,
        Unavailable,
        OperationTimeout,
        OperationAborted,
        StreamLength,
        InternalError,
    )
}
# What gRPC itself ends calls with.
BY_CODE |= {"UNKNOWN": Unavailable, "CANCELLED": OperationAborted}


def error_from(code: str, message: str, refusal: str | None = None) -> DsmlError:
    """The exception for a status that came over the wire."""
    cls = BY_REFUSAL.get(refusal or "")
    if cls is None or cls is DsmlError:  # which has no refusal of its own
        cls = BY_CODE.get(code)
    if cls is None:
        return DsmlError(f"{code}: {message}")
    return cls(message)
