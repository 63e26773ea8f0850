"""Communicators, for the one driver of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.collectives import TRANSPORTS, Collectives, lookup
from dsml_gpu.client.results import CollectiveResult, result_of
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.errors import CommNotFound, DsmlError, InvalidValue, RankMismatch
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Group:
    """What `Communicator.group` gives; `result` is set when the group has run."""

    def __init__(self) -> None:
        self.result: CollectiveResult | None = None


class Communicator(Collectives):
    """Devices with ranks 0..n-1, and the collectives on them.

    Made by `Client.communicator`; ends with `close` or its ``with`` block.

    Attributes:
        comm_id: its id at the coordinator.
        devices: rank r is ``devices[r]``.
    """

    def __init__(self, connection: CoordinatorConnection, response: pb.CommInitResponse) -> None:
        self._connection = connection
        connection.open_lane(response.lane)
        self.comm_id: int = response.commId
        self._closed = False
        self.devices = tuple(
            Device(connection, metadata, self.comm_id, lambda: self._closed) for metadata in response.devices
        )

    def array(self, sources: Sequence[Any], dtype: Any = None) -> list[DeviceArray]:
        """One new array on each device: ``sources[r]`` on rank r.

        Raises:
            RankMismatch: not one source for each rank.
        """
        self._require_open()
        if len(sources) != self.nranks:
            raise RankMismatch(f"{self.nranks} ranks need one source each, got {len(sources)}")
        arrays: list[DeviceArray] = []
        try:
            for device, source in zip(self.devices, sources, strict=True):
                arrays.append(device.array(source, dtype))
        except BaseException:
            for array in arrays:
                with suppress(DsmlError):
                    array.free()
            raise
        return arrays

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float64) -> list[DeviceArray]:
        """One new array on each device, with undefined contents."""
        self._require_open()
        return [device.empty(shape, dtype) for device in self.devices]

    @contextmanager
    def group(self, *, blocking: bool = True, timeout_s: float | None = None) -> Iterator[Group]:
        """Collectives inside run together at the end of the block, in order, as one round of control messages.

        An exception inside the block drops them.

        Args:
            blocking: return from the block when all is done; otherwise at once; `status` and `finalize` tell the end, and
                `DeviceArray.get` waits for it.

        Raises:
            GroupMisuse: a group is open; groups do not nest.
        """
        self._require_open()
        self._connection.call("GroupStart", pb.GroupStartRequest(commId=self.comm_id))
        group = Group()
        try:
            yield group
        except BaseException:
            with suppress(DsmlError):  # what the caller did wrong is the error to be seen
                self._connection.call("GroupEnd", pb.GroupEndRequest(commId=self.comm_id, discard=True))
            raise
        request = pb.GroupEndRequest(commId=self.comm_id, nonBlocking=not blocking)
        group.result = result_of(
            self._connection.call("GroupEnd", request, timeout_s or self._connection.collective_timeout_s)
        )

    def status(self) -> tuple[str, str]:
        """``"IN_PROGRESS"``, ``"SUCCESS"`` or ``"FAILED"``, and why it failed."""
        response = self._connection.call("GetCommStatus", pb.GetCommStatusRequest(commId=self.comm_id))
        return pb.Status.Name(response.status), response.message

    def finalize(self, timeout_s: float | None = None) -> str:
        """Waits for all collectives; the communicator takes no more. Returns how the last one ended, as `status`."""
        response = self._connection.call(
            "CommFinalize",
            pb.CommFinalizeRequest(commId=self.comm_id),
            timeout_s or self._connection.collective_timeout_s,
        )
        return pb.Status.Name(response.status)

    def close(self) -> None:
        """Waits for all collectives, gives the devices back and frees the arrays made here. Idempotent."""
        if self._closed:
            return
        request = pb.CommDestroyRequest(commId=self.comm_id)
        with suppress(CommNotFound):  # an earlier try did end it
            self._connection.call("CommDestroy", request, self._connection.collective_timeout_s)
        self._closed = True

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"devices {[device.device_id for device in self.devices]}"
        return f"Communicator({self.comm_id}, {self.nranks} ranks, {state})"


def init_request(ndevices: int | None, device_ids: Sequence[int] | None, transport: str) -> pb.CommInitRequest:
    """The CommInit that `Client.communicator` sends."""
    if ndevices is None:
        ndevices = len(device_ids or ())
    if ndevices < 1:
        raise InvalidValue(f"a communicator needs at least 1 device, not {ndevices}")
    return pb.CommInitRequest(
        numDevices=ndevices,
        deviceIds=device_ids or (),
        transport=pb.Transport.Name(lookup(TRANSPORTS, transport, "transport")),
    )
