"""What a client makes of what it is told of a communicator's devices."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from dsml_gpu.client.arrays import Device
from dsml_gpu.client.epochs import Epochs
from dsml_gpu.wire import gpu_sim_pb2 as pb


def metadata(device_id: int, process: int = 1) -> pb.DeviceMetadata:
    return pb.DeviceMetadata(deviceId=pb.DeviceId(value=device_id), processUid=f"process {process} of {device_id}")


def status(epoch: int, seated: dict[int, pb.DeviceMetadata]) -> pb.GetCommStatusResponse:
    return pb.GetCommStatusResponse(epoch=epoch, seats=seated.keys(), devices=seated.values())


@pytest.fixture
def epochs() -> Epochs:
    return Epochs(lambda one: Device(Mock(), one), [metadata(1), metadata(2), metadata(3)])


@pytest.mark.parametrize(
    "now",
    [
        {0: metadata(4), 1: metadata(2), 2: metadata(3)},
        {0: metadata(5), 1: metadata(2), 2: metadata(6)},
        {0: metadata(1, process=2), 1: metadata(2), 2: metadata(3)},
    ],
    ids=["another one", "two others", "the same one, started again"],
)
def test_devices_become_those_that_have_taken_their_places(epochs: Epochs, now: dict[int, pb.DeviceMetadata]) -> None:
    """So that arrays on the lost ones are arrays on those. Who was in a place in between makes no difference."""
    before = epochs.present.devices
    epochs.follow(status(3, now))
    assert epochs.present.epoch == 3
    assert [one.metadata for one in epochs.present.devices] == [*now.values()]
    assert all(one is other for one, other in zip(epochs.present.devices, before, strict=True))


def test_who_is_left_is_the_same_as_before(epochs: Epochs) -> None:
    first, second, third = epochs.present.devices
    epochs.follow(status(2, {1: metadata(2), 2: metadata(3)}))
    assert epochs.present.devices == (second, third)
    assert (first.is_behind, second.is_behind) == (True, False)


def test_who_comes_in_is_no_other_one(epochs: Epochs) -> None:
    """Also where a device comes back that was left behind: it has nothing any more."""
    first, second, third = epochs.present.devices
    epochs.follow(status(2, {1: metadata(2), 2: metadata(3)}))
    epochs.follow(status(3, {1: metadata(2), 2: metadata(3), 3: metadata(1)}))
    assert epochs.present.devices[:2] == (second, third)
    assert epochs.present.devices[2] is not first
