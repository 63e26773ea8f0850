"""What the simulator moves: the messages of every stream of a schedule, with what each must wait for and what it costs."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsml_gpu.schedules.cost_model import CostModel, Costs
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.topology import Topology


class Stream:
    """All that one rank sends to another, in order.

    Attributes:
        src, dst: ranks; src_process, dst_process: their processes.
        p2p: the receiver reads the sender's memory, which is free when it has.
        path: the links between the processors of both: number, seconds for each byte, and latency, of those that have any.
        out, into: the links of their devices, in the same form; None where there is none.
        unsent, unwritten, unreceived, inbox: its messages, by how far they are (see `simulator`).
        under_way_bytes: of those that leave or have left, and were not taken.
        kept: how many were taken and may not be applied yet.
        is_waiting, is_leaving: the next one may not leave yet; one is about to leave.
        is_writing, is_receiving, is_taking: one of its messages has, or waits for, the processor.
        is_between_chunks: the last message that was taken ended its chunk.
    """

    __slots__ = (
        "dst", "dst_process", "inbox", "into", "is_between_chunks", "is_leaving", "is_receiving", "is_taking", "is_waiting",
        "is_writing", "kept", "out", "p2p", "path", "src", "src_process", "under_way_bytes", "unreceived", "unsent",
        "unwritten",
    )  # fmt: skip

    def __init__(self, src: int, dst: int, topology: Topology) -> None:
        self.src = src
        self.dst = dst
        self.src_process, self.dst_process = int(topology.processes[src]), int(topology.processes[dst])
        self.p2p = self.src_process == self.dst_process
        self.out, self.path, self.into = _links(topology, src, dst)
        self.unsent: deque[Message] = deque()
        self.unwritten: deque[Message] = deque()
        self.unreceived: deque[Message] = deque()
        self.inbox: deque[Message] = deque()
        self.under_way_bytes = self.kept = 0
        self.is_waiting = self.is_leaving = self.is_writing = False
        self.is_receiving = self.is_taking = self.is_between_chunks = False


#: A link's number, seconds for each byte, and latency in seconds.
Hop = tuple[int, float, float]


def _links(topology: Topology, src: int, dst: int) -> tuple[Hop | None, tuple[Hop, ...], Hop | None]:
    links, crossed = topology.paths(np.array([src]), np.array([dst]))
    hops: list[Hop | None] = []
    for number, is_crossed in zip(links[:, 0].tolist(), crossed[:, 0].tolist(), strict=True):
        hop = (number, float(topology.byte_times_s[number]), float(topology.latencies_s[number]))
        hops.append(hop if is_crossed and (hop[1] or hop[2]) else None)
    return hops[0], tuple(hop for hop in hops[1:-1] if hop is not None), hops[-1]


class Message:
    """A slice of a chunk on its way. A *cell* is a slice of a chunk on one rank.

    Attributes:
        stream: of which it is part.
        nbytes: its length.
        src_cell, dst_cell: the slice on either rank.
        gate_cell, gate_writes: it may leave when this cell has been written so often.
        reads_before, writes_before: it may be applied when `dst_cell` has been read and written so often.
        send_s, receive_s, apply_s: processor time.
        keep_s: processor time to keep it: memory of the sender must be copied, what came by gRPC is there to stay.
        ends_chunk: it is the last slice of its chunk.
        place: how many links of the path it has crossed.
        spread_s: how long it takes from its first byte to its last one, where it is now.
        is_ready: it could be applied when it was taken.
    """

    __slots__ = (
        "apply_s", "dst_cell", "ends_chunk", "gate_cell", "gate_writes", "is_ready", "keep_s", "nbytes", "place",
        "reads_before", "receive_s", "send_s", "spread_s", "src_cell", "stream", "writes_before",
    )  # fmt: skip

    def __init__(
        self,
        stream: Stream,
        nbytes: int,
        cells: tuple[int, int, int],
        gate_writes: int,
        reads_before: int,
        writes_before: int,
        seconds: tuple[float, float, float, float],
        ends_chunk: bool,
    ) -> None:
        self.stream = stream
        self.nbytes = nbytes
        self.src_cell, self.dst_cell, self.gate_cell = cells
        self.gate_writes = gate_writes
        self.reads_before = reads_before
        self.writes_before = writes_before
        self.send_s, self.receive_s, self.keep_s, self.apply_s = seconds
        self.ends_chunk = ends_chunk
        self.place = 0
        self.spread_s = 0.0
        self.is_ready = False


@dataclass(frozen=True, slots=True)
class Work:
    """All messages of a schedule.

    Attributes:
        streams: with their messages.
        opening_s: processor time of each process to open and close its streams.
        control_s: time of the control messages.
        ncells: cells are numbers below this.
        nmessages: of all streams together.
    """

    streams: tuple[Stream, ...]
    opening_s: Mapping[int, float]
    control_s: float
    ncells: int
    nmessages: int


def work_of(
    schedule: Schedule,
    chunk_bytes: Sequence[int],
    topology: Topology,
    model: CostModel,
    slice_bytes: int,
    cut_bytes: int,
) -> Work:
    """The messages of a schedule.

    Args:
        chunk_bytes: of each chunk.
        slice_bytes: what the devices cut chunks into, for which `model` has the costs.
        cut_bytes: what they are cut into here.
    """
    cuts = [_cut(nbytes, cut_bytes) for nbytes in chunk_bytes]
    cells = _Cells([len(cut) for cut in cuts])
    streams: dict[tuple[int, int], Stream] = {}
    for step in schedule.steps:
        senders_to: dict[int, set[int]] = defaultdict(set)
        for transfer in step:
            senders_to[transfer.dst].add(transfer.src)
        before = [cells.begin_read(transfer.src, transfer.chunk) for transfer in step]
        for transfer, gate_writes in zip(step, before, strict=True):
            pair = (transfer.src, transfer.dst)
            if pair not in streams:
                streams[pair] = Stream(*pair, topology)
            stream = streams[pair]
            first_src, first_dst = cells.first(transfer.src, transfer.chunk), cells.first(transfer.dst, transfer.chunk)
            reads_before, writes_before = cells.begin_write(transfer.dst, transfer.chunk)
            cut = cuts[transfer.chunk]
            last = len(cut) - 1
            others = len(senders_to[transfer.dst]) - 1
            seconds = _Seconds(model.costs(stream.p2p), stream.p2p, transfer.reduce, others, slice_bytes)
            for index, nbytes in enumerate(cut):
                gate = first_src + (last if schedule.store_and_forward else index)
                stream.unsent.append(
                    Message(
                        stream,
                        nbytes,
                        (first_src + index, first_dst + index, gate),
                        gate_writes,
                        reads_before,
                        writes_before,
                        seconds.of(nbytes),
                        index == last,
                    )
                )
    opening_s: dict[int, float] = defaultdict(float)
    for stream in streams.values():
        for process in (stream.src_process, stream.dst_process):
            opening_s[process] += model.costs(stream.p2p).stream_s
    p2p = all(stream.p2p for stream in streams.values())
    return Work(
        tuple(streams.values()),
        opening_s,
        model.costs(p2p and len(set(topology.process_of)) == 1).control_s(schedule.nranks),
        cells.count,
        sum(len(stream.unsent) for stream in streams.values()),
    )


class _Seconds:
    """Processor time of a transfer's messages.

    Args:
        others: ranks that send to the same receiver in the same step.
    """

    def __init__(self, costs: Costs, p2p: bool, reduce: bool, others: int, slice_bytes: int) -> None:
        self._costs = costs
        self._recv_byte_s = costs.recv_byte_s + others * costs.meet_byte_s
        self._keep_byte_s = costs.copy_byte_s if p2p else 0.0
        self._combine_byte_s = costs.combine_byte_s(reduce)
        self._slice_bytes = slice_bytes

    def of(self, nbytes: int) -> tuple[float, float, float, float]:
        """To send, to receive, to keep and to apply a message, which may stand for several slices."""
        costs = self._costs
        message_s = costs.message_s * -(-nbytes // self._slice_bytes)
        return (
            message_s + costs.send_byte_s * nbytes,
            message_s + self._recv_byte_s * nbytes,
            self._keep_byte_s * nbytes,
            self._combine_byte_s * nbytes,
        )


class _Cells:
    """Numbers of cells, and how many reads and writes of each chunk on each rank were announced.

    Args:
        slices: of each chunk.
    """

    def __init__(self, slices: list[int]) -> None:
        self._slices = slices
        self._first: dict[tuple[int, int], int] = {}
        self._reads: dict[tuple[int, int], int] = defaultdict(int)
        self._writes: dict[tuple[int, int], int] = defaultdict(int)
        self.count = 0

    def first(self, rank: int, chunk: int) -> int:
        """The cell of a chunk's first slice; those of the others follow."""
        key = (rank, chunk)
        if key not in self._first:
            self._first[key] = self.count
            self.count += self._slices[chunk]
        return self._first[key]

    def begin_read(self, rank: int, chunk: int) -> int:
        """Announces a read; gives the number of writes before it."""
        self._reads[rank, chunk] += 1
        return self._writes[rank, chunk]

    def begin_write(self, rank: int, chunk: int) -> tuple[int, int]:
        """Announces a write; gives the numbers of reads and of writes before it."""
        before = self._reads[rank, chunk], self._writes[rank, chunk]
        self._writes[rank, chunk] += 1
        return before


def _cut(nbytes: int, slice_bytes: int) -> list[int]:
    whole, rest = divmod(nbytes, slice_bytes)
    return [slice_bytes] * whole + [rest] * (rest > 0)
