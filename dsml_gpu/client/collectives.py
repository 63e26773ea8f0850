"""The collectives of a communicator, as the one driver of all ranks calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.epochs import Epochs, Members
from dsml_gpu.client.groups import Group, is_surely_valid
from dsml_gpu.client.results import CollectiveResult, result_of
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.errors import CommNotReady, InvalidValue, RankMismatch
from dsml_gpu.reduction import wire_dtype
from dsml_gpu.schedules import Schedule
from dsml_gpu.wire import gpu_sim_pb2 as pb

OPS = {name.lower(): number for name, number in pb.ReduceOp.items()}
ON_FAILURE = {name.lower(): number for name, number in pb.OnFailure.items() if number}
TRANSPORTS = {name.lower(): number for name, number in pb.Transport.items()}


@dataclass(frozen=True, slots=True)
class _Typed:
    """What all arrays of a call have in common: their type, and the epoch whose ranks they are on."""

    dtype: np.dtype[Any]
    members: Members


class Collectives:
    """Collectives over devices with ranks 0..n-1. All methods have in common:

    They are called once for all ranks, by whoever drives them. They return when every rank is done; inside
    `Communicator.group` they return None at once, and the group's end runs them. `arrays` has one array for each rank, in
    the order of ranks, on that rank's device. All arrays of a call have one type.

    When a device dies, the collective is undone and run again on those that are left (`Client.communicator` takes other
    wishes): it returns as if nothing had happened, `CollectiveResult.device_ids` says who took part, and `devices` and
    `nranks` are those that are left. Later calls take the arrays of these, or still those of all former ranks, of which
    the lost ones are ignored; `root` and blocks then count as they did, and blocks of lost ranks stay what they are.

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
        PeerUnavailable: a device is gone, and the communicator is not to go on without it, or cannot. All buffers that are
            left are as they were.
        RanksLost: it cannot be done without the ranks that are lost: the root, one end of a send, a schedule of one's own.
        OperationTimeout: nothing moved for the coordinator's stall timeout, or the deadline passed.
    """

    comm_id: int
    _connection: CoordinatorConnection
    _closed: bool
    _group: Group | None
    _epochs: Epochs

    @property
    def devices(self) -> tuple[Device, ...]:
        """Rank r is ``devices[r]``, as the last answer has told."""
        return self._epochs.present.devices

    @property
    def nranks(self) -> int:
        return self._epochs.present.nranks

    @property
    def epoch(self) -> int:
        """Version of its membership, from 1."""
        return self._epochs.present.epoch

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
        typed = self._one_type(arrays, out)
        count = _one_size([*enumerate(arrays), *enumerate(out)])
        buffers = [_buffers(source, result) for source, result in zip(arrays, out, strict=True)]
        return self._reduce("ALL_REDUCE", [count], buffers, typed, op, weights, algorithm, timeout_s)

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
        self._require_root(root, arrays)
        result = _at(arrays, root) if out is None else out
        typed = self._one_type(arrays, {root: result})
        count = _one_size([*enumerate(arrays), (root, result)])
        buffers = [_buffers(source, result if rank == root else None) for rank, source in enumerate(arrays)]
        return self._reduce("REDUCE", [count], buffers, typed, op, weights, algorithm, timeout_s, root)

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
        self._require_root(root, arrays)
        source = _at(arrays, root) if source is None else source
        typed = self._one_type(arrays, {root: source})
        count = _one_size([*enumerate(arrays), (root, source)])
        buffers = [_buffers(source if rank == root else None, result) for rank, result in enumerate(arrays)]
        return self._run("BROADCAST", [count], buffers, typed, algorithm, timeout_s, root=root)

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
        typed = self._one_type(arrays, arrays if out is None else out)
        blocks = _blocks(counts, out, arrays, len(arrays))
        _require_sizes(arrays, [sum(blocks)] * len(arrays))
        if out is not None:
            _require_sizes(out, blocks)
        own = [array.addr + start * typed.dtype.itemsize for array, start in zip(arrays, _starts(blocks), strict=True)]
        targets = own if out is None else [array.addr for array in out]
        buffers = [
            pb.RankBuffers(sendAddr=array.addr, recvAddr=target) for array, target in zip(arrays, targets, strict=True)
        ]
        nbytes = _bytes(blocks, typed.dtype)
        return self._reduce("REDUCE_SCATTER", nbytes, buffers, typed, op, weights, algorithm, timeout_s)

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
        typed = self._one_type(arrays, arrays if out is None else out)
        blocks = _blocks(counts, None if out is None else arrays, arrays, len(arrays))
        _require_sizes(arrays if out is None else out, [sum(blocks)] * len(arrays))
        if out is not None:
            _require_sizes(arrays, blocks)
        own = [array.addr + start * typed.dtype.itemsize for array, start in zip(arrays, _starts(blocks), strict=True)]
        sources = own if out is None else [array.addr for array in arrays]
        targets = [array.addr for array in (arrays if out is None else out)]
        buffers = [pb.RankBuffers(sendAddr=source, recvAddr=target) for source, target in zip(sources, targets, strict=True)]
        return self._run("ALL_GATHER", _bytes(blocks, typed.dtype), buffers, typed, algorithm, timeout_s)

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
        self._require_root(root, arrays)
        result = _at(arrays, root) if out is None else out
        typed = self._one_type(arrays, {root: result})
        blocks = self._rooted_blocks(counts, arrays, result, root, in_place=out is None)
        own = result.addr + _starts(blocks)[root] * typed.dtype.itemsize if out is None else arrays[root].addr
        buffers = [_buffers(array, None) for array in arrays]
        buffers[root] = pb.RankBuffers(sendAddr=own, recvAddr=result.addr)
        return self._run("GATHER", _bytes(blocks, typed.dtype), buffers, typed, algorithm, timeout_s, root=root)

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
        self._require_root(root, arrays)
        in_place = _at(arrays, root) is None
        targets = [source if array is None and rank == root else array for rank, array in enumerate(arrays)]
        if any(array is None for array in targets):
            raise RankMismatch("only the root's array may be None")
        filled = cast("list[DeviceArray]", targets)
        typed = self._one_type(filled, {root: source})
        blocks = self._rooted_blocks(counts, filled, source, root, in_place)
        own = source.addr + _starts(blocks)[root] * typed.dtype.itemsize if in_place else filled[root].addr
        buffers = [_buffers(None, array) for array in filled]
        buffers[root] = pb.RankBuffers(sendAddr=source.addr, recvAddr=own)
        return self._run("SCATTER", _bytes(blocks, typed.dtype), buffers, typed, algorithm, timeout_s, root=root)

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
        typed, nranks = self._one_type(arrays, results), len(arrays)
        if counts is None:
            even = _even(arrays[0], nranks)
            counts = [[even] * nranks] * nranks
        if len(counts) != nranks or any(len(row) != nranks for row in counts):
            raise RankMismatch(f"counts must be {nranks} rows of {nranks}, got rows of {[*map(len, counts)]}")
        if min(map(min, counts)) < 0:
            raise InvalidValue(f"counts must be 0 or more, got {min(map(min, counts))}")
        _require_sizes(arrays, [sum(row) for row in counts])
        _require_sizes(results, [sum(column) for column in zip(*counts, strict=True)])
        buffers = [_buffers(source, result) for source, result in zip(arrays, results, strict=True)]
        blocks = [count for row in counts for count in row]
        return self._run("ALL_TO_ALL", _bytes(blocks, typed.dtype), buffers, typed, algorithm, timeout_s)

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
        members = self._epochs.of_all([array for pair in pairs for array in pair])
        request = self._request("SEND_RECV", _Typed(dtype, members), algorithm)
        for source, destination in pairs:
            request.sendRecvs.add(
                src=self._rank_of(source, members),
                dst=self._rank_of(destination, members),
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
        typed = _Typed(np.dtype(np.uint8), self._epochs.present)
        return self._call(self._request("BARRIER", typed, algorithm), timeout_s)

    # ---- what they share ----------------------------------------------------------------------------------------------

    def _reduce(
        self,
        kind: str,
        counts: Sequence[int],
        buffers: Sequence[pb.RankBuffers],
        typed: _Typed,
        op: str,
        weights: Sequence[float] | None,
        algorithm: str | Schedule,
        timeout_s: float | None,
        root: int = 0,
    ) -> CollectiveResult | None:
        fields = {"op": lookup(OPS, op, "op"), "weights": () if weights is None else weights, "root": root}
        if weights is not None and len(weights) != typed.members.nranks:
            raise RankMismatch(f"{typed.members.nranks} ranks need one weight each, got {len(weights)}")
        return self._run(kind, counts, buffers, typed, algorithm, timeout_s, **fields)

    def _run(
        self,
        kind: str,
        counts: Sequence[int],
        buffers: Sequence[pb.RankBuffers],
        typed: _Typed,
        algorithm: str | Schedule,
        timeout_s: float | None,
        **fields: Any,
    ) -> CollectiveResult | None:
        request = self._request(kind, typed, algorithm, **fields)
        request.counts.extend(counts)
        request.buffers.extend(buffers)
        return self._call(request, timeout_s)

    def _request(self, kind: str, typed: _Typed, algorithm: str | Schedule, **fields: Any) -> pb.CollectiveRequest:
        request = pb.CollectiveRequest(
            commId=self.comm_id,
            kind=kind,
            dtype=pb.DataType.Name(wire_dtype(typed.dtype)),
            epoch=typed.members.epoch,
            **fields,
        )
        if isinstance(algorithm, Schedule):
            _require_same_collective(algorithm, request, typed.members.nranks)
            request.schedule.CopyFrom(wire_schedule(algorithm))
        else:
            request.algorithm = algorithm
        return request

    def _call(self, request: pb.CollectiveRequest, timeout_s: float | None) -> CollectiveResult | None:
        """Runs a collective, or puts it into the open group."""
        timeout_s = timeout_s or self._connection.collective_timeout_s
        if self._group is None:
            return self._heard(self._connection.call("Collective", request, timeout_s))
        if not is_surely_valid(request):
            request.checkOnly = True
            self._connection.call("Collective", request, timeout_s)
            request.ClearField("checkOnly")
        self._group.requests.append(request)
        return None

    def _heard(self, response: Any) -> CollectiveResult | None:
        """The result that an answer carries, once the client knows who is in the communicator now."""
        result = result_of(response)
        if result is not None and result.epoch > self._epochs.present.epoch:
            self._epochs.follow(self._ask_status())
        return result

    def _ask_status(self) -> pb.GetCommStatusResponse:
        status: pb.GetCommStatusResponse = self._connection.call(
            "GetCommStatus", pb.GetCommStatusRequest(commId=self.comm_id)
        )
        return status

    def _require_open(self) -> None:
        if self._closed:
            raise CommNotReady(f"{self!r} is closed")

    def _require_root(self, root: int, arrays: Sequence[Any]) -> None:
        nranks = max(len(arrays), self.nranks)
        if not 0 <= root < nranks:
            raise InvalidValue(f"root {root} is not one of {nranks} ranks")

    def _one_type(self, arrays: Sequence[DeviceArray], others: Sequence[DeviceArray] | dict[int, DeviceArray]) -> _Typed:
        """The type of all arrays, once it is clear that each is on the device of its rank in one epoch.

        Args:
            arrays: one for each rank.
            others: as `arrays`, or some ranks' by rank.
        """
        self._require_open()
        members = self._epochs.of(arrays)
        if not isinstance(others, dict):
            if len(others) != members.nranks:
                raise RankMismatch(f"{members.nranks} ranks need one array each, got {len(others)}")
            others = dict(enumerate(others))
        for rank, array in [*enumerate(arrays), *others.items()]:
            array._require_alive()
            members.require_on(array, rank)
            if array.dtype != arrays[0].dtype:
                raise InvalidValue(
                    f"all arrays must have one type: rank 0 has {arrays[0].size} of {arrays[0].dtype}, rank {rank} has "
                    f"{array.size} of {array.dtype}"
                )
        return _Typed(arrays[0].dtype, members)

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
            blocks = _blocks(counts, arrays, arrays, len(arrays))
        else:
            blocks = [array.size for array in arrays]
            blocks[root] = whole.size - (sum(blocks) - blocks[root])
            if blocks[root] < 0:
                raise InvalidValue(f"{sum(blocks) - blocks[root]} elements of other ranks do not fit into {whole.size}")
        expected = [whole.size if in_place and rank == root else blocks[rank] for rank in range(len(arrays))]
        _require_sizes(arrays, expected)
        _require_sizes([whole], [sum(blocks)])
        return blocks

    def _rank_of(self, array: DeviceArray, members: Members) -> int:
        array._require_alive()
        rank = members.rank_of(array)
        if rank is None:
            raise RankMismatch(f"{array!r} is on no device of {self!r}")
        return rank


def lookup(names: dict[str, int], name: str, what: str) -> int:
    """The number of a name in lower or upper case. Raises InvalidValue."""
    number = names.get(name.lower())
    if number is None:
        raise InvalidValue(f"unknown {what} {name!r}; known: {', '.join(names)}")
    return number


def _require_same_collective(schedule: Schedule, request: pb.CollectiveRequest, nranks: int) -> None:
    actual = (schedule.collective, schedule.nranks, schedule.root)
    expected = (pb.CollectiveRequest.Kind.Name(request.kind).lower(), nranks, request.root)
    if actual != expected:
        said = "{} on {} ranks with root {}"
        raise InvalidValue(f"the schedule is for {said.format(*actual)}, the call is {said.format(*expected)}")


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
