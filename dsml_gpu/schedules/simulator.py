"""Times a schedule on a topology, event by event: what the devices' executor would do, with costs in place of work.

A chunk is cut into slices, and every slice is a message. On its way from rank to rank it

1. waits until the sender's copy of it has been written as often as the schedule says, and the one before it in the same
   stream has left;
2. leaves by the link of the sender's device and travels for its latency;
3. takes processor time of the sender, message by message in each stream;
4. crosses the links between the two devices;
5. takes processor time of the receiver;
6. arrives by the link of the receiver's device;
7. is reduced or copied, which takes processor time again, as soon as the receiver's copy of it has been read and written as
   often as the schedule says; until then it is kept, and the next chunk of the stream waits.

Processor time comes behind the device's link, as in the servers where they emulate it; with links in hardware it comes
before, which takes as long. A process has one thread for all its work, first come, first served, and a host's threads share
its cores. Where a receiver does not take what was sent, the sender stops when too much is on its way. Buffers are in place:
out of place, where data is kept where it was, some waits are shorter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.schedules.processors import Processors
from dsml_gpu.schedules.program import chunk_bounds
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.streams import Hop, Message, Stream, Work, work_of
from dsml_gpu.schedules.topology import Topology

#: What may be on its way in one stream: in the connection and in the queues of both ends. Fits what is measured.
_WINDOW_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run would take.

    Attributes:
        time_s: from the client's call to its return.
        rank_finish_s: when each rank has nothing more to send or to receive.
        busy_s: processor time that each process needs, by process.
        link_bytes: what each link of limited bandwidth carried, by its name; idle ones are left out.
        least_s: what the control messages and the busiest link, process or host need.
        messages: how many were simulated.
        slice_bytes: into which chunks were cut: more than was asked for where there would have been too many messages.
    """

    time_s: float
    rank_finish_s: tuple[float, ...]
    busy_s: Mapping[int, float]
    link_bytes: Mapping[str, int]
    least_s: float
    messages: int
    slice_bytes: int


def simulate(
    schedule: Schedule,
    block_bytes: int | Sequence[int],
    topology: Topology,
    model: CostModel,
    slice_bytes: int = 512 << 10,
    max_messages: int = 100_000,
) -> Prediction:
    """Predicts the time of a schedule; some 10 us of computing for each message.

    Args:
        block_bytes: of each block of the collective, or one number for all of them.
        slice_bytes: chunks are cut into messages of this size.
        max_messages: where there would be more, slices are made larger, each with the costs of those that it stands for, but
            so that a chunk is still two of them. Larger slices reach the end of a chain of ranks later: by their length,
            for each rank on the way. So times are taken with slices of two sizes, and a straight line through them goes to
            the size that was asked for, but not below what the busiest link or process needs. Where the way of the data
            does not depend on the size of slices, this is exact; elsewhere tests find up to a tenth too much or too little.

    Raises:
        ValueError: the topology has another number of ranks, or the blocks another number of sizes.
    """
    if topology.nranks != schedule.nranks:
        raise ValueError(f"the topology has {topology.nranks} ranks, the schedule {schedule.nranks}")
    if slice_bytes < 1:
        raise ValueError(f"slices cannot have {slice_bytes} bytes")
    chunk_bytes = _chunk_bytes(schedule, block_bytes)
    cut_bytes = _cut_bytes(schedule, chunk_bytes, slice_bytes, max_messages)

    def with_slices_of(nbytes: int) -> Prediction:
        return _Run(topology, work_of(schedule, chunk_bytes, topology, model, slice_bytes, nbytes)).predict(nbytes)

    larger = with_slices_of(cut_bytes)
    if cut_bytes == slice_bytes:
        return larger
    return _extrapolated(with_slices_of(2 * cut_bytes), larger, slice_bytes)


def _chunk_bytes(schedule: Schedule, block_bytes: int | Sequence[int]) -> list[int]:
    blocks = [block_bytes] * schedule.nblocks if isinstance(block_bytes, int) else list(block_bytes)
    if len(blocks) != schedule.nblocks:
        raise ValueError(f"the schedule has {schedule.nblocks} blocks, {len(blocks)} sizes were given")
    if blocks and min(blocks) < 0:
        raise ValueError(f"a block cannot have {min(blocks)} bytes")
    bounds = (chunk_bounds(nbytes, schedule.parts, part) for nbytes in blocks for part in range(schedule.parts))
    return [last - first for first, last in bounds]


def _cut_bytes(schedule: Schedule, chunk_bytes: list[int], slice_bytes: int, max_messages: int) -> int:
    """The size of slices that gives at most so many messages, or two for the largest chunk."""
    times_sent = np.zeros(len(chunk_bytes), dtype=np.int64)
    np.add.at(times_sent, [transfer.chunk for step in schedule.steps for transfer in step], 1)
    sizes = np.array(chunk_bytes, dtype=np.int64)
    cut_bytes, half_a_chunk = slice_bytes, -(-max(chunk_bytes, default=0) // 2)
    while cut_bytes < half_a_chunk and int(times_sent @ -(-sizes // cut_bytes)) > max_messages:
        cut_bytes = min(2 * cut_bytes, half_a_chunk)
    return cut_bytes


def _extrapolated(largest: Prediction, larger: Prediction, slice_bytes: int) -> Prediction:
    """What smaller slices than those of two predictions would take."""
    beyond = (larger.slice_bytes - slice_bytes) / (largest.slice_bytes - larger.slice_bytes)

    def through(largest_s: float, larger_s: float) -> float:
        return larger_s - (largest_s - larger_s) * beyond

    ranks = zip(largest.rank_finish_s, larger.rank_finish_s, strict=True)
    return replace(
        larger,
        time_s=max(through(largest.time_s, larger.time_s), larger.least_s),
        rank_finish_s=tuple(through(*seconds) for seconds in ranks),
        messages=largest.messages + larger.messages,
    )


class _Run:
    """One simulation. What is called ``_on_...`` happens at the time that the processors' clock shows."""

    def __init__(self, topology: Topology, work: Work) -> None:
        self._topology = topology
        self._work = work
        self._processors: Processors[Any] = Processors(topology)
        self._reads = [0] * work.ncells
        self._writes = [0] * work.ncells
        #: By cell, what is to be tried again when it has been read or written once more.
        self._waiting: dict[int, list[tuple[Callable[[Any], None], Any]]] = defaultdict(list)
        self._free_s = [0.0] * topology.nlinks
        self._carried = [0] * topology.nlinks
        self._finish_s = [0.0] * topology.nranks
        self._applied = 0

    def predict(self, slice_bytes: int) -> Prediction:
        """Runs to the end; `slice_bytes` is what chunks were cut into."""
        work, processors, topology = self._work, self._processors, self._topology
        for process, seconds in work.opening_s.items():
            processors.submit(process, _take_seconds, _do_nothing, seconds)
        for stream in work.streams:
            self._offer(stream)
        processors.run()
        assert self._applied == work.nmessages, "a proved schedule ends"
        on_links_s = np.array(self._carried) * topology.byte_times_s
        return Prediction(
            time_s=work.control_s + processors.now_s,
            rank_finish_s=tuple(work.control_s + seconds for seconds in self._finish_s),
            busy_s=processors.busy_s(),
            link_bytes={topology.link_name(number): carried for number, carried in enumerate(self._carried) if carried},
            least_s=work.control_s + max(float(on_links_s.max()), processors.least_s()),
            messages=work.nmessages,
            slice_bytes=slice_bytes,
        )

    # ---- the sender ----------------------------------------------------------------------------------------------------

    def _offer(self, stream: Stream) -> None:
        """Lets the stream's next message leave, if it may; called again whenever that may have changed."""
        if stream.is_leaving or not stream.unsent:
            return
        message = stream.unsent[0]
        if stream.under_way_bytes >= max(_WINDOW_BYTES, 2 * message.nbytes):
            return
        if self._writes[message.gate_cell] < message.gate_writes:
            if not stream.is_waiting:
                stream.is_waiting = True
                self._waiting[message.gate_cell].append((self._offer_again, stream))
            return
        stream.unsent.popleft()
        stream.is_leaving = True
        stream.under_way_bytes += message.nbytes
        if stream.out is None:
            self._on_travelled(message)
        else:
            self._processors.at(self._crossed(stream.out, message), self._on_left, message)

    def _offer_again(self, stream: Stream) -> None:
        stream.is_waiting = False
        self._offer(stream)

    def _on_left(self, message: Message) -> None:
        stream = message.stream
        assert stream.out is not None
        self._count_read(message)
        self._processors.at(self._processors.now_s + stream.out[2], self._on_travelled, message)
        stream.is_leaving = False
        self._offer(stream)

    def _on_travelled(self, message: Message) -> None:
        stream = message.stream
        stream.unwritten.append(message)
        if not stream.is_writing:
            stream.is_writing = True
            self._write(message)

    def _write(self, message: Message) -> None:
        self._processors.submit(message.stream.src_process, _send_s, self._on_written, message)

    def _on_written(self, message: Message) -> None:
        stream = message.stream
        stream.unwritten.popleft()
        if stream.out is None:
            if not stream.p2p:
                self._count_read(message)
            stream.is_leaving = False
            self._offer(stream)
        self._on_at_link(message)
        if stream.unwritten:
            self._write(stream.unwritten[0])
        else:
            stream.is_writing = False

    # ---- the links -----------------------------------------------------------------------------------------------------

    def _crossed(self, hop: Hop, message: Message) -> float:
        """When a message is through a link at whose beginning its last byte is now, but for the latency.

        Its bytes come one after the other, as they left the slowest link so far, and messages that come side by side share
        the link byte by byte. So it works on the message from when it is free and the first byte is there, and is through
        with it when the work is done and the last byte is there: an idle link that is not slower adds nothing.
        """
        number, byte_s, _ = hop
        now_s = self._processors.now_s
        if not byte_s:
            return now_s
        busy_s = message.nbytes * byte_s
        free_s = max(self._free_s[number], now_s - message.spread_s) + busy_s
        self._free_s[number] = free_s
        self._carried[number] += message.nbytes
        message.spread_s = max(message.spread_s, busy_s)
        return max(free_s, now_s)

    def _on_at_link(self, message: Message) -> None:
        path = message.stream.path
        if message.place == len(path):
            self._on_arrived(message)
            return
        hop = path[message.place]
        message.place += 1
        self._processors.at(self._crossed(hop, message) + hop[2], self._on_at_link, message)

    # ---- the receiver --------------------------------------------------------------------------------------------------

    def _on_arrived(self, message: Message) -> None:
        stream = message.stream
        stream.unreceived.append(message)
        if not stream.is_receiving:
            stream.is_receiving = True
            self._receive(message)

    def _receive(self, message: Message) -> None:
        self._processors.submit(message.stream.dst_process, _receive_s, self._on_received, message)

    def _on_received(self, message: Message) -> None:
        stream = message.stream
        stream.unreceived.popleft()
        if stream.into is None:
            self._on_delivered(message)
        else:
            self._processors.at(self._crossed(stream.into, message), self._on_delivered, message)
        if stream.unreceived:
            self._receive(stream.unreceived[0])
        else:
            stream.is_receiving = False

    def _on_delivered(self, message: Message) -> None:
        stream = message.stream
        stream.inbox.append(message)
        if not stream.is_taking:
            stream.is_taking = True
            self._take(message)

    def _take(self, message: Message) -> None:
        self._processors.submit(message.stream.dst_process, self._begin_to_take, self._on_taken, message)

    def _begin_to_take(self, message: Message) -> float:
        message.is_ready = self._may_be_applied(message)
        return message.apply_s if message.is_ready else message.keep_s

    def _on_taken(self, message: Message) -> None:
        stream = message.stream
        stream.inbox.popleft()
        if stream.p2p:
            self._count_read(message)
        stream.under_way_bytes -= message.nbytes
        self._offer(stream)
        if message.is_ready:
            self._on_applied(message)
        else:
            stream.kept += 1
            self._apply_later(message)
        # The next chunk is not begun before this one is applied.
        stream.is_between_chunks = message.ends_chunk
        if not (message.ends_chunk and stream.kept):
            self._take_next(stream)

    def _take_next(self, stream: Stream) -> None:
        if stream.inbox:
            self._take(stream.inbox[0])
        else:
            stream.is_taking = False

    def _apply_later(self, message: Message) -> None:
        """Applies a message that was kept, now or when it may be."""
        if self._may_be_applied(message):
            self._processors.submit(message.stream.dst_process, _apply_s, self._on_kept_applied, message)
        else:
            self._waiting[message.dst_cell].append((self._apply_later, message))

    def _on_kept_applied(self, message: Message) -> None:
        stream = message.stream
        stream.kept -= 1
        self._on_applied(message)
        if stream.is_between_chunks and not stream.kept:
            self._take_next(stream)

    # ---- cells ---------------------------------------------------------------------------------------------------------

    def _may_be_applied(self, message: Message) -> bool:
        cell = message.dst_cell
        return self._writes[cell] >= message.writes_before and self._reads[cell] >= message.reads_before

    def _on_applied(self, message: Message) -> None:
        self._applied += 1
        self._writes[message.dst_cell] += 1
        self._finish_s[message.stream.dst] = self._processors.now_s
        self._wake(message.dst_cell)

    def _count_read(self, message: Message) -> None:
        self._reads[message.src_cell] += 1
        self._finish_s[message.stream.src] = self._processors.now_s
        self._wake(message.src_cell)

    def _wake(self, cell: int) -> None:
        for again, owner in self._waiting.pop(cell, ()):
            again(owner)


def _take_seconds(seconds: float) -> float:
    return seconds


def _do_nothing(seconds: float) -> None:
    pass


def _send_s(message: Message) -> float:
    return message.send_s


def _receive_s(message: Message) -> float:
    return message.receive_s


def _apply_s(message: Message) -> float:
    return message.apply_s
