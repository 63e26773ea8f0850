"""Runs a schedule as its definition says, step by step, on any values, with no executor in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dsml_gpu.schedules import COLLECTIVES, Schedule

Value = TypeVar("Value")


def interpret(
    schedule: Schedule, initial: Callable[[int, int], Value], combine: Callable[[Value, Value], Value]
) -> list[dict[int, Value]]:
    """What each rank holds at the end, by rank and chunk.

    Args:
        initial: (rank, chunk) -> what a rank that holds the chunk at the start has.
        combine: (what was there, what came) -> what is there then.
    """
    collective = COLLECTIVES[schedule.collective]
    held: list[dict[int, Value]] = [{} for _ in range(schedule.nranks)]
    for chunk in range(schedule.nchunks):
        for rank in collective.holders(schedule.roles, chunk // schedule.parts):
            held[rank][chunk] = initial(rank, chunk)
    for step in schedule.steps:
        incoming = [held[transfer.src][transfer.chunk] for transfer in step]
        for transfer, value in zip(step, incoming, strict=True):
            there = held[transfer.dst]
            there[transfer.chunk] = combine(there[transfer.chunk], value) if transfer.reduce else value
    return held
