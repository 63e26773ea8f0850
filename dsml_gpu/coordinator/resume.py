"""A coordinator goes on with the communicators of the one before, which was killed or stopped.

Devices keep their memory and what was joined; the journal has who is in which communicator. What is between the two is
settled here, before the first request is served: each device of a communicator ends what the dead coordinator had it do, and
says which round it has not settled. That is kept where the journal has it (`commits`), and undone where not; then the
client's second request runs the operation as if it had never begun.

A device that does not answer in time, or is another process, is gone for these communicators: their next operation goes on
without it, or not, as for any other loss. Where it comes back, it is told to leave them.

Rounds of passes over shared memory that may have begun to write are brought to their end after that (`Communicator.finish`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.epochs import Epoch
from dsml_gpu.coordinator.records import KnownCommunicator, Member, Membership, Outcome, Recovered
from dsml_gpu.coordinator.registry import DeviceRegistry
from dsml_gpu.errors import REFUSALS, DsmlError, InvalidValue
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: Device servers are waited for so long. Clients wait meanwhile.
_WAIT_S = 2.0
_BETWEEN_TRIES_S = 0.1
#: For a device to end what it does, and to settle it.
_SETTLE_TIMEOUT_S = 2.0
#: Methods of operations, whose end is a communicator's status.
_OPERATIONS = frozenset({"AllReduceRing", "NaiveAllReduce", "Collective", "GroupEnd"})
#: Of errors that an operation is refused with before it begins, which change no status.
_REFUSALS = frozenset({*REFUSALS, "NOT_FOUND"})


@dataclass(frozen=True, slots=True)
class Past:
    """What a communicator was with the coordinator before.

    Attributes:
        epochs: all of them, in order.
        process_uids: of each rank of the last epoch, of the process that is in it; empty: it is gone.
        finalized: it takes no more operations.
        status: how its last operation ended, and why.
    """

    epochs: Sequence[Epoch]
    process_uids: Sequence[str]
    finalized: bool
    status: tuple[pb.Status, str]


@dataclass(frozen=True, slots=True)
class Resumed:
    """A communicator that goes on.

    Attributes:
        known: as the journal has it.
        handles: of each rank.
    """

    known: KnownCommunicator
    handles: Sequence[DeviceHandle]
    past: Past


async def resume(
    recovered: Recovered, registry: DeviceRegistry, committed: Callable[[int], frozenset[int]]
) -> tuple[list[Resumed], list[int]]:
    """Finds the devices of all communicators, and has them settle what they did.

    Args:
        recovered: of the journal.
        committed: numbers of the rounds of a communicator that are to be kept.

    Returns:
        Those that go on, and ids of those that cannot: they had devices of the dead process, or none is left.
    """
    memberships: defaultdict[int, list[Membership]] = defaultdict(list)
    for membership in recovered.memberships:
        memberships[membership.comm_id].append(membership)
    present = [memberships[one.comm_id][-1] for one in recovered.communicators if memberships[one.comm_id]]
    await _find_servers(registry, {member.address for one in present for member in one.members if not member.embedded})
    resumed, over = [], []
    for one in recovered.communicators:
        epochs = memberships[one.comm_id]
        why = _why_over(registry, epochs)
        if why:
            log.warning("communicator %d is over: %s", one.comm_id, why)
            over.append(one.comm_id)
            _drop(registry, one.comm_id, epochs, keep=())
            continue
        handles = [registry.expected(member.address, member.device_id) for member in epochs[-1].members]
        _drop(registry, one.comm_id, epochs[:-1], keep=handles)
        past = Past(
            [Epoch(epoch.epoch, tuple(member.seat for member in epoch.members)) for epoch in epochs],
            [
                member.process_uid if _is_same(handle, member) else ""
                for handle, member in zip(handles, epochs[-1].members, strict=True)
            ],
            one.finalized,
            _status(one.comm_id, recovered),
        )
        resumed.append(Resumed(one, handles, past))
    settled = await asyncio.gather(*(_settled(one, committed(one.known.comm_id)) for one in resumed))
    return settled, over


async def _find_servers(registry: DeviceRegistry, addresses: Iterable[str]) -> None:
    """Has device servers answer that were there before; they need not have registered anew."""
    until_s = time.monotonic() + _WAIT_S
    await asyncio.gather(*(_find_server(registry, address, until_s) for address in addresses))


async def _find_server(registry: DeviceRegistry, address: str, until_s: float) -> None:
    while (remaining_s := until_s - time.monotonic()) > 0:
        try:
            await asyncio.wait_for(registry.register(address), remaining_s)
            return
        except InvalidValue as error:
            log.warning("%s", error)
            return
        except asyncio.TimeoutError:
            break
        except DsmlError:
            await asyncio.sleep(_BETWEEN_TRIES_S)
    log.warning("the device server at %s does not answer; communicators go on without it", address)


def _why_over(registry: DeviceRegistry, epochs: Sequence[Membership]) -> str:
    """Why a communicator cannot go on; empty: it can."""
    members = epochs[-1].members if epochs else ()
    if not members:
        return "the journal does not have its devices"
    embedded = [str(member.device_id) for member in members if member.embedded]
    if embedded:
        return f"its devices {', '.join(embedded)} were in the process of the coordinator that has ended"
    handles = [registry.expected(member.address, member.device_id) for member in members]
    if all(not handle.lost and not _is_same(handle, member) for handle, member in zip(handles, members, strict=True)):
        return "the servers of all of its devices were restarted"
    return ""


def _is_same(handle: DeviceHandle, member: Member) -> bool:
    """Whether a device is there, in the process that it was in."""
    return handle.reachable and handle.metadata.processUid == member.process_uid


def _drop(registry: DeviceRegistry, comm_id: int, epochs: Iterable[Membership], keep: Sequence[DeviceHandle]) -> None:
    """Has devices that were in a communicator, and are not any more, hear of that: they may not have before."""
    gone = {(member.device_id, member.process_uid) for one in epochs for member in one.members if not member.embedded}
    for handle in registry.handles:
        if handle not in keep and (handle.device_id, handle.metadata.processUid) in gone:
            handle.drop(comm_id)


def _status(comm_id: int, recovered: Recovered) -> tuple[pb.Status, str]:
    for outcome in reversed(recovered.outcomes):
        if outcome.comm_id == comm_id and outcome.method in _OPERATIONS and not _is_refusal(outcome):
            return (pb.SUCCESS, "") if outcome.refused is None else (pb.FAILED, outcome.refused.message)
    if any(one.comm_id == comm_id for one in recovered.rounds):
        return pb.SUCCESS, ""
    return pb.IN_PROGRESS, ""


def _is_refusal(outcome: Outcome) -> bool:
    return outcome.refused is not None and outcome.refused.code in _REFUSALS


async def _settled(one: Resumed, committed: frozenset[int]) -> Resumed:
    """The communicator, once its devices have settled what they did; those that have not are gone."""
    past, comm_id = one.past, one.known.comm_id

    async def uid(handle: DeviceHandle, process_uid: str) -> str:
        return process_uid if process_uid and await _settle(comm_id, handle, committed) else ""

    # First all: some have the memory of others open, and may still write there what is then undone.
    await asyncio.gather(
        *(_end_work(comm_id, handle) for handle, one in zip(one.handles, past.process_uids, strict=True) if one)
    )
    uids = await asyncio.gather(*(map(uid, one.handles, past.process_uids)))
    log.info(
        "communicator %d goes on in epoch %d with %s", comm_id, past.epochs[-1].number, ", ".join(map(str, one.handles))
    )
    return Resumed(one.known, one.handles, Past(past.epochs, uids, past.finalized, past.status))


async def _end_work(comm_id: int, handle: DeviceHandle) -> None:
    try:
        await handle.call("Quiesce", pb.QuiesceRequest(commId=comm_id, deviceId=handle.device_id), _SETTLE_TIMEOUT_S)
    except DsmlError as error:  # it is asked once more
        log.debug("%s has not ended what it did for communicator %d: %s", handle, comm_id, error)


async def _settle(comm_id: int, handle: DeviceHandle, committed: frozenset[int]) -> bool:
    """Whether a device has ended what it did for a communicator, and has kept or undone it."""
    request = pb.QuiesceRequest(commId=comm_id, deviceId=handle.device_id)
    try:
        request.round = (await handle.call("Quiesce", request, _SETTLE_TIMEOUT_S)).unsettledRound
        if request.round:
            keep = request.round in committed
            request.settlement = pb.QuiesceRequest.COMMIT if keep else pb.QuiesceRequest.ROLL_BACK
            await handle.call("Quiesce", request, _SETTLE_TIMEOUT_S)
            log.info("%s has %s what it did last for communicator %d", handle, "kept" if keep else "undone", comm_id)
    except DsmlError as error:
        log.warning("%s has not settled what it did for communicator %d: %s", handle, comm_id, error)
        return False
    return True
