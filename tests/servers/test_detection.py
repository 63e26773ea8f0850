"""Device servers that die, freeze, are restarted or starve: who is given up, when, and who comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.coordinator.server import CoordinatorServer
from dsml_gpu.coordinator.signs import RemoteSigns
from dsml_gpu.errors import CommNotFound
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.lane import can_have_lanes
from tests.support.faults import frozen, kill
from tests.support.in_this_process import coordinating, heard_of, in_event_loop, loss_of, until
from tests.support.processes import run_to_end, running, wait_until
from tests.support.rpc import CALL_TIMEOUT_S, all_reduce_on, all_reduce_works, assert_refused, rpc_to
from tests.support.traffic import Traffic

pytestmark = pytest.mark.alone

#: The processor is shared with as many times more processes than there are cores.
OVERSUBSCRIPTION = 4


@contextmanager
def devices(count: int, *options: str) -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(ServerProcess("device", "--id", str(number + 1), "--memory", "32MiB", *options, wait=False))
            for number in range(count)
        ]
        for server in servers:
            server.wait_until_ready()
        yield servers


# ---- heartbeats -------------------------------------------------------------------------------------------------------


def test_a_device_server_sends_heartbeats_until_the_caller_ends_the_call() -> None:
    with ServerProcess("device", "--memory", "8MiB") as server, rpc_to(server.address) as rpc:
        beats = rpc.device.Heartbeat(pb.HeartbeatRequest(intervalMs=10), timeout=CALL_TIMEOUT_S)
        assert [next(beats).number for _ in range(5)] == [1, 2, 3, 4, 5]
        beats.cancel()
        assert_refused(
            lambda: rpc.device.Heartbeat(pb.HeartbeatRequest(), timeout=CALL_TIMEOUT_S),
            "INVALID_ARGUMENT",
            "INVALID_VALUE",
            ["intervalMs"],
        )


def test_a_server_that_stops_ends_its_heartbeats_in_order_and_does_not_wait_for_them(tmp_path: Path) -> None:
    with running(tmp_path, "device", "--memory", "8MiB") as server, rpc_to(server.address) as rpc:
        beats = rpc.device.Heartbeat(pb.HeartbeatRequest(intervalMs=3_600_000), timeout=60)
        assert next(beats).number == 1
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert list(beats) == []
        assert beats.code() is grpc.StatusCode.OK
        assert server.ends() == 0
        assert time.monotonic() - started < 8  # the drain time is 10
        assert server.stderr == ""


# ---- dead, frozen, restarted ------------------------------------------------------------------------------------------


@in_event_loop
async def test_a_dead_process_is_known_at_once() -> None:
    with devices(2) as (one, two):
        async with coordinating(one.address, two.address) as coordinator:
            await heard_of(coordinator)
            dead, alive = coordinator.registry.handles
            started = time.monotonic()
            kill(one)
            reason = await loss_of(dead)
            assert time.monotonic() - started < 1.0
            assert reason == f"device 1 at {one.address} is gone: its process has ended"
            assert dead.lost_after_s < 1.0
            assert not dead.reachable
            assert (alive.lost, alive.reachable) == ("", True)


@in_event_loop
async def test_a_frozen_process_is_given_up_and_comes_back_awake() -> None:
    with devices(2) as (one, two):
        async with coordinating(one.address, two.address) as coordinator:
            await heard_of(coordinator)
            sleeper, alive = coordinator.registry.handles
            await sleeper.call("JoinComm", pb.JoinCommRequest(commId=77, peers=[pb.Peer(deviceId=1)], deviceId=1))
            started = time.monotonic()
            with frozen(one):
                reason = await loss_of(sleeper)
                assert 1.5 < time.monotonic() - started < 3.0
                assert reason.startswith(f"device 1 at {one.address} has sent no heartbeat for ")
                assert 1.9 < sleeper.lost_after_s < 3.0
                assert not sleeper.reachable
                sleeper.drop(77)
            await until(lambda: sleeper.reachable, "the end of the loss")
            assert sleeper.lost == ""
            # What it was dropped from it has forgotten.
            with pytest.raises(CommNotFound):
                await sleeper.call("Execute", pb.ExecuteRequest(commId=77, deviceId=1))
            assert alive.lost == ""
        assert one.process.poll() is None


@in_event_loop
async def test_a_process_that_is_frozen_for_a_moment_is_not_given_up() -> None:
    with devices(1) as (one,):
        async with coordinating(one.address) as coordinator:
            await heard_of(coordinator)
            (handle,) = coordinator.registry.handles
            loss = handle.until_lost()
            with frozen(one):
                await asyncio.sleep(1.0)
            await asyncio.wait([loss], timeout=1.5)
            assert not loss.done()
            loss.cancel()


@in_event_loop
async def test_a_restarted_server_is_another_one(tmp_path: Path) -> None:
    with running(tmp_path, "device", "--id", "1", "--memory", "8MiB") as first:
        async with coordinating(first.address) as coordinator:
            await heard_of(coordinator)
            (handle,) = coordinator.registry.handles
            uid = handle.metadata.processUid
            loss = handle.until_lost()
            await asyncio.to_thread(first.ends, signal.SIGKILL)
            port = first.address.rpartition(":")[2]
            with running(tmp_path, "device", "--id", "1", "--memory", "8MiB", "--port", port):
                await until(lambda: handle.reachable and handle.metadata.processUid != uid, "the next process")
                assert "is gone" in loss.result()


@in_event_loop
async def test_a_server_that_is_stopped_is_said_to_be(tmp_path: Path) -> None:
    with running(tmp_path, "device", "--id", "1", "--memory", "8MiB") as server:
        async with coordinating(server.address) as coordinator:
            await heard_of(coordinator)
            (handle,) = coordinator.registry.handles
            server.process.send_signal(signal.SIGTERM)
            assert (await loss_of(handle)).startswith(f"device 1 at {server.address} is gone: its ")
            assert await asyncio.to_thread(server.ends) == 0


def test_a_coordinator_that_was_frozen_itself_blames_nobody(tmp_path: Path) -> None:
    with devices(2) as (one, two):
        options = ["--device", one.address, "--device", two.address, "--embedded", "0"]
        with running(tmp_path, "coordinator", *options) as coordinator, rpc_to(coordinator.address) as rpc:
            comm = rpc.comm_init(2)
            all_reduce_on(rpc, comm)
            coordinator.process.send_signal(signal.SIGSTOP)
            time.sleep(4)  # this is the fault
            coordinator.process.send_signal(signal.SIGCONT)
            all_reduce_on(rpc, comm)
            time.sleep(1)  # for what it would say
            assert coordinator.stderr == ""


def test_the_coordinator_says_who_was_lost_and_who_is_back(tmp_path: Path) -> None:
    with (
        devices(1) as (one,),
        running(tmp_path, "coordinator", "--device", one.address, "--dead-after", "0.5") as coordinator,
        rpc_to(coordinator.address) as rpc,
    ):
        all_reduce_works(rpc, 1)
        with frozen(one):
            said = f"device 1 at {one.address} has sent no heartbeat for 0."
            wait_until(lambda: said in coordinator.stderr, "the loss")
        wait_until(lambda: f"device 1 at {one.address} is back" in coordinator.stderr, "the return")
        all_reduce_works(rpc, 1)


# ---- slow is not dead -------------------------------------------------------------------------------------------------


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    code = "print(flush=True)\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


async def nobody_is_lost_for(seconds: float, coordinator: CoordinatorServer, elements: int) -> float:
    """Returns the longest silence of a device server meanwhile."""
    handles = coordinator.registry.handles
    await heard_of(coordinator)
    losses = [handle.until_lost() for handle in handles]
    with Traffic(coordinator.address, len(handles), elements) as traffic:
        await asyncio.wait(losses, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        await until(lambda: traffic.done > 2 or traffic.failure is not None, "some collectives", timeout_s=60)
        await asyncio.to_thread(traffic.end)
    assert [loss.result() for loss in losses if loss.done()] == []
    assert traffic.failure is None
    for loss in losses:
        loss.cancel()
    return max(watch.pulse.longest_silence_s for watch in coordinator.registry.watches.values())


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.slow)])
@in_event_loop
async def test_nobody_is_given_up_on_a_machine_with_four_times_too_much_to_do(seconds: float) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with devices(4) as servers:
        async with coordinating(*(server.address for server in servers)) as coordinator:
            with busy_processes(OVERSUBSCRIPTION * cores):
                longest_s = await nobody_is_lost_for(seconds, coordinator, 1 << 18)
    print(f"longest silence: {longest_s:.2f} s")


@pytest.mark.skipif(not can_have_lanes(), reason="needs what Linux says of processes")
@in_event_loop
async def test_the_system_tells_a_stopped_process_and_a_dead_one_from_one_that_lives() -> None:
    with devices(1) as (one,):
        async with coordinating(one.address) as coordinator:
            (server,) = coordinator.registry.servers
            signs = RemoteSigns(one.address, lambda: server.connection.lane)
            assert letter_of(signs) in "RSD"
            with frozen(one):
                await until(lambda: letter_of(signs) == "T", "the stop")
            await until(lambda: letter_of(signs) != "T", "the end of the stop")
            assert not await signs.nobody_listens()
            kill(one)
            await until(lambda: letter_of(signs) == "X", "the end")
            assert await signs.nobody_listens()


@in_event_loop
async def test_a_server_without_a_lane_is_called_by_tcp() -> None:
    with devices(1, "--no-lane") as (one,):
        async with coordinating(one.address) as coordinator:
            (server,) = coordinator.registry.servers
            assert server.connection.lane is None
            assert not server.connection.tells_of_its_end


def letter_of(signs: RemoteSigns) -> str:
    state = signs.look()
    assert state is not None
    return state.letter


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--failed-requests", "often"], ["--failed-requests", "X/Y", "'often'"]),
        (["--failed-requests", "6/5"], ["6 of the last 5"]),
        (["--dead-after", "0.4"], ["0.25 s", "0.4 s"]),
    ],
)
def test_settings_that_do_not_do_are_refused_in_one_line(options: list[str], words: list[str]) -> None:
    ended = run_to_end("coordinator", "--port", "0", *options)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    for word in words:
        assert word in line
