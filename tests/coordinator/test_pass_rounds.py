"""Rounds of passes where results cannot be staged: all ranks keep what is overwritten, and bring it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.coordinator.memory_access import MemoryAccess
from dsml_gpu.device.device import Device
from dsml_gpu.device.passes import run_passes
from dsml_gpu.errors import DsmlError, InternalError


@pytest.mark.parametrize("elements", [1000, 600_000], ids=["one works", "several work"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
def test_what_others_have_overwritten_comes_back(monkeypatch: pytest.MonkeyPatch, elements: int, in_place: bool) -> None:
    async def none(self: MemoryAccess, handles: Sequence[Any]) -> int:
        return 0

    failures: list[int] = []

    async def fail_afterwards(device: Device, work: Sequence[Any]) -> None:
        await run_passes(device, work)
        if device.device_id in failing:
            failures.append(device.device_id)
            raise InternalError("a defect")

    monkeypatch.setattr(MemoryAccess, "staging_bytes", none)
    monkeypatch.setattr("dsml_gpu.device.executions.run_passes", fail_afterwards)
    with dsml_gpu.local(3, backend="numpy") as client:
        comm = client.communicator(3)
        before = [np.arange(elements) * 10**rank for rank in range(3)]
        arrays, out = comm.array(before), comm.array([np.full(elements, 7)] * 3)
        failing = {comm.devices[0].device_id}
        with pytest.raises(DsmlError, match="a defect"):
            comm.all_reduce(arrays, None if in_place else out)
        assert failures == [*failing]
        for array, was in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(array.get(), was)
        assert all((array.get() == 7).all() for array in out)
        failing.clear()
        comm.all_reduce(arrays, out)
        for array in out:
            np.testing.assert_array_equal(array.get(), np.arange(elements) * 111)
