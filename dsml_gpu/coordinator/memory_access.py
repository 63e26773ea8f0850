"""Whether the ranks of a communicator have each other's memory open, and how it is taken from those who must not have it.

Devices open each other's memory when they join. From then on a rank that runs passes (`passes`) writes to the memory of
all. Devices are never trusted to have stopped because nobody heard of them: when a round of passes fails, each rank that did
not answer is asked to stop, and where one does not even answer that, the memory of all others is moved to where it has not
opened it. Then it may wake up at any time; what it writes lands in memory that nobody uses. Undisturbed operations pay
nothing for this. A failure costs a copy of what the survivors have ever touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from dsml_gpu.coordinator import passes, plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.control_round import all_or_first_error
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.errors import DsmlError, InvalidValue, MemoryNotShared, NoAnswer, PeerUnavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: For a rank to stop what it writes.
_QUIESCE_TIMEOUT_S = 2.0


class MemoryAccess:
    """Of one communicator.

    Args:
        forced_transport: number of ``enum Transport``.

    Attributes:
        all_open: every rank has the memory of every rank open.
    """

    def __init__(self, forced_transport: int) -> None:
        self._forced = forced_transport
        self.all_open = False
        self._joined_with: list[pb.SharedMemory | None] = []
        #: Of each rank, where its memory was when it was last told: a lost rank's is still there for those who have it open.
        self._places: list[pb.SharedMemory | None] = []
        self._one_process = True
        self._staging_bytes: int | None = None

    async def join(self, comm_id: int, handles: Sequence[DeviceHandle], epoch: int = 0) -> None:
        """Tells every device its rank and its peers in an epoch, and has it open their memory.

        Raises:
            InvalidValue: p2p is forced, and the devices cannot open each other's memory.
            DsmlError: what a device refuses with.
        """
        devices = [handle.metadata for handle in handles]
        uids = {device.processUid for device in devices}
        self._one_process = len(uids) == 1 and "" not in uids and len({device.backend for device in devices}) == 1
        may_open = passes.may_open_memory(devices, self._forced)
        opens = may_open and not self._one_process
        closed = await _share(handles) if opens else None
        self._joined_with = [handle.shared if opens else None for handle in handles]
        self._places = list(self._joined_with)
        self._staging_bytes = None
        responses = await all_or_first_error(
            [
                handle.call(
                    "JoinComm",
                    pb.JoinCommRequest(
                        commId=comm_id,
                        rank=rank,
                        peers=plan.peers_of(devices, rank, self._forced, self._joined_with),
                        deviceId=handle.device_id,
                        epoch=epoch,
                    ),
                )
                for rank, handle in enumerate(handles)
            ]
        )
        if may_open and closed is None:
            closed = next(
                (
                    f"{handles[rank]} cannot open the memory of {handles[unreachable.rank]}: {unreachable.reason}"
                    for rank, response in enumerate(responses)
                    for unreachable in response.unreachable
                ),
                None,
            )
        self.all_open = may_open and closed is None
        if not self.all_open and not self._one_process and self._forced == pb.P2P:
            why = closed or "they are not of one host and one backend, with one GPU for each process"
            raise InvalidValue(f"p2p is not possible between these devices: {why}")
        if closed is not None:
            log.warning("communicator %d uses gRPC: %s", comm_id, closed)

    def resume(self, handles: Sequence[DeviceHandle]) -> None:
        """The ranks have joined with the coordinator before; what they have open of each other, they have open still.

        They join again before the next operation.
        """
        self._one_process = len({handle.metadata.processUid for handle in handles}) == 1
        self._places = [None] * len(handles)

    def has_moved(self, handles: Sequence[DeviceHandle]) -> bool:
        """Whether memory of a rank is somewhere else than when it joined: then all must join again."""
        if not self.all_open or self._one_process:  # which needs not open what it has
            return False
        return any(handle.shared != joined for handle, joined in zip(handles, self._joined_with, strict=True))

    def require_links(self, call: CollectiveCall, by_passes: bool) -> None:
        """Raises InvalidValue where p2p is forced, and a call needs slices to go between processes."""
        if self._forced == pb.P2P and not by_passes and not self._one_process and call.name != "barrier":
            why = "in place" if call.copies_input else f"by {call.algorithm or 'a schedule of its own'}"
            raise InvalidValue(
                f"{call.name} {why} sends slices from rank to rank, which p2p does only within one process; between "
                f"processes it runs the algorithm {passes.ALGORITHM}"
            )

    async def staging_bytes(self, handles: Sequence[DeviceHandle]) -> int:
        """Size of the smallest staging of a rank, with its header; 0 where one has none. After `join`."""
        if self._staging_bytes is None:
            if self._one_process and await _share(handles) is not None:
                self._staging_bytes = 0
            else:
                self._staging_bytes = min(handle.shared.stagingBytes if handle.shared else 0 for handle in handles)
        return self._staging_bytes

    async def fence(self, comm_id: int, handles: Sequence[DeviceHandle], ranks: Sequence[int]) -> None:
        """See `control_round.Fence`."""
        await self.stop(comm_id, handles, ranks)

    async def stop(self, comm_id: int, handles: Sequence[DeviceHandle], ranks: Sequence[int]) -> list[int]:
        """As `fence`; returns those of the ranks that do not answer. When there are some, `reopen` must follow."""
        stopped = await asyncio.gather(*(_quiesce(handles[rank], comm_id) for rank in ranks))
        lost = [rank for rank, has in zip(ranks, stopped, strict=True) if not has]
        if not lost:
            return []
        survivors = [handle for rank, handle in enumerate(handles) if rank not in lost and not handle.lost]
        log.warning(
            "communicator %d: %s may still write; the memory of the others moves",
            comm_id,
            ", ".join(str(handles[rank]) for rank in lost),
        )
        await asyncio.gather(*(_move_memory(handle) for handle in survivors))
        return lost

    async def reopen(
        self, comm_id: int, handles: Sequence[DeviceHandle], epoch: int, ranks: Sequence[int]
    ) -> dict[int, DsmlError]:
        """Has ranks open each other's memory where it has moved to, and keep that of the others open.

        Before the next operation all must `join`, also those that are not among these ranks; see `has_moved`.

        Returns:
            The ranks that could not, and why.
        """
        if self._one_process:
            return {}
        for rank in ranks:
            self._places[rank] = handles[rank].shared or self._places[rank]
        devices = [handle.metadata for handle in handles]
        requests = {
            rank: pb.JoinCommRequest(
                commId=comm_id,
                rank=rank,
                peers=plan.peers_of(devices, rank, self._forced, self._places),
                deviceId=handles[rank].device_id,
                epoch=epoch,
            )
            for rank in ranks
        }
        answers = await asyncio.gather(
            *(handles[rank].call("JoinComm", request) for rank, request in requests.items()), return_exceptions=True
        )
        failures: dict[int, DsmlError] = {}
        for rank, answer in zip(requests, answers, strict=True):
            if isinstance(answer, DsmlError):
                failures[rank] = answer
            elif isinstance(answer, BaseException):
                raise answer
            elif answer.unreachable:
                failures[rank] = MemoryNotShared(f"{handles[rank]}: {answer.unreachable[0].reason}")
        return failures


async def _share(handles: Sequence[DeviceHandle]) -> str | None:
    """Asks devices where their memory can be opened; returns why one of them does not tell."""
    reasons = await all_or_first_error([_share_memory(handle) for handle in handles])
    return next((reason for reason in reasons if reason is not None), None)


async def _quiesce(handle: DeviceHandle, comm_id: int) -> bool:
    """Whether a device has stopped running operations of a communicator."""
    try:
        await handle.call("Quiesce", pb.QuiesceRequest(commId=comm_id, deviceId=handle.device_id), _QUIESCE_TIMEOUT_S)
    except DsmlError:
        return False
    return True


async def _share_memory(handle: DeviceHandle) -> str | None:
    """Has a device say where its memory can be opened; returns why it cannot."""
    try:
        await handle.share_memory()
    except (PeerUnavailable, NoAnswer):
        raise
    except DsmlError as error:  # an older server knows nothing of it
        return f"{handle} does not share its memory: {error}"
    return None


async def _move_memory(handle: DeviceHandle) -> None:
    """Has a device's memory move; gives the device up where it does not: somebody may write to it who was given up."""
    try:
        await handle.share_memory(move=True)
    except DsmlError as error:
        handle.give_up(f"may be written to by devices that were given up; its memory did not move: {error}")
