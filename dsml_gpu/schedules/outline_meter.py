"""Counts what the rounds of an outline put on a topology's links, processes and hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsml_gpu.schedules.cost_model import LINKS_ONLY, CostModel, Costs
from dsml_gpu.schedules.outline import Everybody, Outline, Pattern, Round, Rounds
from dsml_gpu.schedules.topology import Floats, Ints, Topology

#: Seconds, of one transport.
Cost = Callable[[Costs], float]


@dataclass(frozen=True, slots=True)
class Load:
    """What takes longest among many, which depends on the size of chunks.

    Attributes:
        message_s: seconds for each message.
        byte_s: seconds for each byte.
    """

    message_s: Floats
    byte_s: Floats

    def seconds(self, messages: float, nbytes: float) -> float:
        """Of that which takes longest with so many messages and bytes."""
        return float((self.message_s * messages + self.byte_s * nbytes).max())


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """How long first messages of a pattern are on their way, through all repetitions of its round.

    Attributes:
        src, dst: where each begins, and where it has come at the end.
        alone: seconds for the message, and for each byte of it, if it meets no other.
        met: the same, if in the first repetition it meets the first messages of all other pairs.
    """

    src: Ints
    dst: Ints
    alone: Floats
    met: Floats

    def arrivals_s(self, begin_s: Floats, nbytes: float, meet: bool) -> Floats:
        """When each rank has all that came, if each began at its time of `begin_s`; no sooner than it began."""
        message_s, byte_s = self.met if meet else self.alone
        arrivals_s: Floats = begin_s.copy()
        np.maximum.at(arrivals_s, self.dst, begin_s[self.src] + message_s + byte_s * nbytes)
        return arrivals_s


@dataclass(frozen=True, slots=True)
class RoundProfile:
    """What a round does to a topology.

    Attributes:
        repeat: of the round.
        load: of each link, process and host, with all its chunks; messages and bytes are those of one chunk.
        ways: of each pattern.
        one_way: of a single message, alone, once.
        one_place: the longest of its stops.
    """

    repeat: int
    load: Load
    ways: tuple[Ways, ...]
    one_way: Load
    one_place: Load

    def arrivals_s(self, begin_s: Floats, nbytes: float, meet: bool) -> Floats:
        """See `Ways`."""
        arrivals_s: Floats = np.stack([ways.arrivals_s(begin_s, nbytes, meet) for ways in self.ways]).max(axis=0)
        return arrivals_s


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """A phase's rounds, and the load of all of them together."""

    rounds: tuple[RoundProfile, ...]
    load: Load


class Meter:
    """Counts for one topology.

    Args:
        topology: the links, processes and hosts.
        model: costs of processors.
    """

    def __init__(self, topology: Topology, model: CostModel) -> None:
        self.topology = topology
        self.model = model
        self.processors_are_free = model == LINKS_ONLY
        processes, self.process_of = np.unique(topology.processes, return_inverse=True)
        self.nprocesses = len(processes)
        self.host_of_process: Ints = np.zeros(self.nprocesses, dtype=np.int64)
        self.host_of_process[self.process_of] = topology.hosts
        cores = np.array(topology.cores or (0,) * topology.nhosts)
        #: How long a host takes for a second of work; 0 where there is a core for every thread.
        self.core_share = np.where(cores > 0, 1 / np.maximum(cores, 1), 0.0)

    def control_s(self, outline: Outline) -> float:
        """Time of the control messages, and until everybody has opened all streams."""
        seconds = self.model.costs(self.nprocesses == 1).control_s(outline.nranks)
        if self.processors_are_free:
            return seconds
        patterns = [pattern for round_ in outline.rounds for pattern in round_.patterns]
        pairs = [pattern.src * outline.nranks + pattern.dst for pattern in patterns if isinstance(pattern, Pattern)]
        opening = _Count(self)
        if len(pairs) < len(patterns):
            opening.add_streams(Everybody(outline.nranks, 1, False))
        elif pairs:
            src, dst = np.divmod(np.unique(np.concatenate(pairs)), outline.nranks)
            opening.add_streams(Pattern(src, dst, 1, False))
        return seconds + opening.load().seconds(1, 0)

    def phase(self, rounds: Rounds) -> PhaseProfile:
        """Measures a phase."""
        total = _Count(self)
        profiles = []
        for round_ in rounds:
            load, firsts = _Count(self), _Count(self)
            for pattern in round_.patterns:
                load.add(pattern, chunks=True)
                firsts.add(pattern, chunks=False)
            total.add_times(round_.repeat, load)
            profiles.append(self._round(round_, load, firsts))
        return PhaseProfile(tuple(profiles), total.load())

    def _round(self, round_: Round, load: _Count, firsts: _Count) -> RoundProfile:
        topology, repeat = self.topology, round_.repeat
        ways, once, places = [], [], []
        for pattern in round_.patterns:
            src, dst = (pattern.src, pattern.dst) if isinstance(pattern, Pattern) else _some_pairs(topology)
            links, crossed = topology.paths(src, dst)
            on_link_s = np.stack([np.zeros(len(src)), np.where(crossed, topology.byte_times_s[links], 0.0).max(axis=0)])
            send_s, receive_s = (
                np.stack([self.pair_s(src, dst, cost) for cost in costs]) for costs in _message_costs(pattern.reduce)
            )
            latency_s = np.where(crossed, topology.latencies_s[links], 0.0).sum(axis=0)
            alone_s = on_link_s + send_s + receive_s
            alone_s[0] += latency_s
            met_s = firsts.met_on_the_way(src, dst)
            met_s[0] += latency_s
            once.append(_busiest(*alone_s))
            places += [_busiest(*place_s) for place_s in (on_link_s, send_s, receive_s)]
            if repeat == 1:
                ways.append(Ways(src, dst, alone_s, met_s))
            else:
                end, along_s = _along(src, dst, alone_s, repeat, topology.nranks)
                ways.append(Ways(src, end[src], along_s[:, src], along_s[:, src] + met_s - alone_s))
        return RoundProfile(repeat, load.load(), tuple(ways), _joined(once), _joined(places))

    def pair_s(self, src: Ints, dst: Ints, cost: Cost) -> Floats:
        """A cost of each pair of ranks, by its transport."""
        p2p = self.process_of[src] == self.process_of[dst]
        return np.asarray(np.where(p2p, cost(self.model.p2p), cost(self.model.grpc)), dtype=np.float64)

    def with_everybody_s(self, cost: Cost) -> Floats:
        """A cost of each process, if each of its ranks has to do with every other rank."""
        ranks = np.bincount(self.process_of, minlength=self.nprocesses)
        each_s = (ranks - 1) * cost(self.model.p2p) + (self.topology.nranks - ranks) * cost(self.model.grpc)
        return np.asarray(ranks * each_s, dtype=np.float64)

    def by_process(self, ranks: Ints, seconds: Floats) -> Floats:
        """Sums by the process of ranks."""
        sums: Any = np.bincount(self.process_of[ranks], seconds, minlength=self.nprocesses)
        return np.asarray(sums, dtype=np.float64)

    def by_host(self, of_processes: Floats) -> Floats:
        """How long hosts take for what their processes have to do."""
        work_s: Any = np.bincount(self.host_of_process, of_processes, minlength=self.topology.nhosts)
        return np.asarray(work_s * self.core_share, dtype=np.float64)


class _Count:
    """Seconds by link and by process.

    Attributes:
        links: for each byte of a chunk, by link.
        sent, received: for each message and for each byte, by process.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.links: Floats = np.zeros(meter.topology.nlinks)
        self.sent: Floats = np.zeros((2, meter.nprocesses))
        self.received: Floats = np.zeros((2, meter.nprocesses))

    def add(self, pattern: Pattern | Everybody, chunks: bool) -> None:
        """Counts a pattern, either with all its chunks or with one message for each pair."""
        self.links += self._crossings(pattern, chunks) * self._meter.topology.byte_times_s
        if not self._meter.processors_are_free:
            send, receive = _message_costs(pattern.reduce)
            for kind in (0, 1):
                self._add_work(pattern, chunks, kind, send[kind], receive[kind])

    def add_streams(self, pattern: Pattern | Everybody) -> None:
        """Counts the opening of a stream for each pair."""
        self._add_work(pattern, False, 0, _stream_s, _stream_s)

    def met_on_the_way(self, src: Ints, dst: Ints) -> Floats:
        """For each pair: seconds for each message and each byte on the slowest link of its way and in both processes.

        Of all that was counted there, not only the pair's own.
        """
        process_of = self._meter.process_of
        links, crossed = self._meter.topology.paths(src, dst)
        way_s = self.sent[:, process_of[src]] + self.received[:, process_of[dst]]
        way_s[1] += np.where(crossed, self.links[links], 0.0).max(axis=0)
        return way_s

    def _crossings(self, pattern: Pattern | Everybody, chunks: bool) -> Floats:
        """How many chunks, or messages, cross each link."""
        topology = self._meter.topology
        if isinstance(pattern, Everybody):
            return _crossings_of_everybody(topology) * (pattern.chunks if chunks else 1)
        links, crossed = topology.paths(pattern.src, pattern.dst)
        weights = np.broadcast_to(pattern.each if chunks else 1, links.shape)[crossed]
        return np.asarray(np.bincount(links[crossed], weights, minlength=topology.nlinks), dtype=np.float64)

    def _add_work(
        self,
        pattern: Pattern | Everybody,
        chunks: bool,
        kind: int,
        send: Cost,
        receive: Cost,
    ) -> None:
        """Adds to `sent` and `received`, to the one of their rows that is called `kind`."""
        meter = self._meter
        if isinstance(pattern, Everybody):
            self.sent[kind] += meter.with_everybody_s(send) * (pattern.chunks if chunks else 1)
            self.received[kind] += meter.with_everybody_s(receive) * (pattern.chunks if chunks else 1)
        else:
            src, dst, times = pattern.src, pattern.dst, pattern.each if chunks else np.ones_like(pattern.src)
            self.sent[kind] += meter.by_process(src, times * meter.pair_s(src, dst, send))
            self.received[kind] += meter.by_process(dst, times * meter.pair_s(src, dst, receive))

    def add_times(self, times: int, other: _Count) -> None:
        """Adds another count so many times."""
        self.links += times * other.links
        self.sent += times * other.sent
        self.received += times * other.received

    def load(self) -> Load:
        """Of everything."""
        of_processes = self.sent + self.received
        of_hosts = map(self._meter.by_host, of_processes)
        return _joined([_busiest(np.zeros_like(self.links), self.links), _busiest(*of_hosts), _busiest(*of_processes)])


def _message_costs(reduce: bool) -> tuple[tuple[Cost, Cost], tuple[Cost, Cost]]:
    """Sender's and receiver's, each for a message and for a byte."""
    return (
        (lambda costs: costs.message_s, lambda costs: costs.send_byte_s),
        (lambda costs: costs.message_s, lambda costs: costs.recv_byte_s + costs.combine_byte_s(reduce)),
    )


def _stream_s(costs: Costs) -> float:
    return costs.stream_s


def _busiest(message_s: Floats, byte_s: Floats) -> Load:
    """Of all with as much work for a message, the one with the most for a byte."""
    if not message_s.any():
        return Load(np.zeros(1), byte_s.max(keepdims=True))
    values, place = np.unique(message_s, return_inverse=True)
    most = np.zeros(len(values))
    np.maximum.at(most, place, byte_s)
    return Load(values, most)


def _crossings_of_everybody(topology: Topology) -> Floats:
    """How often each link is crossed, if every rank sends one message to every other one."""
    inside, nic_out, nic_in, core = topology.first_links()
    in_process = np.bincount(topology.processes)[topology.processes]
    in_host = np.bincount(topology.hosts)[topology.hosts]
    crossings = np.zeros(topology.nlinks)
    crossings[:inside] = np.tile(topology.nranks - in_process, 2)
    crossings[inside:nic_out] = np.bincount(topology.hosts, in_host - 1)
    crossings[nic_out:nic_in] = crossings[nic_in:core] = np.bincount(topology.hosts, topology.nranks - in_host)
    crossings[core] = crossings[nic_out:nic_in].sum()
    return crossings


def _some_pairs(topology: Topology) -> tuple[Ints, Ints]:
    """For each rank two others: the next in number, which may be on its host, and the farthest, which may be on another."""
    ranks = np.arange(topology.nranks)
    others = np.concatenate([(ranks + 1) % topology.nranks, (ranks + topology.nranks // 2) % topology.nranks])
    return np.tile(ranks, 2), others


def _joined(loads: list[Load]) -> Load:
    """Of all that several are of."""
    return Load(np.concatenate([load.message_s for load in loads]), np.concatenate([load.byte_s for load in loads]))


def _along(src: Ints, dst: Ints, seconds: Floats, repeat: int, nranks: int) -> tuple[Ints, Floats]:
    """Ways of `repeat` pairs from each rank, each pair from where the last one went; a rank that does not send ends a way.

    By doubling: ways of 1, 2, 4 ... pairs, put together as `repeat` is of powers of 2.

    Returns:
        Where the ways end, and the sums of `seconds`, of which each column is a pair's.
    """
    following, step_s = np.arange(nranks), np.zeros((len(seconds), nranks))
    following[src], step_s[:, src] = dst, seconds
    at, total_s = np.arange(nranks), np.zeros_like(step_s)
    while repeat:
        if repeat % 2:
            total_s, at = total_s + step_s[:, at], following[at]
        step_s, following = step_s + step_s[:, following], following[following]
        repeat //= 2
    return at, total_s
