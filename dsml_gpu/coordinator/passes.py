"""Collectives as passes over memory that all ranks read and write: pure decisions.

Where every rank can open the memory of every other one, a collective needs no schedule. By its specification
(`schedules.COLLECTIVES`) each block is the reduction of what some ranks hold, or what one rank holds, and goes to some
ranks; that is one pass over the block, with all holders as sources and all takers as destinations. It reads each input
once and writes each output once, which is the least that can be done. This is the direct all-reduce (every rank reduces its
own part from all peers), and its likes of the other collectives.

Any rank can do any part of any pass, and parts do not touch each other, also where a collective is in place: an element of
an output depends only on the same element of the inputs, all of which are read before it is written. So the parts need no
order and no barrier.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.remembered import remembered
from dsml_gpu.memory.staging import HEADER_BYTES
from dsml_gpu.reduction import dtype_of
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: What a collective that is run as passes calls its algorithm.
ALGORITHM = "direct"
#: Below so many bytes read and written a second rank costs more, by its messages, than it helps.
BYTES_PER_WORKER = 4 << 20
#: Parts begin at multiples of so many bytes from the start of a block: no two ranks write to one cache line.
_ALIGNMENT = 64

#: A rank, and an address in its device's memory.
Location = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass: sources are reduced, one source alone is copied, and the result goes to all destinations.

    Attributes:
        dtype, op: numbers on the wire.
        count: bytes of each range.
        weights: of each source; empty: none.
        needs_staging: it cannot be done again when it has written something, or another one has.
    """

    dtype: int
    op: int
    count: int
    sources: tuple[Location, ...]
    destinations: tuple[Location, ...]
    weights: tuple[float, ...] = ()
    needs_staging: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.count * (len(self.sources) + len(self.destinations))

    def part(self, start: int, stop: int) -> Pass:
        """The pass over bytes ``[start, stop)`` of each range."""
        return Pass(
            self.dtype,
            self.op,
            stop - start,
            tuple((rank, addr + start) for rank, addr in self.sources),
            tuple((rank, addr + start) for rank, addr in self.destinations),
            self.weights,
            self.needs_staging,
        )

    def to_wire(self, staged: Location | None = None) -> pb.Pass:
        """As it is shipped.

        Args:
            staged: rank in whose staging, and where there, the result is first.
        """
        return pb.Pass(
            dtype=cast("pb.DataType", self.dtype),
            op=cast("pb.ReduceOp", self.op),
            count=self.count,
            sources=[pb.RankAddress(rank=rank, addr=addr) for rank, addr in self.sources],
            destinations=[pb.RankAddress(rank=rank, addr=addr) for rank, addr in self.destinations],
            weights=self.weights,
            staged=None if staged is None else pb.RankAddress(rank=staged[0], addr=staged[1]),
        )


def may_open_memory(devices: Sequence[pb.DeviceMetadata], forced: int = pb.AUTO) -> bool:
    """Whether all of these devices can be asked to open the memory of each other.

    Args:
        devices: of each rank.
        forced: number of ``enum Transport``; P2P also where links are emulated, which passes are not slowed down by.
    """
    first = devices[0]
    return (
        forced != pb.GRPC
        and all(device.backend == first.backend and device.host == first.host for device in devices)
        and (forced == pb.P2P or not any(device.linkLatencyNs or device.linkBytesPerS for device in devices))
        # Two GPUs in one process copy what they need of each other; kernels read it where it is only across processes.
        and len({(device.processUid, device.gpu) for device in devices}) == len({device.processUid for device in devices})
    )


def has_passes(call: CollectiveCall) -> bool:
    """Whether a call can be run as passes: it moves data, and its outputs are nobody else's inputs."""
    return call.collective.name != "barrier" and not call.copies_input and not call.own_schedule


def passes_of(call: CollectiveCall) -> list[Pass]:
    """The passes of a call, one for each block in which there is something to do."""
    passes = []
    for block, count in enumerate(call.counts):
        sources, destinations = [], []
        for rank, places in enumerate(call.places):
            place = places.get(block)
            if place is not None and place.send is not None:
                sources.append((rank, place.send))
            if place is not None and place.recv is not None:
                destinations.append((rank, place.recv))
        weights = tuple(call.weights[rank] for rank, _ in sources) if call.weights else ()
        if not call.collective.reduces or (len(sources) == 1 and not weights):
            destinations = [place for place in destinations if place not in sources]
        if count and destinations:
            passes.append(Pass(call.dtype, call.op, count, tuple(sources), tuple(destinations), weights))
    return passes


@remembered
def bytes_of(call: CollectiveCall) -> int:
    """Bytes that the passes of a call read and write."""
    return sum(one.nbytes for one in passes_of(call))


@dataclass(frozen=True, slots=True)
class Team:
    """Who can do the work.

    Attributes:
        nranks: number of ranks.
        cores: of their host; 0: not known.
        gpus: of each rank, its process and its GPU; empty where memory is on the host.
    """

    nranks: int
    cores: int
    gpus: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, devices: Sequence[pb.DeviceMetadata]) -> Team:
        """That of devices of one backend on one host."""
        on_host = devices[0].backend == "numpy"
        gpus = () if on_host else tuple((device.processUid, device.gpu) for device in devices)
        return cls(len(devices), devices[0].cores, gpus)

    def workers(self, nbytes: int) -> list[int]:
        """The ranks that do the work where so many bytes are read and written.

        On the host as many as help, at most one for each core; on GPUs one for each GPU, whose kernels use all of it.
        """
        if self.gpus:
            first: dict[tuple[str, int], int] = {}
            for rank, gpu in enumerate(self.gpus):
                first.setdefault(gpu, rank)
            return list(first.values())
        most = min(self.nranks, self.cores or self.nranks)
        return list(range(max(1, min(most, nbytes // BYTES_PER_WORKER))))


@dataclass(frozen=True, slots=True)
class Round:
    """Passes that run side by side.

    Attributes:
        work: of each rank that has some, in order, as it is shipped.
        nbytes: that are read and written in all.
        phase: how it is run if it is to be atomic: RUN by one rank, PIECES, or COMMIT where it can be repeated.
        staged_bytes: of results that are staged all at once.
    """

    work: Mapping[int, Sequence[pb.Pass]]
    nbytes: int
    phase: pb.ExecuteRequest.Phase = pb.ExecuteRequest.RUN
    staged_bytes: int = 0


@remembered
def rounds_of(calls: tuple[CollectiveCall, ...], team: Team, staging_bytes: int = 0) -> tuple[Round, ...]:
    """Which rank does what, round by round; a round is over when all of it is done.

    Calls that do not touch each other's outputs share a round, however many they are. Others are done one after the other,
    by one rank and in one round where they are small.

    Args:
        staging_bytes: of each rank's staging, with its header, where results are to be staged; 0: they are not.
    """
    in_turn = _are_small(calls)
    rounds = []
    for run in runs_of(calls, staging_bytes):
        some = [one for call in run for one in passes_of(call)]
        nbytes = sum(one.nbytes for one in some)
        ranks = team.workers(nbytes)
        phase: pb.ExecuteRequest.Phase = pb.ExecuteRequest.RUN
        if staging_bytes:
            some, phase = with_staging(some, in_turn)
        if in_turn or (staging_bytes and phase == pb.ExecuteRequest.RUN):
            ranks = ranks[:1]
        work = {rank: _staged(rank, share) for rank, share in zip(ranks, shares(some, len(ranks)), strict=True) if share}
        if work:
            rounds.append(Round(work, nbytes, phase, sum(one.count for one in some if one.needs_staging)))
    return tuple(rounds)


def _staged(rank: int, share: Sequence[Pass]) -> list[pb.Pass]:
    """Passes as they are shipped, with places one behind the other in the staging of the rank that runs them."""
    wire, offset = [], HEADER_BYTES
    for one in share:
        wire.append(one.to_wire((rank, offset) if one.needs_staging else None))
        if one.needs_staging:
            offset += _aligned(one.count)
    return wire


def with_staging(passes: Sequence[Pass], small: bool) -> tuple[list[Pass], pb.ExecuteRequest.Phase]:
    """Passes of one round, those marked whose results are to be staged before any is written, and how they are run.

    The others read what none of the round writes, and write what none of it reads: done again, by whomever and whenever,
    they do the same. Where that cannot be said of all, but each writes nothing that another one reads, and where it writes
    what it reads itself that is at the same distance from the beginning, they can be done in pieces.

    Args:
        small: one rank does them, and it does not matter what it takes to stage them.
    """
    read: defaultdict[int, _Ranges] = defaultdict(_Ranges)
    written: defaultdict[int, _Ranges] = defaultdict(_Ranges)
    for one in passes:
        for ranges, locations in ((read, one.sources), (written, one.destinations)):
            for rank, addr in locations:
                ranges[rank].add(addr, addr + one.count)
    marked = [
        replace(
            one,
            needs_staging=any(read[rank].meet(addr, addr + one.count) for rank, addr in one.destinations)
            or any(written[rank].meet(addr, addr + one.count) for rank, addr in one.sources),
        )
        for one in passes
    ]
    if small:
        return marked, pb.ExecuteRequest.RUN
    if not any(one.needs_staging for one in marked):
        return marked, pb.ExecuteRequest.COMMIT
    return (list(passes), pb.ExecuteRequest.PIECES) if _are_apart(passes) else (marked, pb.ExecuteRequest.RUN)


def _are_apart(passes: Sequence[Pass]) -> bool:
    """Whether passes touch nothing that another one writes, and of what they write themselves read only what is in place."""
    touched: defaultdict[int, _Ranges] = defaultdict(_Ranges)
    written: defaultdict[int, _Ranges] = defaultdict(_Ranges)
    for one in passes:
        own: defaultdict[int, _Ranges] = defaultdict(_Ranges)
        for rank, addr in one.destinations:
            if touched[rank].meet(addr, addr + one.count) or own[rank].meet(addr, addr + one.count):
                return False
            own[rank].add(addr, addr + one.count)
        for rank, addr in one.sources:
            if written[rank].meet(addr, addr + one.count):
                return False
            if (rank, addr) not in one.destinations and own[rank].meet(addr, addr + one.count):
                return False
        for rank, addr in (*one.sources, *one.destinations):
            touched[rank].add(addr, addr + one.count)
        for rank, addr in one.destinations:
            written[rank].add(addr, addr + one.count)
    return True


def runs_of(calls: Sequence[CollectiveCall], staging_bytes: int = 0) -> list[list[CollectiveCall]]:
    """Calls in runs, in order, each of which is one round.

    Args:
        staging_bytes: of each rank's staging, with its header, which the results of a round must fit in; 0: any number does.
    """
    runs = [list(calls)] if _are_small(calls) else independent(calls)
    return [part for run in runs for part in _that_fit(run, staging_bytes)] if staging_bytes else runs


def _that_fit(calls: Sequence[CollectiveCall], staging_bytes: int) -> list[list[CollectiveCall]]:
    runs: list[list[CollectiveCall]] = []
    left = 0
    for call in calls:
        # As if one rank did all of it, or each pass were cut at every rank: nobody stages more.
        needed = sum(_aligned(one.count) + _ALIGNMENT for one in passes_of(call))
        if not runs or needed > left:
            runs.append([])
            left = staging_bytes - HEADER_BYTES
        runs[-1].append(call)
        left -= needed
    return runs


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _are_small(calls: Sequence[CollectiveCall]) -> bool:
    return sum(map(bytes_of, calls)) < 2 * BYTES_PER_WORKER


def independent(calls: Sequence[CollectiveCall]) -> list[list[CollectiveCall]]:
    """Calls in runs, in order: within a run no call touches what another one writes, so they may run side by side."""
    runs: list[list[CollectiveCall]] = []
    touched: list[_Touched] = []
    for call in calls:
        if not runs or any(one.conflicts(call, rank) for rank, one in enumerate(touched)):
            runs.append([])
            touched = [_Touched() for _ in range(call.roles.nranks)]
        runs[-1].append(call)
        for rank, one in enumerate(touched):
            one.add(call, rank)
    return runs


class _Touched:
    """What some calls read and write on one rank."""

    def __init__(self) -> None:
        self._read = _Ranges()
        self._written = _Ranges()

    def conflicts(self, call: CollectiveCall, rank: int) -> bool:
        """Whether a call writes what they read or write, or reads what they write."""
        for block, place in call.places[rank].items():
            count = call.counts[block]
            if place.send is not None and self._written.meet(place.send, place.send + count):
                return True
            if place.recv is not None and (
                self._written.meet(place.recv, place.recv + count) or self._read.meet(place.recv, place.recv + count)
            ):
                return True
        return False

    def add(self, call: CollectiveCall, rank: int) -> None:
        """One more call."""
        for block, place in call.places[rank].items():
            if place.send is not None:
                self._read.add(place.send, place.send + call.counts[block])
            if place.recv is not None:
                self._written.add(place.recv, place.recv + call.counts[block])


class _Ranges:
    """Bytes, as ranges in order that neither overlap nor touch. There can be very many: each question is a search."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def meet(self, start: int, stop: int) -> bool:
        """Whether one of the bytes ``[start, stop)`` is among them."""
        after = bisect_right(self._stops, start)
        return start < stop and after < len(self._starts) and self._starts[after] < stop

    def add(self, start: int, stop: int) -> None:
        if start == stop:
            return
        first, end = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < end:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[end - 1])
        self._starts[first:end] = [start]
        self._stops[first:end] = [stop]


def shares(passes: Sequence[Pass], nworkers: int) -> list[list[Pass]]:
    """Passes cut into as many lists, each of about as many bytes read and written, in order."""
    total = sum(one.nbytes for one in passes)
    lists: list[list[Pass]] = [[] for _ in range(nworkers)]
    done = 0
    for one in passes:
        operands = len(one.sources) + len(one.destinations)
        start, worker = 0, min(done * nworkers // total, nworkers - 1)
        while start < one.count:
            # Where this worker's share ends in the pass; the last one takes what is left.
            end = one.count
            if worker < nworkers - 1:
                end = ((worker + 1) * total // nworkers - done) // operands // _unit(one) * _unit(one)
                end = max(start, min(end, one.count))
            if end > start:
                lists[worker].append(one.part(start, end) if (start, end) != (0, one.count) else one)
            start, worker = end, worker + 1
        done += one.nbytes
    return lists


def _unit(one: Pass) -> int:
    return max(_ALIGNMENT, dtype_of(one.dtype).itemsize)
