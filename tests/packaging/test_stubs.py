"""The committed stubs are those of ``proto/gpu_sim.proto`` as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

from dsml_gpu.wire import gpu_sim_pb2, gpu_sim_pb2_grpc
from tests.packaging.conftest import ROOT

SERVICES = ("GPUDevice", "GPUCoordinator")


@pytest.mark.timeout(300)
def test_the_generator_would_write_the_same():
    """Byte for byte; where no Python here can run the pinned generator, the tests below still compare the meaning."""
    command = [sys.executable, str(ROOT / "proto/generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def compiled(scratch: Path) -> FileDescriptorProto:
    """The contract as today's protoc reads it, under the name that the stubs have it."""
    out = scratch / "contract.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Idsml_gpu/wire={ROOT / 'proto'}"]
    command += [f"--descriptor_set_out={out}", "dsml_gpu/wire/gpu_sim.proto"]
    subprocess.run(command, cwd=scratch, check=True, timeout=60)
    (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    return file


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """Drop what protoc derives: descriptor sets have it, generated code does not."""
    normal = FileDescriptorProto()
    normal.CopyFrom(file)
    messages: list[DescriptorProto] = list(normal.message_type)
    while messages:
        message = messages.pop()
        for field in message.field:
            field.ClearField("json_name")
        messages.extend(message.nested_type)
    return normal


def test_the_descriptor_inside_the_stubs_is_the_contract(tmp_path):
    committed = FileDescriptorProto()
    gpu_sim_pb2.DESCRIPTOR.CopyToProto(committed)
    # As text, so that a failure shows the lines that differ.
    assert str(without_json_names(committed)) == str(without_json_names(compiled(tmp_path)))


class RecordingChannel:
    """Notes which RPCs a stub asks a channel for, and how each streams."""

    def __init__(self) -> None:
        self.calls: dict[str, str] = {}

    def __getattr__(self, kind: str):
        def multi_callable(path: str, **codec: object) -> str:
            self.calls[path] = kind
            return path

        return multi_callable


@pytest.mark.parametrize("service", SERVICES)
def test_the_grpc_stub_and_servicer_have_every_method_of_the_service(tmp_path, service):
    (contract,) = (found for found in compiled(tmp_path).service if found.name == service)
    kinds = {True: "stream", False: "unary"}
    expected = {
        f"/gpu_sim.{service}/{method.name}": f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
        for method in contract.method
    }
    channel = RecordingChannel()

    getattr(gpu_sim_pb2_grpc, f"{service}Stub")(channel)

    assert channel.calls == expected
    servicer = getattr(gpu_sim_pb2_grpc, f"{service}Servicer")
    assert {name for name in vars(servicer) if not name.startswith("_")} == {m.name for m in contract.method}


def test_no_service_is_left_out():
    assert tuple(gpu_sim_pb2.DESCRIPTOR.services_by_name) == SERVICES
