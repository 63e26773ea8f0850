"""Communicators and collectives, for the one driver of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import numpy as np

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.errors import CommNotFound, CommNotReady, DsmlError, InvalidValue, RankMismatch
from dsml_gpu.reduction import wire_dtype
from dsml_gpu.schedules import ALL_REDUCE
from dsml_gpu.wire import gpu_sim_pb2 as pb

OPS = {name.lower(): number for name, number in pb.ReduceOp.items()}
TRANSPORTS = {name.lower(): number for name, number in pb.Transport.items()}
ALGORITHMS = tuple(ALL_REDUCE)


@dataclass(frozen=True, slots=True)
class CollectiveResult:
    """What a collective, or a group of them, did.

    Attributes:
        algorithm: its name; empty for a group of several.
        transports: names of the transports that carried data; empty where nothing had to move.
        elapsed_s: from the start of the coordinator's control round to the last rank's answer.
        bytes_sent: payload that all ranks together sent.
    """

    algorithm: str
    transports: tuple[str, ...]
    elapsed_s: float
    bytes_sent: int


class Group:
    """What `Communicator.group` gives; `result` is set when the group has run."""

    def __init__(self) -> None:
        self.result: CollectiveResult | None = None


class Communicator:
    """Devices with ranks 0..n-1. Made by `Client.communicator`; ends with `close` or its ``with`` block.

    Attributes:
        comm_id: its id at the coordinator.
        devices: rank r is ``devices[r]``.
    """

    def __init__(self, connection: CoordinatorConnection, response: pb.CommInitResponse) -> None:
        self._connection = connection
        self.comm_id: int = response.commId
        self._closed = False
        self.devices = tuple(
            Device(connection, metadata, self.comm_id, lambda: self._closed) for metadata in response.devices
        )

    @property
    def nranks(self) -> int:
        return len(self.devices)

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

    def all_reduce(
        self,
        arrays: Sequence[DeviceArray],
        *,
        op: str = "sum",
        algorithm: str = "ring",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Reduces ``arrays[0] .. arrays[n-1]`` element by element, in place: afterwards each holds the result.

        Called once for all ranks, by whoever drives them. Returns when every rank is done; inside `group` it returns at
        once and the group's end runs it.

        Args:
            arrays: one per rank, in the order of ranks, all of one type and size.
            op: ``"sum"``, ``"prod"``, ``"min"``, ``"max"`` or ``"avg"``.
            algorithm: ``"ring"`` or ``"naive"``.
            timeout_s: deadline; None for the client's.

        Returns:
            What it did; None inside a group.

        Raises:
            RankMismatch: not one array for each rank, on its device.
            InvalidValue: types or sizes differ, or an unknown `op` or `algorithm`.
            PeerUnavailable: a device is gone; buffers are undefined.
            OperationTimeout: nothing moved for the coordinator's stall timeout, or the deadline passed.
        """
        self._require_open()
        self._check_ranks(arrays)
        count, dtype = arrays[0].nbytes, cast("pb.DataType", wire_dtype(arrays[0].dtype))
        mem_addrs = {rank: pb.MemAddr(value=array.addr) for rank, array in enumerate(arrays)}
        op_number = cast("pb.ReduceOp", _lookup(OPS, op, "op"))
        request: Any
        if algorithm == "ring":
            method = "AllReduceRing"
            request = pb.AllReduceRingRequest(
                commId=self.comm_id, count=count, op=op_number, memAddrs=mem_addrs, dtype=dtype
            )
        elif algorithm == "naive":
            method = "NaiveAllReduce"
            request = pb.NaiveAllReduceRequest(
                comm_id=self.comm_id, count=count, op=op_number, mem_addrs=mem_addrs, dtype=dtype
            )
        else:
            raise InvalidValue(f"unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
        response = self._connection.call(method, request, timeout_s or self._connection.collective_timeout_s)
        return _result(response)

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
        group.result = _result(
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

    def _require_open(self) -> None:
        if self._closed:
            raise CommNotReady(f"{self!r} is closed")

    def _check_ranks(self, arrays: Sequence[DeviceArray]) -> None:
        if len(arrays) != self.nranks:
            raise RankMismatch(f"{self.nranks} ranks need one array each, got {len(arrays)}")
        for rank, (array, device) in enumerate(zip(arrays, self.devices, strict=True)):
            array._require_alive()
            if array.device.device_id != device.device_id:
                raise RankMismatch(
                    f"rank {rank} is device {device.device_id}, but its array is on device {array.device.device_id}"
                )
            if array.dtype != arrays[0].dtype or array.nbytes != arrays[0].nbytes:
                raise InvalidValue(
                    f"all arrays must have one type and size: rank 0 has {arrays[0].size} of {arrays[0].dtype}, "
                    f"rank {rank} has {array.size} of {array.dtype}"
                )


def _lookup(names: dict[str, int], name: str, what: str) -> int:
    number = names.get(name.lower())
    if number is None:
        raise InvalidValue(f"unknown {what} {name!r}; known: {', '.join(names)}")
    return number


def _result(response: Any) -> CollectiveResult | None:
    if not response.HasField("result"):
        return None
    result = response.result
    transports = tuple(pb.Transport.Name(number).lower() for number in result.transports)
    return CollectiveResult(result.algorithm, transports, result.elapsedNs / 1e9, result.bytesSent)


def init_request(ndevices: int | None, device_ids: Sequence[int] | None, transport: str) -> pb.CommInitRequest:
    """The CommInit that `Client.communicator` sends."""
    if ndevices is None:
        ndevices = len(device_ids or ())
    if ndevices < 1:
        raise InvalidValue(f"a communicator needs at least 1 device, not {ndevices}")
    return pb.CommInitRequest(
        numDevices=ndevices,
        deviceIds=device_ids or (),
        transport=pb.Transport.Name(_lookup(TRANSPORTS, transport, "transport")),
    )
