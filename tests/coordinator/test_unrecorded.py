"""Operations that have ended, and whose end the journal cannot take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.coordinator.journal_file import FileJournal
from dsml_gpu.coordinator.server import CoordinatorConfig, CoordinatorServer
from dsml_gpu.errors import InternalError
from dsml_gpu.memory.shared import can_share
from tests.support.in_this_process import in_event_loop

ELEMENTS = 60_000


def fails_once(monkeypatch: pytest.MonkeyPatch, method: str) -> list[bool]:
    """A method of journals fails when it is called for the first time; returns what is empty from then on."""
    full = [True]
    put = getattr(FileJournal, method)

    def put_or_fail(journal: FileJournal, one: object) -> None:
        if full:
            full.clear()
            raise InternalError("the journal cannot be written: the disk is full")
        put(journal, one)

    monkeypatch.setattr(FileJournal, method, put_or_fail)
    return full


@contextmanager
def devices(count: int) -> Iterator[list[str]]:
    servers = [ServerProcess("device", "--id", str(number + 1), "--memory", "32MiB") for number in range(count)]
    try:
        yield [server.address for server in servers]
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize(
    ("transport", "happens"),
    [
        ("grpc", False),
        pytest.param("p2p", True, marks=pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, Linux's")),
    ],
)
@in_event_loop
async def test_what_cannot_be_recorded_has_happened_or_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, happens: bool
) -> None:
    """On all ranks. What can be undone is; over shared memory it cannot be, and then it has happened."""
    full = fails_once(monkeypatch, "put_round")
    before = [np.arange(ELEMENTS) * 10**rank for rank in range(2)]

    def talk(address: str) -> None:
        with dsml_gpu.connect(address, timeout_s=20) as client, client.communicator(2, transport=transport) as comm:
            arrays = comm.array(before)
            if happens:
                comm.all_reduce(arrays)
            else:
                with pytest.raises(InternalError, match="the disk is full"):
                    comm.all_reduce(arrays)
            assert not full
            now = [np.asarray(sum(before))] * 2 if happens else before
            for array, value in zip(arrays, now, strict=True):
                np.testing.assert_array_equal(array.get(), value)
            comm.all_reduce(arrays)
            np.testing.assert_array_equal(arrays[1].get(), sum(now))

    await with_coordinator(tmp_path, talk)


@in_event_loop
async def test_a_communicator_that_cannot_be_recorded_gives_its_devices_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = fails_once(monkeypatch, "put_communicator")

    def talk(address: str) -> None:
        with dsml_gpu.connect(address, timeout_s=20) as client:
            with pytest.raises(InternalError, match="the disk is full"):
                client.communicator(2)
            assert not full
            with client.communicator(2) as comm:
                comm.barrier()

    await with_coordinator(tmp_path, talk)


async def with_coordinator(folder: Path, talk: Callable[[str], None]) -> None:
    """Has a client talk to a coordinator of this process, with a journal, over two device servers."""
    with devices(2) as addresses:
        server = CoordinatorServer(CoordinatorConfig(port=0, devices=tuple(addresses), embedded=0, state=folder / "state"))
        await server.start()
        try:
            with ThreadPoolExecutor(1) as pool:
                await asyncio.get_running_loop().run_in_executor(pool, talk, server.rpc.address)
        finally:
            await server.stop(2.0)
