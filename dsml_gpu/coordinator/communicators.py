"""The communicators of a coordinator: how they come into being, go on after its predecessor, and end."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence

from dsml_gpu.coordinator.checkpoints import Checkpoints, LastCheckpoint
from dsml_gpu.coordinator.choice import Chooser
from dsml_gpu.coordinator.commits import Commits
from dsml_gpu.coordinator.communicator import Communicator
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.epochs import Epoch
from dsml_gpu.coordinator.journal import Journal
from dsml_gpu.coordinator.outcomes import Outcomes, asked
from dsml_gpu.coordinator.ranks import RunSettings
from dsml_gpu.coordinator.records import (
    Begun,
    KnownCommunicator,
    Member,
    Membership,
    Outcome,
    Recovered,
    Refused,
)
from dsml_gpu.coordinator.registry import DeviceRegistry
from dsml_gpu.coordinator.remembered import forget
from dsml_gpu.coordinator.replacement import Allocations, Place, replace
from dsml_gpu.coordinator.resume import resume
from dsml_gpu.coordinator.settings import CoordinatorSettings
from dsml_gpu.errors import CommNotFound, DsmlError, InvalidValue
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)


class Communicators:
    """All communicators of a coordinator, and the devices that they have. To each of them it is the `members.Keeper`.

    Args:
        journal: gets who is in which; see `record` for when it hears of new ones.
        recovered: what it had of the coordinator before.
        outcomes: of the operations that clients may ask for again.
        chooser: chooses algorithms.

    Attributes:
        checkpoints: of all of them.
        allocations: what was allocated for each of them.
    """

    def __init__(
        self,
        registry: DeviceRegistry,
        settings: CoordinatorSettings,
        journal: Journal,
        recovered: Recovered,
        outcomes: Outcomes,
        chooser: Chooser,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._journal = journal
        self._recovered = recovered
        self._outcomes = outcomes
        self._commits = Commits(journal, recovered.rounds, recovered.begun, outcomes.has)
        self._chooser = chooser
        self._known: dict[int, Communicator] = {}
        self.checkpoints = Checkpoints(settings.operation_timeout_s)
        self.allocations = Allocations()
        # Devices are chosen after a round of questions to their servers; nobody else may choose meanwhile.
        self._choosing = asyncio.Lock()

    def get(self, comm_id: int) -> Communicator:
        """The communicator of an id. Raises CommNotFound."""
        comm = self._known.get(comm_id)
        if comm is None:
            raise CommNotFound(f"no communicator {comm_id}; {len(self._known)} exist")
        return comm

    # ---- from the first to the last -----------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Goes on with the communicators of the coordinator before. To be called once, before anything else."""
        resumed, over = await resume(self._recovered, self._registry, self._commits.numbers)
        self._recovered = Recovered()
        for comm_id in over:
            self._journal.forget_communicator(comm_id)
            self._commits.forget(comm_id)
        for one in resumed:
            known = one.known
            settings = self._run_settings(known.transport)
            comm = self._known[known.comm_id] = Communicator(
                known.comm_id, one.handles, self._chooser, settings, known.on_failure, self, self._commits, one.past
            )
            for handle in one.handles:
                handle.comm_ids.add(known.comm_id)
            begun = self._commits.unfinished(known.comm_id)
            if begun is not None:
                await self._bring_to_its_end(comm, begun)
            if known.checkpoint:
                self.checkpoints.set_last(known.comm_id, LastCheckpoint(known.checkpoint, known.checkpoint_seats))

    async def _bring_to_its_end(self, comm: Communicator, begun: Begun) -> None:
        try:
            if await comm.finish(begun):
                log.info("communicator %d: what was under way over shared memory has been brought to its end", comm.comm_id)
        except DsmlError as error:
            log.error("communicator %d: %s", comm.comm_id, error)
            if begun.key:
                # Its client is not to run it on what is in the buffers now.
                self._outcomes.keep(Outcome(begun.key, comm.comm_id, "", refused=Refused.of(error)))
        self._commits.forget_begun(comm.comm_id)

    async def create(self, number: int, device_ids: Sequence[int], transport: int, on_failure: int) -> Communicator:
        """A new communicator, whose devices have joined. The journal does not have it before `record`.

        Args:
            number: of devices.
            device_ids: which; empty: any that are free.
            transport: number of ``enum Transport`` that it is forced to.
            on_failure: number of ``enum OnFailure``, not 0.

        Raises:
            DsmlError: what `DeviceRegistry.take`, `DeviceRegistry.take_named` and `Communicator.join` refuse with.
        """
        comm_id = _new_comm_id()
        handles = await self._take(number, device_ids, comm_id)
        settings = self._run_settings(transport)
        comm = Communicator(comm_id, handles, self._chooser, settings, on_failure, self, self._commits)
        try:
            await comm.join()
        except BaseException:
            await asyncio.shield(self._give_back(comm))
            raise
        self._known[comm_id] = comm
        return comm

    def record(self, comm_id: int, transport: int, on_failure: int) -> None:
        """Has the journal take one that was just created, with what it was created with.

        By itself, so that it is written together with the answer to the client (`Outcomes.once`).
        """
        self._journal.put_communicator(KnownCommunicator(comm_id, transport, on_failure))
        comm = self._known[comm_id]
        self.begin_epoch(comm_id, comm.epoch, comm.handles)

    async def grow(self, comm: Communicator, number: int, device_ids: Sequence[int]) -> None:
        """Has a communicator take in more devices.

        Args:
            number: of devices.
            device_ids: which; empty: any that are free.

        Raises:
            InvalidValue: a device is in it already.
            DsmlError: what `DeviceRegistry.take`, `DeviceRegistry.take_named` and `Communicator.grow` refuse with.
        """
        comm.check_growing(number)
        await comm.leave_lost_behind()  # a device that was restarted may come in anew
        named = {handle.device_id for handle in comm.handles} & set(device_ids)
        if named:
            raise InvalidValue(f"device {min(named)} is in communicator {comm.comm_id} already")
        handles = await self._take(number, device_ids, comm.comm_id)
        try:
            await comm.grow(handles)
        except BaseException:
            self._registry.release(handles, comm.comm_id)
            raise

    async def retire(self, handle: DeviceHandle) -> None:
        """Returns when a device's communicators have ended what they run, and go on without it."""
        for comm in [self._known[comm_id] for comm_id in sorted(handle.comm_ids) if comm_id in self._known]:
            await comm.retire(handle)

    async def finalize(self, comm: Communicator) -> None:
        """See `Communicator.finalize`; holds for the next coordinator as well."""
        await comm.finalize()
        self._journal.change_communicator(comm.comm_id, finalized=True)

    async def destroy(self, comm: Communicator) -> None:
        """Ends a communicator after what it runs, and gives its devices back. Idempotent."""
        await comm.finalize()
        self.checkpoints.forget(comm.comm_id)
        if self._known.pop(comm.comm_id, None) is not None:  # otherwise another call was faster
            await asyncio.shield(self._give_back(comm))

    async def drain(self, drain_s: float) -> None:
        """Waits for running collectives, and cancels what is not done after `drain_s`."""
        await asyncio.gather(*(comm.drain(drain_s) for comm in list(self._known.values())))

    async def close(self) -> None:
        """Takes leave of all devices, but for those of communicators that a next coordinator can go on with."""
        over = [comm for comm in self._known.values() if not self._outlasts(comm)]
        await asyncio.gather(*(self.destroy(comm) for comm in over))

    def _outlasts(self, comm: Communicator) -> bool:
        return self._journal.lasts and not any(handle.embedded for handle in comm.handles)

    async def _give_back(self, comm: Communicator) -> None:
        try:
            await comm.leave()
        finally:
            self._registry.release(comm.handles, comm.comm_id)
            self.allocations.forget(comm.comm_id)
            self._commits.forget(comm.comm_id)
            forget()
            # Last: until then a client's second try finds it, and its memory is not left behind.
            self._journal.forget_communicator(comm.comm_id)

    async def _take(self, number: int, device_ids: Sequence[int], comm_id: int) -> list[DeviceHandle]:
        async with self._choosing:
            if device_ids:
                return await self._registry.take_named(list(device_ids), comm_id)
            return await self._registry.take(number, comm_id)

    def _run_settings(self, transport: int) -> RunSettings:
        settings = self._settings
        return RunSettings(transport, round(settings.stall_timeout_s * 1000), settings.operation_timeout_s, settings.atomic)

    # ---- what communicators tell their keeper -------------------------------------------------------------------------

    def begin_epoch(self, comm_id: int, epoch: Epoch, handles: Sequence[DeviceHandle], *, grows: bool = False) -> None:
        """See `members.Keeper`."""
        members = tuple(
            Member(handle.device_id, handle.address, handle.metadata.processUid, seat, handle.embedded)
            for handle, seat in zip(handles, epoch.seats, strict=True)
        )
        operation = asked.get()
        with self._journal.together():
            self._journal.put_membership(Membership(comm_id, epoch.number, members))
            if grows and operation is not None and operation.key:
                # A coordinator that dies from now on has grown it: its successor is not to do so once more.
                answer = grown(epoch, handles).SerializeToString()
                self._journal.put_outcome(Outcome(operation.key, comm_id, operation.method, answer))

    def let_go(self, comm_id: int, handles: Sequence[DeviceHandle]) -> None:
        """See `members.Keeper`."""
        for handle in handles:
            handle.drop(comm_id)
            self.allocations.drop(comm_id, handle.device_id)
        self._registry.release(handles, comm_id)

    async def replace(self, place: Place) -> DeviceHandle:
        """See `members.Keeper`."""
        spare = await replace(
            place,
            self.checkpoints.last(place.comm_id),
            self.allocations.of(place.comm_id, place.handle.device_id),
            lambda blocks: self._registry.spare(blocks, place.handle, place.comm_id),
            lambda handle: self.let_go(place.comm_id, [handle]),
        )
        self.allocations.move(place.comm_id, place.handle.device_id, spare.device_id)
        return spare


def grown(epoch: Epoch, handles: Sequence[DeviceHandle]) -> pb.CommGrowResponse:
    """The answer to CommGrow of a communicator that has grown."""
    devices = [handle.metadata for handle in handles]
    return pb.CommGrowResponse(epoch=epoch.number, devices=devices, seats=epoch.seats)


def _new_comm_id() -> int:
    """Drawn at random, so that coordinators that share devices do not collide; below 2**53, for JavaScript's numbers."""
    return secrets.randbelow((1 << 53) - 1) + 1
