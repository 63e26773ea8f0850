"""Times an outline on a topology: a few operations on arrays for each round, whatever the size of the data.

What a round puts on each link, process and host is counted once. A size turns the counts into seconds, and two bounds turn
these into a time. Every round takes

- as long as the busiest link, process or host has work: its *load*;
- as long as it takes until all have the first message of what they get: its *lead*.

Rounds that use the same links one after the other, as those of a ring do, take the larger of both each. Rounds that use
different links, as the levels of a tree do, overlap: together they take as long as what is busiest in all of them has
work, and the leads of all on top. A phase takes the shorter of these two times. Pipelining reaches them where the rounds of
a phase are all of the one or all of the other kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.schedules.outline import Outline
from dsml_gpu.schedules.outline_meter import Load, Meter, PhaseProfile
from dsml_gpu.schedules.topology import Topology


@dataclass(frozen=True, slots=True)
class _Cut:
    """How chunks are cut.

    Attributes:
        chunk_bytes: of a chunk.
        messages: that a chunk is.
        message_bytes: of the first of them.
    """

    chunk_bytes: float
    messages: float
    message_bytes: float

    def load_s(self, load: Load) -> float:
        return load.seconds(self.messages, self.chunk_bytes)

    def one_message_s(self, load: Load) -> float:
        return load.seconds(1, self.message_bytes)


@dataclass(frozen=True, slots=True)
class _Leads:
    """The leads of a phase's rounds.

    Attributes:
        met_s: of each round, if first messages meet.
        alone_s: of all rounds together, if they do not.
    """

    met_s: tuple[float, ...]
    alone_s: float


class OutlineTimer:
    """Predicts the time of an outline, for any size.

    Args:
        outline: of a number of ranks.
        topology: of as many.
        model: costs of processors.

    Raises:
        ValueError: the numbers of ranks differ.
    """

    def __init__(self, outline: Outline, topology: Topology, model: CostModel) -> None:
        if topology.nranks != outline.nranks:
            raise ValueError(f"the topology has {topology.nranks} ranks, the outline {outline.nranks}")
        self._outline = outline
        self._phase_s = _one_by_one_s if outline.store_and_forward else _pipelined_s
        meter = Meter(topology, model)
        self._phases = [meter.phase(phase) for phase in outline.phases if phase]
        self._control_s = meter.control_s(outline)
        #: By the size of messages, which is the same for all large sizes.
        self._leads: dict[float, list[_Leads]] = {}

    def time_s(self, buffer_bytes: int, slice_bytes: int = 512 << 10) -> float:
        """From the client's call to its return.

        Args:
            buffer_bytes: of each rank's buffer, all blocks together.
            slice_bytes: chunks are cut into messages of this size.
        """
        if not buffer_bytes:
            return self._control_s
        chunk_bytes = buffer_bytes / self._outline.chunks
        # Of chunks with less than a byte on average, so many have one, and the others are not sent.
        messages = -(-chunk_bytes // slice_bytes) if chunk_bytes > 1 else chunk_bytes
        cut = _Cut(chunk_bytes, messages, min(slice_bytes, max(chunk_bytes, 1)))
        if cut.message_bytes not in self._leads:
            self._leads[cut.message_bytes] = [
                _leads(phase, cut.message_bytes, self._outline.nranks) for phase in self._phases
            ]
        phases = zip(self._phases, self._leads[cut.message_bytes], strict=True)
        return self._control_s + sum(self._phase_s(phase, leads, cut) for phase, leads in phases)


def _leads(phase: PhaseProfile, message_bytes: float, nranks: int) -> _Leads:
    met_s, alone_s = np.zeros(nranks), np.zeros(nranks)
    each_s, before_s = [], 0.0
    for profile in phase.rounds:
        met_s = profile.arrivals_s(met_s, message_bytes, meet=True)
        alone_s = profile.arrivals_s(alone_s, message_bytes, meet=False)
        after_s = float(met_s.max())
        each_s.append(after_s - before_s)
        before_s = after_s
    return _Leads(tuple(each_s), float(alone_s.max()))


def _pipelined_s(phase: PhaseProfile, leads: _Leads, cut: _Cut) -> float:
    in_turn_s = 0.0
    for profile, lead_s in zip(phase.rounds, leads.met_s, strict=True):
        load_s = cut.load_s(profile.load)
        in_turn_s += max(profile.repeat * load_s, lead_s)
    # The last message leaves when the load of the last round is done; of its way, one place is counted there.
    last_s = cut.one_message_s(profile.one_way) - cut.one_message_s(profile.one_place)
    in_turn_s += max(0.0, load_s + last_s - max(load_s, lead_s / profile.repeat))
    # In what is busiest in the phase, the first message is counted with the leads.
    first_s = max(cut.one_message_s(profile.one_place) for profile in phase.rounds)
    overlapping_s = leads.alone_s + max(0.0, cut.load_s(phase.load) - first_s)
    return min(in_turn_s, overlapping_s)


def _one_by_one_s(phase: PhaseProfile, leads: _Leads, cut: _Cut) -> float:
    """For store and forward: nothing overlaps but a round's own messages."""
    return sum(
        profile.repeat
        * (cut.load_s(profile.load) + cut.one_message_s(profile.one_way) - cut.one_message_s(profile.one_place))
        for profile in phase.rounds
    )
