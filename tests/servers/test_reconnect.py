"""Clients whose coordinator is killed, stopped or cut off: they come back by themselves, and no operation happens twice."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator, DeviceArray, errors
from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.blocking_lane import BlockingLanes
from dsml_gpu.wire.lane import CANCEL, HEADER, REQUEST, can_have_lanes, request_payload
from tests.support.coordinators import Coordinators
from tests.support.processes import run_to_end, wait_until
from tests.support.rpc import MIB, assert_refused, failure_of, rpc_to

#: Of one call, however often it is tried; the starts of two servers take most of it.
LIMIT_S = 60.0
MEMORY = 16 * MIB
LARGE = 4 * MIB


@pytest.fixture(scope="module")
def devices() -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        options = ["--memory", "16MiB"]
        yield [stack.enter_context(ServerProcess("device", "--id", str(number), *options)) for number in (1, 2)]


@pytest.fixture
def coordinators(tmp_path: Path, devices: list[ServerProcess]) -> Iterator[Coordinators]:
    one_after_the_other = Coordinators(tmp_path, devices, tmp_path / "state")
    yield one_after_the_other
    one_after_the_other.stop()


@pytest.fixture
def forgetful(tmp_path: Path, devices: list[ServerProcess]) -> Iterator[Coordinators]:
    one_after_the_other = Coordinators(tmp_path, devices, None)
    yield one_after_the_other
    one_after_the_other.stop()


@contextmanager
def called(call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """A call in a thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def values_of(client: Client, arrays: list[DeviceArray]) -> list[Any]:
    return [array.get().tolist() for array in arrays]


# ---- a coordinator that is killed while a call waits --------------------------------------------------------------------


def large(client: Client) -> DeviceArray:
    return client.devices()[0].array(np.arange(LARGE // 8))


def write(nbytes: int) -> Callable[[DeviceArray], Any]:
    return lambda array: array.device._connection.write(1, array.addr, np.arange(nbytes, dtype=np.uint8))


def read(nbytes: int) -> Callable[[DeviceArray], Any]:
    def call(array: DeviceArray) -> list[int]:
        out = np.empty(nbytes, np.uint8)
        array.device._connection.read(1, array.addr, out)
        return [int(value) for value in out[:16]]

    return call


CALLS: dict[str, Callable[[Client, DeviceArray], Any]] = {
    "devices": lambda client, array: [device.device_id for device in client.devices()],
    "malloc": lambda client, array: array.device.empty(4, np.uint8).free(),
    "small write": lambda client, array: write(100)(array),
    "large write": lambda client, array: write(LARGE)(array),
    "small read": lambda client, array: read(100)(array),
    "large read": lambda client, array: read(LARGE)(array),
    "write to shared memory": lambda client, array: array.set(np.arange(LARGE // 8) + 1),
    "read of shared memory": lambda client, array: array.get().tolist(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_waits_when_the_coordinator_is_killed_ends_at_the_next_one(
    forgetful: Coordinators, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    forgetful.start()
    with dsml_gpu.connect(forgetful.address) as client, large(client) as array:
        expected = CALLS[call](client, array)
        forgetful.now.process.send_signal(signal.SIGSTOP)  # from now on no call can end
        with called(lambda: CALLS[call](client, array)) as waits:
            forgetful.kill()
            wait_until(lambda: bool(caplog.records), "the client's notice")
            forgetful.start()
            assert waits.result(LIMIT_S) == expected
        said = [record.getMessage() for record in caplog.records if record.name.startswith("dsml_gpu.client")]
        assert len(said) == 2
        assert said[0] == f"the coordinator at {forgetful.address} does not answer; trying again for 30 s"
        assert re.fullmatch(rf"the coordinator at {forgetful.address} answers again, after \d+\.\d\d s", said[1])


def test_many_threads_say_it_once(forgetful: Coordinators, caplog: pytest.LogCaptureFixture) -> None:
    forgetful.start()
    with dsml_gpu.connect(forgetful.address) as client, ThreadPoolExecutor(8) as pool:
        forgetful.now.process.send_signal(signal.SIGSTOP)
        waiting = [pool.submit(client.devices) for _ in range(8)]
        forgetful.kill()
        wait_until(lambda: bool(caplog.records), "the client's notice")
        forgetful.start()
        assert all(len(call.result(LIMIT_S)) == 2 for call in waiting)
    assert len([record for record in caplog.records if record.name.startswith("dsml_gpu.client")]) == 2


def test_a_coordinator_that_stops_in_order_is_waited_for_too(coordinators: Coordinators) -> None:
    coordinators.start()
    with dsml_gpu.connect(coordinators.address) as client:
        assert coordinators.now.ends(signal.SIGTERM) == 0
        with called(client.devices) as waits:
            coordinators.start()
            assert len(waits.result(LIMIT_S)) == 2


def test_the_lane_is_that_of_the_coordinator_that_answers(forgetful: Coordinators) -> None:
    if not can_have_lanes():
        pytest.skip("lanes need Linux's abstract sockets")
    forgetful.start()
    with dsml_gpu.connect(forgetful.address) as client:
        lanes = []
        for _ in range(2):
            comm = client.communicator(2)
            comm.barrier()
            lanes.append(client._connection._lanes)
            forgetful.kill()
            forgetful.start()
            client.devices()
            assert client._connection._lanes is None  # the communicator is not known here, so nobody could be asked
        assert None not in lanes
        assert lanes[0] is not lanes[1]


def test_the_lane_is_found_by_a_communicator_that_is_still_there(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a lane is known that has ended meanwhile."""
    with dsml_gpu.connect(fleet.address) as client, client.communicator(2) as comm:
        connection = client._connection
        connection._lane_name, right = "dsml-of-the-last-one", connection._lane_name
        connection._lanes = BlockingLanes(connection._lane_name, "GPUCoordinator")
        comm.barrier()
        assert connection._lane_name == right
        assert connection._lanes is not None


# ---- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reconnect_s", "timeout_s", "least_s", "notices"), [(0.0, 30.0, 0.0, 0), (0.6, 30.0, 0.6, 1), (60.0, 0.6, 0.6, 1)]
)
def test_a_coordinator_that_stays_away_is_given_up(
    forgetful: Coordinators,
    caplog: pytest.LogCaptureFixture,
    reconnect_s: float,
    timeout_s: float,
    least_s: float,
    notices: int,
) -> None:
    forgetful.start()
    with dsml_gpu.connect(forgetful.address, timeout_s=timeout_s, reconnect_s=reconnect_s) as client:
        forgetful.kill()
        started_s = time.monotonic()
        with pytest.raises(errors.PeerUnavailable, match=f"the coordinator at {forgetful.address} does not answer"):
            client.devices()
        assert least_s <= time.monotonic() - started_s < LIMIT_S / 2
        assert len(caplog.records) == notices


def test_a_client_that_is_closed_waits_no_longer(forgetful: Coordinators, caplog: pytest.LogCaptureFixture) -> None:
    forgetful.start()
    client = dsml_gpu.connect(forgetful.address, timeout_s=1e6, reconnect_s=1e6)
    forgetful.kill()
    with called(client.devices) as waits:
        wait_until(lambda: bool(caplog.records), "the client's notice")
        client.close()
        with pytest.raises(errors.PeerUnavailable, match="does not answer"):
            waits.result(LIMIT_S)


# ---- exactly once -----------------------------------------------------------------------------------------------------


def lost_answer(coordinators: Coordinators, method: str, call: Callable[[Client], Any]) -> Any:
    """What a call gives whose coordinator is killed before it has sent the answer, and started again."""
    coordinators.start(f"outcomes.kept:kill@method={method}")
    with dsml_gpu.connect(coordinators.address) as client, called(lambda: call(client)) as waits:
        coordinators.ends()
        assert coordinators.faults == f"outcomes.kept:kill method={method}\n"
        coordinators.start()
        result = waits.result(LIMIT_S)
        coordinators.kill()
        return result


def test_a_communicator_is_made_once(coordinators: Coordinators) -> None:
    comm: Communicator = lost_answer(coordinators, "CommInit", lambda client: client.communicator(2))
    found = coordinators.journal()
    assert [one.comm_id for one in found.communicators] == [comm.comm_id]
    (membership,) = found.memberships
    assert [(one.device_id, one.address) for one in membership.members] == [
        (device.device_id, device.address) for device in comm.devices
    ]
    assert [server.registered for server in found.servers] == [False, False]


def test_memory_is_reserved_once(coordinators: Coordinators) -> None:
    """It would not fit twice."""

    def reserve(client: Client) -> None:
        for _ in range(2):
            client.devices()[0].empty(MEMORY * 3 // 5, np.uint8).free()

    lost_answer(coordinators, "Malloc", reserve)


def test_memory_is_given_back_once(coordinators: Coordinators) -> None:
    def give_back(client: Client) -> None:
        array = client.devices()[0].empty(64)
        array.free()

    lost_answer(coordinators, "Free", give_back)


def test_a_refusal_is_the_same_the_second_time(coordinators: Coordinators) -> None:
    def ask_for_too_much(client: Client) -> str:
        with pytest.raises(errors.OutOfMemory) as refused:
            client.devices()[0].empty(2 * MEMORY, np.uint8)
        return str(refused.value)

    refusal = lost_answer(coordinators, "Malloc", ask_for_too_much)
    (outcome,) = coordinators.journal().outcomes
    assert outcome.refused is not None
    assert (outcome.method, outcome.refused.refusal, outcome.refused.message) == ("Malloc", "OUT_OF_MEMORY", refusal)
    # Another request with its key, which could be had, is refused as well: nothing is tried again.
    coordinators.start()
    request = pb.MallocRequest(deviceId=pb.DeviceId(value=1), numBytes=8, idempotencyKey=outcome.key)
    with rpc_to(coordinators.address) as rpc:
        assert_refused(lambda: rpc.coordinator.Malloc(request, timeout=LIMIT_S), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")


@pytest.mark.parametrize("grouped", [False, True], ids=["Collective", "GroupEnd"])
def test_a_collective_in_place_happens_once(coordinators: Coordinators, grouped: bool) -> None:
    def sum_up(client: Client) -> tuple[Any, list[Any]]:
        comm = client.communicator(2)
        arrays = comm.array([np.array([1.0, 10.0]), np.array([2.0, 20.0])])
        if grouped:
            with comm.group() as group:
                comm.all_reduce(arrays)
                comm.all_reduce(arrays, op="max")
            return group.result, values_of(client, arrays)
        return comm.all_reduce(arrays), values_of(client, arrays)

    result, values = lost_answer(coordinators, "GroupEnd" if grouped else "Collective", sum_up)
    assert values == [[3.0, 30.0]] * 2
    assert len(result.operations) == 1 + grouped


def test_a_communicator_that_is_forgotten_is_a_clear_error(forgetful: Coordinators) -> None:
    forgetful.start()
    with dsml_gpu.connect(forgetful.address) as client:
        comm = client.communicator(2)
        arrays = comm.array([np.ones(4)] * 2)
        forgetful.kill()
        with called(lambda: comm.all_reduce(arrays)) as waits:
            forgetful.start()
            with pytest.raises(errors.CommNotFound, match=r"no communicator \d+; .*anew without --state"):
                waits.result(LIMIT_S)
        assert values_of(client, arrays) == [[1.0] * 4] * 2


# ---- callers that are gone, at a coordinator that is there ------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, ["--memory", "16MiB"]) as fleet:
        yield fleet


class Waiting:
    """An all-reduce in place with a key, which waits for memory that somebody holds."""

    def __init__(self, client: Client, comm: Communicator, key: str) -> None:
        self.client, self.comm = client, comm
        self.arrays = comm.array([np.array([1.0]), np.array([2.0])])
        self.request = pb.CollectiveRequest(
            commId=comm.comm_id,
            kind=pb.CollectiveRequest.ALL_REDUCE,
            counts=[8],
            buffers=[pb.RankBuffers(sendAddr=array.addr, recvAddr=array.addr) for array in self.arrays],
            idempotencyKey=key,
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        request = pb.HoldMemoryRequest(
            deviceId=pb.DeviceId(value=self.comm.devices[0].device_id), memAddr=pb.MemAddr(), numBytes=8
        )
        with self.client._connection.hold(request):
            yield

    def runs(self) -> bool:
        """Whether the coordinator has begun it, and not ended."""
        request = pb.GetCommStatusRequest(commId=self.comm.comm_id)
        response = self.client._connection.call("GetCommStatus", request)
        return bool(response.status == pb.IN_PROGRESS)

    def values(self) -> list[Any]:
        return values_of(self.client, self.arrays)


@pytest.fixture
def waiting(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Waiting]:
    with dsml_gpu.connect(fleet.address) as client, client.communicator(2) as comm:
        comm.barrier()  # without which the status would be IN_PROGRESS from the start
        yield Waiting(client, comm, request.node.name)


def ask_by_lane(waiting: Waiting, *frames: bytes) -> None:
    """Asks on a lane of its own, breaks it when the operation waits, having sent more frames."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lane:
        lane.connect(f"\0{waiting.client._connection._lane_name}")
        payload = request_payload("Collective", waiting.request)
        lane.sendall(HEADER.pack(len(payload), 0, REQUEST) + payload)
        wait_until(waiting.runs, "the operation")
        lane.sendall(b"".join(frames))


@pytest.mark.parametrize("how", ["lane", "cancelled grpc"])
def test_an_operation_goes_on_without_its_caller(fleet: Fleet, waiting: Waiting, how: str) -> None:
    with rpc_to(fleet.address) as rpc:
        with waiting.held():
            if how == "lane":
                ask_by_lane(waiting)
            else:
                call = rpc.coordinator.Collective.future(waiting.request, timeout=LIMIT_S)
                wait_until(waiting.runs, "the operation")
                call.cancel()
            again = rpc.coordinator.Collective.future(waiting.request, timeout=LIMIT_S)
        assert again.result(LIMIT_S).HasField("result")
        assert rpc.coordinator.Collective(waiting.request, timeout=LIMIT_S) == again.result()
    assert waiting.values() == [[3.0]] * 2


@pytest.mark.parametrize("how", ["lane", "grpc"])
def test_an_operation_that_its_caller_gives_up_is_cancelled(fleet: Fleet, waiting: Waiting, how: str) -> None:
    with rpc_to(fleet.address) as rpc:
        with waiting.held():
            if how == "lane":
                ask_by_lane(waiting, HEADER.pack(0, 0, CANCEL))
            else:
                error = failure_of(lambda: rpc.coordinator.Collective(waiting.request, timeout=0.5))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: not waiting.runs(), "the operation's end")
        assert_refused(lambda: rpc.coordinator.Collective(waiting.request, timeout=LIMIT_S), "ABORTED", "OPERATION_ABORTED")
    assert waiting.values() == [[1.0], [2.0]]


def test_a_client_whose_deadline_passes_gives_up(waiting: Waiting) -> None:
    with waiting.held():
        with pytest.raises(errors.OperationTimeout):
            waiting.comm.all_reduce(waiting.arrays, timeout_s=0.2)
        wait_until(lambda: not waiting.runs(), "the operation's end")
    assert waiting.values() == [[1.0], [2.0]]


# ---- the file of a coordinator ----------------------------------------------------------------------------------------


def test_a_second_coordinator_with_the_file_does_not_start(coordinators: Coordinators) -> None:
    coordinators.start()
    second = run_to_end("coordinator", "--port", "0", "--state", str(coordinators.state))
    assert second.returncode == 1
    pid = coordinators.now.process.pid
    assert second.stderr == f"dsml-gpu: the journal {coordinators.state} is in use by another coordinator, process {pid}\n"


def test_a_damaged_file_keeps_a_coordinator_from_starting(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text("not a journal\n" * 100)
    ended = run_to_end("coordinator", "--port", "0", "--state", str(state))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"dsml-gpu: the journal {state} is damaged or cannot be opened: ")
    assert state.read_text() == "not a journal\n" * 100
