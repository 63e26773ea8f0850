"""Which devices a communicator has, and had, as its client knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.errors import RankMismatch
from dsml_gpu.wire import gpu_sim_pb2 as pb


@dataclass(frozen=True, slots=True)
class Members:
    """Who is in a communicator in one of its epochs.

    Attributes:
        epoch: its number; from 1.
        devices: of each rank. A device that has taken the place of a lost one is the same object (`Device.become`).
    """

    epoch: int
    devices: tuple[Device, ...]

    @property
    def nranks(self) -> int:
        return len(self.devices)

    @property
    def identities(self) -> list[tuple[int, str]]:
        """See `Device.identity`."""
        return [device.identity for device in self.devices]

    def rank_of(self, array: DeviceArray) -> int | None:
        """The rank that an array is on; None: none."""
        identities = self.identities
        return identities.index(array.device.identity) if array.device.identity in identities else None

    def require_on(self, array: DeviceArray, rank: int) -> None:
        """Raises RankMismatch unless an array is on a rank's device."""
        device = self.devices[rank]
        if array.device.identity != device.identity:
            before = ", as it was before its server was restarted" if array.device.device_id == device.device_id else ""
            raise RankMismatch(
                f"rank {rank} is device {device.device_id}, but its array is on device {array.device.device_id}{before}"
            )


class Epochs:
    """All epochs that the client has heard of.

    Args:
        make: the `Device` of what its server says of it.
        first: devices of epoch 1.
    """

    def __init__(self, make: Callable[[pb.DeviceMetadata], Device], first: Iterable[pb.DeviceMetadata]) -> None:
        self._make = make
        self.present = Members(1, tuple(map(make, first)))
        self._known = {1: self.present}
        #: By seat; see the contract's GetCommStatusResponse.
        self._seated = dict(enumerate(self.present.devices))

    def of(self, arrays: Sequence[DeviceArray], name: str = "") -> Members:
        """The latest epoch whose ranks the arrays are on, one on each, in their order.

        Args:
            name: of the arrays, for the message.

        Raises:
            RankMismatch: there is none; the message is about the present one.
        """
        identities = [array.device.identity for array in arrays]
        for members in reversed(self._known.values()):
            if identities == members.identities:
                return members
        if len(arrays) != self.present.nranks:
            what = f"array {name!r}" if name else "array"
            raise RankMismatch(f"{self.present.nranks} ranks need one {what} each, got {len(arrays)}")
        for rank, array in enumerate(arrays):
            self.present.require_on(array, rank)
        raise AssertionError("one of them is on another device")

    def of_all(self, arrays: Iterable[DeviceArray]) -> Members:
        """The latest epoch that has the devices of all arrays; the present one where there is none."""
        identities = {array.device.identity for array in arrays}
        found = (members for members in reversed(self._known.values()) if identities <= set(members.identities))
        return next(found, self.present)

    def follow(self, told: pb.GetCommStatusResponse | pb.CommGrowResponse) -> None:
        """The communicator is in the epoch that the coordinator tells of.

        Arrays on a device whose place another one has taken are on that one from now on.
        """
        devices = []
        for seat, metadata in zip(told.seats, told.devices, strict=True):
            device = self._seated.get(seat)
            if device is None:
                device = self._seated[seat] = self._make(metadata)
            elif device.identity != (metadata.deviceId.value, metadata.processUid):
                device.become(metadata)
            devices.append(device)
        for device in self._seated.values():
            device.is_behind = device not in devices
        self.present = self._known[told.epoch] = Members(told.epoch, tuple(devices))

    def left(self, arrays: Sequence[DeviceArray], name: str) -> list[DeviceArray]:
        """Those of the arrays that are on the present devices. Raises RankMismatch as `of`."""
        self.of(arrays, name)
        present = set(self.present.identities)
        return [array for array in arrays if array.device.identity in present]
