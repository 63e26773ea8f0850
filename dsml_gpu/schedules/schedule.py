"""What a schedule is. Building one that is wrong raises."""

from __future__ import annotations

from dataclasses import dataclass

from dsml_gpu.schedules.verify import verify


@dataclass(frozen=True, slots=True)
class Transfer:
    """One chunk on its way from one rank to another in one step.

    Attributes:
        src, dst: ranks.
        chunk: which part of the buffer.
        reduce: reduce into what `dst` holds; otherwise overwrite it.
    """

    src: int
    dst: int
    chunk: int
    reduce: bool


@dataclass(frozen=True)
class Schedule:
    """Who sends which chunk to whom, in which step.

    Within a step every transfer reads what its source held before the step; reductions into one chunk of one rank happen
    in the order listed. A rank does not wait for the others between steps: it goes on as soon as its own chunks allow.

    Attributes:
        collective: what it must compute, a key of `verify.POSTCONDITIONS`.
        algorithm: its name for people and answers.
        nranks: number of ranks.
        nchunks: parts into which each rank's buffer is cut (see `chunk_bounds`).
        steps: the transfers of each step.

    Raises:
        InvalidSchedule: on construction, where the schedule is not proved (see `verify`).
    """

    collective: str
    algorithm: str
    nranks: int
    nchunks: int
    steps: tuple[tuple[Transfer, ...], ...]

    def __post_init__(self) -> None:
        verify(self)

    def __repr__(self) -> str:
        transfers = sum(map(len, self.steps))
        return (
            f"Schedule({self.collective} {self.algorithm}, {self.nranks} ranks, {self.nchunks} chunks, "
            f"{len(self.steps)} steps, {transfers} transfers)"
        )
