"""A schedule's parts for its ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.schedules import ALL_REDUCE, Kind, Move, chunk_bounds, naive_all_reduce, programs_of, ring_all_reduce


@given(st.integers(0, 10**12), st.integers(1, 50))
def test_chunks_cover_the_buffer_once_and_evenly(count: int, nchunks: int) -> None:
    bounds = [chunk_bounds(count, nchunks, chunk) for chunk in range(nchunks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == count
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_ring_of_two() -> None:
    """Rank 0 passes chunk 0, completes chunk 1, and the complete chunks change places."""
    assert programs_of(ring_all_reduce(2))[0].steps == (
        (Move(Kind.SEND, 1, 0), Move(Kind.REDUCE_LAST, 1, 1)),
        (Move(Kind.SEND, 1, 1), Move(Kind.COPY, 1, 0)),
    )


def test_naive_root_completes_with_the_last_rank_only() -> None:
    root = programs_of(naive_all_reduce(4))[0]
    assert root.steps[0] == (Move(Kind.REDUCE, 1, 0), Move(Kind.REDUCE, 2, 0), Move(Kind.REDUCE_LAST, 3, 0))
    assert programs_of(naive_all_reduce(4))[2].steps == ((Move(Kind.SEND, 0, 0),), (Move(Kind.COPY, 0, 0),))


@pytest.mark.parametrize("algorithm", sorted(ALL_REDUCE))
@pytest.mark.parametrize("nranks", range(2, 10))
def test_moves_pair_up_and_every_chunk_is_completed_once(algorithm: str, nranks: int) -> None:
    """Were a chunk completed twice an average would be divided twice; were it never, not at all."""
    schedule = ALL_REDUCE[algorithm](nranks)
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
    assert completed == Counter(range(schedule.nchunks))
