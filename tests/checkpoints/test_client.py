"""Checkpoints as a user takes them: a client, and a coordinator in this process."""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator, DeviceArray
from dsml_gpu.checkpoints.folders import LocalFolder
from dsml_gpu.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    GroupMisuse,
    InvalidValue,
    OperationAborted,
    OperationTimeout,
    RankMismatch,
    StorageUnavailable,
)
from dsml_gpu.reduction import DTYPES

NRANKS = 4
WAIT_S = 60.0
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with dsml_gpu.local(devices=6, memory_bytes=64 << 20) as client:
        yield client


@pytest.fixture
def comm(client: Client) -> Iterator[Communicator]:
    with client.communicator(NRANKS) as comm:
        yield comm


@pytest.fixture(params=["path", "file://", "memory://"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory://":
        return f"memory://client-{next(_NUMBERS)}"
    return f"{tmp_path}/checkpoint" if request.param == "path" else f"file://{tmp_path}/checkpoint"


def parts(first: int, rows: list[int], dtype: str = "FLOAT32") -> list[np.ndarray]:
    """One array of each rank, of so many rows of 3, no two of which are the same."""
    whole = np.arange(first, first + 3 * sum(rows)).astype(DTYPES[dtype]).reshape(-1, 3)
    return np.split(whole, np.cumsum(rows)[:-1])


def assert_are(arrays: list[DeviceArray], expected: list[np.ndarray]) -> None:
    for array, right in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array.get(), right)


class Hold:
    """Keeps the files of checkpoints from being written while the block runs."""

    def __init__(self) -> None:
        self._goes_on = threading.Event()
        real = LocalFolder.create

        def create(folder, name):
            assert self._goes_on.wait(WAIT_S)
            return real(folder, name)

        self._patch = mock.patch.object(LocalFolder, "create", create)

    def release(self) -> None:
        self._goes_on.set()

    def __enter__(self) -> Hold:
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
        self._patch.stop()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back(comm: Communicator, dtype: str, tmp_path: Path):
    values = parts(-5 if dtype[0] in "FBI" else 5, [2, 0, 3, 1], dtype)
    comm.checkpoint(tmp_path, {"a": comm.array(values)}).wait(WAIT_S)
    (restored,) = comm.restore(tmp_path).values()
    assert [array.dtype for array in restored] == [DTYPES[dtype]] * NRANKS
    assert_are(restored, values)


def test_a_checkpoint_has_what_was_there_when_it_was_taken(comm: Communicator, url: str):
    values = parts(0, [2, 3, 4, 5])
    arrays = comm.array(values)
    job = comm.checkpoint(url, {"a": arrays})
    for array in arrays:
        array.set(np.full(array.shape, -1))
    job.wait(WAIT_S)
    assert job.done
    assert job.progress == (3 * 14 * 4, 3 * 14 * 4)
    assert_are(comm.restore(url)["a"], values)
    assert_are(arrays, [np.full_like(one, -1) for one in values])


def test_collectives_run_while_files_are_written(comm: Communicator, tmp_path: Path):
    arrays = comm.array(parts(0, [2] * NRANKS))
    with Hold() as hold:
        job = comm.checkpoint(tmp_path, {"a": arrays})
        comm.all_reduce(arrays)
        assert not job.done
        with pytest.raises(OperationTimeout, match=r"has 0 of 96 bytes after 0\.01 s"):
            job.wait(0.01)
        with pytest.raises(CheckpointNotFound, match="no complete checkpoint"):
            comm.restore(tmp_path)
        hold.release()
        job.wait(WAIT_S)
    assert_are(comm.restore(tmp_path)["a"], parts(0, [2] * NRANKS))


def test_a_checkpoint_comes_after_what_was_issued_before(comm: Communicator, tmp_path: Path):
    arrays = comm.array([np.full(5 << 18, rank + 1.0) for rank in range(NRANKS)])
    with comm.group(blocking=False):
        for _ in range(10):
            comm.all_reduce(arrays, op="avg")
    comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)
    assert_are(comm.restore(tmp_path)["a"], [np.full(5 << 18, 2.5)] * NRANKS)


def test_the_next_one_replaces_it(comm: Communicator, tmp_path: Path):
    arrays = comm.array(parts(0, [1] * NRANKS))
    for first in (0, 100, 200):
        for array, values in zip(arrays, parts(first, [1] * NRANKS), strict=True):
            array.set(values)
        comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)
        assert_are(comm.restore(tmp_path)["a"], parts(first, [1] * NRANKS))
        assert len(list(tmp_path.iterdir())) == NRANKS + 1, "what it replaces is still there"


def test_the_last_one_issued_is_the_last_one_complete(comm: Communicator, tmp_path: Path):
    arrays = comm.array(parts(0, [1] * NRANKS))
    with Hold() as hold:
        jobs = []
        for first in range(5):
            for array, values in zip(arrays, parts(first, [1] * NRANKS), strict=True):
                array.set(values)
            jobs.append(comm.checkpoint(tmp_path, {"a": arrays}))
        jobs[3].cancel()
        hold.release()
        for number, job in enumerate(jobs):
            if number != 3:
                job.wait(WAIT_S)
    assert_are(comm.restore(tmp_path)["a"], parts(4, [1] * NRANKS))
    assert len(list(tmp_path.iterdir())) == NRANKS + 1


def test_one_that_was_cancelled_leaves_the_one_before(comm: Communicator, tmp_path: Path, caplog):
    arrays = comm.array(parts(0, [1] * NRANKS))
    comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)
    with Hold():
        job = comm.checkpoint(tmp_path, {"a": comm.array(parts(50, [1] * NRANKS))})
        job.cancel()
        with pytest.raises(OperationAborted, match="cancelled by the caller"):
            job.wait(WAIT_S)
    assert "failed: cancelled by the caller" in caplog.text
    assert_are(comm.restore(tmp_path)["a"], parts(0, [1] * NRANKS))


def test_a_file_that_cannot_be_written(comm: Communicator, tmp_path: Path):
    arrays = comm.array(parts(0, [1] * NRANKS))
    comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(os, "fsync", full), pytest.raises(StorageUnavailable, match="No space left on device"):
        comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)
    assert len(list(tmp_path.iterdir())) <= 2 * NRANKS + 1
    assert_are(comm.restore(tmp_path)["a"], parts(0, [1] * NRANKS))
    (tmp_path / "file").touch()
    with pytest.raises(StorageUnavailable, match="File exists"):
        comm.checkpoint(tmp_path / "file" / "folder", {"a": arrays}).wait(WAIT_S)


def test_all_live_arrays_by_default(comm: Communicator, tmp_path: Path):
    first = comm.array(parts(0, [1] * NRANKS))
    forgotten = comm.empty(3)
    freed = comm.array(parts(10, [1] * NRANKS))
    last = comm.empty((2, 2), np.uint8)
    del forgotten
    gc.collect()
    freed[2].free()
    comm.checkpoint(tmp_path).wait(WAIT_S)
    restored = comm.restore(tmp_path)
    assert sorted(restored) == ["array0", "array3"]
    assert_are(restored["array0"], [array.get() for array in first])
    assert_are(restored["array3"], [array.get() for array in last])


def test_restored_arrays_keep_their_names(client: Client, tmp_path: Path):
    with client.communicator(2) as comm:
        comm.checkpoint(tmp_path, {"w": comm.array(parts(0, [2, 2])), "array0": comm.array(parts(9, [1, 1]))}).wait(WAIT_S)
    with client.communicator(2) as comm:
        kept = comm.restore(tmp_path)
        more = comm.empty(1)
        comm.checkpoint(tmp_path).wait(WAIT_S)
        assert sorted(comm.restore(tmp_path)) == ["array0", "array1", "w"]
        assert_are(kept["w"], parts(0, [2, 2]))
        assert len(more) == 2


@pytest.mark.parametrize("nranks", [1, 2, 3, 5, 6])
def test_on_another_number_of_ranks(client: Client, url: str, nranks: int):
    rows = [2, 3, 0, 2]
    same = np.arange(6, dtype=np.int64).reshape(2, 3)
    with client.communicator(NRANKS) as comm:
        arrays = {"sharded": comm.array(parts(0, rows)), "same": comm.array([same] * NRANKS)}
        comm.checkpoint(url, arrays).wait(WAIT_S)
    with client.communicator(nranks) as other:
        restored = other.restore(url)
        assert_are(restored["sharded"], np.array_split(np.concatenate(parts(0, rows)), nranks))
        assert_are(restored["same"], [same] * nranks)


def test_into_arrays_that_are_there(comm: Communicator, tmp_path: Path):
    values = parts(0, [2, 3, 4, 5])
    comm.checkpoint(tmp_path, {"a": comm.array(values), "b": comm.array(parts(99, [1] * NRANKS))}).wait(WAIT_S)
    into = comm.array([np.zeros_like(one) for one in values])
    assert comm.restore(tmp_path, {"a": into}) == {"a": into}
    assert_are(into, values)


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "said"),
    [
        ((2, 3), np.float64, "a", "a has type FLOAT32 in the checkpoint, and FLOAT64 where it shall go"),
        ((5,), np.float32, "a", r"goes to one of shape \(5,\)"),
        ((2, 3), np.float32, "nothing", "has no array 'nothing'"),
    ],
)
def test_into_arrays_that_do_not_fit(comm: Communicator, tmp_path: Path, shape, dtype, name: str, said: str):
    comm.checkpoint(tmp_path, {"a": comm.array(parts(0, [2] * NRANKS))}).wait(WAIT_S)
    into = comm.array([np.full(shape, 7, dtype)] * NRANKS)
    with pytest.raises(InvalidValue, match=said):
        comm.restore(tmp_path, {name: into})
    assert_are(into, [np.full(shape, 7, dtype)] * NRANKS)


def test_damage_is_refused_before_any_array_changes(comm: Communicator, tmp_path: Path):
    comm.checkpoint(tmp_path, {"a": comm.array(parts(0, [1] * NRANKS))}).wait(WAIT_S)
    last = sorted(tmp_path.glob("shard-*-00003-*"))[0]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    into = comm.array(parts(100, [1] * NRANKS))
    with pytest.raises(
        CheckpointDamaged, match=rf"{last.name}: bytes {len(data) - 12}\.\.{len(data)} are not what was written"
    ):
        comm.restore(tmp_path, {"a": into})
    assert_are(into, parts(100, [1] * NRANKS))


@pytest.mark.parametrize("how", ["longer", "shorter", "missing"])
def test_files_of_another_length(comm: Communicator, tmp_path: Path, how: str):
    comm.checkpoint(tmp_path, {"a": comm.array(parts(0, [1] * NRANKS))}).wait(WAIT_S)
    file = sorted(tmp_path.glob("shard-*"))[1]
    size = file.stat().st_size
    if how == "missing":
        file.unlink()
        said = "does not exist"
    elif how == "longer":
        file.write_bytes(file.read_bytes() + b"x")
        said = rf"bytes {size}\.\.{size + 1} are more than was written"
    else:
        file.write_bytes(file.read_bytes()[:-5])
        said = rf"bytes {size - 5}\.\.{size} are missing"
    with pytest.raises(CheckpointDamaged, match=rf"{file.name}.* {said}"):
        comm.restore(tmp_path)


def test_memory_of_a_restore_that_was_refused_is_free_again(comm: Communicator, tmp_path: Path):
    arrays = comm.array([np.zeros(40 << 20, np.uint8)] * NRANKS)
    comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)
    for array in arrays:
        array.free()
    manifest = tmp_path / "manifest.json"
    (tmp_path / json.loads(manifest.read_text())[1][1]["name"]).unlink()
    for _ in range(3):
        with pytest.raises(CheckpointDamaged):
            comm.restore(tmp_path)
    comm.empty(40 << 20, np.uint8)


def test_what_cannot_be_checkpointed(client: Client, comm: Communicator, tmp_path: Path):
    arrays = comm.array(parts(0, [1] * NRANKS))
    with pytest.raises(RankMismatch, match="4 ranks need one array 'a' each, got 3"):
        comm.checkpoint(tmp_path, {"a": arrays[:3]})
    with pytest.raises(RankMismatch, match="rank 0 is device"):
        comm.checkpoint(tmp_path, {"a": arrays[::-1]})
    with pytest.raises(InvalidValue, match="arrays is empty"):
        comm.checkpoint(tmp_path, {})
    with pytest.raises(InvalidValue, match="cannot be called ''"):
        comm.checkpoint(tmp_path, {"": arrays})
    with pytest.raises(InvalidValue, match="has types float32, float64 on different ranks"):
        comm.checkpoint(tmp_path, {"a": comm.array([np.zeros(1), np.zeros(1, "f4"), np.zeros(1), np.zeros(1)])})
    with pytest.raises(InvalidValue, match="complex128 has no place on the wire"):
        comm.checkpoint(tmp_path, {"a": comm.array([np.zeros(1, complex)] * NRANKS)})
    with comm.group(), pytest.raises(GroupMisuse):
        comm.checkpoint(tmp_path, {"a": arrays})
    with comm.group(), pytest.raises(GroupMisuse):
        comm.restore(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_closing_waits_for_checkpoints(client: Client, tmp_path: Path):
    with client.communicator(2) as comm, Hold() as hold:
        arrays = comm.array(parts(0, [1, 1]))
        job = comm.checkpoint(tmp_path, {"a": arrays})
        timer = threading.Timer(0.1, hold.release)
        timer.start()
        comm.close()
        timer.join()
        assert job.done
        job.wait()


def test_a_job_tells_how_it_stands(comm: Communicator, tmp_path: Path):
    arrays = comm.array(parts(0, [1] * NRANKS))
    with Hold() as hold:
        job = comm.checkpoint(tmp_path, {"a": arrays})
        assert repr(job) == f"CheckpointJob({str(tmp_path)!r}, 0 of 48 bytes)"
        hold.release()
        job.wait(WAIT_S)
    assert repr(job) == f"CheckpointJob({str(tmp_path)!r}, complete)"
