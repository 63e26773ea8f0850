"""Which passes reduce N sources into D destinations, when one pass takes at most `MAX_OPERANDS` of each.

Decided here once, for the host and for the GPU: the half types round once per pass, so the same passes are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

#: Sources, and destinations, that one pass takes.
MAX_OPERANDS = 8
#: The buffer that holds what was accumulated so far where no destination can; as an index, the last of a list.
TEMPORARY = -1


@dataclass(frozen=True, slots=True)
class Pass:
    """One reading of some buffers and writing of others; element i of all sources is read before any element i is written.

    A buffer is an index into ``[*sources, *destinations, temporary]`` of the whole reduction. A destination that is one
    of the sources goes by the source's index, so in a plan different indices are different memory.

    Attributes:
        sources: in the order of the operation, what was accumulated so far first.
        destinations: where the result goes, to each of them.
        last: all sources are in: this pass applies the divisor. What follows it copies.
    """

    sources: tuple[int, ...]
    destinations: tuple[int, ...]
    last: bool = False

    @property
    def accumulator(self) -> int | None:
        """A destination that can hold what is accumulated of the first sources: it is none that is read after the second."""
        return next((index for index in self.destinations if index not in self.sources[2:]), None)

    @property
    def copies(self) -> bool:
        """Whether it brings the complete result to further destinations."""
        return len(self.sources) == 1 and not self.last


@lru_cache(maxsize=1024)
def plan_passes(nsources: int, aliases: tuple[int | None, ...]) -> tuple[Pass, ...]:
    """The passes of a reduction, in order.

    No pass writes a buffer that a later one still reads as a source. An intermediate result goes to a destination that
    is no source, or a source already read; only where there is none, to the temporary buffer.

    Args:
        nsources: number of sources, at least 1.
        aliases: for each destination which source it is, None for memory of its own. A source that is given twice
            counts by its last position.

    Raises:
        ValueError: no sources, no destinations, an alias that is no source, or two destinations that are one.
    """
    _check(nsources, aliases)
    destinations = [nsources + own if alias is None else alias for own, alias in enumerate(aliases)]
    passes = []
    read = min(nsources, MAX_OPERANDS)
    operands = tuple(range(read))
    if read < nsources:
        # A destination of its own has an index that is no source's.
        accumulator = next((d for d in destinations if d < read or d >= nsources), TEMPORARY)
        while read < nsources:
            passes.append(Pass(operands, (accumulator,)))
            more = min(nsources - read, MAX_OPERANDS - 1)
            operands = (accumulator, *range(read, read + more))
            read += more
    passes.append(Pass(operands, tuple(destinations[:MAX_OPERANDS]), last=True))
    for start in range(MAX_OPERANDS, len(destinations), MAX_OPERANDS):
        passes.append(Pass((destinations[0],), tuple(destinations[start : start + MAX_OPERANDS])))
    return tuple(passes)


def aliases_of(sources: Sequence[int], destinations: Sequence[int]) -> tuple[int | None, ...]:
    """Which source each destination is, from the addresses of both."""
    positions = {address: position for position, address in enumerate(sources)}
    return tuple(positions.get(address) for address in destinations)


def _check(nsources: int, aliases: tuple[int | None, ...]) -> None:
    if nsources < 1 or not aliases:
        raise ValueError(f"a reduction has at least 1 source and 1 destination, not {nsources} and {len(aliases)}")
    in_place = [alias for alias in aliases if alias is not None]
    if any(not 0 <= alias < nsources for alias in in_place):
        raise ValueError(f"destinations are sources {in_place}, but there are {nsources}")
    if len(set(in_place)) < len(in_place):
        raise ValueError(f"two destinations are the same memory: sources {in_place}")
