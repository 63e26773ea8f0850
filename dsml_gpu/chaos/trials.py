"""What is tried: a plan, made from a seed and nothing else, so that a run can be had again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dsml_gpu.chaos.operations import Operation
from dsml_gpu.errors import InvalidValue

#: Places in a device server's code (`failpoints`) that an operation over shared memory passes, and one with slices.
PASS_PLACES = ("execute.begin", "passes.staged", "passes.commit", "passes.committed")
SLICE_PLACE = "execute.slice"
PLACES = ("execute.begin", "execute.done", SLICE_PLACE, SLICE_PLACE)
#: How often each collective is tried.
_COLLECTIVES = {"all_reduce": 6, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1, "broadcast": 1}
_DTYPES = ("int32", "int64", "float32", "float64")
#: (transport, algorithm). Over shared memory a collective is one pass, by the algorithm direct.
_WAYS = (("p2p", "direct"), ("grpc", "ring"), ("grpc", "direct"), ("auto", "ring"))
_PAIRWISE = {"ring": "pairwise"}  # an all-to-all goes round in pairs, not in a ring


@dataclass(frozen=True, slots=True)
class Moment:
    """When a fault happens.

    Attributes:
        place: a failpoint of the victim; empty: at a random instant of the operation.
        skip: so often the place is passed before.
        fraction: where there is no place: of the time that the operation takes, from 0 to 1.
    """

    place: str = ""
    skip: int = 0
    fraction: float = 0.0

    def __str__(self) -> str:
        if not self.place:
            return f"after {self.fraction:.0%} of its time"
        return f"at {self.place}" + (f" number {self.skip + 1}" if self.skip else "")


@dataclass(frozen=True, slots=True)
class Trial:
    """One operation with one fault.

    Attributes:
        number: from 1.
        seed: of its data.
        whole: data of float types are whole numbers.
        victim: rank that the fault is of.
        delay_s: by how much its traffic is delayed, where that is the fault.
    """

    number: int
    seed: int
    operation: Operation
    victim: int
    moment: Moment = field(default_factory=Moment)
    whole: bool = True
    delay_s: float = 0.0

    def __str__(self) -> str:
        return f"trial {self.number}: {self.operation}; rank {self.victim} {self.moment}"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What trials may be of.

    Attributes:
        ranks: least and largest number of ranks.
        transports: of those of `_WAYS`; empty: all.
        largest_bytes: of a rank's buffer.
        failpoints: also have faults at failpoints, half of them.
        collectives: of those known; empty: all.
        in_place: only that; None: either.
        ops: reductions.

    Raises:
        InvalidValue: on construction, where nothing is left.
    """

    ranks: tuple[int, int] = (2, 8)
    transports: Sequence[str] = ()
    largest_bytes: int = 16 << 20
    failpoints: bool = True
    collectives: Sequence[str] = ()
    in_place: bool | None = None
    ops: Sequence[str] = ("sum", "sum", "sum", "max", "min")

    def __post_init__(self) -> None:
        least, largest = self.ranks
        if not 1 <= least <= largest:
            raise InvalidValue(f"ranks must be LEAST..LARGEST with at least 1, got {least}..{largest}")
        if self.largest_bytes < 8 * largest:
            raise InvalidValue(f"buffers of {largest} ranks take at least {8 * largest} bytes, got {self.largest_bytes}")
        if not self.ways:
            raise InvalidValue(f"transports must be of {sorted({way[0] for way in _WAYS})}, got {list(self.transports)}")

    @property
    def ways(self) -> list[tuple[str, str]]:
        """Transports and algorithms."""
        return [way for way in _WAYS if not self.transports or way[0] in self.transports]


def plan(n: int, seed: int, wishes: Wishes | None = None) -> list[Trial]:
    """Trials 1 .. n. The same for the same arguments, and trial k is the same for every n."""
    wishes = wishes or Wishes()
    return [_drawn(number, random.Random(f"{seed} {number}"), wishes) for number in range(1, n + 1)]


def _drawn(number: int, rng: random.Random, wishes: Wishes) -> Trial:
    nranks = rng.randint(*wishes.ranks)
    names = [name for name in _COLLECTIVES if not wishes.collectives or name in wishes.collectives]
    collective = rng.choices(names, [_COLLECTIVES[name] for name in names])[0]
    transport, algorithm = rng.choice(wishes.ways)
    in_place = rng.random() < 0.5 if wishes.in_place is None else wishes.in_place
    if collective == "all_to_all":
        algorithm = _PAIRWISE.get(algorithm, algorithm)
        # In place it goes by slices, which p2p between processes has not.
        in_place = in_place and transport != "p2p"
    dtype = rng.choice(_DTYPES)
    blocks = 1 if collective in ("all_reduce", "broadcast") else nranks
    most = wishes.largest_bytes // (np.dtype(dtype).itemsize * blocks)
    operation = Operation(
        collective,
        nranks,
        max(1, round(most ** rng.random())),  # as many small ones as large ones, on a logarithmic scale
        dtype,
        rng.choice(wishes.ops),
        algorithm,
        transport,
        in_place,
        rng.randrange(nranks),
    )
    return Trial(
        number,
        rng.randrange(1 << 31),
        operation,
        rng.randrange(nranks),
        _moment(rng, operation, wishes.failpoints),
        rng.random() < 0.5,
        rng.uniform(0.05, 0.8),
    )


def _moment(rng: random.Random, operation: Operation, failpoints: bool) -> Moment:
    fraction, place, skip = rng.random(), "", 0
    if failpoints and rng.random() < 0.5:
        place = rng.choice(PLACES if operation.transport != "p2p" and operation.nranks > 1 else PASS_PLACES)
        if place == SLICE_PLACE:
            skip = rng.randrange(1 + max(0, min(40, operation.nbytes // (64 << 10))))
    return Moment(place, skip, fraction)
