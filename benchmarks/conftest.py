"""Communicators of four devices, made once for all benchmarks that use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.client import Communicator, connect, local

DEVICES = 4


@pytest.fixture(scope="session")
def embedded() -> Iterator[Communicator]:
    """Devices and coordinator inside this process."""
    with local(DEVICES) as client, client.communicator(DEVICES) as comm:
        yield comm


@pytest.fixture(scope="session")
def processes() -> Iterator[Communicator]:
    """Devices and coordinator in a process each."""
    with Fleet(DEVICES) as fleet, connect(fleet.address) as client, client.communicator(DEVICES) as comm:
        yield comm


@pytest.fixture
def comm(deployment: str, request: pytest.FixtureRequest) -> Communicator:
    """The communicator of the benchmark's ``deployment`` parameter, the name of one of the fixtures above."""
    communicator: Communicator = request.getfixturevalue(deployment)
    return communicator
