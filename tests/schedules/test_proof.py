"""Schedules are proved when they are built; wrong ones are refused with the first violated condition."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from dsml_gpu.schedules import ALGORITHMS, COLLECTIVES, Algorithm, InvalidSchedule, Schedule, Transfer, algorithms_of
from dsml_gpu.schedules.verify import verify

SEND = Transfer(0, 1, 0, reduce=True)
BACK = Transfer(1, 0, 0, reduce=False)


@pytest.mark.parametrize(
    ("steps", "parts", "complaint"),
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
def test_broken_schedules_are_refused(steps: tuple[tuple[Transfer, ...], ...], parts: int, complaint: str) -> None:
    with pytest.raises(InvalidSchedule, match=complaint):
        Schedule("all_reduce", "broken", 2, parts, steps)


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
    with pytest.raises(InvalidSchedule, match="at least 1 rank and 1 part are needed, not 0 and 1"):
        Schedule("all_reduce", "x", 0, 1, ())
    with pytest.raises(InvalidSchedule, match="at least 1 rank and 1 part are needed, not 2 and 0"):
        Schedule("all_reduce", "x", 2, 0, ())
    with pytest.raises(InvalidSchedule, match="root 2 is not one of 2 ranks"):
        Schedule("broadcast", "x", 2, 1, (), root=2)
    with pytest.raises(InvalidSchedule, match=r"rank 3 of the pair \(0, 3\) is not one of 2 ranks"):
        Schedule("send_recv", "x", 2, 1, (), pairs=((0, 3),))


@pytest.mark.parametrize("collective", sorted(set(COLLECTIVES) - {"send_recv"}))
def test_nothing_is_no_schedule_of_any_collective(collective: str) -> None:
    with pytest.raises(InvalidSchedule, match="at the end rank"):
        Schedule(collective, "null", 2, 1, ())


COPY = Transfer(0, 1, 0)


@pytest.mark.parametrize(
    ("collective", "steps", "complaint"),
    [
        pytest.param("broadcast", ((BACK,),), "rank 1 does not hold chunk 0 yet", id="sends what it has not"),
        pytest.param("broadcast", ((SEND,),), "broadcast does not reduce", id="reduces in a broadcast"),
        pytest.param("all_gather", ((COPY, BACK),), "rank 1 does not hold chunk 0 yet", id="gathers one block only"),
        pytest.param("all_gather", ((COPY,),), "rank 0 holds the contributions of no rank in chunk 1", id="one way only"),
        pytest.param("scatter", ((COPY,),), "rank 1 holds the contributions of no rank in chunk 1", id="the wrong block"),
        pytest.param("gather", ((COPY,),), "rank 0 holds the contributions of no rank in chunk 1", id="to the wrong rank"),
        pytest.param(
            "reduce", ((SEND,),), "rank 0 holds the contributions of rank 0 in", id="to a rank that is not the root"
        ),
        pytest.param("reduce_scatter", ((SEND,),), "rank 0 holds the contributions of rank 0 in", id="one block on each"),
        pytest.param("all_to_all", ((Transfer(0, 1, 1), Transfer(1, 0, 1)),), "does not hold chunk 1 yet", id="mixed up"),
        pytest.param("barrier", ((SEND,),), "rank 0 holds the contributions of rank 0", id="one rank hears of nobody"),
    ],
)
def test_broken_schedules_of_other_collectives(
    collective: str, steps: tuple[tuple[Transfer, ...], ...], complaint: str
) -> None:
    with pytest.raises(InvalidSchedule, match=complaint):
        Schedule(collective, "broken", 2, 1, steps)


@pytest.mark.parametrize("collective", sorted(name for name, one in COLLECTIVES.items() if not one.reduces))
def test_what_does_not_reduce_refuses_reductions(collective: str) -> None:
    """Each algorithm, with one copy that has become a reduction."""
    for algorithm in algorithms_of(collective).values():
        schedule = algorithm.schedule(4, pairs=((0, 1), (2, 3)) if collective == "send_recv" else ())
        (first, *others), *later = schedule.steps
        steps = ((replace(first, reduce=True), *others), *later)
        with pytest.raises(InvalidSchedule, match=f"step 0, .*: {collective} does not reduce"):
            replace(schedule, steps=steps)


@pytest.mark.parametrize("collective", sorted(name for name, one in COLLECTIVES.items() if not one.reduces))
def test_nobody_sends_what_it_does_not_hold(collective: str) -> None:
    """Each algorithm, with another source of its first transfer: at the start only one rank holds a block of these."""
    for algorithm in algorithms_of(collective).values():
        schedule = algorithm.schedule(4, pairs=((0, 1), (2, 3)) if collective == "send_recv" else ())
        (first, *others), *later = schedule.steps
        src = next(rank for rank in range(4) if rank not in (first.src, first.dst))
        with pytest.raises(InvalidSchedule, match=f"rank {src} does not hold chunk {first.chunk} yet"):
            replace(schedule, steps=((replace(first, src=src), *others), *later))


@pytest.mark.parametrize("collective", sorted(name for name, one in COLLECTIVES.items() if one.rooted))
def test_a_schedule_for_one_root_is_none_for_another(collective: str) -> None:
    for algorithm in algorithms_of(collective).values():
        for root in (0, 2, 3):
            with pytest.raises(InvalidSchedule):
                replace(algorithm.schedule(5, root=1), root=root)
        with pytest.raises(InvalidSchedule, match="root 5 is not one of 5 ranks"):
            replace(algorithm.schedule(5, root=1), root=5)


@pytest.mark.parametrize("collective", sorted(COLLECTIVES))
def test_a_root_or_pairs_where_there_are_none(collective: str) -> None:
    if not COLLECTIVES[collective].rooted:
        with pytest.raises(InvalidSchedule, match=f"{collective} has no root, but root 1 was given"):
            Schedule(collective, "x", 2, 1, (), root=1)
    if collective != "send_recv":
        with pytest.raises(InvalidSchedule, match=f"{collective} has no pairs, but 2 were given"):
            Schedule(collective, "x", 2, 1, (), pairs=((0, 1), (1, 0)))


@pytest.mark.parametrize("pair", [(0, 2), (-1, 0), (2, 2)])
def test_pairs_of_ranks_that_there_are_not(pair: tuple[int, int]) -> None:
    with pytest.raises(InvalidSchedule, match=r"rank (2|-1) of the pair .* is not one of 2 ranks"):
        Schedule("send_recv", "x", 2, 1, (), pairs=((0, 0), pair))


def test_an_algorithm_that_builds_something_else_is_refused() -> None:
    def for_root_0(nranks: int, root: int) -> Schedule:
        return algorithms_of("broadcast")["direct"].schedule(nranks)

    wrong = Algorithm("broadcast", "wrong", for_root_0, "nobody")
    assert wrong.schedule(3).root == 0
    with pytest.raises(InvalidSchedule, match=r"wrong has built a schedule for broadcast with .*root=0.*, not for .*root=2"):
        wrong.schedule(3, root=2)


def test_pairs_that_are_not_served() -> None:
    with pytest.raises(InvalidSchedule, match="rank 1 holds the contributions of no rank in chunk 1"):
        Schedule("send_recv", "broken", 2, 1, ((COPY,),), pairs=((0, 1), (0, 1)))
    Schedule("send_recv", "right", 2, 1, ((COPY, Transfer(0, 1, 1)),), pairs=((0, 1), (0, 1)))


def test_a_token_may_meet_itself_again() -> None:
    """Three ranks tell their right neighbours twice: the second time each hears of its own token, and that is no harm."""
    around = tuple(Transfer(rank, (rank + 1) % 3, 0, reduce=True) for rank in range(3))
    Schedule("barrier", "around", 3, 1, (around, around))
    Schedule("barrier", "around", 3, 1, (around, around, around))
    with pytest.raises(InvalidSchedule, match="would be reduced twice"):
        Schedule("all_reduce", "around", 3, 1, (around, around, around))


def test_a_valid_schedule_verifies_again() -> None:
    verify(algorithms_of("all_reduce")["ring"].schedule(4))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda one: f"{one.collective}-{one.name}")
def test_the_largest_communicators_are_proved_in_seconds(algorithm: object) -> None:
    """256 ranks; a communicator has no more."""
    started = time.perf_counter()
    algorithm.schedule(256)  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 60
