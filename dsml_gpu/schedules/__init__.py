"""Collectives as data: pure functions that return proved schedules. Imports nothing of the rest of the package.

To add an algorithm, write one function that returns a `Schedule` in a file of its own and list it in `ALL_REDUCE`.
"""

from __future__ import annotations

from dsml_gpu.schedules.naive import naive_all_reduce
from dsml_gpu.schedules.program import Kind, Move, Program, chunk_bounds, programs_of
from dsml_gpu.schedules.ring import ring_all_reduce
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.verify import InvalidSchedule

#: Algorithms of all-reduce by name: nranks -> Schedule.
ALL_REDUCE = {"ring": ring_all_reduce, "naive": naive_all_reduce}

__all__ = [
    "ALL_REDUCE",
    "InvalidSchedule",
    "Kind",
    "Move",
    "Program",
    "Schedule",
    "Transfer",
    "chunk_bounds",
    "naive_all_reduce",
    "programs_of",
    "ring_all_reduce",
]
