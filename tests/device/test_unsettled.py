"""Rounds that are done on one rank: settled once, each by its own number, and over when the next one begins."""

from __future__ import annotations

import numpy as np
import pytest

from dsml_gpu.device.undo import SparePieces, Undo
from dsml_gpu.device.unsettled import UnsettledRounds
from dsml_gpu.memory.arena import MIN_ARENA_BYTES, Arena
from dsml_gpu.memory.backend import NUMPY
from tests.support.in_this_process import in_event_loop

KEY, OTHER = (3, 7), (3, 8)


class Rank:
    """A device's memory, in which a round has replaced ones by twos."""

    def __init__(self) -> None:
        self.place = Arena(MIN_ARENA_BYTES, NUMPY).view(0, 64)
        self.place[:] = 1
        self.spare = SparePieces(Arena(MIN_ARENA_BYTES, NUMPY).memory)
        self.undo = Undo(self.spare)
        self.undo.keep(self.place)
        self.place[:] = 2

    @property
    def holds(self) -> int:
        (value,) = np.unique(self.place)
        return int(value)


@in_event_loop
async def test_a_round_is_rolled_back_once() -> None:
    rank, rounds = Rank(), UnsettledRounds()
    rounds.done(KEY, 5, rank.undo)
    assert rounds.round_of(KEY) == 5
    await rounds.settle(KEY, 5, roll_back=True)
    assert rank.holds == 1
    assert rounds.round_of(KEY) == 0
    rank.place[:] = 3
    await rounds.settle(KEY, 5, roll_back=True)
    assert rank.holds == 3, "settled already"


@in_event_loop
async def test_a_round_that_ended_well_stays() -> None:
    rank, rounds = Rank(), UnsettledRounds()
    rounds.done(KEY, 5, rank.undo)
    await rounds.settle(KEY, 5, roll_back=False)
    await rounds.settle(KEY, 5, roll_back=True)
    assert rank.holds == 2
    assert rounds.round_of(KEY) == 0


@pytest.mark.parametrize(("key", "round_id"), [(KEY, 4), (KEY, 0), (OTHER, 5)], ids=["older", "none", "other"])
@in_event_loop
async def test_what_is_said_of_another_round_changes_nothing(key: tuple[int, int], round_id: int) -> None:
    rank, rounds = Rank(), UnsettledRounds()
    rounds.done(KEY, 5, rank.undo)
    await rounds.settle(key, round_id, roll_back=True)
    assert rank.holds == 2
    assert rounds.round_of(KEY) == 5


@in_event_loop
async def test_the_next_round_gets_the_memory_of_the_last_one() -> None:
    rank, rounds = Rank(), UnsettledRounds()
    rounds.done(KEY, 5, rank.undo)
    rounds.next_round(OTHER)
    assert rounds.round_of(KEY) == 5
    rounds.next_round(KEY)
    assert rounds.round_of(KEY) == 0
    await rank.undo.roll_back()
    assert rank.holds == 2, "nothing is kept any more"


@in_event_loop
async def test_who_leaves_is_not_asked_any_more() -> None:
    rank, rounds = Rank(), UnsettledRounds()
    rounds.done(KEY, 5, rank.undo)
    rounds.leave(KEY)
    rounds.leave(KEY)
    await rounds.settle(KEY, 5, roll_back=True)
    assert rank.holds == 2
