"""A call of a collective: what a client asked for, checked, and where each block of it is on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from dsml_gpu.errors import BufferOverlap, InvalidValue, RankMismatch, ScheduleNotProved
from dsml_gpu.reduction import checked_weight, dtype_of, elements_in, operator_of
from dsml_gpu.schedules import COLLECTIVES, Collective, InvalidSchedule, Layout, Roles, Schedule, Transfer
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Collectives by their numbers on the wire.
_COLLECTIVES = {
    number: COLLECTIVES[name.lower()] for name, number in pb.CollectiveRequest.Kind.items() if name.lower() in COLLECTIVES
}
#: What a client's own schedule may have at most.
_MAX_TRANSFERS = 1 << 18
_MAX_CHUNKS = 1 << 17
#: Chunks that all ranks together hold at the start, each of which the proof follows.
_MAX_HELD_CHUNKS = 1 << 20


class Place(NamedTuple):
    """Where one block is on one rank.

    Attributes:
        send: address of what the rank has of it at the start; None: nothing.
        recv: address that the rank's result goes to; None: it gets none.
    """

    send: int | None
    recv: int | None


class Range(NamedTuple):
    """A range of device memory that a call reads or writes."""

    addr: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class CollectiveCall:
    """One collective on all ranks of a communicator, checked but for the devices' memory.

    Attributes:
        collective: which.
        roles: who takes part, and as what.
        counts: bytes of each block.
        places: by rank, the blocks that it has or gets.
        ranges: by rank, what device memory that is.
        dtype, op: numbers on the wire.
        weights: of each rank; empty: none.
        algorithm: name of the algorithm that was asked for; empty: the coordinator chooses.
        own_schedule: wire bytes of the client's own schedule; empty: none.
        copies_input: ranks whose buffers are in place in an all-to-all.
        parts: calls that were fused into this one, whose blocks are theirs one behind the other; empty: none.
    """

    collective: Collective
    roles: Roles
    counts: tuple[int, ...]
    places: tuple[Mapping[int, Place], ...]
    ranges: tuple[tuple[Range, ...], ...]
    dtype: int
    op: int
    weights: tuple[float, ...] = ()
    algorithm: str = ""
    own_schedule: bytes = b""
    copies_input: frozenset[int] = frozenset()
    parts: tuple[CollectiveCall, ...] = ()

    @property
    def name(self) -> str:
        return self.collective.name

    @property
    def count(self) -> int:
        """Bytes of the largest buffer."""
        return max((nbytes for ranges in self.ranges for _, nbytes in ranges), default=0)

    def __str__(self) -> str:
        return f"{self.name} ({self.algorithm or 'auto'}, {self.count} bytes, {self.roles.nranks} ranks)"


def all_reduce_call(algorithm: str, nranks: int, request: Any, addrs: Mapping[int, Any]) -> CollectiveCall:
    """What AllReduceRing and NaiveAllReduce ask for: an all-reduce in place.

    Args:
        addrs: the request's address of each rank.

    Raises:
        RankMismatch, CountNotMultiple, InvalidValue: what does not fit.
    """
    in_place = [
        pb.RankBuffers(sendAddr=addr, recvAddr=addr) for addr in (addrs[rank].value for rank in _ranks_of(addrs, nranks))
    ]
    return call_of(
        pb.CollectiveRequest(
            kind=pb.CollectiveRequest.ALL_REDUCE,
            dtype=request.dtype,
            op=request.op,
            counts=[request.count],
            buffers=in_place,
            algorithm=algorithm,
        ),
        nranks,
    )


def call_of(request: pb.CollectiveRequest, nranks: int) -> CollectiveCall:
    """The call that a request asks for.

    Raises:
        InvalidValue: unknown kind, dtype or op; root, counts, weights or fields that the collective has not.
        CountNotMultiple: a count is not a multiple of the item size.
        RankMismatch: not one pair of buffers for each rank, or a rank without an address that it needs.
        BufferOverlap: buffers overlap otherwise than in place.
        ScheduleNotProved: a schedule of the client's own that has no parts; `schedule_of_wire` proves the others.
    """
    collective = _COLLECTIVES.get(request.kind)
    if collective is None:
        known = ", ".join(f"{number} {kind.name.upper()}" for number, kind in _COLLECTIVES.items())
        raise InvalidValue(f"unknown kind of collective {request.kind}; known: {known}")
    roles = _roles(request, collective, nranks)
    places: list[dict[int, Place]]
    if collective.layout is Layout.LISTED:
        counts = tuple(entry.count for entry in request.sendRecvs)
        places, ranges = _listed(request, nranks)
        copies_input: frozenset[int] = frozenset()
    elif collective.name == "barrier":
        counts = (1,)
        places, ranges, copies_input = [{} for _ in range(nranks)], [()] * nranks, frozenset()
    else:
        counts = _counts(request, collective, roles)
        places, ranges, copies_input = _packed(request.buffers, collective, roles, counts)
    dtype = dtype_of(request.dtype)
    if collective.name != "barrier":
        for count in dict.fromkeys(counts):
            elements_in(count, dtype)
    operator_of(request.op)
    own = request.schedule.algorithm
    if request.HasField("schedule") and request.algorithm not in ("", own):
        raise InvalidValue(f"algorithm is {request.algorithm!r}, but a schedule of {own!r} comes along")
    if request.HasField("schedule") and request.schedule.parts < 1:
        raise ScheduleNotProved("the schedule cuts each block into 0 parts, expected at least 1")
    return CollectiveCall(
        collective=collective,
        roles=roles,
        counts=counts,
        places=tuple(places),
        ranges=tuple(ranges),
        dtype=pb.UINT8 if collective.name == "barrier" else request.dtype,
        op=pb.MAX if collective.name == "barrier" else request.op,
        weights=_weights(request, collective, nranks, dtype),
        algorithm="" if request.algorithm == "auto" else request.algorithm,
        own_schedule=request.schedule.SerializeToString(deterministic=True) if request.HasField("schedule") else b"",
        copies_input=copies_input,
    )


@lru_cache(maxsize=64)
def schedule_of_wire(collective: str, roles: Roles, message: bytes) -> Schedule:
    """A client's own schedule, proved.

    Raises:
        ScheduleNotProved: it is not; the message names the first violated condition.
    """
    wire = pb.Schedule.FromString(message)
    nblocks, holders = COLLECTIVES[collective].nblocks(roles), COLLECTIVES[collective].holders
    held = wire.parts * sum(len(holders(roles, block)) for block in range(nblocks))
    for number, what, limit in (
        (sum(len(step.transfers) for step in wire.steps), "transfers", _MAX_TRANSFERS),
        (wire.parts * nblocks, "chunks", _MAX_CHUNKS),
        (held, "chunks that ranks hold at the start", _MAX_HELD_CHUNKS),
    ):
        if number > limit:
            raise ScheduleNotProved(f"the schedule has {number} {what}, at most {limit} are allowed")
    steps = tuple(
        tuple(Transfer(transfer.src, transfer.dst, transfer.chunk, transfer.reduce) for transfer in step.transfers)
        for step in wire.steps
    )
    try:
        return Schedule(
            collective,
            wire.algorithm or "unnamed",
            roles.nranks,
            wire.parts,
            steps,
            roles.root,
            roles.pairs,
            wire.storeAndForward,
        )
    except InvalidSchedule as error:
        raise ScheduleNotProved(str(error)) from None


def _roles(request: pb.CollectiveRequest, collective: Collective, nranks: int) -> Roles:
    for field, used in (
        ("sendRecvs", collective.layout is Layout.LISTED),
        ("counts", collective.layout is not Layout.LISTED and collective.name != "barrier"),
        ("buffers", collective.layout is not Layout.LISTED and collective.name != "barrier"),
    ):
        if getattr(request, field) and not used:
            raise InvalidValue(f"{collective.name} has no {field}, {len(getattr(request, field))} came")
    if request.root and not collective.rooted:
        raise InvalidValue(f"{collective.name} has no root, but root is {request.root}")
    if request.root >= nranks:
        raise InvalidValue(f"root {request.root} is not one of {nranks} ranks")
    pairs = tuple((entry.src, entry.dst) for entry in request.sendRecvs)
    for pair in pairs:
        for rank in pair:
            if rank >= nranks:
                raise InvalidValue(f"rank {rank} of the send/recv {pair[0]} -> {pair[1]} is not one of {nranks} ranks")
    return Roles(nranks, request.root, pairs)


def _counts(request: pb.CollectiveRequest, collective: Collective, roles: Roles) -> tuple[int, ...]:
    nblocks, counts = collective.nblocks(roles), tuple(request.counts)
    if len(counts) == 1:
        return counts * nblocks
    if len(counts) != nblocks:
        raise InvalidValue(f"{collective.name} on {roles.nranks} ranks has {nblocks} blocks, but {len(counts)} counts came")
    return counts


def _weights(request: pb.CollectiveRequest, collective: Collective, nranks: int, dtype: Any) -> tuple[float, ...]:
    weights = tuple(request.weights)
    if not weights:
        return ()
    if not collective.reduces or collective.idempotent or request.op != pb.SUM:
        op = pb.ReduceOp.Name(request.op)
        raise InvalidValue(f"weights go with a reduction by SUM, not with {collective.name} by {op}")
    if len(weights) != nranks:
        raise RankMismatch(f"{nranks} ranks need one weight each, got {len(weights)}")
    for weight in weights:
        checked_weight(weight, dtype)
    return weights


# ---- where blocks are -------------------------------------------------------------------------------------------------


def _packed(
    buffers: Sequence[pb.RankBuffers], collective: Collective, roles: Roles, counts: Sequence[int]
) -> tuple[list[dict[int, Place]], list[tuple[Range, ...]], frozenset[int]]:
    """Places and ranges of buffers that hold a rank's blocks one behind the other, and the ranks that copy their input."""
    nranks = roles.nranks
    if len(buffers) != nranks:
        raise RankMismatch(f"{nranks} ranks need one pair of buffers each, got {len(buffers)}")
    sends: list[dict[int, int]] = [{} for _ in range(nranks)]
    recvs: list[dict[int, int]] = [{} for _ in range(nranks)]
    for addrs, who, field in ((sends, collective.holders, "sendAddr"), (recvs, collective.takers, "recvAddr")):
        nbytes = [0] * nranks
        for block, count in enumerate(counts):
            for rank in who(roles, block):
                if not buffers[rank].HasField(field):
                    raise RankMismatch(f"rank {rank} has no {field}; {collective.name} needs it there")
                addrs[rank][block] = getattr(buffers[rank], field) + nbytes[rank]
                nbytes[rank] += count
    places, ranges, copies_input = [], [], []
    for rank, (send, recv) in enumerate(zip(sends, recvs, strict=True)):
        # An address that the collective does not use on the rank is no range: it may be anything.
        used = [Range(next(iter(part.values())), sum(counts[block] for block in part)) for part in (send, recv) if part]
        if len(used) == 2 and _overlap(*used):
            if collective.layout is Layout.PER_PAIR:
                in_place = used[0].addr == used[1].addr
                copies_input.append(rank)
            else:
                shared = send.keys() & recv.keys()
                in_place = bool(shared) and all(send[block] == recv[block] for block in shared)
            if not in_place:
                raise BufferOverlap(
                    f"rank {rank}: the send buffer {_span(used[0])} and the receive buffer {_span(used[1])} overlap, and "
                    f"not as {collective.name} in place has them"
                )
        places.append({block: Place(send.get(block), recv.get(block)) for block in send.keys() | recv.keys()})
        ranges.append(tuple(used))
    return places, ranges, frozenset(copies_input)


def _listed(request: pb.CollectiveRequest, nranks: int) -> tuple[list[dict[int, Place]], list[tuple[Range, ...]]]:
    """Places and ranges of a send/recv, in which each block has its own buffers."""
    places: list[dict[int, Place]] = [{} for _ in range(nranks)]
    reads: list[list[Range]] = [[] for _ in range(nranks)]
    writes: list[list[Range]] = [[] for _ in range(nranks)]
    for block, entry in enumerate(request.sendRecvs):
        read, written = Range(entry.sendAddr, entry.count), Range(entry.recvAddr, entry.count)
        if entry.src == entry.dst:
            places[entry.src][block] = Place(entry.sendAddr, entry.recvAddr)
            if read == written:  # it is where it shall be
                reads[entry.src].append(read)
                continue
        else:
            places[entry.src][block] = Place(entry.sendAddr, None)
            places[entry.dst][block] = Place(None, entry.recvAddr)
        reads[entry.src].append(read)
        writes[entry.dst].append(written)
    for rank in range(nranks):
        _check_disjoint(rank, reads[rank], writes[rank])
    return places, [(*reads[rank], *writes[rank]) for rank in range(nranks)]


def _check_disjoint(rank: int, reads: Sequence[Range], writes: Sequence[Range]) -> None:
    """Raises BufferOverlap where a range that is written meets another one."""
    ranges = sorted([(*read, False) for read in reads if read.nbytes] + [(*write, True) for write in writes if write.nbytes])
    for is_write in (True, False):
        # The furthest end so far of what this pass holds against the next ones: writes against all, reads against writes.
        furthest: Range | None = None
        for addr, nbytes, writes_it in ranges:
            this = Range(addr, nbytes)
            if furthest is not None and addr < sum(furthest) and (is_write or writes_it):
                raise BufferOverlap(
                    f"rank {rank}: {_span(this)} and {_span(furthest)} overlap, and one of them is a receive buffer"
                )
            if writes_it is is_write and (furthest is None or sum(this) > sum(furthest)):
                furthest = this


def _overlap(one: Range, other: Range) -> bool:
    return bool(one.nbytes and other.nbytes and one.addr < sum(other) and other.addr < sum(one))


def _span(part: Range) -> str:
    return f"{part.addr:#x} + {part.nbytes} bytes"


def _ranks_of(addrs: Mapping[int, Any], nranks: int) -> range:
    for rank in range(nranks):
        if rank not in addrs:
            raise RankMismatch(f"rank {rank} has no address; {nranks} ranks need one each, got {_shown(addrs)}")
    if len(addrs) > nranks:
        raise RankMismatch(f"{len(addrs)} addresses for {nranks} ranks: {_shown(addrs)}")
    return range(nranks)


def _shown(addrs: Mapping[int, Any]) -> str:
    ranks = sorted(addrs)[:20]
    return f"addresses for ranks {', '.join(map(str, ranks))}" if ranks else "none"
