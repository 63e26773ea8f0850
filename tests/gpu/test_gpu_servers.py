"""Server processes whose devices are on a GPU, from the command line to a client's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.errors import OutOfMemory
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.stubs import device_stub
from tests.support.processes import Running, running

TWO_ON_ONE_GPU = ("device", "--backend", "cupy", "--gpu", "0", "--gpu", "0", "--memory", "16MiB")
#: More than any GPU has.
TOO_MUCH = "64TiB"


@contextmanager
def coordinator_over(
    command: Sequence[str], folder: Path, *servers: Sequence[str], options: Sequence[str] = ()
) -> Iterator[tuple[Running, list[Running]]]:
    with ExitStack() as stack:
        devices = [stack.enter_context(running(folder, *arguments, command=command)) for arguments in servers]
        addresses = [option for device in devices for option in ("--device", device.address)]
        yield stack.enter_context(running(folder, "coordinator", *addresses, *options)), devices


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_collectives_and_copies_between_four_devices_on_one_gpu(
    command: Sequence[str], tmp_path: Path, transport: str
) -> None:
    generator = np.random.default_rng(5)
    with coordinator_over(command, tmp_path, TWO_ON_ONE_GPU, TWO_ON_ONE_GPU) as (coordinator, devices):
        assert "CuPy on " in devices[0].ready_line
        with dsml_gpu.connect(coordinator.address) as client, client.communicator(4, transport=transport) as comm:
            assert {device.backend for device in comm.devices} == {"cupy"}
            for algorithm in ("ring", "naive"):
                for dtype in (np.float64, np.float32, np.float16, np.int32):
                    inputs = [generator.integers(-50, 50, 100_003).astype(dtype) for _ in range(4)]
                    arrays = comm.array(inputs)
                    result = comm.all_reduce(arrays, algorithm=algorithm)
                    assert "grpc" in result.transports
                    for array in arrays:
                        np.testing.assert_array_equal(array.get(), np.sum(inputs, axis=0, dtype=dtype))
                        array.free()


def test_processes_open_each_others_memory_of_a_gpu(command: Sequence[str], tmp_path: Path) -> None:
    """By CUDA IPC: one kernel reads and writes the memory of all."""
    generator = np.random.default_rng(6)
    with (
        coordinator_over(command, tmp_path, TWO_ON_ONE_GPU, TWO_ON_ONE_GPU) as (coordinator, _),
        dsml_gpu.connect(coordinator.address) as client,
        client.communicator(4) as comm,
    ):
        for dtype, size in ((np.float64, 1), (np.float32, 100_003), (np.float16, 500_000), (np.int8, 7)):
            inputs = [generator.integers(-20, 20, size).astype(dtype) for _ in range(4)]
            arrays, out = comm.array(inputs), comm.empty(size, dtype)
            for target in (out, None):
                result = comm.all_reduce(arrays, target)
                assert (result.algorithm, result.transports) == ("direct", ("p2p",))
                for array, before in zip(arrays, inputs, strict=True):
                    if target is not None:
                        np.testing.assert_array_equal(array.get(), before)
                for array in target or arrays:
                    np.testing.assert_array_equal(array.get(), np.sum(inputs, axis=0, dtype=dtype))
        arrays = comm.array([np.arange(8.0) + rank for rank in range(4)])
        gathered, mine = comm.empty(8), comm.empty(2)
        comm.reduce_scatter(arrays, mine, op="max")
        comm.all_gather(mine, gathered)
        for array in gathered:
            np.testing.assert_array_equal(array.get(), np.arange(8.0) + 3)


def test_two_devices_with_and_two_without_a_gpu(command: Sequence[str], tmp_path: Path) -> None:
    on_host = ("device", "--backend", "numpy", "--memory", "16MiB")
    with (
        coordinator_over(command, tmp_path, TWO_ON_ONE_GPU, on_host, on_host) as (coordinator, _),
        dsml_gpu.connect(coordinator.address) as client,
        client.communicator(4) as comm,
    ):
        assert [device.backend for device in comm.devices] == ["cupy", "cupy", "numpy", "numpy"]
        inputs = [np.random.default_rng(rank).standard_normal(50_000).astype(np.float32) for rank in range(4)]
        arrays = comm.array(inputs)
        comm.all_reduce(arrays)
        results = {array.get().tobytes() for array in arrays}
        assert len(results) == 1
        np.testing.assert_allclose(arrays[0].get(), np.sum(inputs, axis=0), rtol=1e-4, atol=1e-5)


def test_embedded_devices(command: Sequence[str], tmp_path: Path) -> None:
    options = ("coordinator", "--backend", "cupy", "--gpu", "0", "--memory", "16MiB")
    with (
        running(tmp_path, *options, command=command) as coordinator,
        dsml_gpu.connect(coordinator.address) as client,
        client.communicator(3) as comm,
    ):
        arrays = comm.array([np.full(1000, rank + 1.0) for rank in range(3)])
        result = comm.all_reduce(arrays)
        assert result.transports == ("p2p",)
        assert all((array.get() == 6).all() for array in arrays)


def test_a_device_that_the_gpu_has_no_memory_for_refuses_and_its_server_goes_on(
    command: Sequence[str], tmp_path: Path
) -> None:
    too_large = ("device", "--backend", "cupy", "--gpu", "0", "--memory", TOO_MUCH)
    with coordinator_over(command, tmp_path, too_large, TWO_ON_ONE_GPU) as (coordinator, devices):
        with dsml_gpu.connect(coordinator.address) as client, client.communicator(3) as comm:
            for _ in range(2):
                with pytest.raises(OutOfMemory, match="cannot be had"):
                    comm.devices[0].array(np.ones(10))
            assert (comm.devices[1].array(np.ones(10)).get() == 1).all()
        with grpc.insecure_channel(devices[0].address) as channel:
            answer = device_stub(channel).GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=10)
            assert answer.metadata.backend == "cupy"
        with dsml_gpu.connect(coordinator.address) as client, client.communicator(3) as comm:
            arrays = comm.devices[1].array(np.ones(10)), comm.devices[2].array(np.ones(10))
            assert all((array.get() == 1).all() for array in arrays)


def test_the_kernels_are_built_ahead_of_their_use(command: Sequence[str]) -> None:
    from dsml_gpu.reduction.kernels import instantiations
    from tests.support.processes import run_to_end

    built = run_to_end("kernels", "build", "--gpu", "0", command=command, timeout_s=300)
    count = sum(len(family) for family in instantiations().values())
    assert built.returncode == 0, built.stderr
    assert f"{count} kernels for GPU 0 are ready" in built.stdout
