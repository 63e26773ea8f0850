"""A coordinator in this process, and a communicator of four of its six devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator
from tests.client.collectives import NRANKS


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with dsml_gpu.local(devices=6, memory_bytes=64 << 20) as client:
        yield client


@pytest.fixture
def comm(client: Client) -> Iterator[Communicator]:
    with client.communicator(NRANKS) as comm:
        yield comm
