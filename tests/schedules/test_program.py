"""A schedule's parts for its ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.schedules import COLLECTIVES, Kind, Move, Schedule, Transfer, algorithms_of, chunk_bounds, programs_of
from dsml_gpu.schedules.naive import naive_all_reduce
from dsml_gpu.schedules.ring import ring_all_reduce


@given(st.integers(0, 10**12), st.integers(1, 50))
def test_chunks_cover_the_buffer_once_and_evenly(count: int, nchunks: int) -> None:
    bounds = [chunk_bounds(count, nchunks, chunk) for chunk in range(nchunks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == count
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_ring_of_two() -> None:
    """Rank 0 passes chunk 1, completes chunk 0, and the complete chunks change places."""
    assert programs_of(ring_all_reduce(2))[0].steps == (
        (Move(Kind.SEND, 1, 1), Move(Kind.REDUCE_LAST, 1, 0)),
        (Move(Kind.SEND, 1, 0), Move(Kind.COPY, 1, 1)),
    )


def test_naive_root_completes_with_the_last_rank_only() -> None:
    root = programs_of(naive_all_reduce(4))[0]
    assert root.steps[0] == (Move(Kind.REDUCE, 1, 0), Move(Kind.REDUCE, 2, 0), Move(Kind.REDUCE_LAST, 3, 0))
    assert programs_of(naive_all_reduce(4))[2].steps == ((Move(Kind.SEND, 0, 0),), (Move(Kind.COPY, 0, 0),))


@pytest.mark.parametrize("algorithm", sorted(algorithms_of("all_reduce")))
@pytest.mark.parametrize("nranks", range(2, 10))
def test_moves_pair_up_and_every_chunk_is_completed(algorithm: str, nranks: int) -> None:
    schedule = algorithms_of("all_reduce")[algorithm].schedule(nranks)
    sent: Counter[tuple[int, int, int]] = Counter()
    received: Counter[tuple[int, int, int]] = Counter()
    completed: Counter[int] = Counter()
    for rank in range(nranks):
        for step in programs_of(schedule)[rank].steps:
            kinds = [move.kind is Kind.SEND for move in step]
            assert kinds == sorted(kinds, reverse=True), "sends come before receives"
            for move in step:
                if move.kind is Kind.SEND:
                    sent[rank, move.peer, move.chunk] += 1
                else:
                    received[move.peer, rank, move.chunk] += 1
                completed[move.chunk] += move.kind is Kind.REDUCE_LAST
    assert sent == received
    assert set(completed) == set(range(schedule.nchunks))


def test_a_program_numbers_the_blocks_of_its_own_rank() -> None:
    """Of the 9 blocks of an all-to-all rank 1 has to do with those that it sends or gets, and with the one it keeps."""
    program = programs_of(algorithms_of("all_to_all")["direct"].schedule(3))[1]
    assert program.blocks == (1, 3, 4, 5, 7)  # 0->1, 1->0, 1->1, 1->2, 2->1
    (moves,) = program.steps
    assert moves == (Move(Kind.SEND, 2, 3), Move(Kind.SEND, 0, 1), Move(Kind.COPY, 0, 0), Move(Kind.COPY, 2, 4))
    assert program.nchunks == 5


def test_a_block_that_stays_where_it_is_belongs_to_the_program() -> None:
    schedule = algorithms_of("send_recv")["direct"].schedule(3, pairs=((0, 1), (2, 2)))
    assert [program.blocks for program in programs_of(schedule)] == [(0,), (0,), (1,)]
    assert programs_of(schedule)[2].steps == ()


def test_parts_of_a_block_stay_together() -> None:
    transfers = (Transfer(0, 1, 0), Transfer(0, 1, 1), Transfer(1, 0, 2), Transfer(1, 0, 3))
    program = programs_of(Schedule("all_gather", "in halves", 2, 2, (transfers,)))[1]
    assert program.blocks == (0, 1)
    assert program.steps == ((Move(Kind.SEND, 0, 2), Move(Kind.SEND, 0, 3), Move(Kind.COPY, 0, 0), Move(Kind.COPY, 0, 1)),)


def test_pipelining_is_told() -> None:
    assert all(program.store_and_forward for program in programs_of(naive_all_reduce(3)))
    assert not any(program.store_and_forward for program in programs_of(ring_all_reduce(3)))


@pytest.mark.parametrize("collective", sorted(COLLECTIVES))
def test_an_average_is_divided_once(collective: str) -> None:
    """Also where several ranks complete the same chunk, each for itself. Were it never, it would not be divided at all."""
    if not COLLECTIVES[collective].reduces or collective == "barrier":
        return  # nothing is averaged
    for algorithm in algorithms_of(collective).values():
        for nranks in (2, 3, 6, 8):
            schedule = algorithm.schedule(nranks)
            divided: list[dict[int, int]] = [dict.fromkeys(range(schedule.nchunks), 0) for _ in range(nranks)]
            programs = programs_of(schedule)
            kinds = [
                {(number, move.peer, move.chunk): move.kind for number, step in enumerate(p.steps) for move in step}
                for p in programs
            ]
            assert all(kinds)
            finals = [
                Counter(
                    p.blocks[move.chunk // p.parts] * p.parts + move.chunk % p.parts
                    for step in p.steps
                    for move in step
                    if move.kind is Kind.REDUCE_LAST
                )
                for p in programs
            ]
            for rank, final in enumerate(finals):
                for chunk, times in final.items():
                    divided[rank][chunk] += times
            assert max(times for chunks in divided for times in chunks.values()) == 1
            completed = {chunk for chunks in divided for chunk, times in chunks.items() if times}
            assert completed == set(range(schedule.nchunks))
