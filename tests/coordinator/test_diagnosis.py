"""Who is to blame for an operation that stands still, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsml_gpu.coordinator.diagnosis import Subject, blamed, failing, held_up_operation, in_schedule, message, waiting_for
from dsml_gpu.schedules import find_algorithm, programs_of
from dsml_gpu.wire import gpu_sim_pb2 as pb

NAMES = [f"device {rank + 5} at 10.0.0.{rank + 3}:50051" for rank in range(4)]
SUBJECT = Subject("all_reduce", 17, 17, "ring", 64 << 20, 3)


def gets(rank: int, step: int, chunk: int = 1, ms: int = 2100, operation: int = 0) -> pb.Wait:
    """Nothing comes from a rank."""
    return pb.Wait(rank=rank, chunk=chunk, step=step, steps=6, waitedMs=ms, operation=operation)


def sends(rank: int, ms: int = 2100, operation: int = 0) -> pb.Wait:
    """A rank takes nothing."""
    return pb.Wait(rank=rank, waitedMs=ms, sends=True, operation=operation)


def ends(rank: int, operation: int, ms: int = 2100) -> pb.Wait:
    """All that is left to come from a rank is the end."""
    return pb.Wait(rank=rank, waitedMs=ms, operation=operation)


#: A ring in which rank 2 stands still after the second step.
CHAIN = {3: [gets(2, 2)], 0: [gets(3, 3, 0)], 1: [gets(0, 4, 3), sends(2)]}
#: The connection from rank 1 to rank 2 of a ring is broken: all wait, and all answer.
CYCLE = {2: [gets(1, 1)], 3: [gets(2, 2)], 0: [gets(3, 3)], 1: [gets(0, 4), sends(2)]}


def test_the_message() -> None:
    """Word for word."""
    assert message(SUBJECT, CHAIN, {2}, NAMES, "never said") == (
        "all_reduce #17 (ring, 64 MiB, epoch 3): rank 2 (device 7 at 10.0.0.5:50051) has not sent chunk 1 of step 3/6 "
        "for 2.1 s; ranks 0, 1, 3 wait for it"
    )


@pytest.mark.parametrize(
    ("waits", "silent", "rank"),
    [
        pytest.param(CHAIN, {2}, 2, id="a chain to one that does not answer"),
        pytest.param(CHAIN, set(), 2, id="which is then one without an entry"),
        pytest.param(CHAIN | {2: []}, set(), 2, id="a chain to one that waits for nothing"),
        pytest.param(CHAIN | {2: [gets(1, 3)]}, set(), 2, id="its own wait is for what comes after that"),
        pytest.param(CHAIN | {2: [gets(1, 1)]}, set(), 1, id="its own wait is for what comes before that"),
        pytest.param(CYCLE, set(), 1, id="a ring with a broken link"),
        pytest.param({0: [gets(1, 0)], 1: [gets(0, 0)]}, set(), 1, id="two that wait for each other: the higher"),
        pytest.param({0: [gets(1, 0)], 1: [gets(0, 0)], 2: [gets(0, 0)]}, set(), 0, id="two: whom most wait for"),
        pytest.param({0: [sends(1)], 1: [], 2: []}, set(), 1, id="one that takes nothing"),
        pytest.param({0: [sends(1)], 1: [gets(2, 0)], 2: []}, set(), 2, id="and why it does not"),
        pytest.param({0: [gets(1, 0, operation=1)], 1: [sends(2)], 2: []}, set(), 2, id="it cannot begin the next one"),
        pytest.param({0: [ends(1, 1)], 1: [gets(2, 5)], 2: []}, set(), 2, id="one that is done waits for one that is not"),
        pytest.param({0: [gets(1, 0)], 1: []}, {3}, 3, id="one that does not answer, whoever is waited for"),
        pytest.param({0: [gets(3, 0)], 1: [gets(3, 0)]}, {2, 3}, 3, id="two do not answer: whom most wait for"),
        pytest.param({0: [], 1: []}, {2, 3}, 3, id="two do not answer, and nobody waits"),
        pytest.param({0: [], 1: []}, set(), None, id="nobody"),
        pytest.param({}, set(), None, id="nobody was asked"),
    ],
)
def test_who_is_to_blame(waits: dict[int, list[pb.Wait]], silent: set[int], rank: int | None) -> None:
    assert blamed(waits, silent) == rank


def test_all_that_wait_are_named_and_those_that_do_not_are_not() -> None:
    assert waiting_for(1, CYCLE) == [0, 2, 3]
    assert waiting_for(2, {0: [gets(2, 0)], 1: [], 3: [sends(0)]}) == [0, 3]
    one = {0: [gets(1, 0, ms=940)], 1: [], 2: []}
    assert failing(1, one) == "has not sent chunk 1 of step 1/6 for 0.9 s; rank 0 waits for it"


def test_of_several_waits_for_one_rank_the_first_step_is_told() -> None:
    waits = {0: [gets(2, 4, chunk=3)], 1: [gets(2, 1, chunk=0, ms=1500)], 3: [sends(2)]}
    assert failing(2, waits).startswith("has not sent chunk 0 of step 2/6 for 1.5 s; ranks 0, 1, 3 wait")


def test_other_words() -> None:
    assert failing(1, {0: [sends(1)], 1: []}) == "has not taken what rank 0 sends for 2.1 s; rank 0 waits for it"
    last = {0: [ends(1, 1)]}
    assert failing(1, last) == "has not come to the end of what it sends to rank 0 for 2.1 s; rank 0 waits for it"
    assert failing(2, {0: []}) == "does not answer"
    assert message(SUBJECT, {0: [], 1: []}, set(), NAMES, "rank 0: slow") == f"{SUBJECT}: rank 0: slow"
    assert str(replace(SUBJECT, last=20, nbytes=1536)) == "all_reduce #17 to #20 (ring, 1.5 KiB, epoch 3)"
    assert str(replace(SUBJECT, nbytes=8)) == "all_reduce #17 (ring, 8 B, epoch 3)"


def test_the_operation() -> None:
    waits = {0: [gets(1, 0, operation=2)], 1: [gets(2, 0, operation=1)], 2: []}
    assert held_up_operation(2, waits) == 1
    assert held_up_operation(1, waits) == 2
    assert held_up_operation(3, waits) == held_up_operation(None, waits) == 1
    assert held_up_operation(None, {}) == 0


def test_a_rank_counts_only_its_own_steps_and_blocks() -> None:
    """A chain from rank 0 to rank 3: rank 2 takes part in the last two of three steps, rank 3 in the last."""
    schedule = find_algorithm("broadcast", "ring").schedule(4, root=0, pairs=(), hosts=(0,) * 4)
    programs = programs_of(schedule)
    for rank, step in ((1, 0), (2, 1), (3, 2)):
        seen = in_schedule(pb.Wait(rank=rank - 1, steps=len(programs[rank].steps), waitedMs=7), rank, schedule, (0,))
        assert (seen.rank, seen.step, seen.steps, seen.waitedMs) == (rank - 1, step, 3, 7)
    assert in_schedule(sends(1), 0, schedule, (0,)) == sends(1)


def test_chunks_are_those_of_the_schedule() -> None:
    """Of a gather rank 2 has its own block only."""
    schedule = find_algorithm("gather", "direct").schedule(4, root=0, pairs=(), hosts=(0,) * 4)
    blocks = programs_of(schedule)[2].blocks
    assert blocks == (2,)
    seen = in_schedule(pb.Wait(rank=0, chunk=0, step=0, steps=1), 2, schedule, blocks)
    assert seen.chunk == 2
