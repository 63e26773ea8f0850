"""The file of a rank: the safetensors library reads it, and it is read back piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load

from dsml_gpu.checkpoints.folders import folder_at
from dsml_gpu.checkpoints.manifest import PIECE_BYTES, SavedFile
from dsml_gpu.checkpoints.shards import DTYPE_NAMES, ArraySpec, check_header, checked_bytes, header_of, write_shard
from dsml_gpu.errors import InvalidValue, OperationAborted
from dsml_gpu.reduction.dtypes import DTYPES

RNG = np.random.default_rng(1)


def spec_of(name: str, dtype: str, shape: tuple[int, ...] = (3,)) -> ArraySpec:
    return ArraySpec(name, dtype, shape, 4096)


def with_bytes(spec: ArraySpec) -> tuple[ArraySpec, memoryview]:
    return spec, RNG.integers(0, 256, spec.nbytes, dtype=np.uint8).data


def test_the_library_reads_every_type(tmp_path: Path):
    specs = [spec_of(f"{name}-{len(shape)}", name, shape) for name in DTYPES for shape in ((), (3,), (2, 0), (2, 3, 5))]
    arrays = [with_bytes(spec) for spec in specs]
    write_shard(folder_at(str(tmp_path)), "a.safetensors", arrays)

    read = dict(deserialize((tmp_path / "a.safetensors").read_bytes()))
    assert read.keys() == {spec.name for spec in specs}
    for spec, data in arrays:
        found = read[spec.name]
        assert (found["dtype"], tuple(found["shape"])) == (DTYPE_NAMES[spec.dtype], spec.shape)
        assert bytes(found["data"]) == bytes(data)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "BFLOAT16"])  # which its numpy side has not
def test_the_library_makes_the_same_values_of_them(tmp_path: Path, dtype: str):
    values = np.array([0, 1, 117, 3], DTYPES[dtype])
    write_shard(folder_at(str(tmp_path)), "a.safetensors", [(spec_of("a", dtype, (4,)), values.view(np.uint8).data)])
    read = load((tmp_path / "a.safetensors").read_bytes())["a"]
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_names_of_all_types():
    assert DTYPE_NAMES.keys() == DTYPES.keys()


def test_arrays_begin_at_multiples_of_their_items(tmp_path: Path):
    arrays = [with_bytes(spec_of(name, name, (3,))) for name in DTYPES]
    file = write_shard(folder_at(str(tmp_path)), "a.safetensors", arrays)
    assert all(array.start % DTYPES[array.dtype].itemsize == 0 for array in file.arrays)


def written(folder: Path, count: int) -> tuple[SavedFile, bytes]:
    spec, data = with_bytes(spec_of("a", "UINT8", (count,)))
    file = write_shard(folder_at(str(folder)), "a.safetensors", [with_bytes(spec_of("x", "INT64")), (spec, data)])
    return SavedFile.of_json(file.to_json()), bytes(data)


@pytest.mark.parametrize("count", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 18 * PIECE_BYTES + 3])
def test_what_is_written_is_read(tmp_path: Path, count: int):
    file, data = written(tmp_path, count)
    folder = folder_at(str(tmp_path))
    check_header(folder, file)
    array = file.array("a")
    for start in {0, 1, count // 2, count - 1, PIECE_BYTES, 17 * PIECE_BYTES - 1}:
        for nbytes in {0, 1, count - start, PIECE_BYTES, 17 * PIECE_BYTES}:
            if start >= 0 and 0 <= nbytes <= count - start:
                assert b"".join(checked_bytes(folder, file, array, start, nbytes)) == data[start : start + nbytes]


@pytest.mark.parametrize(("start", "nbytes"), [(0, 4), (3, 1), (-1, 2), (4, 0)])
def test_bytes_that_the_array_has_not(tmp_path: Path, start: int, nbytes: int):
    file, _ = written(tmp_path, 3)
    with pytest.raises(InvalidValue, match="which has 3"):
        list(checked_bytes(folder_at(str(tmp_path)), file, file.array("a"), start, nbytes))


@pytest.mark.parametrize(
    ("names", "said"), [(["a", "a"], "two arrays are called 'a'"), ([""], "cannot"), (["__metadata__"], "cannot")]
)
def test_names_that_the_format_does_not_allow(names: list[str], said: str):
    with pytest.raises(InvalidValue, match=said):
        header_of([spec_of(name, "INT8") for name in names])


def test_a_file_that_was_stopped_is_not_there(tmp_path: Path):
    countdown = iter([False, False, True])
    arrays = [with_bytes(spec_of("a", "UINT8", (5 * PIECE_BYTES,)))]
    with pytest.raises(OperationAborted, match=f"after {2 * PIECE_BYTES} bytes"):
        write_shard(folder_at(str(tmp_path)), "a.safetensors", arrays, stopped=lambda: next(countdown))
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_with_all_bytes(tmp_path: Path):
    told: list[int] = []
    arrays = [with_bytes(spec_of("a", "UINT8", (130 << 20,)))]
    write_shard(folder_at(str(tmp_path)), "a.safetensors", arrays, told.append)
    assert told == [64 << 20, 128 << 20, 130 << 20]
