"""What a schedule is. Building one that is wrong raises."""

from __future__ import annotations

from dataclasses import dataclass

from dsml_gpu.schedules.collectives import COLLECTIVES, Roles
from dsml_gpu.schedules.verify import verify


@dataclass(frozen=True, slots=True)
class Transfer:
    """One chunk on its way from one rank to another in one step.

    Attributes:
        src, dst: ranks.
        chunk: which chunk; it has the same number on both.
        reduce: reduce into what `dst` holds; otherwise overwrite it.
    """

    src: int
    dst: int
    chunk: int
    reduce: bool = False


@dataclass(frozen=True)
class Schedule:
    """Who sends which chunk to whom, in which step.

    Within a step every transfer reads what its source held before the step; reductions into one chunk of one rank happen
    in the order listed. A rank does not wait for the others between steps: it goes on as soon as its own chunks allow.

    Attributes:
        collective: what it must compute, a key of `COLLECTIVES`.
        algorithm: its name for people and answers.
        nranks: number of ranks.
        parts: chunks into which each block is cut; chunk c is part ``c % parts`` of block ``c // parts``.
        steps: the transfers of each step.
        root: of a rooted collective.
        pairs: (src, dst) of each block of a send/recv.
        store_and_forward: a rank sends a chunk on only when all of it has arrived; otherwise slice by slice.

    Raises:
        InvalidSchedule: on construction, where the schedule is not proved (see `verify`).
    """

    collective: str
    algorithm: str
    nranks: int
    parts: int
    steps: tuple[tuple[Transfer, ...], ...]
    root: int = 0
    pairs: tuple[tuple[int, int], ...] = ()
    store_and_forward: bool = False

    def __post_init__(self) -> None:
        verify(self)

    @property
    def roles(self) -> Roles:
        """Who takes part, and as what."""
        return Roles(self.nranks, self.root, self.pairs)

    @property
    def nblocks(self) -> int:
        """Blocks of the collective."""
        return COLLECTIVES[self.collective].nblocks(self.roles)

    @property
    def nchunks(self) -> int:
        """Chunks of all blocks together."""
        return self.nblocks * self.parts

    def __repr__(self) -> str:
        transfers = sum(map(len, self.steps))
        return (
            f"Schedule({self.collective} {self.algorithm}, {self.nranks} ranks, {self.nchunks} chunks, "
            f"{len(self.steps)} steps, {transfers} transfers)"
        )
