"""Who is in a communicator, and how it goes on when devices die, leave or come.

Each change begins an epoch (`epochs`), which the coordinator's journal has before it is used. The devices of the new epoch
join with the next operation, and those of an older one are refused by them: whoever was left behind can write nowhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.diagnosis import HeldUp
from dsml_gpu.coordinator.epochs import Epoch, Epochs
from dsml_gpu.coordinator.ranks import Ranks
from dsml_gpu.coordinator.remembered import forget
from dsml_gpu.coordinator.replacement import Place, reads_of
from dsml_gpu.coordinator.shrink import without_lost
from dsml_gpu.errors import REFUSALS, DsmlError, PeerUnavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Who keeps what a communicator must not forget, and its devices."""

    def begin_epoch(self, comm_id: int, epoch: Epoch, handles: Sequence[DeviceHandle], *, grows: bool = False) -> None:
        """A communicator is about to go on in another epoch, with these devices.

        Args:
            grows: it is the end of the operation that takes some of them in, but for their joining.
        """

    def let_go(self, comm_id: int, handles: Sequence[DeviceHandle]) -> None:
        """Devices are in a communicator no more."""

    async def replace(self, place: Place) -> DeviceHandle:
        """A device that has taken the place of a lost one. Raises DsmlError where none can."""


class Members:
    """The devices of one communicator. All calls but `gone_after` are made in the turn of these devices (`order.Turn`).

    Args:
        epochs: so far.
        ranks: of the present one.
        make_ranks: for another one, of its number and its devices.
        on_failure: number of ``enum OnFailure``, not 0.
        keeper: hears of new epochs before they are used.

    Attributes:
        ranks: the devices of the present epoch.
    """

    def __init__(
        self,
        comm_id: int,
        epochs: Epochs,
        ranks: Ranks,
        make_ranks: Callable[[int, Sequence[DeviceHandle]], Ranks],
        on_failure: int,
        keeper: Keeper,
    ) -> None:
        self._comm_id = comm_id
        self._epochs = epochs
        self.ranks = ranks
        self._make_ranks = make_ranks
        self._on_failure = on_failure
        self._keeper = keeper
        #: Why it takes no more operations; empty: it does.
        self._broken = ""

    @property
    def handles(self) -> tuple[DeviceHandle, ...]:
        """Rank r of the present epoch is ``handles[r]``."""
        return self.ranks.handles

    @property
    def epoch(self) -> Epoch:
        """The present one."""
        return self._epochs.present

    def epoch_of(self, number: int) -> Epoch:
        """The epoch of a number, 0 for the first. Raises InvalidValue where there never was one."""
        return self._epochs.of(number)

    def kept(self, epoch: Epoch) -> tuple[int, ...]:
        """The ranks of an epoch that are left, which are those of the present one, in order. Raises as `Epochs.kept`."""
        return self._epochs.kept(epoch)

    def in_present(self, call: CollectiveCall, epoch: Epoch) -> CollectiveCall:
        """A call in the numbering of an epoch, on the ranks that are left. Raises as `kept` and `shrink.without_lost`."""
        return without_lost(call, self._epochs.kept(epoch))

    def require_whole(self) -> None:
        """Raises PeerUnavailable where devices were lost, and it was not to go on without them."""
        if self._broken:
            raise PeerUnavailable(self._broken)

    # ---- who comes and leaves -----------------------------------------------------------------------------------------

    def retire(self, handle: DeviceHandle) -> None:
        """Goes on without a device that leaves. With ``FAIL``, or where it is the only one, what comes later fails."""
        left = {seat: one for seat, one in self._seated().items() if one is not handle}
        if len(left) == len(self.handles) or not left or self._on_failure == pb.FAIL:
            return
        log.info("communicator %d goes on without %s, which leaves", self._comm_id, handle)
        self._begin_epoch(left)
        self._keeper.let_go(self._comm_id, [handle])

    async def grow(self, handles: Sequence[DeviceHandle]) -> None:
        """Takes in devices, which get the ranks behind the last one.

        Raises:
            DsmlError: a device cannot join: then none has.
        """
        next_seat = self._epochs.next_seat
        before = self._seated()
        self._begin_epoch(before | dict(enumerate(handles, next_seat)), grows=True)
        try:
            await self.ranks.join()
        except BaseException:
            # Those that have joined must not stay in an epoch that the others never hear of.
            self._begin_epoch(before)
            for handle in handles:
                handle.drop(self._comm_id)
            raise

    def _seated(self) -> dict[int, DeviceHandle]:
        return dict(zip(self.epoch.seats, self.handles, strict=True))

    def _begin_epoch(self, seated: dict[int, DeviceHandle], *, grows: bool = False) -> None:
        """Goes on with these devices; they join with the next operation. Changes nothing where the keeper raises."""
        epoch, handles = self._epochs.next(seated), list(seated.values())
        self._keeper.begin_epoch(self._comm_id, epoch, handles, grows=grows)
        self._epochs.begin(epoch)
        self.ranks = self._make_ranks(epoch.number, handles)
        forget()

    # ---- who is lost --------------------------------------------------------------------------------------------------

    async def gone_after(self, error: DsmlError, stall_timeout_ms: int) -> list[int]:
        """The ranks that an operation's error comes from, if it comes from ranks that are gone. They are given up."""
        if error.code in REFUSALS:
            return []  # another membership would not change it
        held_up = error if isinstance(error, HeldUp) else None
        if held_up is not None and held_up.rank is not None and held_up.is_silent:
            self.handles[held_up.rank].give_up(held_up.why)
        silent = await self.ranks.probe()
        for rank in silent:
            self.handles[rank].give_up("does not answer")
        gone = {*silent, *self.ranks.gone()}
        if (
            not gone
            and held_up is not None
            and held_up.rank is not None
            # What is only slow is waited for much shorter.
            and 2 * held_up.waited_ms >= stall_timeout_ms
            and self._on_failure != pb.FAIL
        ):
            # It answers here, but the others do not get what it sends, or it does not take what they do.
            self.handles[held_up.rank].give_up(held_up.why)
            gone.add(held_up.rank)
        return sorted(gone)

    async def go_on_after(self, gone: Sequence[int], next_calls: Sequence[CollectiveCall]) -> list[pb.LostDevice]:
        """Goes on as `on_failure` says when ranks are gone; returns who that is.

        What was under way has been undone, or has ended well.

        Args:
            next_calls: what is to be run next, in the numbering of the present epoch.

        Raises:
            PeerUnavailable: it is not to go on, or cannot.
        """
        if self._on_failure != pb.RESTORE:
            return self.go_on_without(gone)
        lost = [_lost(rank, self.handles[rank]) for rank in gone]
        seated = self._seated()
        try:
            for one in lost:
                seat, handle = self.epoch.seats[one.rank], self.handles[one.rank]
                place = Place(self._comm_id, handle, seat, reads_of(next_calls, one.rank))
                seated[seat] = await self._keeper.replace(place)
                one.replacedBy = seated[seat].device_id
        except BaseException as error:
            came = [handle for handle in seated.values() if handle not in self.handles]
            self._keeper.let_go(self._comm_id, came)
            if isinstance(error, DsmlError):
                # The next operation tries again.
                raise PeerUnavailable(f"{_named(lost)}; nothing has taken the place: {error}") from error
            raise
        left = [self.handles[rank] for rank in gone]
        self._begin_epoch(seated)
        self._keeper.let_go(self._comm_id, left)
        return lost

    def go_on_without(self, gone: Sequence[int]) -> list[pb.LostDevice]:
        """Leaves ranks behind that are gone; returns who that is. See `go_on_after`."""
        lost = [_lost(rank, self.handles[rank]) for rank in gone]
        named = _named(lost)
        handles = [self.handles[rank] for rank in gone]
        left = {seat: handle for seat, handle in self._seated().items() if handle not in handles}
        if not left or self._on_failure != pb.SHRINK:
            self._broken = named
            raise PeerUnavailable(named)
        self._begin_epoch(left)
        log.warning("communicator %d goes on in epoch %d without %s", self._comm_id, self.epoch.number, named)
        self._keeper.let_go(self._comm_id, handles)
        return lost


def _named(lost: Sequence[pb.LostDevice]) -> str:
    return "; ".join(f"rank {one.rank}: {one.reason}" for one in lost)


def _lost(rank: int, handle: DeviceHandle) -> pb.LostDevice:
    return pb.LostDevice(
        deviceId=handle.device_id,
        rank=rank,
        reason=handle.lost or f"{handle} has lost the communicator; its server was restarted",
        detectionNs=round(handle.lost_after_s * 1e9),
    )
