"""Collectives as data: pure functions that return proved schedules. Imports nothing of the rest of the package.

To add an algorithm, write one function that returns a `Schedule` in a file of its own and list it in `catalog`; or use a
`Builder`, in a distribution of your own (`plugins`). `drawing` makes pictures of schedules.
"""

from __future__ import annotations

from dsml_gpu.schedules.algorithm import Algorithm
from dsml_gpu.schedules.builder import Builder, Chunk, StaleChunk
from dsml_gpu.schedules.catalog import ALGORITHMS, algorithms_of
from dsml_gpu.schedules.collectives import COLLECTIVES, Collective, Layout, Roles
from dsml_gpu.schedules.plugins import BrokenPlugin, UnknownAlgorithm, find_algorithm, known_algorithms
from dsml_gpu.schedules.program import Kind, Move, Program, chunk_bounds, programs_of
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.verify import InvalidSchedule

__all__ = [
    "ALGORITHMS",
    "COLLECTIVES",
    "Algorithm",
    "BrokenPlugin",
    "Builder",
    "Chunk",
    "Collective",
    "InvalidSchedule",
    "Kind",
    "Layout",
    "Move",
    "Program",
    "Roles",
    "Schedule",
    "StaleChunk",
    "Transfer",
    "UnknownAlgorithm",
    "algorithms_of",
    "chunk_bounds",
    "find_algorithm",
    "known_algorithms",
    "programs_of",
]
