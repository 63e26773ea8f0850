"""The constants that a fit finds, where the true ones are known: the measurements come from a model, not from a machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsml_gpu.schedules import find_algorithm
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, CostModel, Costs
from dsml_gpu.schedules.fitting import Measured, fit
from dsml_gpu.schedules.topology import Topology

PROBES = ("ring", "naive", "direct", "recursive_doubling")
SIZES = (1 << 10, 64 << 10, 1 << 20, 8 << 20)
TRUTH = Costs(
    operation_s=2e-3,
    rank_s=5e-4,
    stream_s=2e-4,
    message_s=5e-5,
    send_byte_s=1.5e-9,
    recv_byte_s=0.7e-9,
    reduce_byte_s=4e-10,
    copy_byte_s=2e-10,
    meet_byte_s=1e-10,
)


def measured_by(model: CostModel, process_of: tuple[int, ...] = (), noise: float = 0.0) -> list[Measured]:
    """What would be measured on a machine of which the model is true."""
    generator = np.random.default_rng(0)
    found = []
    for nranks in (2, 4):
        topology = Topology(host_of=(0,) * nranks, cores=(2,), process_of=process_of[:nranks])
        for name in PROBES:
            schedule = find_algorithm("all_reduce", name).schedule(nranks)
            for nbytes in SIZES:
                exact = Measured(schedule, nbytes, topology, 1.0).predicted_s(model)
                found.append(Measured(schedule, nbytes, topology, exact * np.exp(noise * generator.standard_normal())))
    return found


def errors(model: CostModel, measured: list[Measured]) -> np.ndarray:
    return np.array([abs(one.predicted_s(model) / one.time_s - 1) for one in measured])


def test_a_model_that_is_true_is_found() -> None:
    measured = measured_by(replace(DEFAULT_COST_MODEL, grpc=TRUTH))
    assert errors(DEFAULT_COST_MODEL, measured).max() > 0.4, "there is nothing to fit"
    found = fit(measured, DEFAULT_COST_MODEL, p2p=False)
    assert errors(found, measured).max() < 0.03
    assert found.p2p == DEFAULT_COST_MODEL.p2p, "the other transport was not measured"
    # What a byte costs at both ends together is determined by the measurements, its share of either is not.
    both = found.grpc.send_byte_s + found.grpc.recv_byte_s
    assert both == pytest.approx(TRUTH.send_byte_s + TRUTH.recv_byte_s, rel=0.15)


def test_noise_does_not_carry_it_away() -> None:
    truth = replace(DEFAULT_COST_MODEL, grpc=TRUTH)
    found = fit(measured_by(truth, noise=0.1), DEFAULT_COST_MODEL, p2p=False)
    assert np.median(errors(found, measured_by(truth))) < 0.06


def test_p2p_has_constants_of_its_own() -> None:
    truth = replace(DEFAULT_COST_MODEL, p2p=replace(DEFAULT_COST_MODEL.p2p, operation_s=1e-3, reduce_byte_s=1e-9))
    measured = measured_by(truth, process_of=(0, 0, 0, 0))
    found = fit(measured, DEFAULT_COST_MODEL, p2p=True)
    assert errors(found, measured).max() < 0.03
    assert found.grpc == DEFAULT_COST_MODEL.grpc


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="no measurements"):
        fit([], DEFAULT_COST_MODEL, p2p=False)
