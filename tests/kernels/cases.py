"""Launches of the kernels with what must come out, and the check of what did.

What must come out is computed here with numpy and ml_dtypes, and shares nothing with the reductions of the package.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from dsml_gpu.reduction import DTYPES, OPERATORS, checked_weight
from dsml_gpu.reduction.kernels import Launch, copy_launch, reduce_launch, weigh_launch
from dsml_gpu.reduction.operators import Operator
from tests.kernels.on_cpu import Grid, Program, address

MAX_OPERANDS = 8
PACK_BYTES = 16
PACKS_IN_FLIGHT = 8

#: On both sides of each operand; more than a pack.
GUARD_BYTES = 48
#: Columns of `pool`: more than the longest operand has elements.
POOL = 80_000

#: Few threads, so that a short operand takes each of them round the loop several times.
SMALL_GRIDS = (Grid(1, 1), Grid(3, 1, backwards=True), Grid(2, 3), Grid(1, 5, backwards=True))
#: With blocks as the GPU has them.
REAL_GRIDS = (Grid(1, 256), Grid(2, 256, backwards=True))

OPERANDS = range(1, MAX_OPERANDS + 1)
IN_PLACE = ("", "same", "last")
DIVISORS = (1, 2, 3, 7, 8, 200, 256)


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        before: the buffers, each an operand with its guards.
        payloads: where in each buffer the operand is.
        wanted: what must be there afterwards; None where it must be what it was.
        bits_matter: neither another NaN nor a zero of the other sign will do.
        zeros_alike: of two equal zeros the operator may give either.
    """

    name: str
    launch: Launch
    grid: Grid
    before: list[np.ndarray]
    payloads: list[slice]
    wanted: list[np.ndarray | None]
    bits_matter: bool
    zeros_alike: bool


def check(program: Program, cases: Iterable[Case]) -> int:
    """Run the cases and compare; return how many there were.

    Raises:
        AssertionError: for the first case that is wrong, saying how.
    """
    listed = list(cases)
    results = program.run([(case.launch, case.grid, case.before) for case in listed])
    for case, after in zip(listed, results, strict=True):
        for number in range(len(after)):
            _check_buffer(case, number, after[number])
    return len(listed)


def _check_buffer(case: Case, number: int, after: np.ndarray) -> None:
    before, payload, wanted = case.before[number], case.payloads[number], case.wanted[number]
    if wanted is None:
        assert after.tobytes() == before.tobytes(), f"{case.name}: operand {number} is a source only, and was written"
        return
    guards_kept = (after[: payload.start].tobytes(), after[payload.stop :].tobytes()) == (
        before[: payload.start].tobytes(),
        before[payload.stop :].tobytes(),
    )
    assert guards_kept, f"{case.name}: bytes beside operand {number} were written"
    if after[payload].tobytes() == wanted.tobytes():
        return
    got = np.frombuffer(after[payload].tobytes(), wanted.dtype)
    as_bits = f"u{wanted.dtype.itemsize}"
    same = got.view(as_bits) == wanted.view(as_bits)
    if not case.bits_matter and wanted.dtype.kind not in "iu":
        with np.errstate(invalid="ignore"):  # some types say so when they meet a NaN
            same |= np.isnan(got) & np.isnan(wanted)
            if case.zeros_alike:
                same |= (got == 0) & (wanted == 0)
    if not same.all():
        wrong = np.flatnonzero(~same)
        first = wrong[0]
        raise AssertionError(
            f"{case.name}: operand {number}: {wrong.size} of {same.size} elements differ, "
            f"the first at {first}: {got[first]}, expected {wanted[first]}"
        )


def reduced(operator: str, sources: np.ndarray, divisor: int) -> np.ndarray:
    """The sources (one in each row) from left to right; half types accumulate in float32 and round once."""
    combine: Any = {"SUM": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum, "AVG": np.add}[operator]
    dtype = sources.dtype
    integers = dtype.kind in "iu"
    with np.errstate(all="ignore"):
        wide = sources.astype(np.float32) if dtype.itemsize == 2 else sources
        value = functools.reduce(combine, wide)
        if operator == "AVG" and integers:
            # Division of magnitudes truncates toward zero. The magnitude of the least integer needs the unsigned type.
            negative = value < 0
            magnitude = np.where(negative, np.uint64(0) - value.astype(np.uint64), value.astype(np.uint64))
            quotient = magnitude // np.uint64(divisor)
            value = np.where(negative, np.uint64(0) - quotient, quotient)
        elif operator == "AVG":
            value = value / value.dtype.type(divisor)
        return value.astype(dtype)


@functools.cache
def pool(dtype_name: str) -> np.ndarray:
    """Values to reduce, one source in each row: the hard ones and any others, column by column in no order."""
    dtype = DTYPES[dtype_name]
    rng = np.random.default_rng(list(DTYPES).index(dtype_name))
    any_bits = np.frombuffer(rng.bytes(MAX_OPERANDS * POOL * dtype.itemsize), dtype).reshape(MAX_OPERANDS, POOL)
    blocks = _integers(rng, dtype) if dtype.kind in "iu" else _floats(rng, dtype)
    hard = np.concatenate([np.asarray(block).astype(dtype) for block in blocks], axis=1)
    values = np.concatenate([hard, any_bits[:, hard.shape[1] :]], axis=1)
    return np.ascontiguousarray(values[:, rng.permutation(POOL)])


def _integers(rng: np.random.Generator, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    info = np.iinfo(dtype)
    shape = (MAX_OPERANDS, POOL // 4)
    yield rng.choice(np.array([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype), shape)
    yield rng.integers(0, 8, shape).astype(dtype) - dtype.type(4 if info.min < 0 else 0)


def _floats(rng: np.random.Generator, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    info = ml_dtypes.finfo(dtype)
    columns = POOL // 8
    shape = (MAX_OPERANDS, columns)
    largest, least_normal, least = float(info.max), float(info.tiny), float(info.smallest_subnormal)
    yield rng.choice(
        [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, largest, -largest, least_normal, -least_normal, least, -least], shape
    )
    # Subnormal numbers, and sums of them that are none.
    yield rng.integers(-1 << info.nmant, 1 << info.nmant, shape) * least
    # Of the same size, so that much cancels and the order of additions tells.
    yield rng.normal(size=shape) * 2.0 ** rng.integers(-3, 4, shape)
    # Near the largest: sums of few overflow, and some come back.
    yield rng.choice([largest, -largest, largest / 2, largest / 4], shape)
    eps = float(info.eps)
    odd_and_even = 1 + eps * rng.integers(0, 1 << (info.nmant - 1), columns)
    # Sums half way between two neighbours.
    ties = np.zeros(shape)
    ties[0], ties[1] = odd_and_even, rng.choice([-1, 1], columns) * eps / 2
    yield ties
    # Products likewise.
    ties = np.ones(shape)
    ties[0], ties[1] = odd_and_even, 1.5
    yield ties
    # Rounded after every source, these would stay what the first is.
    small = np.full(shape, eps / 2)
    small[0] = odd_and_even
    yield small


def alignments(itemsize: int) -> list[tuple[int, ...]]:
    """Addresses modulo 16, for the operands in turn: alike with every head, apart, and not even those of elements."""
    alike = [(-head * itemsize % PACK_BYTES,) for head in range(PACK_BYTES // itemsize)]
    apart = [tuple(i * itemsize % PACK_BYTES for i in range(1, 4))]
    odd = [(1,), (PACK_BYTES - 1,), (0, 1), (5, 0, 7, 2)] if itemsize > 1 else [(5, 0, 7, 2)]
    return alike + apart + odd


def capacity(sources: int) -> int:
    """The power of two that holds so many, from 2 on."""
    return max(2, 1 << (sources - 1).bit_length())


def pack_counts(grid: Grid, sources: int) -> list[int]:
    """Numbers of packs around the ends of the unrolled loop, of the threads, and of several rounds of both."""
    threads = grid.blocks * grid.threads
    round_ = threads * (PACKS_IN_FLIGHT // capacity(sources))
    around = {edge + i for edge in (0, threads, round_, 2 * round_) for i in (-1, 0, 1)} | {2 * round_ + threads + 1}
    return sorted(count for count in around if count >= 0)


def reduction(
    rng: np.random.Generator,
    operator: Operator,
    dtype_name: str,
    sources: int,
    destinations: int,
    *,
    count: int,
    alignment: Sequence[int],
    in_place: str = "",
    divisor: int = 1,
    grid: Grid = SMALL_GRIDS[0],
    guard: int = GUARD_BYTES,
) -> Case:
    """A reduction of some window of `pool`.

    Args:
        count: elements of each operand.
        alignment: addresses modulo 16 of the operands in turn.
        in_place: ``""``, ``"same"``: destinations are the sources of the same number, or ``"last"``: the first destination
            is the last source.
        guard: bytes on both sides of an operand.
    """
    dtype = DTYPES[dtype_name]
    start = int(rng.integers(POOL - count))
    rows = pool(dtype_name)[:sources, start : start + count]
    copies = sources == 1 and divisor == 1
    # Which buffer each destination is; those of the sources are the first.
    others = itertools.count(sources)
    written = []
    for j in range(destinations):
        if in_place == "same" and j < sources:
            written.append(j)
        elif in_place == "last" and j == 0:
            written.append(sources - 1)
        else:
            written.append(next(others))
    return _case(
        f"{operator.name} {dtype_name} {sources} -> {destinations}, {count} elements at {alignment}, "
        f"in place: {in_place or 'no'}, divisor {divisor}, {grid}",
        rng,
        rows,
        written,
        rows[0] if copies else reduced(operator.name, rows, divisor),
        lambda sources, destinations, nbytes: reduce_launch(operator, dtype, sources, destinations, nbytes, divisor),
        alignment=alignment,
        grid=grid,
        guard=guard,
        bits_matter=copies,
        zeros_alike=operator.name in ("MIN", "MAX"),
    )


def copy(
    rng: np.random.Generator,
    nbytes: int,
    destinations: int,
    alignment: Sequence[int],
    grid: Grid = SMALL_GRIDS[0],
    guard: int = GUARD_BYTES,
) -> Case:
    """A copy of any bytes."""
    row = np.frombuffer(rng.bytes(nbytes), np.uint8)
    return _case(
        f"copy of {nbytes} bytes to {destinations} at {alignment}, {grid}",
        rng,
        row[np.newaxis],
        list(range(1, 1 + destinations)),
        row,
        lambda sources, destinations, nbytes: copy_launch(sources[0], destinations, nbytes),
        alignment=alignment,
        grid=grid,
        guard=guard,
        bits_matter=True,
        zeros_alike=False,
    )


def weighed(values: np.ndarray, weight: float) -> np.ndarray:
    """Values times a weight: half types in float32, with a weight of float32, and rounded once; integers wrap."""
    dtype = values.dtype
    with np.errstate(all="ignore"):
        if dtype.itemsize == 2:
            return (values.astype(np.float32) * np.float32(weight)).astype(dtype)
        return values * dtype.type(weight)


def weighing(
    rng: np.random.Generator,
    dtype_name: str,
    weight: float,
    *,
    count: int,
    alignment: Sequence[int],
    in_place: bool,
    grid: Grid = SMALL_GRIDS[0],
    guard: int = GUARD_BYTES,
) -> Case:
    """A multiplication of some window of `pool` by a weight."""
    dtype = DTYPES[dtype_name]
    start = int(rng.integers(POOL - count))
    rows = pool(dtype_name)[:1, start : start + count]
    return _case(
        f"{dtype_name} times {weight:g}, {count} elements at {alignment}, {'in place' if in_place else 'elsewhere'}, {grid}",
        rng,
        rows,
        [0 if in_place else 1],
        weighed(rows[0], weight),
        lambda sources, destinations, nbytes: weigh_launch(
            dtype, sources[0], destinations[0], nbytes, checked_weight(weight, dtype)
        ),
        alignment=alignment,
        grid=grid,
        guard=guard,
        bits_matter=False,
        zeros_alike=False,
    )


def weights_for(dtype_name: str) -> list[float]:
    """Some that are exact, some that are rounded, and the hard ones."""
    dtype = DTYPES[dtype_name]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        # The largest as a float is too large for 64 bits.
        largest = info.max if dtype.itemsize < 8 else 1 << 62
        return [0, 1, 3, 100, largest, *([-1, -7, info.min] if info.min < 0 else [])]
    return [0.0, 1.0, -1.0, 0.5, 3.0, 1 / 3, 1e-3, -0.0, np.inf, np.nan, 2.0**-20, 65520.0]


def weighings(dtype_name: str, guard: int = GUARD_BYTES) -> Iterator[Case]:
    """Every weight and every alignment with lengths near an end of something, in place and elsewhere; and a GPU's blocks."""
    itemsize = DTYPES[dtype_name].itemsize
    rng = np.random.default_rng(list(DTYPES).index(dtype_name))
    grids, places, weights = itertools.cycle(SMALL_GRIDS), itertools.cycle((True, False)), weights_for(dtype_name)
    for weight, count in itertools.product(weights, (0, 1, 333)):
        yield weighing(rng, dtype_name, weight, count=count, alignment=(0,), in_place=next(places), guard=guard)
    for alignment, weight in zip(alignments(itemsize), itertools.cycle(weights)):
        grid = next(grids)
        for packs, tail in itertools.product(pack_counts(grid, 1), sorted({0, 1, PACK_BYTES // itemsize - 1})):
            count = length(itemsize, alignment, packs, tail)
            place = next(places)
            yield weighing(rng, dtype_name, weight, count=count, alignment=alignment, in_place=place, grid=grid, guard=guard)
    grid = REAL_GRIDS[0]
    count = length(itemsize, (0,), 2 * PACKS_IN_FLIGHT * grid.threads + grid.threads + 1, 1)
    yield weighing(rng, dtype_name, weights[2], count=count, alignment=(0,), in_place=False, grid=grid, guard=guard)


def _case(
    name: str,
    rng: np.random.Generator,
    rows: np.ndarray,
    written: Sequence[int],
    wanted: np.ndarray,
    launch: Callable[[list[int], list[int], int], Launch],
    *,
    alignment: Sequence[int],
    grid: Grid,
    guard: int,
    bits_matter: bool,
    zeros_alike: bool,
) -> Case:
    sources, nbytes = len(rows), rows[0].nbytes
    before, payloads, places = [], [], []
    for number in range(max(sources, *(1 + each for each in written))):
        start = (guard + PACK_BYTES - 1) // PACK_BYTES * PACK_BYTES + alignment[number % len(alignment)]
        buffer = np.frombuffer(rng.bytes(start + nbytes + guard), np.uint8).copy()
        if number < sources:
            buffer[start : start + nbytes] = np.frombuffer(rows[number].tobytes(), np.uint8)
        before.append(buffer)
        payloads.append(slice(start, start + nbytes))
        places.append(address(number, start))
    return Case(
        name=name,
        launch=launch(places[:sources], [places[number] for number in written], nbytes),
        grid=grid,
        before=before,
        payloads=payloads,
        wanted=[wanted if number in written else None for number in range(len(before))],
        bits_matter=bits_matter,
        zeros_alike=zeros_alike,
    )


def length(itemsize: int, alignment: Sequence[int], packs: int, tail: int) -> int:
    """Elements of so many packs, with the head that the alignment leaves before them and a tail behind them."""
    return -alignment[0] % PACK_BYTES // itemsize + packs * (PACK_BYTES // itemsize) + tail


def breadth(operator: Operator, dtype_name: str, each: int = 3, guard: int = GUARD_BYTES) -> Iterator[Case]:
    """Every number of sources and of destinations, each a few times with all else chosen at random."""
    itemsize = DTYPES[dtype_name].itemsize
    rng = np.random.default_rng([OPERATORS.index(operator), list(DTYPES).index(dtype_name)])
    aligned = alignments(itemsize)
    for sources, destinations, _ in itertools.product(OPERANDS, OPERANDS, range(each)):
        grid = SMALL_GRIDS[rng.integers(len(SMALL_GRIDS))]
        alignment = aligned[rng.integers(len(aligned))]
        packs, tail = int(rng.choice(pack_counts(grid, sources))), int(rng.integers(PACK_BYTES // itemsize))
        yield reduction(
            rng,
            operator,
            dtype_name,
            sources,
            destinations,
            count=length(itemsize, alignment, packs, tail),
            alignment=alignment,
            in_place=IN_PLACE[rng.integers(len(IN_PLACE))],
            divisor=int(rng.choice(DIVISORS)) if operator.averages else 1,
            grid=grid,
            guard=guard,
        )


def real_blocks(operator: Operator, dtype_name: str, guard: int = GUARD_BYTES) -> Iterator[Case]:
    """Each instantiation with blocks of the size that a GPU gets, over more packs than two rounds of all threads."""
    rng = np.random.default_rng([OPERATORS.index(operator), list(DTYPES).index(dtype_name)])
    itemsize = DTYPES[dtype_name].itemsize
    for number, sources in enumerate((2, 4, 8)):
        grid = REAL_GRIDS[number % len(REAL_GRIDS)]
        count = length(itemsize, (0,), pack_counts(grid, sources)[-1], 1)
        divisor = sources if operator.averages else 1
        yield reduction(
            rng, operator, dtype_name, sources, 2, count=count, alignment=(0,), divisor=divisor, grid=grid, guard=guard
        )


def boundaries(dtype_name: str, guard: int = GUARD_BYTES) -> Iterator[Case]:
    """Every alignment with every length near an end of something; operators and grids in turn."""
    itemsize = DTYPES[dtype_name].itemsize
    rng = np.random.default_rng(list(DTYPES).index(dtype_name))
    per_pack = PACK_BYTES // itemsize
    grids, operators, in_place = itertools.cycle(SMALL_GRIDS), itertools.cycle(OPERATORS), itertools.cycle(IN_PLACE)
    for sources, alignment in itertools.product((2, 4, 8), alignments(itemsize)):
        grid = next(grids)
        for packs, tail in itertools.product(pack_counts(grid, sources), sorted({0, 1, per_pack - 1})):
            yield reduction(
                rng,
                next(operators),
                dtype_name,
                sources,
                int(rng.integers(1, 9)),
                count=length(itemsize, alignment, packs, tail),
                alignment=alignment,
                in_place=next(in_place),
                grid=grid,
                guard=guard,
            )
    # Less than a pack, and heads that are longer than the operand.
    for alignment, count in itertools.product(alignments(itemsize), range(2 * per_pack)):
        yield reduction(rng, next(operators), dtype_name, 2, 1, count=count, alignment=alignment, guard=guard)


def copies(guard: int = GUARD_BYTES) -> Iterator[Case]:
    """All numbers of destinations, alignments alike for each type that bytes are copied as, and apart."""
    rng = np.random.default_rng(0)
    aligned = [(offset,) for offset in range(PACK_BYTES)] + [(0, 8), (0, 4), (8, 12), (0, 2), (1, 5, 3)]
    lengths = [*range(50), 16 * 8 * 6, 16 * 8 * 6 + 8, 16 * 8 * 6 * 2 + 4, 16 * 8 * 6 * 2 - 1]
    for number, (alignment, nbytes) in enumerate(itertools.product(aligned, lengths)):
        yield copy(rng, nbytes, 1 + number % MAX_OPERANDS, alignment, SMALL_GRIDS[number % len(SMALL_GRIDS)], guard)
