"""The standard services beside ours: health, and reflection for tools such as grpcurl."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.rpc import CALL_TIMEOUT_S, Rpc, assert_refused, failure_of, ring, rpc_to

STANDARD = ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, ["--memory", "16MiB"], ["--embedded", "0"]) as fleet:
        yield fleet


@pytest.fixture(params=["device", "coordinator"])
def server(request: pytest.FixtureRequest, fleet: Fleet) -> Iterator[tuple[Rpc, list[str]]]:
    """A server and the services of ours that it has."""
    if request.param == "device":
        with rpc_to(fleet.devices[0].address) as rpc:
            yield rpc, ["gpu_sim.GPUDevice"]
    else:
        with rpc_to(fleet.address) as rpc:
            yield rpc, ["gpu_sim.GPUCoordinator", "gpu_sim.GPUDevice"]


def test_every_service_is_healthy(server: tuple[Rpc, list[str]]):
    rpc, services = server
    for service in ["", *services]:
        assert rpc.is_serving(service), service


def test_the_health_of_an_unknown_service_is_not_found(server: tuple[Rpc, list[str]]):
    rpc, _ = server
    assert failure_of(lambda: rpc.is_serving("gpu_sim.Nothing")).code() is grpc.StatusCode.NOT_FOUND


def test_health_can_be_watched(server: tuple[Rpc, list[str]]):
    rpc, services = server
    watch = health_pb2_grpc.HealthStub(rpc.channel).Watch(
        health_pb2.HealthCheckRequest(service=services[0]), timeout=CALL_TIMEOUT_S
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_reflection_lists_the_services(server: tuple[Rpc, list[str]]):
    rpc, services = server
    assert sorted(ProtoReflectionDescriptorDatabase(rpc.channel).get_services()) == sorted([*services, *STANDARD])


def test_reflection_gives_the_contract(server: tuple[Rpc, list[str]]):
    """A client that has no proto file can read every message and method, and call one."""
    rpc, services = server
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(rpc.channel))
    for service in services:
        found = pool.FindServiceByName(service)
        ours = pb.DESCRIPTOR.services_by_name[found.name]
        assert [method.name for method in found.methods] == [method.name for method in ours.methods]
    message = pool.FindMessageTypeByName("gpu_sim.AllReduceRingRequest")
    assert {field.number: field.name for field in message.fields} == {
        field.number: field.name for field in pb.AllReduceRingRequest.DESCRIPTOR.fields
    }


def test_the_device_service_of_a_coordinator_without_embedded_devices_has_none(fleet: Fleet):
    with rpc_to(fleet.address) as rpc:
        assert_refused(
            lambda: rpc.device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=CALL_TIMEOUT_S),
            "INVALID_ARGUMENT",
            "INVALID_VALUE",
            ["0 devices"],
        )


def test_http_1_and_nonsense_do_not_stop_the_server(server: tuple[Rpc, list[str]]):
    rpc, _ = server
    host, _, port = rpc.address.rpartition(":")
    for words in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(range(256)) * 10, b""):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(5)
            while connection.recv(4096):
                pass
    assert rpc.is_serving()


def test_health_is_answered_during_the_first_collective_of_many_ranks():
    """The first one of a number of ranks plans its schedule; nobody must take the coordinator for dead meanwhile."""
    nranks = 64
    with (
        ServerProcess("coordinator", "--memory", "4MiB") as alone,
        rpc_to(alone.address) as rpc,
        rpc_to(alone.address) as prober,
    ):
        assert prober.is_serving()
        comm = rpc.comm_init(nranks)
        result = rpc.coordinator.AllReduceRing.future(ring(comm, 8 * nranks), timeout=60)
        answered = 0
        while not result.done():
            assert prober.is_serving(timeout_s=1.0)
            answered += 1
        assert result.result().success
        assert answered
