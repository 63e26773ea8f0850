"""Outlines: schedules in short, for more ranks than a schedule can be written out for.

A ring on 65536 ranks is one pattern of 65536 transfers, repeated 131070 times; its schedule would have 8.6e9 transfers. An
outline says how much each rank sends to which, step by step, and not which chunks these are. It is not proved as schedules
are; tests show for many numbers of ranks that it moves exactly what the schedule moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, permutations

import numpy as np

from dsml_gpu.schedules.topology import Ints


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Transfers of one kind at the same time: `src[i]` sends `chunks` chunks to `dst[i]`.

    Attributes:
        src, dst: ranks.
        chunks: one number for each pair, or one for all.
        reduce: reduce into what `dst` holds; otherwise overwrite it.
    """

    src: Ints
    dst: Ints
    chunks: Ints | int
    reduce: bool

    @property
    def each(self) -> Ints:
        """Chunks of each pair."""
        return np.broadcast_to(np.asarray(self.chunks, dtype=np.int64), self.src.shape)

    @property
    def transfers(self) -> int:
        """Number of transfers of single chunks."""
        return int(self.each.sum())

    def turned_round(self, reduce: bool) -> Pattern:
        """Every transfer back to where it came from."""
        return Pattern(self.dst, self.src, self.chunks, reduce)

    def written_out(self) -> Iterator[tuple[int, int, int]]:
        """(src, dst, chunks) of each pair."""
        return zip(self.src.tolist(), self.dst.tolist(), self.each.tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class Everybody:
    """A pattern with too many pairs for arrays: every rank sends `chunks` chunks to every other one."""

    nranks: int
    chunks: int
    reduce: bool

    @property
    def transfers(self) -> int:
        """Number of transfers of single chunks."""
        return self.nranks * (self.nranks - 1) * self.chunks

    def turned_round(self, reduce: bool) -> Everybody:
        """Every transfer back to where it came from."""
        return Everybody(self.nranks, self.chunks, reduce)

    def written_out(self) -> Iterator[tuple[int, int, int]]:
        """(src, dst, chunks) of each pair."""
        return ((src, dst, self.chunks) for src, dst in permutations(range(self.nranks), 2))


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What happens in one step of the schedule, or in so many alike.

    Attributes:
        patterns: together the step's transfers.
        repeat: number of such steps, one after the other.
    """

    patterns: tuple[Pattern | Everybody, ...]
    repeat: int = 1


#: One after the other.
Rounds = tuple[Round, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A schedule in short.

    Attributes:
        nranks: number of ranks.
        chunks: into how many a rank's buffer is cut; all are about as large.
        phases: their rounds, one after the other. Between phases nothing overlaps: what the next one sends is there only
            when all of this one is done. Within a phase it may: a rank sends on what it has, slice by slice.
        store_and_forward: see `Schedule`.
    """

    nranks: int
    chunks: int
    phases: tuple[Rounds, ...]
    store_and_forward: bool = False

    @property
    def rounds(self) -> Iterator[Round]:
        """Those of all phases."""
        return chain.from_iterable(self.phases)

    @property
    def transfers(self) -> int:
        """Number of transfers of single chunks."""
        return sum(round_.repeat * pattern.transfers for round_ in self.rounds for pattern in round_.patterns)

    def steps(self) -> Iterator[Counter[tuple[int, int, bool]]]:
        """Written out: for each step how many chunks go from where to where, by (src, dst, reduce)."""
        for round_ in self.rounds:
            step: Counter[tuple[int, int, bool]] = Counter()
            for pattern in round_.patterns:
                for src, dst, chunks in pattern.written_out():
                    step[src, dst, pattern.reduce] += chunks
            for _ in range(round_.repeat):
                yield step
