"""Servers as processes: how they start, what they say when they cannot, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import COMMAND, run_to_end, running, wait_until
from tests.support.rpc import (
    CALL_TIMEOUT_S,
    MIB,
    Rpc,
    all_reduce_works,
    assert_refused,
    failure_of,
    naive,
    ring,
    rpc_to,
)
from tests.support.slow_copy import SlowCopy

SERVERS = ["device", "coordinator", "serve"]
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def slow_copy(rpc: Rpc, command: str) -> SlowCopy:
    """One that a server of a command is busy with."""
    if command != "device":
        return SlowCopy(rpc.coordinator, rpc.comm_init(1).devices[0], 16)
    metadata = rpc.device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=CALL_TIMEOUT_S).metadata
    return SlowCopy(rpc.device, metadata, 16)


def refuses_new_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # the listening socket was closed just then
        return False
    return False


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("command", SERVERS)
def test_a_signal_drains_running_calls_and_ends_the_server(tmp_path: Path, command: str, number: signal.Signals):
    with running(tmp_path, command) as server, rpc_to(server.address) as rpc:
        copy = slow_copy(rpc, command)
        server.process.send_signal(number)
        wait_until(lambda: refuses_new_connections(server.address), "the end of listening")
        assert server.process.poll() is None
        copy.finish()
        assert server.ends() == 0
        assert server.stderr == ""


@pytest.mark.slow
def test_a_call_that_does_not_end_is_cut_off(tmp_path: Path):
    """Ten seconds after the signal, as the server's drain time says."""
    with running(tmp_path, "device") as server, rpc_to(server.address) as rpc:
        copy = slow_copy(rpc, "device")
        assert server.ends(signal.SIGTERM) == 0
        assert failure_of(copy.answer.result).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        copy.give_up()


@pytest.mark.parametrize("command", SERVERS)
def test_a_server_ends_with_its_standard_input_when_told_to(tmp_path: Path, command: str):
    with (
        running(tmp_path, command, "--until-stdin-closes", stdin=subprocess.PIPE) as server,
        rpc_to(server.address) as rpc,
    ):
        assert rpc.is_serving()
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.ends() == 0
        assert server.stderr == ""


def test_a_server_outlives_its_standard_input_otherwise(tmp_path: Path):
    with running(tmp_path, "device", stdin=subprocess.PIPE) as server, rpc_to(server.address) as rpc:
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert rpc.is_serving()
        assert server.ends(signal.SIGTERM) == 0


@pytest.mark.parametrize("stdin", ["/dev/null", "a file"])
def test_standard_input_that_is_no_pipe_has_ended(tmp_path: Path, stdin: str):
    """As under nohup, cron or a service manager; there is nothing to wait for."""
    path = tmp_path / "empty"
    path.touch()
    with open("/dev/null" if stdin == "/dev/null" else path) as source:
        ended = run_to_end("device", "--port", "0", "--until-stdin-closes", stdin=source)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 0, ended.stderr


# ---- it cannot start ------------------------------------------------------------------------------------------------


def assert_one_line(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    """Asserts that a command has failed with one clear line."""
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize("command", SERVERS)
def test_a_port_in_use_is_said_in_one_line(command: str, taken_port: str):
    assert_one_line(run_to_end(command, "--port", taken_port), f"127.0.0.1:{taken_port}", "in use")


def test_two_servers_do_not_share_a_port():
    with ServerProcess("device") as server:
        port = server.address.rpartition(":")[2]
        assert_one_line(run_to_end("device", "--port", port), server.address)


def test_a_metrics_port_in_use_is_said_in_one_line(taken_port: str):
    assert_one_line(run_to_end("device", "--port", "0", "--metrics-port", taken_port), taken_port, "metrics")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["device", "--backend", "abacus"], ["abacus", "numpy"]),
        (["device", "--memory", "1MiB"], ["--memory", "1 MiB", "4 MiB"]),
        (["device", "--min-addr", str((1 << 64) - 4096)], ["--min-addr", "64 bits"]),
        (["device", "--slice", "5000001"], ["5000001"]),
        (["device", "--max-message", "2GiB"], ["--max-message"]),
        (["coordinator", "--transport", "pigeon"], ["pigeon", "p2p"]),
        (["coordinator", "--memory", "1MiB"], ["--memory", "1 MiB", "4 MiB"]),
        (["coordinator", "--backend", "abacus"], ["abacus", "numpy"]),
        (["device", "--backend", "numpy", "--gpu", "0"], ["numpy", "GPU 0"]),
        (["coordinator", "--backend", "numpy", "--gpu", "0"], ["numpy", "GPU 0"]),
    ],
    ids=str,
)
def test_an_option_that_does_not_do_is_said_in_one_line(arguments: list[str], words: list[str]):
    assert_one_line(run_to_end(*arguments, "--port", "0"), *words)


@pytest.mark.parametrize("command", SERVERS)
def test_a_gpu_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_one_line(run_to_end(command, "--gpu", "0", "--port", "0"), "CuPy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["device", "--port", "notaport"],
        ["device", "--port", "65536"],
        ["device", "--memory", "lots"],
        ["device", "--id", "0"],
        ["device", "--gpu", "-1"],
        ["device", "--colour", "blue"],
        ["device", "--stall-timeout", "0"],
        ["coordinator", "--embedded", "-1"],
        ["coordinator", "--config", "/no/such/file.toml"],
    ],
    ids=str,
)
def test_an_option_that_cannot_be_read_is_named(arguments: list[str]):
    ended = run_to_end(*arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert arguments[1] in ended.stderr.splitlines()[-1]


# ---- what it serves -------------------------------------------------------------------------------------------------


def listed(rpc: Rpc) -> list[pb.DeviceStatus]:
    response = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S)
    return list(response.devices)


def test_a_configuration_file_names_device_servers(tmp_path: Path):
    with ServerProcess("device", "--id", "11") as one, ServerProcess("device", "--id", "12") as two:
        config = tmp_path / "servers.toml"
        config.write_text(f'devices = ["{two.address}"]\n')
        options = ["--device", one.address, "--config", str(config)]
        with running(tmp_path, "coordinator", *options) as server, rpc_to(server.address) as rpc:
            assert "2 of 2 device servers answer" in server.ready_line
            # Options first, then the file; and ranks in that order.
            assert [status.metadata.deviceId.value for status in listed(rpc)] == [11, 12]
            assert [device.deviceId.value for device in rpc.comm_init(2).devices] == [11, 12]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("devices = 5", ["devices", "5"]),
        ('devices = ["a:1"]\ncolour = "blue"', ["colour"]),
        ("devices = [", []),
        ("", ["devices"]),
    ],
    ids=["no list", "unknown key", "no TOML", "empty"],
)
def test_a_configuration_file_that_does_not_do_is_said_in_one_line(tmp_path: Path, content: str, words: list[str]):
    config = tmp_path / "servers.toml"
    config.write_text(content)
    assert_one_line(run_to_end("coordinator", "--port", "0", "--config", str(config)), str(config), *words)


def test_a_coordinator_alone_embeds_devices_on_demand(tmp_path: Path):
    with running(tmp_path, "coordinator", "--memory", "8MiB") as server, rpc_to(server.address) as rpc:
        assert "on demand" in server.ready_line
        assert listed(rpc) == []
        comm = rpc.comm_init(3)
        status = listed(rpc)
        assert [device.metadata.deviceId.value for device in status] == [device.deviceId.value for device in comm.devices]
        assert all(device.embedded and device.reachable for device in status)
        assert {device.metadata.maxMemAddr.value for device in status} == {8 * MIB}
        assert [list(device.commIds) for device in status] == [[comm.commId]] * 3
        # Devices of another communicator are others; at the end of a communicator its devices are gone.
        with rpc.comm(2) as other:
            assert not {d.deviceId.value for d in other.devices} & {d.deviceId.value for d in comm.devices}
        assert len(listed(rpc)) == 3


def test_a_coordinator_with_device_servers_embeds_none():
    with (
        ServerProcess("device", "--id", "3") as device,
        ServerProcess("coordinator", "--device", device.address) as server,
        rpc_to(server.address) as rpc,
    ):
        assert [(status.metadata.deviceId.value, status.embedded) for status in listed(rpc)] == [(3, False)]
        assert_refused(lambda: rpc.comm_init(2), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", ["2 devices", "1 of 1"])
        all_reduce_works(rpc, 1)


def test_a_number_of_embedded_devices_is_there_from_the_start(tmp_path: Path):
    with running(tmp_path, "coordinator", "--embedded", "2") as server, rpc_to(server.address) as rpc:
        assert "2 embedded devices" in server.ready_line
        before = [status.metadata.deviceId.value for status in listed(rpc)]
        assert len(before) == 2
        all_reduce_works(rpc, 2)
        assert [status.metadata.deviceId.value for status in listed(rpc)] == before
        assert_refused(lambda: rpc.comm_init(3), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", ["3 devices", "2 of 2"])


def test_embedded_devices_and_device_servers_work_in_one_communicator():
    """Also where the device server's id is one that an embedded device would have taken."""
    with (
        ServerProcess("device", "--id", "1") as device,
        ServerProcess("coordinator", "--device", device.address, "--embedded", "2") as server,
        rpc_to(server.address) as rpc,
    ):
        assert [status.embedded for status in listed(rpc)] == [False, True, True]
        all_reduce_works(rpc, 3)


def test_serve_says_what_it_serves_and_how_to_use_it(tmp_path: Path):
    with ServerProcess("device", "--id", "21") as device:
        with running(tmp_path, "serve", "--device", device.address) as server, rpc_to(server.address) as rpc:
            assert server.ends(signal.SIGTERM) == 0
            assert server.process.stdout is not None
            summary = server.process.stdout.read()
            assert rpc.address == server.address
        for word in (f"device 21 at {device.address}", "transport  auto", f'dsml_gpu.connect("{server.address}")'):
            assert word in summary


@pytest.mark.parametrize("command", SERVERS)
def test_the_ready_line_says_which_backend_and_why(tmp_path: Path, command: str):
    with running(tmp_path, command) as server, rpc_to(server.address) as rpc:
        metadata = (
            rpc.device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=CALL_TIMEOUT_S).metadata
            if command == "device"
            else rpc.comm_init(1).devices[0]
        )
        if metadata.backend == "cupy":
            assert f"CuPy, because {metadata.deviceName} answers" in server.ready_line
        else:
            assert metadata.backend == "numpy"
            assert "numpy, because CuPy" in server.ready_line


def test_the_ready_line_says_that_the_backend_was_asked_for(tmp_path: Path):
    with running(tmp_path, "device", "--backend", "numpy") as server:
        assert "numpy, as asked" in server.ready_line


def test_the_default_device_id_is_the_same_at_every_start(tmp_path: Path):
    ids = []
    port = "0"
    for _ in range(2):
        with running(tmp_path, "device", "--port", port) as server, rpc_to(server.address) as rpc:
            metadata = rpc.device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=CALL_TIMEOUT_S).metadata
            ids.append(metadata.deviceId.value)
            port = server.address.rpartition(":")[2]
            assert server.ends(signal.SIGKILL) == -signal.SIGKILL
    assert ids[0] == ids[1] != 0


# ---- metrics --------------------------------------------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def samples(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset({"collective": "all_reduce", **values}.items())


def test_metrics_count_operations(tmp_path: Path, free_port: int):
    with (
        ServerProcess("device") as one,
        ServerProcess("device") as two,
        running(
            *(tmp_path, "coordinator", "--device", one.address, "--device", two.address, "--on-failure", "fail"),
            *("--metrics-port", str(free_port)),
        ) as server,
        rpc_to(server.address) as rpc,
    ):
        comm = rpc.comm_init(2)
        rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=CALL_TIMEOUT_S)
        rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        rpc.coordinator.AllReduceRing(ring(comm, 80), timeout=CALL_TIMEOUT_S)
        rpc.coordinator.NaiveAllReduce(naive(comm, 16), timeout=CALL_TIMEOUT_S)
        rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        two.process.kill()
        two.process.wait()
        failure_of(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=CALL_TIMEOUT_S))
        found = samples(free_port)
    assert found["dsml_gpu_operations_total", labels(algorithm="ring", outcome="ok")] == 2
    assert found["dsml_gpu_operations_total", labels(algorithm="naive", outcome="ok")] == 1
    assert found["dsml_gpu_operations_total", labels(algorithm="ring", outcome="failed")] == 1
    assert found["dsml_gpu_operation_bytes_total", labels()] == 800 + 80 + 16
    assert found["dsml_gpu_control_round_seconds_count", frozenset()] == 2


# ---- the command itself ---------------------------------------------------------------------------------------------


def test_a_reader_of_the_ready_line_that_goes_away_does_not_end_the_server(tmp_path: Path):
    with running(tmp_path, "device") as server, rpc_to(server.address) as rpc:
        assert server.process.stdout is not None
        server.process.stdout.close()
        assert rpc.is_serving()
        assert server.ends(signal.SIGTERM) == 0


def test_servers_of_a_process_that_was_killed_end_too():
    script = (
        "import sys; from dsml_gpu.cli.fleet import Fleet\n"
        "with Fleet(1) as fleet:\n"
        "    print(fleet.coordinator.process.pid, fleet.devices[0].process.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    owner = subprocess.Popen([COMMAND[0], "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2
    finally:
        owner.kill()
        owner.communicate()

    def is_gone(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"  # ended, and nobody has asked for its status: not here, where its parent is gone

    if not os.path.isdir("/proc/self"):

        def is_gone(pid: int) -> bool:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            return False

    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid), f"the end of process {pid}")
