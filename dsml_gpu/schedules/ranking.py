"""How long algorithms take and which is the fastest, by the cost model: by events where that is quick, else by rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsml_gpu.schedules.algorithm import Algorithm
from dsml_gpu.schedules.collectives import COLLECTIVES, Layout
from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.schedules.outline import Outline
from dsml_gpu.schedules.outline_time import OutlineTimer
from dsml_gpu.schedules.outlines import has_outline, outline_of
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.simulator import simulate
from dsml_gpu.schedules.topology import Topology

#: Bytes of each block of a collective, or one number for all of them.
BlockBytes = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Predictor:
    """Predicts the time of one algorithm on one topology.

    Attributes:
        algorithm: the algorithm.
        method: by which: ``"events"`` (`simulator`) or ``"rounds"`` (`outline_time`).
        time_s: for blocks of a size, the seconds from the client's call to its return.
    """

    algorithm: Algorithm
    method: str
    time_s: Callable[[BlockBytes], float]


@dataclass(frozen=True, slots=True)
class Ranked:
    """An algorithm and its prediction; attributes as of `Predictor`."""

    algorithm: Algorithm
    time_s: float
    method: str


def rank_algorithms(
    algorithms: Iterable[Algorithm],
    block_bytes: BlockBytes,
    topology: Topology,
    model: CostModel,
    *,
    root: int = 0,
    pairs: tuple[tuple[int, int], ...] = (),
    slice_bytes: int = 512 << 10,
    max_messages: int = 20_000,
) -> list[Ranked]:
    """Algorithms of one collective by predicted time, the fastest first; of equal ones, the one that was named first.

    Arguments as of `predictors`.
    """
    ranked = [
        Ranked(predictor.algorithm, predictor.time_s(block_bytes), predictor.method)
        for predictor in predictors(
            algorithms,
            topology,
            model,
            root=root,
            pairs=pairs,
            slice_bytes=slice_bytes,
            max_messages=max_messages,
        )
    ]
    return sorted(ranked, key=lambda one: one.time_s)


def predictors(
    algorithms: Iterable[Algorithm],
    topology: Topology,
    model: CostModel,
    *,
    root: int = 0,
    pairs: tuple[tuple[int, int], ...] = (),
    slice_bytes: int = 512 << 10,
    max_messages: int = 20_000,
) -> list[Predictor]:
    """Predictors of algorithms of one collective.

    All by the same method, so that they can be compared: by rounds where one has too many transfers for events. Those
    without an outline are by events always.

    Args:
        root, pairs: see `Algorithm.schedule`.
        slice_bytes: into which devices cut chunks.
        max_messages: of a simulation by events (see `simulator.simulate`), in which a chunk is at least two messages.
    """
    algorithms = list(algorithms)
    outlines = {
        algorithm: outline_of(algorithm, topology.nranks, root=root, hosts=topology.host_of)
        for algorithm in algorithms
        if has_outline(algorithm)
    }
    by_rounds = any(2 * outline.transfers > max_messages for outline in outlines.values())

    def predictor(algorithm: Algorithm) -> Predictor:
        if by_rounds and algorithm in outlines:
            return Predictor(
                algorithm, "rounds", _time_by_rounds(algorithm, outlines[algorithm], topology, model, slice_bytes)
            )
        schedule = algorithm.schedule(topology.nranks, root=root, pairs=pairs, hosts=topology.host_of)
        return Predictor(algorithm, "events", _time_by_events(schedule, topology, model, slice_bytes, max_messages))

    return [predictor(algorithm) for algorithm in algorithms]


def _time_by_events(
    schedule: Schedule, topology: Topology, model: CostModel, slice_bytes: int, max_messages: int
) -> Callable[[BlockBytes], float]:
    return lambda block_bytes: simulate(schedule, block_bytes, topology, model, slice_bytes, max_messages).time_s


def _time_by_rounds(
    algorithm: Algorithm, outline: Outline, topology: Topology, model: CostModel, slice_bytes: int
) -> Callable[[BlockBytes], float]:
    timer = OutlineTimer(outline, topology, model)
    layout = COLLECTIVES[algorithm.collective].layout
    return lambda block_bytes: timer.time_s(buffer_bytes(layout, block_bytes, topology.nranks), slice_bytes)


def buffer_bytes(layout: Layout, block_bytes: BlockBytes, nranks: int) -> int:
    """The larger of a rank's two buffers, on average where ranks differ."""
    nblocks = {Layout.WHOLE: 1, Layout.PER_RANK: nranks, Layout.PER_PAIR: nranks}[layout]
    if isinstance(block_bytes, int):
        return nblocks * block_bytes
    return round(sum(block_bytes) / len(block_bytes) * nblocks)
