"""The Python client against a coordinator in this process."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import ml_dtypes
import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator, errors


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with dsml_gpu.local(devices=4, memory_bytes=256 << 20) as client:
        yield client


@pytest.fixture
def comm(client: Client) -> Iterator[Communicator]:
    with client.communicator(4) as comm:
        yield comm


class OnlyArray:
    def __array__(self, dtype=None, copy=None):
        return np.arange(4.0)


class OnlyDLPack:
    """An array of another library, in host memory."""

    def __init__(self) -> None:
        self._array = np.arange(4.0)

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnCuda:
    @property
    def __cuda_array_interface__(self):
        return {"shape": (4,), "typestr": "<f8", "data": (0, False), "version": 3}


@pytest.mark.parametrize("source", [OnlyArray(), OnlyDLPack(), [0, 1, 2, 3.0], np.arange(4.0), np.arange(8.0)[::2] / 2])
def test_everything_that_is_an_array_is_taken(comm: Communicator, source: object) -> None:
    array = comm.devices[0].array(source)
    assert array.shape == (4,)
    np.testing.assert_array_equal(array.get(), [0, 1, 2, 3])


def test_what_is_no_array_is_refused(comm: Communicator) -> None:
    for source in (object(), [[1], [1, 2]], np.array([None])):
        with pytest.raises(errors.InvalidValue, match="is not an array of numbers"):
            comm.devices[0].array(source)


def test_an_array_in_gpu_memory_needs_cupy(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(errors.InvalidValue, match="only where CuPy is installed"):
        comm.devices[0].array(OnCuda())


@pytest.mark.parametrize(
    "values",
    [
        np.float64(2.5),
        np.zeros((0, 3)),
        np.arange(6, dtype=np.int16).reshape(1, 2, 3),
        np.arange(5, dtype=ml_dtypes.bfloat16),
        np.arange(5, dtype=">f4"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(700_001, dtype=np.float64),
    ],
    ids=["0-d", "empty", "3-d", "bfloat16", "big-endian", "fortran", "streamed"],
)
def test_what_is_set_is_what_get_gives(comm: Communicator, values: np.ndarray) -> None:
    array = comm.devices[1].array(values)
    result = array.get()
    assert result.shape == values.shape == array.shape
    assert result.dtype == values.dtype.newbyteorder("<")
    np.testing.assert_array_equal(result, values)
    out = np.empty(array.shape, array.dtype)
    assert array.get(out=out) is out
    np.testing.assert_array_equal(out, values)
    np.testing.assert_array_equal(np.asarray(array), values)


def test_set_and_get_refuse_what_does_not_fit(comm: Communicator) -> None:
    array = comm.devices[0].empty((2, 3))
    with pytest.raises(errors.InvalidValue, match=r"expected an array of shape \(2, 3\), got \(3, 2\)"):
        array.set(np.zeros((3, 2)))
    with pytest.raises(errors.InvalidValue, match="out must be C-contiguous"):
        array.get(out=np.empty((2, 3), np.float32))


@pytest.mark.parametrize("algorithm", ["ring", "naive"])
def test_all_reduce(comm: Communicator, algorithm: str) -> None:
    values = [np.arange(10.0).reshape(2, 5) * rank for rank in range(4)]
    arrays = comm.array(values)
    result = comm.all_reduce(arrays, op="avg", algorithm=algorithm)
    assert result is not None
    assert (result.algorithm, result.transports) == (algorithm, ("p2p",))
    assert result.bytes_sent == 2 * 3 * 10 * 8  # 2(N-1)/N of the data from each of N ranks, or 2(N-1) times through one
    for array in arrays:
        np.testing.assert_array_equal(array.get(), np.mean(values, axis=0))


def test_transport_can_be_forced(client: Client) -> None:
    with client.communicator(4, transport="grpc") as comm:
        arrays = comm.array([np.ones(1000)] * 4)
        result = comm.all_reduce(arrays)
        assert result is not None
        assert result.transports == ("grpc",)
        assert (arrays[3].get() == 4).all()


def test_all_reduce_refuses_what_does_not_fit(comm: Communicator) -> None:
    arrays = comm.empty(4)
    with pytest.raises(errors.RankMismatch, match="4 ranks need one array each, got 3"):
        comm.all_reduce(arrays[:3])
    with pytest.raises(errors.RankMismatch, match=r"rank 0 is device \d+, but its array is on device \d+"):
        comm.all_reduce(arrays[::-1])
    with pytest.raises(errors.InvalidValue, match="rank 0 has 4 of float64, rank 3 has 5 of float64"):
        comm.all_reduce([*arrays[:3], comm.devices[3].empty(5)])
    with pytest.raises(errors.InvalidValue, match="unknown op 'xor'; known: sum, prod, min, max, avg"):
        comm.all_reduce(arrays, op="xor")
    with pytest.raises(errors.InvalidValue, match=r"unknown algorithm 'star' of all_reduce; known: ring, .*naive"):
        comm.all_reduce(arrays, algorithm="star")
    with pytest.raises(errors.InvalidValue, match="int16 has no place on the wire"):
        comm.all_reduce(comm.empty(4, np.int16))
    with pytest.raises(errors.RankMismatch, match="4 ranks need one source each, got 1"):
        comm.array([np.ones(3)])


def test_a_group_runs_at_the_end_of_its_block(comm: Communicator) -> None:
    first, second = comm.array([np.ones(5)] * 4), comm.array([np.full(5, 2.0)] * 4)
    with comm.group() as group:
        assert comm.all_reduce(first, algorithm="ring") is None
        assert comm.all_reduce(second, algorithm="naive", op="max") is None
        assert group.result is None
        np.testing.assert_array_equal(first[0].get(), np.ones(5))
    assert group.result is not None
    assert group.result.algorithm == ""
    assert (first[2].get() == 4).all()
    assert (second[2].get() == 2).all()


def test_an_exception_in_a_group_drops_it(comm: Communicator) -> None:
    arrays = comm.array([np.ones(5)] * 4)

    def fail_in_a_group() -> None:
        with comm.group():
            comm.all_reduce(arrays)
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fail_in_a_group()
    assert (arrays[0].get() == 1).all()
    with comm.group():
        comm.all_reduce(arrays)
    assert (arrays[0].get() == 4).all()


def test_groups_do_not_nest(comm: Communicator) -> None:
    with comm.group(), pytest.raises(errors.GroupMisuse, match="has an open group of 0 operations"), comm.group():
        pytest.fail("the inner group was opened")


def test_status_follows_the_last_collective(comm: Communicator) -> None:
    assert comm.status() == ("IN_PROGRESS", "")
    arrays = comm.array([np.ones(5)] * 4)
    with comm.group(blocking=False):
        comm.all_reduce(arrays)
    assert comm.finalize() == "SUCCESS"
    assert comm.status() == ("SUCCESS", "")
    with pytest.raises(errors.CommNotReady, match="was finalized"):
        comm.all_reduce(arrays)


def test_devices_are_exclusive_unless_named(client: Client, comm: Communicator) -> None:
    with pytest.raises(errors.OutOfDevices, match="1 devices were asked for; 0 of 4 are free"):
        client.communicator(1)
    names = [device.device_id for device in comm.devices]
    with client.communicator(device_ids=names[::-1]) as other:
        assert [device.device_id for device in other.devices] == names[::-1]
        arrays = other.array([np.ones(3)] * 4)
        other.all_reduce(arrays)
        assert (arrays[0].get() == 4).all()
    with pytest.raises(errors.DeviceNotFound, match="no device 99; there are 1, 2, 3, 4"):
        client.communicator(device_ids=[99])
    with pytest.raises(errors.InvalidValue, match="device ids must differ"):
        client.communicator(device_ids=[1, 1])
    with pytest.raises(errors.InvalidValue, match="at least 1 device, not 0"):
        client.communicator(0)


def test_memory_is_freed_with_the_array_its_block_and_the_communicator(client: Client) -> None:
    quarter = 60 << 20
    for _ in range(3):
        with client.communicator(1) as comm:
            device = comm.devices[0]
            for _ in range(6):
                with device.empty(quarter, np.uint8):
                    pass
            blocks = [device.empty(quarter, np.uint8) for _ in range(4)]
            with pytest.raises(errors.OutOfMemory, match=f"no gap of {quarter} bytes in device memory of {256 << 20}"):
                device.empty(quarter, np.uint8)
            blocks[0].free()
            blocks[0].free()
            again = device.empty(quarter, np.uint8)
            assert again.addr == blocks[0].addr
            with pytest.raises(errors.AllocationNotFound, match="was freed"):
                blocks[0].get()


def test_errors_carry_the_grpc_code() -> None:
    for name in ("OutOfDevices", "CommNotFound", "AddressOutOfRange", "InvalidValue", "PeerUnavailable"):
        assert getattr(errors, name).code in grpc.StatusCode.__members__


def test_nobody_there_is_an_error_after_the_timeout() -> None:
    with pytest.raises(errors.PeerUnavailable, match=r"no coordinator answers at 127.0.0.1:9 within 0.2 s"):
        dsml_gpu.connect("127.0.0.1:9", timeout_s=0.2)


def test_closing_twice_and_using_what_is_closed(client: Client) -> None:
    comm = client.communicator(2)
    arrays = comm.empty(3)
    comm.close()
    comm.close()
    with pytest.raises(errors.CommNotReady, match="closed"):
        comm.all_reduce(arrays)
    with dsml_gpu.local(devices=1) as other:
        pass
    other.close()
    assert "closed" in repr(other)
    assert "closed" in repr(comm)


def test_repr_shows_the_state(client: Client, comm: Communicator) -> None:
    array = comm.devices[0].array([1.0, 2.0])
    assert repr(array) == f"DeviceArray(shape=(2,), dtype=float64, at {array.addr:#x} on device {array.device.device_id})"
    array.free()
    assert repr(array) == "DeviceArray(shape=(2,), dtype=float64, freed)"
    assert "4 ranks" in repr(comm)
    assert client.target in repr(client)
    assert "numpy" in repr(client.devices()[0])


def test_two_local_worlds_do_not_meet() -> None:
    with (
        dsml_gpu.local(devices=2) as one,
        dsml_gpu.local(devices=2) as two,
        one.communicator(2) as left,
        two.communicator(2) as right,
    ):
        ours, theirs = left.array([[1.0], [2.0]]), right.array([[10.0], [20.0]])
        left.all_reduce(ours)
        right.all_reduce(theirs)
        assert ours[0].get()[0] == 3
        assert theirs[0].get()[0] == 30


def test_arrays_end_with_their_communicator(client: Client) -> None:
    """What another communicator has allocated at the same address since is out of their reach."""
    with client.communicator(2) as one:
        names = [device.device_id for device in one.devices]
        old = one.array([np.ones(8)] * 2)
    with client.communicator(device_ids=names) as two:
        new = two.array([np.full(8, 7.0)] * 2)
        assert new[0].addr == old[0].addr
        with pytest.raises(errors.AllocationNotFound, match="ended with its communicator"):
            old[0].get()
        with pytest.raises(errors.AllocationNotFound, match="ended with its communicator"):
            old[0].set(np.zeros(8))
        old[0].free()
        assert two.devices[0].array(np.zeros(8)).addr != new[0].addr
        assert (new[0].get() == 7).all()


def test_a_failed_array_leaves_nothing_allocated(client: Client) -> None:
    with client.communicator(2) as comm:
        with pytest.raises(errors.InvalidValue):
            comm.array([np.ones(8), object()])
        assert comm.devices[0].empty(np.int64(5)).addr == comm.devices[0].min_addr
