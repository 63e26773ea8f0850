"""Schedules are proved when they are built; wrong ones are refused with the first violated condition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsml_gpu.schedules import (
    ALL_REDUCE,
    InvalidSchedule,
    Schedule,
    Transfer,
    chunk_bounds,
    naive_all_reduce,
    ring_all_reduce,
)
from dsml_gpu.schedules.verify import verify


def run_on_numpy(schedule: Schedule, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What the schedule's definition says, step by step, with no executor in between."""
    buffers = [array.copy() for array in inputs]
    count = len(inputs[0])
    for step in schedule.steps:
        before = [buffer.copy() for buffer in buffers]
        for transfer in step:
            part = slice(*chunk_bounds(count, schedule.nchunks, transfer.chunk))
            incoming = before[transfer.src][part]
            buffers[transfer.dst][part] = incoming + buffers[transfer.dst][part] if transfer.reduce else incoming
    return buffers


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(ALL_REDUCE)), st.integers(1, 33), st.integers(0, 100))
def test_all_reduce_on_numpy(algorithm: str, nranks: int, count: int) -> None:
    schedule = ALL_REDUCE[algorithm](nranks)
    inputs = [np.arange(count) * (rank + 1) + 10**rank % 97 for rank in range(nranks)]
    for result in run_on_numpy(schedule, inputs):
        np.testing.assert_array_equal(result, np.sum(inputs, axis=0))


@pytest.mark.parametrize("nranks", [2, 3, 4, 7, 8, 33])
def test_ring_moves_the_least_that_is_possible(nranks: int) -> None:
    schedule = ring_all_reduce(nranks)
    assert len(schedule.steps) == 2 * (nranks - 1)
    for step in schedule.steps:
        assert Counter(transfer.src for transfer in step) == Counter(range(nranks))
        assert all(transfer.dst == (transfer.src + 1) % nranks for transfer in step)
    elements = 5 * nranks  # divisible, so that the closed formula is exact
    sent = Counter(dict.fromkeys(range(nranks), 0))
    for step in schedule.steps:
        for transfer in step:
            first, last = chunk_bounds(elements, schedule.nchunks, transfer.chunk)
            sent[transfer.src] += last - first
    assert set(sent.values()) == {2 * (nranks - 1) * elements // nranks}


@pytest.mark.parametrize(("nranks", "root"), [(2, 0), (4, 0), (5, 3), (9, 8)])
def test_naive_goes_through_the_root(nranks: int, root: int) -> None:
    gather, scatter = naive_all_reduce(nranks, root).steps
    others = [rank for rank in range(nranks) if rank != root]
    assert [(t.src, t.dst, t.reduce) for t in gather] == [(rank, root, True) for rank in others]
    assert [(t.src, t.dst, t.reduce) for t in scatter] == [(root, rank, False) for rank in others]


@pytest.mark.parametrize("algorithm", sorted(ALL_REDUCE))
def test_one_rank_has_nothing_to_do(algorithm: str) -> None:
    assert ALL_REDUCE[algorithm](1).steps == ()


SEND = Transfer(0, 1, 0, reduce=True)
BACK = Transfer(1, 0, 0, reduce=False)


@pytest.mark.parametrize(
    ("steps", "nchunks", "complaint"),
    [
        pytest.param((), 1, "at the end rank 0 holds the contributions of rank 0 in chunk 0", id="nothing happens"),
        pytest.param(((SEND,),), 1, "at the end rank 0 holds", id="the result does not come back"),
        pytest.param(((SEND,), (BACK,)), 2, "in chunk 1; all_reduce promises ranks 0, 1", id="a chunk is forgotten"),
        pytest.param(((SEND,), (SEND,), (BACK,)), 1, "rank 0 would be reduced twice", id="reduced twice"),
        pytest.param(((SEND, SEND), (BACK,)), 1, "rank 0 would be reduced twice", id="reduced twice in one step"),
        pytest.param(
            ((SEND, Transfer(0, 1, 0, reduce=False)),), 1, "another transfer of the same step", id="copy and reduce"
        ),
        pytest.param(
            ((SEND,), (Transfer(1, 0, 0, reduce=True),)), 1, "rank 0 would be reduced twice", id="reduce on way back"
        ),
        pytest.param(((Transfer(0, 0, 0, reduce=False),),), 1, "does not send to itself", id="to itself"),
        pytest.param(((Transfer(0, 2, 0, reduce=True),),), 1, "dst 2 is not one of 2 ranks", id="no such rank"),
        pytest.param(((Transfer(-1, 1, 0, reduce=True),),), 1, "src -1 is not one of 2 ranks", id="negative rank"),
        pytest.param(((Transfer(0, 1, 1, reduce=True),),), 1, "chunk 1 is not one of 1 chunks", id="no such chunk"),
        pytest.param(((Transfer(0, 1, 0, reduce=False), BACK),), 1, "at the end", id="inputs overwritten"),
    ],
)
def test_broken_schedules_are_refused(steps: tuple[tuple[Transfer, ...], ...], nchunks: int, complaint: str) -> None:
    with pytest.raises(InvalidSchedule, match=complaint):
        Schedule("all_reduce", "broken", 2, nchunks, steps)


def test_an_exchange_within_a_step_is_no_deadlock() -> None:
    exchange = (Transfer(0, 1, 0, reduce=True), Transfer(1, 0, 0, reduce=True))
    Schedule("all_reduce", "exchange", 2, 1, (exchange,))


def test_deadlock_is_refused() -> None:
    """Each rank sends first the chunk that the other expects last, and overwrites nothing before its own has left."""
    crossed = (
        Transfer(0, 1, 0, reduce=True),
        Transfer(0, 1, 1, reduce=True),
        Transfer(1, 0, 1, reduce=True),
        Transfer(1, 0, 0, reduce=True),
    )
    with pytest.raises(InvalidSchedule, match="deadlock, Transfer"):
        Schedule("all_reduce", "crossed", 2, 2, (crossed,))
    straight = (crossed[0], crossed[1], crossed[3], crossed[2])
    Schedule("all_reduce", "straight", 2, 2, (straight,))


def test_unknown_collectives_and_empty_worlds_are_refused() -> None:
    with pytest.raises(InvalidSchedule, match="unknown collective 'all_reduse'; known: all_reduce"):
        Schedule("all_reduse", "x", 2, 1, ())
    with pytest.raises(InvalidSchedule, match="at least 1 rank and 1 chunk"):
        Schedule("all_reduce", "x", 0, 1, ())
    with pytest.raises(InvalidSchedule, match="at least 1 rank and 1 chunk"):
        Schedule("all_reduce", "x", 2, 0, ())


@pytest.mark.parametrize("algorithm", sorted(ALL_REDUCE))
@pytest.mark.parametrize("nranks", [2, 3, 5, 8])
def test_every_single_omission_is_noticed(algorithm: str, nranks: int) -> None:
    """Leaving out any one transfer of a right schedule makes a wrong one."""
    schedule = ALL_REDUCE[algorithm](nranks)
    for number, step in enumerate(schedule.steps):
        for index in range(len(step)):
            shorter = (*step[:index], *step[index + 1 :])
            steps = (*schedule.steps[:number], shorter, *schedule.steps[number + 1 :])
            with pytest.raises(InvalidSchedule):
                Schedule("all_reduce", algorithm, nranks, schedule.nchunks, steps)


def test_a_valid_schedule_verifies_again() -> None:
    verify(ring_all_reduce(4))
