"""What each collective starts from and what it promises: the specification that schedules are proved against.

A collective's data is cut into *blocks*, which are what the caller gives a size to: one for all ranks (all-reduce), one for
each rank (all-gather), one for each pair of ranks (all-to-all). A block keeps its number wherever it is: in an all-to-all,
block ``src * nranks + dst`` is what `src` has for `dst`, on every rank that it passes through. Some ranks hold a block when
the collective starts, and some must hold the result when it ends:

- where the collective reduces, the result is the reduction over all that every holder had;
- otherwise there is one holder, and the result is what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Layout(Enum):
    """Which blocks there are."""

    #: One: the whole buffer.
    WHOLE = "whole"
    #: Block r belongs to rank r.
    PER_RANK = "per rank"
    #: Block ``src * nranks + dst`` goes from `src` to `dst`.
    PER_PAIR = "per pair"
    #: Block p is what the p-th of a list of (src, dst) sends.
    LISTED = "listed"


@dataclass(frozen=True, slots=True)
class Roles:
    """Who takes part in a collective, and as what.

    Attributes:
        nranks: number of ranks.
        root: the one rank of a rooted collective; 0 in all others.
        pairs: the (src, dst) of a send/recv, both ranks; empty in all others.
    """

    nranks: int
    root: int = 0
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective.

    Attributes:
        name: as in the names of the API, for example ``"all_gather"``.
        layout: which blocks there are.
        holders: (roles, block) -> the ranks that hold the block at the start.
        takers: (roles, block) -> the ranks that must hold the result at the end.
        reduces: the result is a reduction over what the holders had.
        rooted: it has a root.
        idempotent: to reduce a contribution twice does no harm.
    """

    name: str
    layout: Layout
    holders: Callable[[Roles, int], Sequence[int]]
    takers: Callable[[Roles, int], Sequence[int]]
    reduces: bool = False
    rooted: bool = False
    idempotent: bool = False

    def nblocks(self, roles: Roles) -> int:
        """Number of blocks."""
        return {
            Layout.WHOLE: 1,
            Layout.PER_RANK: roles.nranks,
            Layout.PER_PAIR: roles.nranks**2,
            Layout.LISTED: len(roles.pairs),
        }[self.layout]


def _all(roles: Roles, block: int) -> Sequence[int]:
    return range(roles.nranks)


def _root(roles: Roles, block: int) -> Sequence[int]:
    return (roles.root,)


def _owner(roles: Roles, block: int) -> Sequence[int]:
    return (block,)


COLLECTIVES: dict[str, Collective] = {
    collective.name: collective
    for collective in (
        Collective("all_reduce", Layout.WHOLE, holders=_all, takers=_all, reduces=True),
        Collective("reduce", Layout.WHOLE, holders=_all, takers=_root, reduces=True, rooted=True),
        Collective("broadcast", Layout.WHOLE, holders=_root, takers=_all, rooted=True),
        Collective("reduce_scatter", Layout.PER_RANK, holders=_all, takers=_owner, reduces=True),
        Collective("all_gather", Layout.PER_RANK, holders=_owner, takers=_all),
        Collective("gather", Layout.PER_RANK, holders=_owner, takers=_root, rooted=True),
        Collective("scatter", Layout.PER_RANK, holders=_root, takers=_owner, rooted=True),
        Collective(
            "all_to_all",
            Layout.PER_PAIR,
            holders=lambda roles, block: (block // roles.nranks,),
            takers=lambda roles, block: (block % roles.nranks,),
        ),
        Collective(
            "send_recv",
            Layout.LISTED,
            holders=lambda roles, block: (roles.pairs[block][0],),
            takers=lambda roles, block: (roles.pairs[block][1],),
        ),
        # Every rank's token reaches every rank; a set of tokens may meet itself again.
        Collective("barrier", Layout.WHOLE, holders=_all, takers=_all, reduces=True, idempotent=True),
    )
}
