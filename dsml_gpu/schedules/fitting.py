"""Fits the constants of a cost model to measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np

from dsml_gpu.schedules.cost_model import CostModel, Costs
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.simulator import simulate
from dsml_gpu.schedules.topology import Topology

#: What counts as nothing, in seconds and in seconds for a byte: where a constant is 0, the fit begins here.
_LEAST = {field.name: 2e-11 if field.name.endswith("_byte_s") else 1e-7 for field in fields(Costs)}
#: By how much a constant is changed, as a logarithm, to see what it does.
_PROBE = 0.05
#: Weight of staying near the constants that the fit begins with: they decide only where the measurements do not.
_PRIOR = 0.02
#: Messages of a simulation, of which a fit needs hundreds.
_MAX_MESSAGES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One measurement.

    Attributes:
        schedule: what ran.
        block_bytes: of each block of the collective.
        topology: where it ran.
        time_s: how long it took, from the client's call to its return.
        slice_bytes: into which the devices cut chunks.
    """

    schedule: Schedule
    block_bytes: int
    topology: Topology
    time_s: float
    slice_bytes: int = 512 << 10

    def predicted_s(self, model: CostModel) -> float:
        """What a model predicts for it."""
        return simulate(
            self.schedule, self.block_bytes, self.topology, model, self.slice_bytes, max_messages=_MAX_MESSAGES
        ).time_s


def fit(measured: Sequence[Measured], start: CostModel, p2p: bool, rounds: int = 12) -> CostModel:
    """The model that comes nearest to the measurements, with other constants for one transport.

    Least squares over the logarithms of predicted by measured time, so that a part is as wrong whatever it is a part of,
    by the method of Levenberg (1944) and Marquardt (1963) in the logarithms of the constants.

    Args:
        measured: all of the transport that is fitted.
        start: what is known so far.
        p2p: fit the costs of p2p, otherwise those of gRPC.
        rounds: steps of the method at most.

    Raises:
        ValueError: there are no measurements.
    """
    if not measured:
        raise ValueError("a cost model cannot be fitted to no measurements")
    times = np.log([one.time_s for one in measured])
    first = _logarithms(start.costs(p2p))

    def residuals(constants: np.ndarray) -> np.ndarray:
        model = _with_costs(start, p2p, constants)
        predicted = np.log([one.predicted_s(model) for one in measured])
        return np.concatenate([predicted - times, _PRIOR * (constants - first)])

    constants, damping = first, 0.1
    current = residuals(constants)
    for _ in range(rounds):
        slopes = np.stack(
            [(residuals(constants + _PROBE * unit) - current) / _PROBE for unit in np.eye(len(constants))], axis=1
        )
        normal, gradient = slopes.T @ slopes, slopes.T @ current
        before = float(current @ current)
        for _ in range(6):
            step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), gradient)
            tried = constants + np.clip(step, -1.0, 1.0)
            there = residuals(tried)
            if there @ there < before:
                constants, current, damping = tried, there, damping / 3
                break
            damping *= 4
        else:
            break
        if float(current @ current) > 0.999 * before:
            break
    return _with_costs(start, p2p, constants)


def _logarithms(costs: Costs) -> np.ndarray:
    least = _LEAST.values()
    return np.log([max(value, smallest) for value, smallest in zip(astuple(costs), least, strict=True)])


def _with_costs(model: CostModel, p2p: bool, constants: np.ndarray) -> CostModel:
    costs = Costs(*(float(value) for value in np.exp(constants)))
    return replace(model, p2p=costs) if p2p else replace(model, grpc=costs)
