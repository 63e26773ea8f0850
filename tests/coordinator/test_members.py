"""Who is in a communicator, without servers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import pytest

from dsml_gpu.coordinator.choice import Chooser
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.epochs import Epoch, Epochs
from dsml_gpu.coordinator.members import Members
from dsml_gpu.coordinator.ranks import Ranks, RunSettings
from dsml_gpu.errors import InternalError
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Keeper:
    """Fails so often before it keeps an epoch."""

    def __init__(self, fails: int) -> None:
        self.fails = fails
        self.epochs: list[Epoch] = []
        self.let_go_of: list[DeviceHandle] = []

    def begin_epoch(self, comm_id: int, epoch: Epoch, handles: Sequence[DeviceHandle], *, grows: bool = False) -> None:
        if self.fails:
            self.fails -= 1
            raise InternalError("the journal cannot be written")
        self.epochs.append(epoch)

    def let_go(self, comm_id: int, handles: Sequence[DeviceHandle]) -> None:
        self.let_go_of += handles

    async def replace(self, place: Any) -> DeviceHandle:
        raise AssertionError


def members_of(keeper: Keeper, nranks: int) -> Members:
    handles = [DeviceHandle(Mock(), f"host:{rank}") for rank in range(nranks)]

    def make(number: int, some: Sequence[DeviceHandle]) -> Ranks:
        return Ranks(1, number, some, Chooser(DEFAULT_COST_MODEL), RunSettings(0, 1000, 5.0))

    return Members(1, Epochs([Epoch(1, tuple(range(nranks)))]), make(1, handles), make, pb.SHRINK, keeper)


def test_an_epoch_that_cannot_be_recorded_does_not_begin() -> None:
    async def go_on() -> None:
        keeper = Keeper(fails=2)
        members = members_of(keeper, 3)
        first, second, third = members.handles
        for _ in range(2):
            with pytest.raises(InternalError, match="cannot be written"):
                await members.go_on_after([1], [])
            assert members.handles == (first, second, third)
            assert members.epoch == Epoch(1, (0, 1, 2))
        await members.go_on_after([1], [])
        assert members.handles == (first, third)
        assert keeper.epochs == [members.epoch] == [Epoch(2, (0, 2))]
        assert keeper.let_go_of == [second]

    asyncio.run(go_on())
