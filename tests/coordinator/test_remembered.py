"""What is remembered of calls, and until when."""

from __future__ import annotations

import numpy as np

import dsml_gpu
from dsml_gpu.coordinator import passes
from dsml_gpu.coordinator.remembered import forget, remembered


def test_the_same_is_given_until_it_is_forgotten() -> None:
    made = []

    @remembered
    def doubled(number: int) -> list[int]:
        made.append(number)
        return [2 * number]

    assert doubled(4) is doubled(4)
    assert made == [4]
    forget()
    assert doubled(4) == [8]
    assert made == [4, 4]


def test_calls_of_a_communicator_that_has_ended_are_forgotten() -> None:
    """Those of one that has not are remembered: planning costs more than a small operation."""
    forget()
    with dsml_gpu.local(4) as client:
        with client.communicator(4) as comm:
            arrays = comm.array([np.ones(8)] * 4)
            for _ in range(3):
                comm.all_reduce(arrays)
            assert passes.bytes_of.cache_info().currsize == 1  # type: ignore[attr-defined]
        assert passes.bytes_of.cache_info().currsize == 0  # type: ignore[attr-defined]
