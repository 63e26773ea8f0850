"""What a slice holds, when it may be written, and where results go, with no links."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dsml_gpu.device.dataflow import Dataflow
from dsml_gpu.device.operation import Block, Operation
from dsml_gpu.device.slices import Slice, Slices
from dsml_gpu.device.undo import SparePieces, Undo
from dsml_gpu.memory.arena import MIN_ARENA_BYTES, Arena
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.reduction import OPERATORS, HostReducer, Operator
from dsml_gpu.schedules import Kind
from tests.support.in_this_process import in_event_loop

DTYPE = np.dtype(np.int64)
SUM, AVG = (next(operator for operator in OPERATORS if operator.name == name) for name in ("SUM", "AVG"))
INPUT, OUTPUT = 0, 4096
SLICE_BYTES = 64


class CountingUndo(Undo):
    """An undo that knows how often it was given something."""

    kept = 0

    def keep(self, place: np.ndarray) -> None:
        self.kept += 1
        super().keep(place)


class Rank:
    """One that has a block of an operation, and nobody to talk to."""

    def __init__(
        self,
        elements: int,
        send: int | None,
        recv: int | None,
        parts: int = 1,
        operator: Operator = SUM,
        weight: int | None = None,
        store_and_forward: bool = False,
    ) -> None:
        self.arena = Arena(MIN_ARENA_BYTES, NUMPY)
        self.at(INPUT, elements)[:] = np.arange(1, elements + 1)
        self.undo = CountingUndo(SparePieces(self.arena.memory))
        flow = Dataflow(1, parts, {}, {}, (1,) * parts, (0,) * parts, True, store_and_forward)
        scale = None if weight is None else DTYPE.type(weight)
        operation = Operation(flow, (Block(elements, send, recv),), DTYPE, operator, scale)
        self.slices = Slices(operation, self.arena, HostReducer(), SLICE_BYTES, 4, {}, self.undo)

    def at(self, addr: int, elements: int) -> np.ndarray:
        return self.arena.view(addr, elements * DTYPE.itemsize).view(DTYPE)


def bytes_of(*values: int) -> np.ndarray:
    return np.array(values, DTYPE).view(np.uint8)


def values_of(content: np.ndarray) -> list[int]:
    return [int(value) for value in content.view(DTYPE)]


def test_chunks_are_cut_into_slices() -> None:
    slices = Rank(21, INPUT, INPUT, parts=2).slices
    sizes = [[piece.nbytes for piece in slices.of_chunk(chunk)] for chunk in range(2)]
    assert sorted(map(sum, sizes)) == [80, 88]
    assert sorted(map(len, sizes)) == [2, 2]
    assert max(map(max, sizes)) == SLICE_BYTES
    assert [value for piece in slices for value in values_of(slices.read(piece))] == list(range(1, 22))


def test_an_empty_chunk_has_no_slices() -> None:
    slices = Rank(1, INPUT, INPUT, parts=2).slices
    assert sorted(len(slices.of_chunk(chunk)) for chunk in range(2)) == [0, 1]


@pytest.mark.parametrize("store_and_forward", [False, True])
def test_what_must_have_come_before_a_slice_travels_on(store_and_forward: bool) -> None:
    slices = Rank(20, INPUT, INPUT, store_and_forward=store_and_forward).slices
    first, *_, last = slices.of_chunk(0)
    assert slices.gate(first, 0) is (last if store_and_forward else first)


def test_out_of_place_the_input_stays_and_the_output_is_kept_once() -> None:
    rank = Rank(2, INPUT, OUTPUT)
    rank.at(OUTPUT, 2)[:] = 99
    (piece,) = rank.slices.of_chunk(0)
    rank.slices.apply(Kind.REDUCE, piece, bytes_of(10, 20), lent=True)
    rank.slices.apply(Kind.REDUCE, piece, bytes_of(100, 200), lent=True)
    assert [*rank.at(INPUT, 2)] == [1, 2]
    assert [*rank.at(OUTPUT, 2)] == [111, 222]
    assert rank.undo.kept == 1
    asyncio.run(rank.undo.roll_back())
    assert [*rank.at(OUTPUT, 2)] == [99, 99], "what was there before the first write"


def test_in_place_what_was_there_comes_back() -> None:
    rank = Rank(2, INPUT, INPUT)
    (piece,) = rank.slices.of_chunk(0)
    rank.slices.apply(Kind.COPY, piece, bytes_of(7, 8), lent=False)
    assert [*rank.at(INPUT, 2)] == [7, 8]
    asyncio.run(rank.undo.roll_back())
    assert [*rank.at(INPUT, 2)] == [1, 2]


def test_only_the_last_reduction_divides() -> None:
    rank = Rank(1, INPUT, INPUT, operator=AVG)
    (piece,) = rank.slices.of_chunk(0)
    rank.slices.apply(Kind.REDUCE, piece, bytes_of(3), lent=True)
    assert values_of(rank.slices.read(piece)) == [4]
    rank.slices.apply(Kind.REDUCE_LAST, piece, bytes_of(4), lent=True)
    assert values_of(rank.slices.read(piece)) == [2], "of four ranks"


def test_what_has_no_place_here_gets_memory_until_it_is_read() -> None:
    rank = Rank(2, INPUT, None)
    (piece,) = rank.slices.of_chunk(0)
    rank.slices.apply(Kind.REDUCE, piece, bytes_of(10, 20), lent=True)
    assert [*rank.at(INPUT, 2)] == [1, 2]
    assert piece.content is not None
    assert values_of(piece.content) == [11, 22]
    piece.count_issued()
    piece.count_read()
    assert piece.content is None


def test_data_that_is_not_lent_is_not_copied() -> None:
    rank = Rank(2, None, None)
    (piece,) = rank.slices.of_chunk(0)
    lent, own = bytes_of(1, 2), bytes_of(3, 4)
    rank.slices.apply(Kind.COPY, piece, lent, lent=True)
    assert piece.content is not None
    assert not np.shares_memory(piece.content, lent)
    (piece,) = Rank(2, None, None).slices.of_chunk(0)
    rank.slices.apply(Kind.COPY, piece, own, lent=False)
    assert piece.content is own


@pytest.mark.parametrize(("recv", "weight"), [(OUTPUT, None), (OUTPUT, 5), (INPUT, None), (INPUT, 5)])
@in_event_loop
async def test_what_nobody_sends_is_brought_to_its_place_and_weighed_once(recv: int, weight: int | None) -> None:
    rank = Rank(2, INPUT, recv, weight=weight)
    await rank.slices.settle()
    await rank.slices.settle()
    factor = weight or 1
    assert [*rank.at(recv, 2)] == [factor, 2 * factor]
    if recv != INPUT:
        assert [*rank.at(INPUT, 2)] == [1, 2]


def a_slice(*, in_place: bool) -> Slice:
    content = np.zeros(8, np.uint8)
    return Slice(8, content, content if in_place else np.zeros(8, np.uint8), 1, True, True)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
def test_a_write_waits_for_reads_of_the_same_memory_until_they_are_over(in_place: bool) -> None:
    piece = a_slice(in_place=in_place)
    assert not piece.may_be_written(1, 0)
    piece.count_issued()
    assert piece.may_be_written(1, 0) is not in_place
    piece.count_read()
    assert piece.may_be_written(1, 0)
    assert not piece.may_be_written(1, 1)
    piece.count_write()
    assert piece.may_be_written(1, 1)


@in_event_loop
async def test_those_who_wait_are_woken() -> None:
    piece = a_slice(in_place=True)
    waiting = [asyncio.ensure_future(piece.until(1, 1)), asyncio.ensure_future(piece.until_read())]
    given_up = asyncio.ensure_future(piece.until(1, 1))
    await asyncio.sleep(0)
    given_up.cancel()
    piece.count_issued()
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    piece.count_read()
    await asyncio.wait_for(waiting[1], 20)
    assert not waiting[0].done()
    piece.count_write()
    await asyncio.wait_for(waiting[0], 20)
    assert given_up.cancelled()
