"""Device servers that register with a coordinator and leave it, as processes."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.device.registration import delay_s, outgoing_host
from dsml_gpu.errors import InvalidValue, OutOfDevices, PeerUnavailable, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.in_this_process import coordinating, in_event_loop, until
from tests.support.processes import run_to_end, running, wait_until
from tests.support.rpc import CALL_TIMEOUT_S, Rpc, all_reduce_on, all_reduce_works, assert_refused, rpc_to
from tests.support.traffic import Traffic

ALONE = ("coordinator", "--embedded", "0")


def listed(rpc: Rpc) -> dict[int, str]:
    """Addresses of the devices that can be reached, by id."""
    devices = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
    return {status.metadata.deviceId.value: status.metadata.address for status in devices if status.reachable}


def device(number: int, coordinator: str, *options: str) -> tuple[str, ...]:
    return "device", "--id", str(number), "--memory", "8MiB", "--coordinator", coordinator, *options


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_device_registers_and_is_used(tmp_path: Path) -> None:
    with running(tmp_path, *ALONE) as coordinator, rpc_to(coordinator.address) as rpc:
        assert listed(rpc) == {}
        with (
            running(tmp_path, *device(1, coordinator.address)) as one,
            running(tmp_path, *device(2, coordinator.address)) as two,
        ):
            wait_until(lambda: listed(rpc) == {1: one.address, 2: two.address}, "both devices")
            all_reduce_works(rpc, 2)
            assert one.stderr == two.stderr == ""


def test_a_device_that_was_there_first_comes_in_when_the_coordinator_is_up(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, *device(1, f"127.0.0.1:{port}")) as one:
        wait_until(lambda: "not registered with the coordinator" in one.stderr, "the complaint")
        with running(tmp_path, *ALONE, "--port", str(port)) as coordinator, rpc_to(coordinator.address) as rpc:
            wait_until(lambda: listed(rpc) == {1: one.address}, "the device")
            all_reduce_works(rpc, 1)
            wait_until(lambda: "registered with the coordinator at 127.0.0.1" in one.stderr.splitlines()[-1], "the news")
            assert len(one.stderr.splitlines()) == 2, "said once per change"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_coordinator_that_is_restarted_gets_all_devices_back(tmp_path: Path, number: signal.Signals) -> None:
    with (
        running(tmp_path, *ALONE) as first,
        running(tmp_path, *device(1, first.address)) as one,
        running(tmp_path, *device(2, first.address)) as two,
    ):
        addresses = {1: one.address, 2: two.address}
        with rpc_to(first.address) as rpc:
            wait_until(lambda: listed(rpc) == addresses, "both devices")
        started = time.monotonic()
        assert first.ends(number) == (0 if number is signal.SIGTERM else -number)
        assert time.monotonic() - started < 8, "it waited for registrations to end"  # the drain time is 10
        with (
            running(tmp_path, *ALONE, "--port", first.address.rpartition(":")[2]) as second,
            rpc_to(second.address) as rpc,
        ):
            wait_until(lambda: listed(rpc) == addresses, "both devices again")
            all_reduce_works(rpc, 2)


def test_a_device_leaves_in_order(tmp_path: Path) -> None:
    with (
        running(tmp_path, *ALONE) as coordinator,
        rpc_to(coordinator.address) as rpc,
        running(tmp_path, *device(1, coordinator.address)) as one,
        running(tmp_path, *device(2, coordinator.address)) as two,
    ):
        wait_until(lambda: len(listed(rpc)) == 2, "both devices")
        assert one.ends(signal.SIGTERM) == 0
        # It has left before it ended: nothing is to be waited for.
        devices = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
        assert [status.metadata.address for status in devices] == [two.address]
        all_reduce_works(rpc, 1)
        assert_refused(
            lambda: rpc.comm_init(1, deviceIds=[1]), "NOT_FOUND", "DEVICE_NOT_FOUND", ["no device 1", "there are 2"]
        )
        # Who has left may come again, also somewhere else.
        with running(tmp_path, *device(1, coordinator.address)):
            wait_until(lambda: len(listed(rpc)) == 2, "the return")
            all_reduce_works(rpc, 2)
        assert one.stderr == ""
        assert coordinator.stderr == ""


def test_a_device_leaves_although_the_coordinator_is_gone(tmp_path: Path) -> None:
    with running(tmp_path, *ALONE) as coordinator, running(tmp_path, *device(1, coordinator.address)) as one:
        with rpc_to(coordinator.address) as rpc:
            wait_until(lambda: len(listed(rpc)) == 1, "the device")
        coordinator.ends(signal.SIGKILL)
        assert one.ends(signal.SIGTERM) == 0


def test_a_device_that_was_killed_stays_listed_and_comes_back_where_it_was(tmp_path: Path) -> None:
    with running(tmp_path, *ALONE) as coordinator, rpc_to(coordinator.address) as rpc:
        with running(tmp_path, *device(1, coordinator.address)) as one:
            wait_until(lambda: len(listed(rpc)) == 1, "the device")
            one.ends(signal.SIGKILL)
            wait_until(lambda: "its process has ended" in coordinator.stderr, "the loss")
            (status,) = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
            assert (status.metadata.address, status.reachable) == (one.address, False)
            port = one.address.rpartition(":")[2]
            with running(tmp_path, *device(1, coordinator.address), "--port", port):
                wait_until(lambda: listed(rpc) == {1: one.address}, "the return")
                all_reduce_works(rpc, 1)
        # And at another address: whoever has the id and answers is meant.
        with running(tmp_path, *device(1, coordinator.address)) as other:
            wait_until(lambda: listed(rpc) == {1: other.address}, "the next one")
            all_reduce_works(rpc, 1)
            devices = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
            assert len(devices) == 1, "the one before is forgotten"


def test_devices_join_and_leave_while_collectives_run_on_others(tmp_path: Path) -> None:
    with ServerProcess("device", "--id", "1") as one, ServerProcess("device", "--id", "2") as two:
        options = ["--device", one.address, "--device", two.address]
        with (
            running(tmp_path, *ALONE, *options) as coordinator,
            rpc_to(coordinator.address) as rpc,
            Traffic(coordinator.address, 2, 1 << 14) as traffic,
        ):
            wait_until(lambda: traffic.done > 0 or traffic.failure is not None, "the first collective")
            for _ in range(3):
                with running(tmp_path, *device(3, coordinator.address)) as three:
                    wait_until(lambda: 3 in listed(rpc), "the device")
                    with rpc.comm(1, deviceIds=[3]) as comm:
                        all_reduce_on(rpc, comm)
                    assert three.ends(signal.SIGTERM) == 0
                before = traffic.done
                wait_until(lambda before=before: traffic.done > before or traffic.failure is not None, "more collectives")
            traffic.end()
            assert traffic.failure is None
    print(f"{traffic.done} collectives, none failed")


@pytest.mark.parametrize("transport", ["grpc", "p2p"])
def test_devices_come_into_a_live_communicator_and_leave_it_between_operations(tmp_path: Path, transport: str) -> None:
    with (
        running(tmp_path, *ALONE) as coordinator,
        running(tmp_path, *device(1, coordinator.address)),
        running(tmp_path, *device(2, coordinator.address)) as two,
        dsml_gpu.connect(coordinator.address) as client,
    ):
        wait_until(lambda: len(client.devices()) == 2, "both devices")
        comm = client.communicator(2, transport=transport)
        before = comm.array([np.full(1000, 10.0), np.full(1000, 20.0)])
        comm.all_reduce(before)
        with running(tmp_path, *device(3, coordinator.address)):
            wait_until(lambda: len(client.devices()) == 3, "the third device")
            comm.grow(1)
            assert (comm.nranks, comm.epoch, [one.device_id for one in comm.devices]) == (3, 2, [1, 2, 3])
            with pytest.raises(InvalidValue, match="3 ranks in epoch 2, of which epoch 1 knows 2"):
                comm.all_reduce(before)
            arrays = [*before, comm.devices[2].array(np.full(1000, 5.0))]
            result = comm.all_reduce(arrays)
            assert result is not None
            assert (result.device_ids, result.epoch) == ((1, 2, 3), 2)
            assert [array.get()[0] for array in arrays] == [65] * 3
            # Traffic goes on while one leaves; nothing of it fails.
            assert two.ends(signal.SIGTERM) == 0
            result = comm.all_reduce(arrays)
            assert result is not None
            assert (result.device_ids, result.epoch, result.lost) == ((1, 3), 3, ())
            assert [arrays[rank].get()[0] for rank in (0, 2)] == [130] * 2
            with pytest.raises(OutOfDevices):
                comm.grow(1)
            assert comm.nranks == 2
            comm.close()
            all_reduce_of(client, [3, 1])
    assert two.stderr == ""


def test_a_device_that_was_restarted_comes_in_anew_and_has_forgotten_everything(tmp_path: Path) -> None:
    with (
        running(tmp_path, *ALONE) as coordinator,
        running(tmp_path, *device(1, coordinator.address)),
        running(tmp_path, *device(2, coordinator.address)) as two,
        dsml_gpu.connect(coordinator.address) as client,
    ):
        wait_until(lambda: len(client.devices()) == 2, "both devices")
        comm = client.communicator(device_ids=[1, 2])
        before = comm.array([np.ones(8)] * 2)
        two.ends(signal.SIGKILL)
        with running(tmp_path, *device(2, coordinator.address), "--port", two.address.rpartition(":")[2]):
            wait_until(lambda: len(client.devices()) == 2, "the return")
            comm.grow(device_ids=[2])
            assert [one.device_id for one in comm.devices] == [1, 2]
            with pytest.raises(InvalidValue, match="2 ranks in epoch 3, of which epoch 1 knows 1"):
                comm.all_reduce(before)
            arrays = [before[0], comm.devices[1].array(np.ones(8))]
            comm.all_reduce(arrays)
            assert arrays[1].get().tolist() == [2.0] * 8


def all_reduce_of(client: dsml_gpu.Client, device_ids: list[int]) -> None:
    with client.communicator(device_ids=device_ids) as comm:
        arrays = comm.array([np.ones(8)] * len(device_ids))
        comm.all_reduce(arrays)
        assert arrays[0].get().tolist() == [len(device_ids)] * 8


def test_a_communicator_that_cannot_grow_stays_what_it_is(tmp_path: Path) -> None:
    """The device that is to come freezes before it has joined."""
    with (
        running(tmp_path, *ALONE) as coordinator,
        running(tmp_path, *device(1, coordinator.address)),
        running(tmp_path, *device(2, coordinator.address)) as two,
        dsml_gpu.connect(coordinator.address) as client,
    ):
        wait_until(lambda: len(client.devices()) == 2, "both devices")
        comm = client.communicator(device_ids=[1])
        arrays = comm.array([np.ones(8)])
        two.process.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerUnavailable):
            comm.grow(device_ids=[2])
        assert comm.all_reduce(arrays) is not None
        two.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(client.devices()) == 2, "the return")
        comm.grow(device_ids=[2])
        both = [*arrays, comm.devices[1].array(np.ones(8))]
        comm.all_reduce(both)
        assert both[1].get().tolist() == [2.0] * 8


def test_a_device_that_listens_everywhere_tells_the_address_from_which_it_reaches_the_coordinator(tmp_path: Path) -> None:
    with (
        running(tmp_path, *ALONE) as coordinator,
        rpc_to(coordinator.address) as rpc,
        running(tmp_path, *device(1, coordinator.address), "--host", "0.0.0.0") as one,
    ):
        wait_until(lambda: len(listed(rpc)) == 1, "the device")
        assert listed(rpc) == {1: f"127.0.0.1:{one.address.rpartition(':')[2]}"}
        all_reduce_works(rpc, 1)


def test_a_device_tells_the_address_that_it_is_told_to(tmp_path: Path) -> None:
    port = str(free_port())
    with (
        running(tmp_path, *ALONE) as coordinator,
        rpc_to(coordinator.address) as rpc,
        running(tmp_path, *device(1, coordinator.address), "--port", port, "--advertise", f"localhost:{port}"),
    ):
        wait_until(lambda: listed(rpc) == {1: f"localhost:{port}"}, "the device")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--coordinator", "nonsense"], ["coordinator", "'nonsense'", "HOST:PORT"]),
        (["--coordinator", "here:1", "--advertise", "there"], ["advertised", "'there'"]),
        (["--advertise", "there:1"], ["no coordinator"]),
    ],
)
def test_addresses_that_are_none_are_refused_in_one_line(options: list[str], words: list[str]) -> None:
    ended = run_to_end("device", "--port", "0", *options)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    for word in words:
        assert word in line


# ---- the RPCs ---------------------------------------------------------------------------------------------------------


def test_registering_twice_is_registering_once(tmp_path: Path) -> None:
    with (
        running(tmp_path, "device", "--id", "7", "--memory", "8MiB") as one,
        running(tmp_path, *ALONE, "--device", one.address) as coordinator,
        rpc_to(coordinator.address) as rpc,
    ):
        port = one.address.rpartition(":")[2]
        for address in (one.address, one.address, f"localhost:{port}"):
            answers = rpc.coordinator.RegisterDevices(pb.RegisterDevicesRequest(address=address), timeout=CALL_TIMEOUT_S)
            assert list(next(answers).deviceIds) == [7]
            answers.cancel()
        assert listed(rpc) == {7: one.address}


def test_what_cannot_be_registered_is_refused(tmp_path: Path) -> None:
    with (
        running(tmp_path, "device", "--id", "7", "--memory", "8MiB") as one,
        running(tmp_path, "device", "--id", "7", "--memory", "8MiB") as other,
        running(tmp_path, *ALONE, "--device", one.address) as coordinator,
        rpc_to(coordinator.address) as rpc,
    ):

        def register(address: str) -> None:
            next(rpc.coordinator.RegisterDevices(pb.RegisterDevicesRequest(address=address), timeout=CALL_TIMEOUT_S))

        assert_refused(lambda: register(""), "INVALID_ARGUMENT", "INVALID_VALUE", ["host:port"])
        nobody = f"127.0.0.1:{free_port()}"
        assert_refused(lambda: register(nobody), "UNAVAILABLE", "PEER_UNAVAILABLE", [nobody])
        assert_refused(lambda: register(other.address), "INVALID_ARGUMENT", "INVALID_VALUE", [one.address, other.address])
        assert listed(rpc) == {7: one.address}


def test_unregistering_is_idempotent_but_for_who_was_never_there(tmp_path: Path) -> None:
    with (
        running(tmp_path, "device", "--id", "7", "--memory", "8MiB") as one,
        running(tmp_path, *ALONE, "--device", one.address) as coordinator,
        rpc_to(coordinator.address) as rpc,
    ):

        def unregister(address: str) -> None:
            rpc.coordinator.UnregisterDevices(pb.UnregisterDevicesRequest(address=address), timeout=CALL_TIMEOUT_S)

        for _ in range(2):
            unregister(one.address)
            assert listed(rpc) == {}
        assert_refused(lambda: unregister("there:1"), "NOT_FOUND", "DEVICE_NOT_FOUND", ["there:1"])


class Retired:
    """A communicator that goes on without a device when it is told that its operation has ended."""

    def __init__(self) -> None:
        self.asked: list[DeviceHandle] = []
        self.operation_ended = asyncio.Event()

    async def retire(self, handle: DeviceHandle) -> None:
        self.asked.append(handle)
        await self.operation_ended.wait()
        handle.comm_ids.discard(77)


@in_event_loop
async def test_a_device_leaves_when_its_communicators_go_on_without_it() -> None:
    with ServerProcess("device", "--id", "1") as one, ServerProcess("device", "--id", "2") as two:
        async with coordinating(one.address, two.address) as coordinator:
            registry, comm = coordinator.registry, Retired()
            leaver, _ = await registry.take(2, 77)
            coordinator._service._comms._known[77] = comm  # type: ignore[assignment]
            try:
                request = pb.UnregisterDevicesRequest(address=one.address)
                first = asyncio.ensure_future(coordinator._service.UnregisterDevices(request, None))
                again = asyncio.ensure_future(coordinator._service.UnregisterDevices(request, None))
                await until(lambda: bool(comm.asked), "the question")
                assert leaver.leaving
                with pytest.raises(Unavailable, match=r"device 1 at .* is about to leave"):
                    await registry.take_named([1], 78)
                assert not first.done()
                # Who has asked may go; the leaving goes on.
                first.cancel()
                await asyncio.wait([first])
                comm.operation_ended.set()
                await again
                assert comm.asked == [leaver]
                assert [handle.device_id for handle in registry.handles] == [2]
                assert leaver.lost == ""
            finally:
                del coordinator._service._comms._known[77]


# ---- decisions --------------------------------------------------------------------------------------------------------


def test_attempts_come_after_longer_and_longer_but_never_too_long() -> None:
    assert [delay_s(attempts, 1.0) for attempts in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert delay_s(10**6, 1.0) == 2.0
    assert delay_s(0, 0.0) == 0.05


def test_the_way_to_another_machine() -> None:
    assert outgoing_host("127.0.0.1:1") == "127.0.0.1"
    with pytest.raises(Unavailable, match=r"there.invalid:1"):
        outgoing_host("there.invalid:1")
