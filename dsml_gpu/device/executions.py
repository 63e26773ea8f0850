"""What the devices of a server execute for communicators: how it begins, ends, and is settled.

A round of operations that is done on one rank need not be done on all. So a rank keeps what it has overwritten until the
coordinator says how the round has ended (``Quiesce``), or asks for another one, which it does only after a good end.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from dsml_gpu import failpoints
from dsml_gpu.device.device import Device, Membership
from dsml_gpu.device.executor import GroupExecution
from dsml_gpu.device.kept import KeptRanges
from dsml_gpu.device.links import LinkOpener
from dsml_gpu.device.pass_phases import PassPhases, has_begun
from dsml_gpu.device.passes import run_passes
from dsml_gpu.device.preparation import Preparation
from dsml_gpu.device.progress import Progress
from dsml_gpu.device.requests import dataflow_of_wire, moved_bytes, operations_of, pass_of
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.device.undo import Undo
from dsml_gpu.device.unsettled import Key, UnsettledRounds
from dsml_gpu.device.waits import Wait
from dsml_gpu.errors import InvalidValue
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Executions:
    """Those of the devices of one server. Not thread-safe: everything happens in the server's event loop.

    Args:
        opener: of the links to peers.
        settings: defaults for requests that name none.
        progress: slices and passes are counted there.
    """

    def __init__(self, opener: LinkOpener, settings: TransferSettings, progress: Progress) -> None:
        self._opener = opener
        self._settings = settings
        self._progress = progress
        self._preparation = Preparation()
        #: What runs, by device and communicator.
        self._executing: defaultdict[Key, set[asyncio.Task[Any]]] = defaultdict(set)
        self._unsettled = UnsettledRounds()
        #: By device and communicator, what the last execution waited for that ended otherwise than well.
        self._waits: dict[Key, Sequence[Wait]] = {}
        self._pass_phases: dict[int, PassPhases] = {}  # by device id

    def count(self) -> int:
        """How many run."""
        return sum(map(len, self._executing.values()))

    def leave(self, device: Device, comm_id: int) -> None:
        """A device leaves a communicator: nothing of it will be settled. Idempotent."""
        key = device.device_id, comm_id
        self._unsettled.leave(key)
        self._waits.pop(key, None)

    def remove(self, device_id: int) -> None:
        """A device is served no more. Idempotent."""
        self._pass_phases.pop(device_id, None)

    async def run(self, device: Device, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        """See Execute in the contract.

        Raises:
            CommNotFound, StaleEpoch: the device is not in that epoch of the communicator.
            DsmlError: as `GroupExecution.run`, `PassPhases.run`, and `operations_of`.
        """
        membership = device.membership(request.commId, request.epoch)
        key = device.device_id, request.commId
        task = asyncio.current_task()
        assert task is not None
        running = self._executing[key]
        running.add(task)
        try:
            failpoints.reach("execute.begin", rank=membership.rank, device=device.device_id)
            if request.kept:
                await self._keep(key, device, request)
            begun, bytes_sent = await self._run_passes(device, membership, request)
            if request.operations or not (request.passes or request.phase):
                bytes_sent += await self._run_operations(key, device, membership, request)
        finally:
            running.discard(task)
            if not running:
                self._executing.pop(key, None)
        return pb.ExecuteResponse(bytesSent=bytes_sent, begun=begun)

    async def quiesce(self, device: Device, request: pb.QuiesceRequest) -> pb.QuiesceResponse:
        """See Quiesce in the contract; the settlement is one of it.

        Raises:
            InternalError: from the device's memory.
        """
        key = device.device_id, request.commId
        settlement = request.settlement
        reach = partial(failpoints.reach, device=key[0], settlement=pb.QuiesceRequest.Settlement.Name(settlement))
        reach("settle.begin")
        if settlement != pb.QuiesceRequest.COMMIT:
            await self._give_up(key)
        # Asked once more without a settlement, it tells the same.
        waits = self._waits.get(key, ())
        if settlement != pb.QuiesceRequest.UNSETTLED:
            self._waits.pop(key, None)
            await self._unsettled.settle(key, request.round, roll_back=settlement == pb.QuiesceRequest.ROLL_BACK)
            if request.round and (phases := self._pass_phases.get(device.device_id)) is not None:
                phases.settle(request.round)
        reach("settle.done")
        return pb.QuiesceResponse(waits=[wait.to_wire() for wait in waits], unsettledRound=self._unsettled.round_of(key))

    async def _give_up(self, key: Key) -> None:
        """Cancels what runs; returns when it has stopped."""
        running = self._executing.get(key, set()).copy()
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _keep(self, key: Key, device: Device, request: pb.ExecuteRequest) -> None:
        """Keeps what others are about to overwrite in the device's memory."""
        self._unsettled.next_round(key)
        ranges = [(piece.recvAddr, piece.count) for piece in request.kept]
        self._unsettled.done(key, request.round, KeptRanges(device.arena, device.spare_pieces, ranges))
        await device.arena.memory.finish()

    async def _run_passes(self, device: Device, membership: Membership, request: pb.ExecuteRequest) -> tuple[bool, int]:
        """Returns whether it did something, and how many bytes it moved between the memories of different devices."""
        if request.phase not in pb.ExecuteRequest.Phase.values():
            raise InvalidValue(f"unknown phase {request.phase}")
        if not request.passes or (request.phase == pb.ExecuteRequest.RESUME and not has_begun(membership, request)):
            return False, 0
        passes = [pass_of(one, membership) for one in request.passes]
        for operator, dtype, sources, destinations, weighted in dict.fromkeys(
            (one.operator, one.dtype, len(one.sources), len(one.destinations), bool(one.weights))
            for one in passes
            if len(one.sources) > 1 or one.weights
        ):
            await self._preparation.begin(device.reducer, operator, dtype, sources, destinations, weighted=weighted)
        if request.round:
            await self._phases_of(device).run(membership, request)
        else:
            await run_passes(device, passes)
        self._progress.add(len(passes))
        return True, 0 if request.phase == pb.ExecuteRequest.PREPARE else sum(map(moved_bytes, request.passes))

    def _phases_of(self, device: Device) -> PassPhases:
        phases = self._pass_phases.get(device.device_id)
        if phases is None:
            phases = self._pass_phases[device.device_id] = PassPhases(device)
        return phases

    async def _run_operations(self, key: Key, device: Device, membership: Membership, request: pb.ExecuteRequest) -> int:
        """Returns how many bytes of payload it sent."""
        slice_bytes = request.sliceBytes or self._settings.slice_bytes
        flows = [dataflow_of_wire(program.SerializeToString()) for program in request.programs]
        operations = operations_of(request.operations, flows, device.arena, slice_bytes)
        stall_timeout_s = request.stallTimeoutMs / 1000 or self._settings.stall_timeout_s
        for operation in operations:
            weighted = operation.weight is not None
            if operation.dataflow.reduces or weighted:
                await self._preparation.begin(device.reducer, operation.operator, operation.dtype, weighted=weighted)
        links = self._opener.open(device, membership, request.links, flows)
        self._waits.pop(key, None)
        self._unsettled.next_round(key)
        undo = Undo(device.spare_pieces) if request.round else None
        execution = GroupExecution(device, membership, links, slice_bytes, stall_timeout_s, self._progress, undo)
        try:
            await execution.run(operations)
        except BaseException:
            self._waits[key] = execution.waits.present()
            if undo is not None:
                await undo.roll_back()
            raise
        if undo is not None:
            self._unsettled.done(key, request.round, undo)
        failpoints.reach("execute.done", rank=membership.rank, device=device.device_id)
        return execution.bytes_sent
