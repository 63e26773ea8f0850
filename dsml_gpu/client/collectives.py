"""The collectives of a communicator, as the one driver of all ranks calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.groups import Group, is_surely_valid
from dsml_gpu.client.results import CollectiveResult, result_of
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.errors import CommNotReady, InvalidValue, RankMismatch
from dsml_gpu.reduction import wire_dtype
from dsml_gpu.schedules import Schedule
from dsml_gpu.wire import gpu_sim_pb2 as pb

OPS = {name.lower(): number for name, number in pb.ReduceOp.items()}
TRANSPORTS = {name.lower(): number for name, number in pb.Transport.items()}


class Collectives:
    """Collectives over devices with ranks 0..n-1. All methods have in common:

    They are called once for all ranks, by whoever drives them. They return when every rank is done; inside
    `Communicator.group` they return None at once, and the group's end runs them. `arrays` has one array for each rank, in
    the order of ranks, on that rank's device. All arrays of a call have one type.

    Where data has one block for each rank, blocks lie one behind the other. `counts` are their sizes in elements; None: as
    the arrays that hold one block each have them, or, in place, all the same.

    Args that all share:
        algorithm: name of an algorithm of this collective, ``"auto"`` for the one that the coordinator's cost model
            predicts to be the fastest, or a `Schedule` of one's own (`schedules.Builder`).
        timeout_s: deadline; None for the client's.

    Errors that all share:
        RankMismatch: not one array for each rank, on its device.
        InvalidValue: types or sizes do not fit, or an unknown name.
        BufferOverlap: arrays overlap otherwise than in place.
        ScheduleNotProved: a schedule of one's own that is not for this collective, as the coordinator sees it.
        PeerUnavailable: a device is gone. All buffers that are left are as they were, where data went over gRPC
            (`CollectiveResult.transports`); by p2p, outputs are undefined.
        OperationTimeout: nothing moved for the coordinator's stall timeout, or the deadline passed.
    """

    comm_id: int
    devices: tuple[Device, ...]
    _connection: CoordinatorConnection
    _closed: bool
    _group: Group | None

    @property
    def nranks(self) -> int:
        return len(self.devices)

    def all_reduce(
        self,
        arrays: Sequence[DeviceArray],
        out: Sequence[DeviceArray] | None = None,
        *,
        op: str = "sum",
        weights: Sequence[float] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Reduces ``arrays[0] .. arrays[n-1]`` element by element; every rank gets the result.

        Args:
            out: where it goes; None: in place.
            op: ``"sum"``, ``"prod"``, ``"min"``, ``"max"`` or ``"avg"``.
            weights: with ``"sum"``: ``arrays[r]`` counts ``weights[r]`` times (NCCL's PreMulSum). It is multiplied in its
                own type, float16 and bfloat16 in float32 and rounded once; for integers they are whole numbers.
        """
        out = arrays if out is None else out
        dtype = self._one_type(arrays, out)
        count = _one_size([*enumerate(arrays), *enumerate(out)])
        buffers = [_buffers(source, result) for source, result in zip(arrays, out, strict=True)]
        return self._reduce("ALL_REDUCE", [count], buffers, dtype, op, weights, algorithm, timeout_s)

    def reduce(
        self,
        arrays: Sequence[DeviceArray],
        out: DeviceArray | None = None,
        *,
        root: int = 0,
        op: str = "sum",
        weights: Sequence[float] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Reduces ``arrays[0] .. arrays[n-1]`` element by element; rank `root` gets the result.

        Args:
            out: on the root, where it goes; None: in place.
            op, weights: as in `all_reduce`.
        """
        self._require_root(root)
        result = _at(arrays, root) if out is None else out
        dtype = self._one_type(arrays, {root: result})
        count = _one_size([*enumerate(arrays), (root, result)])
        buffers = [_buffers(source, result if rank == root else None) for rank, source in enumerate(arrays)]
        return self._reduce("REDUCE", [count], buffers, dtype, op, weights, algorithm, timeout_s, root)

    def broadcast(
        self,
        arrays: Sequence[DeviceArray],
        source: DeviceArray | None = None,
        *,
        root: int = 0,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Copies what rank `root` has into all `arrays`.

        Args:
            source: on the root, what it has; None: ``arrays[root]``.
        """
        self._require_root(root)
        source = _at(arrays, root) if source is None else source
        dtype = self._one_type(arrays, {root: source})
        count = _one_size([*enumerate(arrays), (root, source)])
        buffers = [_buffers(source if rank == root else None, result) for rank, result in enumerate(arrays)]
        return self._run("BROADCAST", [count], buffers, dtype, algorithm, timeout_s, root=root)

    def reduce_scatter(
        self,
        arrays: Sequence[DeviceArray],
        out: Sequence[DeviceArray] | None = None,
        *,
        counts: Sequence[int] | None = None,
        op: str = "sum",
        weights: Sequence[float] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Reduces ``arrays[0] .. arrays[n-1]``, which have one block for each rank; rank r gets block r of the result.

        Args:
            out: one block each, where it goes; None: in place, block r of ``arrays[r]``.
            op, weights: as in `all_reduce`.
        """
        dtype = self._one_type(arrays, arrays if out is None else out)
        blocks = _blocks(counts, out, arrays, self.nranks)
        _require_sizes(arrays, [sum(blocks)] * self.nranks)
        if out is not None:
            _require_sizes(out, blocks)
        own = [array.addr + start * dtype.itemsize for array, start in zip(arrays, _starts(blocks), strict=True)]
        targets = own if out is None else [array.addr for array in out]
        buffers = [
            pb.RankBuffers(sendAddr=array.addr, recvAddr=target) for array, target in zip(arrays, targets, strict=True)
        ]
        nbytes = _bytes(blocks, dtype)
        return self._reduce("REDUCE_SCATTER", nbytes, buffers, dtype, op, weights, algorithm, timeout_s)

    def all_gather(
        self,
        arrays: Sequence[DeviceArray],
        out: Sequence[DeviceArray] | None = None,
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Every rank gets the blocks of all ranks.

        Args:
            arrays: one block each; in place: room for all blocks, of which rank r has block r.
            out: room for all blocks on each rank; None: in place.
        """
        dtype = self._one_type(arrays, arrays if out is None else out)
        blocks = _blocks(counts, None if out is None else arrays, arrays, self.nranks)
        _require_sizes(arrays if out is None else out, [sum(blocks)] * self.nranks)
        if out is not None:
            _require_sizes(arrays, blocks)
        own = [array.addr + start * dtype.itemsize for array, start in zip(arrays, _starts(blocks), strict=True)]
        sources = own if out is None else [array.addr for array in arrays]
        targets = [array.addr for array in (arrays if out is None else out)]
        buffers = [pb.RankBuffers(sendAddr=source, recvAddr=target) for source, target in zip(sources, targets, strict=True)]
        return self._run("ALL_GATHER", _bytes(blocks, dtype), buffers, dtype, algorithm, timeout_s)

    def gather(
        self,
        arrays: Sequence[DeviceArray],
        out: DeviceArray | None = None,
        *,
        root: int = 0,
        counts: Sequence[int] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Rank `root` gets the blocks of all ranks.

        Args:
            arrays: one block each; in place: ``arrays[root]`` has room for all blocks, and its own in its place.
            out: on the root, room for all blocks; None: in place.
        """
        self._require_root(root)
        result = _at(arrays, root) if out is None else out
        dtype = self._one_type(arrays, {root: result})
        blocks = self._rooted_blocks(counts, arrays, result, root, in_place=out is None)
        own = result.addr + _starts(blocks)[root] * dtype.itemsize if out is None else arrays[root].addr
        buffers = [_buffers(array, None) for array in arrays]
        buffers[root] = pb.RankBuffers(sendAddr=own, recvAddr=result.addr)
        return self._run("GATHER", _bytes(blocks, dtype), buffers, dtype, algorithm, timeout_s, root=root)

    def scatter(
        self,
        source: DeviceArray,
        arrays: Sequence[DeviceArray | None],
        *,
        root: int = 0,
        counts: Sequence[int] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Rank r gets block r of what rank `root` has.

        Args:
            source: on the root, all blocks.
            arrays: one block each, where they go; None at the root: its block stays where it is in `source`.
        """
        self._require_root(root)
        in_place = _at(arrays, root) is None
        targets = [source if array is None and rank == root else array for rank, array in enumerate(arrays)]
        if any(array is None for array in targets):
            raise RankMismatch("only the root's array may be None")
        filled = cast("list[DeviceArray]", targets)
        dtype = self._one_type(filled, {root: source})
        blocks = self._rooted_blocks(counts, filled, source, root, in_place)
        own = source.addr + _starts(blocks)[root] * dtype.itemsize if in_place else filled[root].addr
        buffers = [_buffers(None, array) for array in filled]
        buffers[root] = pb.RankBuffers(sendAddr=source.addr, recvAddr=own)
        return self._run("SCATTER", _bytes(blocks, dtype), buffers, dtype, algorithm, timeout_s, root=root)

    def all_to_all(
        self,
        arrays: Sequence[DeviceArray],
        out: Sequence[DeviceArray] | None = None,
        *,
        counts: Sequence[Sequence[int]] | None = None,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Every rank sends a block to every rank: block s of rank d's result is block d of what rank s has.

        Args:
            arrays: one block for each receiver.
            out: room for one block from each sender; None: in place, for which the devices copy `arrays` first.
            counts: elements, ``counts[s][d]`` from rank s to rank d; None: all the same.
        """
        results = arrays if out is None else out
        dtype = self._one_type(arrays, results)
        if counts is None:
            even = _even(arrays[0], self.nranks)
            counts = [[even] * self.nranks] * self.nranks
        if len(counts) != self.nranks or any(len(row) != self.nranks for row in counts):
            raise RankMismatch(f"counts must be {self.nranks} rows of {self.nranks}, got rows of {[*map(len, counts)]}")
        if min(map(min, counts)) < 0:
            raise InvalidValue(f"counts must be 0 or more, got {min(map(min, counts))}")
        _require_sizes(arrays, [sum(row) for row in counts])
        _require_sizes(results, [sum(column) for column in zip(*counts, strict=True)])
        buffers = [_buffers(source, result) for source, result in zip(arrays, results, strict=True)]
        blocks = [count for row in counts for count in row]
        return self._run("ALL_TO_ALL", _bytes(blocks, dtype), buffers, dtype, algorithm, timeout_s)

    def send_recv(
        self,
        pairs: Sequence[tuple[DeviceArray, DeviceArray]],
        *,
        algorithm: str | Schedule = "auto",
        timeout_s: float | None = None,
    ) -> CollectiveResult | None:
        """Copies arrays to others, on the same device or another: ``(source, destination)`` each, all at the same time.

        Raises:
            InvalidValue: no pairs, or two of a pair differ in type or size.
            BufferOverlap: a destination overlaps another array.
            RankMismatch: an array is on no device of the communicator.
        """
        self._require_open()
        if not pairs:
            raise InvalidValue("send_recv needs at least one pair of arrays")
        dtype = pairs[0][0].dtype
        for source, destination in pairs:
            if source.dtype != dtype or destination.dtype != dtype or source.size != destination.size:
                raise InvalidValue(
                    f"all arrays must be of type {dtype}, and two of a pair of one size; got {source.size} of "
                    f"{source.dtype} and {destination.size} of {destination.dtype}"
                )
        request = self._request("SEND_RECV", dtype, algorithm)
        for source, destination in pairs:
            request.sendRecvs.add(
                src=self._rank_of(source),
                dst=self._rank_of(destination),
                count=source.nbytes,
                sendAddr=source.addr,
                recvAddr=destination.addr,
            )
        return self._call(request, timeout_s)

    def send(
        self, source: DeviceArray, destination: DeviceArray, *, timeout_s: float | None = None
    ) -> CollectiveResult | None:
        """Copies an array to another one: `send_recv` of one pair. In a group all of them move at the group's end."""
        return self.send_recv([(source, destination)], timeout_s=timeout_s)

    def barrier(self, *, algorithm: str | Schedule = "auto", timeout_s: float | None = None) -> CollectiveResult | None:
        """Returns when every rank has come this far: all work issued before on the devices is done."""
        self._require_open()
        return self._call(self._request("BARRIER", np.dtype(np.uint8), algorithm), timeout_s)

    # ---- what they share ----------------------------------------------------------------------------------------------

    def _reduce(
        self,
        kind: str,
        counts: Sequence[int],
        buffers: Sequence[pb.RankBuffers],
        dtype: np.dtype[Any],
        op: str,
        weights: Sequence[float] | None,
        algorithm: str | Schedule,
        timeout_s: float | None,
        root: int = 0,
    ) -> CollectiveResult | None:
        fields = {"op": lookup(OPS, op, "op"), "weights": () if weights is None else weights, "root": root}
        if weights is not None and len(weights) != self.nranks:
            raise RankMismatch(f"{self.nranks} ranks need one weight each, got {len(weights)}")
        return self._run(kind, counts, buffers, dtype, algorithm, timeout_s, **fields)

    def _run(
        self,
        kind: str,
        counts: Sequence[int],
        buffers: Sequence[pb.RankBuffers],
        dtype: np.dtype[Any],
        algorithm: str | Schedule,
        timeout_s: float | None,
        **fields: Any,
    ) -> CollectiveResult | None:
        request = self._request(kind, dtype, algorithm, **fields)
        request.counts.extend(counts)
        request.buffers.extend(buffers)
        return self._call(request, timeout_s)

    def _request(self, kind: str, dtype: np.dtype[Any], algorithm: str | Schedule, **fields: Any) -> pb.CollectiveRequest:
        request = pb.CollectiveRequest(
            commId=self.comm_id,
            kind=kind,
            dtype=pb.DataType.Name(wire_dtype(dtype)),
            **fields,
        )
        if isinstance(algorithm, Schedule):
            self._require_same_collective(algorithm, request)
            request.schedule.CopyFrom(wire_schedule(algorithm))
        else:
            request.algorithm = algorithm
        return request

    def _require_same_collective(self, schedule: Schedule, request: pb.CollectiveRequest) -> None:
        actual = (schedule.collective, schedule.nranks, schedule.root)
        expected = (pb.CollectiveRequest.Kind.Name(request.kind).lower(), self.nranks, request.root)
        if actual != expected:
            said = "{} on {} ranks with root {}"
            raise InvalidValue(f"the schedule is for {said.format(*actual)}, the call is {said.format(*expected)}")

    def _call(self, request: pb.CollectiveRequest, timeout_s: float | None) -> CollectiveResult | None:
        """Runs a collective, or puts it into the open group."""
        timeout_s = timeout_s or self._connection.collective_timeout_s
        if self._group is None:
            return result_of(self._connection.call("Collective", request, timeout_s))
        if not is_surely_valid(request):
            request.checkOnly = True
            self._connection.call("Collective", request, timeout_s)
            request.ClearField("checkOnly")
        self._group.requests.append(request)
        return None

    def _require_open(self) -> None:
        if self._closed:
            raise CommNotReady(f"{self!r} is closed")

    def _require_root(self, root: int) -> None:
        if not 0 <= root < self.nranks:
            raise InvalidValue(f"root {root} is not one of {self.nranks} ranks")

    def _one_type(
        self, arrays: Sequence[DeviceArray], others: Sequence[DeviceArray] | dict[int, DeviceArray]
    ) -> np.dtype[Any]:
        """The type of all arrays, once it is clear that each is on its rank's device.

        Args:
            arrays: one for each rank.
            others: as `arrays`, or some ranks' by rank.
        """
        self._require_open()
        for group in (arrays, others):
            if not isinstance(group, dict) and len(group) != self.nranks:
                raise RankMismatch(f"{self.nranks} ranks need one array each, got {len(group)}")
        for rank, array in [*enumerate(arrays), *(others.items() if isinstance(others, dict) else enumerate(others))]:
            array._require_alive()
            if array.device.device_id != self.devices[rank].device_id:
                raise RankMismatch(
                    f"rank {rank} is device {self.devices[rank].device_id}, but its array is on device "
                    f"{array.device.device_id}"
                )
            if array.dtype != arrays[0].dtype:
                raise InvalidValue(
                    f"all arrays must have one type: rank 0 has {arrays[0].size} of {arrays[0].dtype}, rank {rank} has "
                    f"{array.size} of {array.dtype}"
                )
        return arrays[0].dtype

    def _rooted_blocks(
        self,
        counts: Sequence[int] | None,
        arrays: Sequence[DeviceArray],
        whole: DeviceArray,
        root: int,
        in_place: bool,
    ) -> list[int]:
        """Elements of each block of a gather or scatter."""
        if counts is not None or not in_place:
            blocks = _blocks(counts, arrays, arrays, self.nranks)
        else:
            blocks = [array.size for array in arrays]
            blocks[root] = whole.size - (sum(blocks) - blocks[root])
            if blocks[root] < 0:
                raise InvalidValue(f"{sum(blocks) - blocks[root]} elements of other ranks do not fit into {whole.size}")
        expected = [whole.size if in_place and rank == root else blocks[rank] for rank in range(self.nranks)]
        _require_sizes(arrays, expected)
        _require_sizes([whole], [sum(blocks)])
        return blocks

    def _rank_of(self, array: DeviceArray) -> int:
        array._require_alive()
        for rank, device in enumerate(self.devices):
            if device.device_id == array.device.device_id:
                return rank
        raise RankMismatch(f"{array!r} is on no device of {self!r}")


def lookup(names: dict[str, int], name: str, what: str) -> int:
    """The number of a name in lower or upper case. Raises InvalidValue."""
    number = names.get(name.lower())
    if number is None:
        raise InvalidValue(f"unknown {what} {name!r}; known: {', '.join(names)}")
    return number


def wire_schedule(schedule: Schedule) -> pb.Schedule:
    """A schedule as it is sent to the coordinator."""
    return pb.Schedule(
        algorithm=schedule.algorithm,
        parts=schedule.parts,
        steps=[
            pb.ScheduleStep(transfers=[pb.Transfer(src=t.src, dst=t.dst, chunk=t.chunk, reduce=t.reduce) for t in step])
            for step in schedule.steps
        ],
        storeAndForward=schedule.store_and_forward,
    )


def _buffers(source: DeviceArray | None, result: DeviceArray | None) -> pb.RankBuffers:
    return pb.RankBuffers(sendAddr=None if source is None else source.addr, recvAddr=None if result is None else result.addr)


def _at(arrays: Sequence[Any], rank: int) -> Any:
    if rank >= len(arrays):
        raise RankMismatch(f"rank {rank} has no array, got {len(arrays)}")
    return arrays[rank]


def _one_size(arrays: Sequence[tuple[int, DeviceArray]]) -> int:
    """Bytes of each of some ranks' arrays."""
    first_rank, first = arrays[0]
    for rank, array in arrays:
        if array.size != first.size:
            raise InvalidValue(
                f"all arrays must have one size: rank {first_rank} has {first.size} of {first.dtype}, rank {rank} has "
                f"{array.size} of {array.dtype}"
            )
    return first.nbytes


def _require_sizes(arrays: Sequence[DeviceArray], sizes: Sequence[int]) -> None:
    for number, (array, size) in enumerate(zip(arrays, sizes, strict=True)):
        if array.size != size:
            raise InvalidValue(f"array {number} must have {size} elements, not {array.size}")


def _blocks(
    counts: Sequence[int] | None, parts: Sequence[DeviceArray] | None, wholes: Sequence[DeviceArray], nranks: int
) -> list[int]:
    """Elements of each rank's block: as given, as the arrays of one block each have them, or all the same."""
    if counts is not None:
        if len(counts) != nranks or min(counts) < 0:
            raise InvalidValue(f"{nranks} ranks need one count each, of 0 or more, got {list(counts)}")
        return list(counts)
    if parts is not None:
        return [array.size for array in parts]
    return [_even(wholes[0], nranks)] * nranks


def _even(array: DeviceArray, nranks: int) -> int:
    if array.size % nranks:
        raise InvalidValue(f"{array.size} elements are no multiple of {nranks} ranks; give counts")
    return array.size // nranks


def _starts(blocks: Sequence[int]) -> list[int]:
    starts, start = [], 0
    for count in blocks:
        starts.append(start)
        start += count
    return starts


def _bytes(blocks: Sequence[int], dtype: np.dtype[Any]) -> list[int]:
    return [count * dtype.itemsize for count in blocks]
