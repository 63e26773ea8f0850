"""Broadcast of much data: each rank gets a part of it, then all give each other their parts.

Source: R. van de Geijn, "On global combine operations", Journal of Parallel and Distributed Computing 22 (1994).
"""

from __future__ import annotations

from dsml_gpu.schedules import ring
from dsml_gpu.schedules.binomial_tree import scatter_steps
from dsml_gpu.schedules.schedule import Schedule


def scatter_all_gather_broadcast(nranks: int, root: int = 0) -> Schedule:
    """Binomial scatter, ring all-gather: ceil(log2 N) + N-1 steps; the root sends about 2 times the data, others less.

    The root, and others that the scatter has brought more than their own part, are not sent what they have.
    """
    scatter = scatter_steps(nranks, root)
    has = {(root, chunk) for chunk in range(nranks)} | {(t.dst, t.chunk) for step in scatter for t in step}
    gather = tuple(tuple(t for t in step if (t.dst, t.chunk) not in has) for step in ring.all_gather_steps(nranks))
    return Schedule("broadcast", "scatter_all_gather", nranks, nranks, scatter + gather, root)
