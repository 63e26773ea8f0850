"""What a client makes of what it is told of a communicator's devices."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from dsml_gpu.client.arrays import Device
from dsml_gpu.client.epochs import Epochs
from dsml_gpu.wire import gpu_sim_pb2 as pb


def metadata(device_id: int, process: int = 1) -> pb.DeviceMetadata:
    return pb.DeviceMetadata(deviceId=pb.DeviceId(value=device_id), processUid=f"process {process} of {device_id}")


@pytest.mark.parametrize(
    ("lost", "present"),
    [
        ([(1, 4)], [(4, 1), (2, 1), (3, 1)]),
        ([(1, 4), (4, 5)], [(5, 1), (2, 1), (3, 1)]),
        ([(1, 4), (3, 6), (4, 5)], [(5, 1), (2, 1), (6, 1)]),
        ([(1, 1)], [(1, 2), (2, 1), (3, 1)]),
    ],
    ids=["one", "one whose successor is lost too", "two", "by the same one, started again"],
)
def test_devices_become_those_that_have_taken_their_places(
    lost: list[tuple[int, int]], present: list[tuple[int, int]]
) -> None:
    """So that arrays on the lost ones are arrays on those."""
    epochs = Epochs(lambda one: Device(Mock(), one), [metadata(1), metadata(2), metadata(3)])
    before = epochs.present.devices
    result = pb.CollectiveResult(
        epoch=3,
        deviceIds=[device_id for device_id, _ in present],
        lost=[pb.LostDevice(deviceId=device_id, replacedBy=by) for device_id, by in lost],
    )
    now = pb.GetCommStatusResponse(epoch=3, devices=[metadata(*one) for one in present])
    epochs.hear(result, lambda: now)
    assert epochs.present.epoch == 3
    assert [one.metadata for one in epochs.present.devices] == list(now.devices)
    assert all(one is other for one, other in zip(epochs.present.devices, before, strict=True))


def test_nobody_is_asked_where_nobody_came() -> None:
    epochs = Epochs(lambda one: Device(Mock(), one), [metadata(1), metadata(2)])
    ask = Mock(side_effect=AssertionError)
    epochs.hear(pb.CollectiveResult(epoch=2, deviceIds=[2], lost=[pb.LostDevice(deviceId=1)]), ask)
    assert [device.device_id for device in epochs.present.devices] == [2]
