"""A client generated from the original contract works unchanged, and the contract has only grown since."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support import numpy_gpus
from tests.support.processes import running
from tests.support.rpc import CALL_TIMEOUT_S, Rpc, assert_refused, rpc_to

HERE = Path(__file__).parent
ORIGINAL = HERE / "original_gpu_sim.proto"


def compile_original(folder: Path, *outputs: str) -> None:
    includes = [f"-Igpu_sim.proto={ORIGINAL}", f"-I{files('grpc_tools') / '_proto'}"]
    assert protoc.main(["protoc", *includes, *outputs, "gpu_sim.proto"]) == 0, f"see above; in {folder}"


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    compile_original(folder, f"--python_out={folder}", f"--grpc_python_out={folder}")
    return folder


@pytest.fixture(scope="module")
def alone() -> Iterator[Rpc]:
    with ServerProcess("coordinator") as server, rpc_to(server.address) as rpc:
        yield rpc


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(4, ["--stall-timeout", "1", "--memory", "64MiB"]) as fleet:
        yield fleet


@pytest.fixture(params=["coordinator alone", "fleet of 4"])
def coordinator(request: pytest.FixtureRequest) -> Iterator[Rpc]:
    if request.param == "coordinator alone":
        yield request.getfixturevalue("alone")
        return
    with rpc_to(request.getfixturevalue("fleet").address) as rpc:
        yield rpc
        # An old client never destroys its communicators; the next one needs the devices.
        listed = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
        for comm_id in {comm_id for device in listed for comm_id in device.commIds}:
            rpc.comm_destroy(comm_id)


def run_client(stubs: Path, *arguments: str) -> None:
    """Runs the client in a process of its own: two files of one proto package cannot live in one."""
    command = [sys.executable, str(HERE / "original_client.py"), str(stubs), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=stubs)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("nranks", [4, 1])
def test_the_main_job(coordinator: Rpc, stubs: Path, nranks: int):
    run_client(stubs, "job", coordinator.address, str(nranks))


@pytest.mark.parametrize("nranks", [3, 4])
def test_any_number_of_elements_and_every_operator(coordinator: Rpc, stubs: Path, nranks: int):
    run_client(stubs, "sizes", coordinator.address, str(nranks))


@pytest.fixture
def joined(fleet: Fleet) -> Iterator[tuple[Rpc, Rpc]]:
    """The first two device servers, told of each other by somebody who knows the additive RPC."""
    with rpc_to(fleet.devices[0].address) as one, rpc_to(fleet.devices[1].address) as two:
        peers = [pb.Peer(deviceId=number, address=rpc.address) for number, rpc in ((1, one), (2, two))]
        for rank, rpc in enumerate((one, two)):
            rpc.device.JoinComm(pb.JoinCommRequest(rank=rank, peers=peers), timeout=CALL_TIMEOUT_S)
        yield one, two


def test_the_low_level_way(fleet: Fleet, joined: tuple[Rpc, Rpc], stubs: Path):
    run_client(stubs, "low-level", fleet.address, *(rpc.address for rpc in joined))


@pytest.mark.parametrize("first", ["data", "receive"])
def test_data_and_receive_in_either_order(joined: tuple[Rpc, Rpc], first: str):
    _, receiver = joined
    stream_id = {"data": 5001, "receive": 5002}[first]
    data = bytes(range(200))

    def send() -> Any:
        chunks = [pb.DataChunk(streamId=stream_id, data=data[:150]), pb.DataChunk(data=data[150:])]
        return receiver.device.StreamSend.future(iter(chunks), timeout=CALL_TIMEOUT_S)

    def receive() -> None:
        request = pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=stream_id),
            recvBuffAddr=pb.MemAddr(value=0),
            numBytes=len(data),
            srcRank=pb.Rank(value=0),
        )
        receiver.device.BeginReceive(request, timeout=CALL_TIMEOUT_S)

    if first == "receive":
        receive()
        sent = send()
    else:
        sent = send()
        # A second sender of the stream waits for ever or is refused, the latter only where the first one is there.
        again = [pb.DataChunk(streamId=stream_id)]
        assert_refused(
            lambda: receiver.device.StreamSend(iter(again), timeout=CALL_TIMEOUT_S),
            "ALREADY_EXISTS",
            "STREAM_IN_USE",
            [stream_id],
        )
        assert not sent.done()
        receive()
    assert sent.result().success
    request = pb.GetStreamStatusRequest(streamId=pb.StreamId(value=stream_id))
    assert receiver.device.GetStreamStatus(request, timeout=CALL_TIMEOUT_S).status == pb.SUCCESS
    answer = receiver.device.StreamDeviceToHost(
        pb.StreamDeviceToHostRequest(memAddr=pb.MemAddr(value=0), numBytes=len(data)), timeout=CALL_TIMEOUT_S
    )
    assert b"".join(chunk.data for chunk in answer) == data


def test_a_server_of_several_devices_shows_the_first(tmp_path: Path, stubs: Path):
    with running(tmp_path, "device", "--id", "7", "--gpu", "0", "--gpu", "1", command=numpy_gpus.COMMAND) as server:
        assert "devices 7, 8" in server.ready_line
        run_client(stubs, "metadata", server.address, "7")


# ---- the two files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorProto:
    folder = tmp_path_factory.mktemp("descriptor")
    compile_original(folder, f"--descriptor_set_out={folder / 'set'}")
    (file,) = descriptor_pb2.FileDescriptorSet.FromString((folder / "set").read_bytes()).file
    return file


@pytest.fixture(scope="module")
def current() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    return file


def field_by_number(message: descriptor_pb2.DescriptorProto) -> dict[int, tuple[object, ...]]:
    """What of each field shows on the wire, in JSON or in generated code."""
    oneofs = [oneof.name for oneof in message.oneof_decl]
    return {
        field.number: (
            field.name,
            field.type,
            field.type_name,
            field.label,
            oneofs[field.oneof_index] if field.HasField("oneof_index") else None,
            field.proto3_optional,
            field.options.SerializeToString(),
        )
        for field in message.field
    }


def assert_message_only_grew(old: descriptor_pb2.DescriptorProto, new: descriptor_pb2.DescriptorProto) -> None:
    old_fields, new_fields = field_by_number(old), field_by_number(new)
    kept = {number: field for number, field in new_fields.items() if number in old_fields}
    assert kept == old_fields, old.name
    added = sorted(set(new_fields) - set(old_fields))
    assert all(number >= 100 for number in added), f"{old.name}: {added}"
    nested = {message.name: message for message in new.nested_type}
    for message in old.nested_type:  # the entries of maps
        assert nested[message.name].options == message.options
        assert field_by_number(nested[message.name]) == field_by_number(message)


def test_the_package_is_the_same(original: descriptor_pb2.FileDescriptorProto, current: Any):
    assert (original.package, original.syntax) == (current.package, current.syntax) == ("gpu_sim", "proto3")


def test_every_message_only_grew(original: descriptor_pb2.FileDescriptorProto, current: Any):
    assert len(original.message_type) == 33
    messages = {message.name: message for message in current.message_type}
    for message in original.message_type:
        assert_message_only_grew(message, messages[message.name])


def test_every_enum_only_grew(original: descriptor_pb2.FileDescriptorProto, current: Any):
    enums = {enum.name: enum for enum in current.enum_type}
    assert [enum.name for enum in original.enum_type] == ["Status", "ReduceOp"]
    for enum in original.enum_type:
        assert list(enums[enum.name].value[: len(enum.value)]) == list(enum.value)


def test_every_service_only_grew(original: descriptor_pb2.FileDescriptorProto, current: Any):
    services = {service.name: service for service in current.service}
    assert {service.name: len(service.method) for service in original.service} == {"GPUDevice": 5, "GPUCoordinator": 7}
    for service in original.service:
        # A method's descriptor is its name, its types and whether they are streams.
        assert list(services[service.name].method[: len(service.method)]) == list(service.method)
