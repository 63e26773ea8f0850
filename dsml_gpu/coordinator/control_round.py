"""One round of control messages: an Execute on each rank that has work, side by side."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from dsml_gpu import failpoints
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.diagnosis import WaitsByRank
from dsml_gpu.errors import CommNotFound, DsmlError, OperationAborted, OperationTimeout, PeerUnavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: For a rank to settle a round.
_SETTLE_TIMEOUT_S = 5.0
#: After one rank has failed the others are given so long to say why, before they are cancelled: the first to answer is
#: often a peer of the one that knows.
_EXPLANATION_S = 0.5


@dataclass(frozen=True, slots=True)
class Answers:
    """What ranks said when they were told to end a round.

    Attributes:
        waits: what each that answered waited for, as its own program counts.
        silent: those that did not answer.
    """

    waits: WaitsByRank = field(default_factory=dict)
    silent: frozenset[int] = frozenset()


class RoundTimeout(OperationTimeout):
    """A round in which nothing moved, or that took too long.

    Args:
        answers: of its ranks, when they had ended it.
    """

    def __init__(self, message: str, answers: Answers) -> None:
        super().__init__(message)
        self.answers = answers


class Fence(Protocol):
    """Keeps ranks that were given up from what comes later."""

    async def fence(self, comm_id: int, handles: Sequence[DeviceHandle], ranks: Sequence[int]) -> None:
        """Returns when these ranks can write nowhere any more."""


async def run_round(
    handles: Sequence[DeviceHandle],
    requests: Mapping[int, pb.ExecuteRequest],
    timeout_s: float,
    fence: Fence | None = None,
) -> int:
    """Runs one round; returns the bytes that moved between ranks.

    Where the requests have a round number (`pb.ExecuteRequest.round`) and it does not end well on all ranks, all that can be
    reached have in their buffers again what was there before.

    Args:
        handles: of each rank.
        requests: by rank; ranks that have nothing to do have none.
        timeout_s: it fails when it takes longer.
        fence: used where the round fails or is cancelled, on the ranks with passes that did not answer.

    Raises:
        RoundTimeout: ranks with operations came to a standstill, or were not done in time.
        DsmlError: of all that ranks failed with, what happened first; what followed from it last.
    """
    failpoints.reach("round.begin")
    answers = Answers()
    late: OperationTimeout | None = None
    tasks = {rank: asyncio.ensure_future(execute(rank, handles[rank], request)) for rank, request in requests.items()}
    try:
        _, unfinished = await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        if unfinished and not any(task.done() and task.exception() for task in tasks.values()):
            waits = [f"rank {rank} ({handles[rank]})" for rank, task in tasks.items() if task in unfinished]
            late = OperationTimeout(f"{', '.join(waits)} not done after {timeout_s:g} s")
        elif unfinished:
            await asyncio.wait(unfinished, timeout=_EXPLANATION_S)
    finally:
        await cancel(list(tasks.values()))
        failed = [rank for rank, task in tasks.items() if requests[rank].passes and (task.cancelled() or task.exception())]
        if failed and fence is not None:
            comm_id = requests[failed[0]].commId
            await asyncio.shield(fence.fence(comm_id, handles, failed))
        if any(task.cancelled() or task.exception() for task in tasks.values()):
            answers = await asyncio.shield(roll_back(handles, requests))
    failures = [error for task in tasks.values() if not task.cancelled() and (error := task.exception()) is not None]
    error = late or min(failures, key=_vagueness, default=None)
    if error is not None:
        if isinstance(error, OperationTimeout) and any(request.operations for request in requests.values()):
            raise RoundTimeout(str(error), await _ask(handles, requests, answers)) from error
        raise error
    return sum(task.result().bytesSent for task in tasks.values())


async def execute(rank: int, handle: DeviceHandle, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
    """One rank's part of a round.

    Raises:
        PeerUnavailable: the device is lost, before or meanwhile.
        DsmlError: what it fails with.
    """
    task, loss = asyncio.current_task(), handle.until_lost()
    assert task is not None
    loss.add_done_callback(lambda ended: ended.cancelled() or task.cancel())
    try:
        response = await handle.call("Execute", request, timeout_s=None)
    except asyncio.CancelledError:
        if not loss.done():
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()  # the cancellation was ours and becomes an error
        raise PeerUnavailable(f"rank {rank}: {loss.result()}") from None
    except CommNotFound:
        raise lost_communicator(rank, handle) from None
    except DsmlError as error:
        raise type(error)(f"rank {rank} ({handle}): {error}") from error
    finally:
        loss.cancel()
    return cast("pb.ExecuteResponse", response)


async def roll_back(handles: Sequence[DeviceHandle], requests: Mapping[int, pb.ExecuteRequest]) -> Answers:
    """Has all ranks of an atomic round undo it; those that do not answer are given up, as they may have what they did."""
    answers = await settle(handles, requests, pb.QuiesceRequest.ROLL_BACK)
    for rank in answers.silent:
        handles[rank].give_up("has not undone what it did of an operation that failed")
    return answers


async def settle(
    handles: Sequence[DeviceHandle], requests: Mapping[int, pb.ExecuteRequest], settlement: pb.QuiesceRequest.Settlement
) -> Answers:
    """Tells all ranks of an atomic round what becomes of what it wrote; returns when they have done it, or are gone.

    Ranks of other rounds are not asked.
    """
    return await _quiesce(handles, {rank: request for rank, request in requests.items() if request.round}, settlement)


async def _ask(handles: Sequence[DeviceHandle], requests: Mapping[int, pb.ExecuteRequest], known: Answers) -> Answers:
    """What the ranks of a round that has ended waited for, also where there was nothing to settle."""
    rest = {rank: request for rank, request in requests.items() if not request.round}
    more = await _quiesce(handles, rest, pb.QuiesceRequest.UNSETTLED)
    return Answers({**known.waits, **more.waits}, known.silent | more.silent)


async def _quiesce(
    handles: Sequence[DeviceHandle], requests: Mapping[int, pb.ExecuteRequest], settlement: pb.QuiesceRequest.Settlement
) -> Answers:
    waits: dict[int, Sequence[pb.Wait]] = {}

    async def tell(rank: int, request: pb.ExecuteRequest) -> None:
        message = pb.QuiesceRequest(
            commId=request.commId, deviceId=request.deviceId, round=request.round, settlement=settlement
        )
        try:
            waits[rank] = (await handles[rank].call("Quiesce", message, _SETTLE_TIMEOUT_S)).waits
        except DsmlError as error:
            # Who has not heard of a COMMIT hears of the next operation, or of the communicator's end.
            level = logging.WARNING if settlement == pb.QuiesceRequest.ROLL_BACK else logging.DEBUG
            log.log(level, "%s has not settled its last operation: %s", handles[rank], error)

    await asyncio.gather(*(tell(rank, request) for rank, request in requests.items()))
    return Answers(waits, frozenset(requests.keys() - waits.keys()))


def lost_communicator(rank: int, handle: DeviceHandle) -> PeerUnavailable:
    """The error of an operation with a device whose server knows nothing of the communicator."""
    return PeerUnavailable(f"rank {rank}: {handle} has lost the communicator; its server was restarted")


def _vagueness(error: BaseException) -> int:
    """Orders the errors of several ranks: what happened first, what followed from it last."""
    if isinstance(error, OperationAborted):
        return 3
    if isinstance(error, OperationTimeout):
        return 2
    return 1 if isinstance(error, PeerUnavailable) else 0


async def cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels what is not done, and waits for it to end."""
    unfinished = [task for task in tasks if not task.done()]
    for task in unfinished:
        task.cancel()
    if unfinished:
        await asyncio.gather(*unfinished, return_exceptions=True)


async def all_or_first_error(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all; the first error cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel(tasks)
