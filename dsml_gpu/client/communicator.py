"""Communicators, for the one driver of all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, cast

import numpy as np

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.checkpoints import CheckpointJob, Checkpoints
from dsml_gpu.client.collectives import ON_FAILURE, TRANSPORTS, Collectives, lookup
from dsml_gpu.client.epochs import Epochs
from dsml_gpu.client.groups import Group
from dsml_gpu.client.results import CollectiveResult
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.errors import CommNotFound, DsmlError, GroupMisuse, InvalidValue, RankMismatch
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Communicator(Collectives):
    """Devices with ranks 0..n-1, and the collectives on them.

    Made by `Client.communicator`; ends with `close` or its ``with`` block.

    Attributes:
        comm_id: its id at the coordinator.
    """

    def __init__(self, connection: CoordinatorConnection, response: pb.CommInitResponse) -> None:
        self._connection = connection
        connection.open_lane(response.lane, response.commId)
        self.comm_id: int = response.commId
        self._closed = False
        self._group: Group | None = None
        self._checkpoints = Checkpoints(connection, self.comm_id)
        self._epochs = Epochs(self._device, response.devices)

    def _device(self, metadata: pb.DeviceMetadata) -> Device:
        return Device(self._connection, metadata, self.comm_id, lambda: self._closed)

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
        self._checkpoints.tracked.add(arrays)
        return arrays

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float64) -> list[DeviceArray]:
        """One new array on each device, with undefined contents."""
        self._require_open()
        arrays = [device.empty(shape, dtype) for device in self.devices]
        self._checkpoints.tracked.add(arrays)
        return arrays

    @contextmanager
    def group(self, *, blocking: bool = True, timeout_s: float | None = None) -> Iterator[Group]:
        """Collectives inside run together at the end of the block, in order, as one round of control messages.

        An exception inside the block drops them.

        Args:
            blocking: return from the block when all is done; otherwise at once; `status` and `finalize` tell the end, and
                `DeviceArray.get` waits for it.

        Raises:
            GroupMisuse: a group is open; groups do not nest.
            DsmlError: what the group fails with, at the end. A call that is wrong is refused where it stands, but for one
                that sends slices between processes where the coordinator is to use p2p only: that one at the end.
        """
        self._require_open()
        if self._group is not None:
            raise GroupMisuse(f"{self!r} has an open group of {len(self._group.requests)} operations already")
        group = self._group = Group()
        try:
            yield group
        finally:
            self._group = None
        if not group.requests:
            group.result = CollectiveResult("", (), 0.0, 0) if blocking else None
            return
        # One message, which can be sent again: the coordinator that gets it need not be the one that was there at the start.
        request = pb.GroupEndRequest(commId=self.comm_id, nonBlocking=not blocking, operations=group.requests)
        group.result = self._heard(
            self._connection.call("GroupEnd", request, timeout_s or self._connection.collective_timeout_s)
        )

    def grow(self, ndevices: int | None = None, *, device_ids: Sequence[int] | None = None) -> None:
        """Takes more devices in, which get the ranks behind the last one. Ordered after all collectives issued before.

        Later calls need one array for each of the ranks that there are then.

        Args:
            ndevices: how many, any free ones.
            device_ids: exactly these.

        Raises:
            OutOfDevices: not enough devices are free.
            DeviceNotFound, PeerUnavailable: a named device does not exist or answer.
            InvalidValue: a device is in the communicator already.
            GroupMisuse: a group is open.
        """
        self._require_open()
        if self._group is not None:
            raise GroupMisuse(f"{self!r} has an open group, and cannot grow before its end")
        number = len(device_ids or ()) if ndevices is None else ndevices
        if number < 1:
            raise InvalidValue(f"a communicator grows by at least 1 device, not {number}")
        request = pb.CommGrowRequest(commId=self.comm_id, numDevices=number, deviceIds=device_ids or ())
        answer = self._connection.call("CommGrow", request, self._connection.collective_timeout_s)
        self._epochs.follow(answer)

    def checkpoint(
        self, url: str | os.PathLike[str], arrays: Mapping[str, Sequence[DeviceArray]] | None = None
    ) -> CheckpointJob:
        """Writes arrays of all ranks to a checkpoint, as they are after all collectives issued before.

        Returns when the devices have copied them, so they may change again; the files are written in the background. Until
        all of them are whole the checkpoint before, if there is one, stays the one that `restore` finds. `close` waits for
        all checkpoints.

        Args:
            url: a folder of its own: a path on the devices' hosts, the same folder for all of them and the coordinator, or
                anything that fsspec takes (``s3://...``) where its plug-in is installed on these hosts.
            arrays: by name, one for each rank; None: all that `array`, `empty` and `restore` of this communicator have made
                and that are still referred to, under the names that they were restored by, or array0, array1 ... in the
                order in which they were made.

        Raises:
            InvalidValue: no arrays, or of a type that the wire has not.
            RankMismatch: not one array for each rank, on its device.
            GroupMisuse: a group is open.
            PeerUnavailable: a device is gone.
        """
        self._require_open()
        self._require_no_group()
        named = self._checkpoints.tracked.live() if arrays is None else arrays
        left = {name: self._epochs.left(each, name) for name, each in named.items()}
        return self._checkpoints.save(url, left, self._epochs.present)

    def restore(
        self,
        url: str | os.PathLike[str],
        into: Mapping[str, Sequence[DeviceArray]] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, list[DeviceArray]]:
        """Reads the arrays of a checkpoint, which may be one of another number of ranks. All files are checked before any
        array changes. Ordered after all collectives issued before.

        With as many ranks as the checkpoint has, each gets its own parts. Otherwise parts that were the same on all ranks go
        to each rank, and others are put together along the first axis and cut anew, as ``numpy.array_split`` does.

        Args:
            into: arrays by their names in the checkpoint, one for each rank; None: new ones for all of them.

        Raises:
            CheckpointNotFound: there is no complete checkpoint.
            CheckpointDamaged: a file is not what was written; the message names it and the place.
            InvalidValue: types or shapes do not fit.
            GroupMisuse: a group is open.
        """
        self._require_open()
        self._require_no_group()
        left = None if into is None else {name: self._epochs.left(arrays, name) for name, arrays in into.items()}
        return self._checkpoints.restore(url, self._epochs.present, left, timeout_s)

    def _require_no_group(self) -> None:
        if self._group is not None:
            raise GroupMisuse(f"{self!r} has an open group, which checkpoints cannot be part of")

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
        """Waits for all collectives and checkpoints, gives the devices back and frees the arrays made here. Idempotent."""
        if self._closed:
            return
        self._checkpoints.wait()
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


def init_request(
    ndevices: int | None, device_ids: Sequence[int] | None, transport: str, on_failure: str | None
) -> pb.CommInitRequest:
    """The CommInit that `Client.communicator` sends."""
    if ndevices is None:
        ndevices = len(device_ids or ())
    if ndevices < 1:
        raise InvalidValue(f"a communicator needs at least 1 device, not {ndevices}")
    return pb.CommInitRequest(
        numDevices=ndevices,
        deviceIds=device_ids or (),
        transport=pb.Transport.Name(lookup(TRANSPORTS, transport, "transport")),
        onFailure=cast("pb.OnFailure", 0 if on_failure is None else lookup(ON_FAILURE, on_failure, "on_failure")),
    )
