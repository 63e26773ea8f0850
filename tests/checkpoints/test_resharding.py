"""What goes where on another number of ranks, beside what numpy does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.checkpoints.manifest import Manifest, SavedArray, SavedFile, digests
from dsml_gpu.checkpoints.resharding import shapes_on, sources_of
from dsml_gpu.errors import InvalidValue


def manifest_of(parts: Sequence[np.ndarray]) -> Manifest:
    files = []
    for rank, part in enumerate(parts):
        saved = SavedArray(
            "a", "INT32", part.shape, 0, 0, digests(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        )
        files.append(SavedFile(f"{rank}", part.nbytes, 0, "", (saved,)))
    return Manifest("0", tuple(files))


def restored(parts: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    out = []
    for shape, sources in zip(shapes, sources_of(manifest_of(parts), "a", "INT32", shapes), strict=True):
        data = b"".join(parts[one.rank].tobytes()[one.start : one.start + one.nbytes] for one in sources)
        assert all(one.nbytes > 0 for one in sources) or len(sources) == 1
        out.append(np.frombuffer(data, "<i4").reshape(shape))
    return out


@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    rest=st.lists(st.integers(1, 3), max_size=2),
    nranks=st.integers(1, 9),
)
def test_parts_are_put_together_and_cut_as_numpy_does(rows: list[int], rest: list[int], nranks: int):
    whole = np.arange(1, sum(rows) * int(np.prod(rest)) + 1, dtype="<i4").reshape(-1, *rest)
    parts = np.split(whole, np.cumsum(rows)[:-1])
    manifest = manifest_of(parts)
    same = all(np.array_equal(part, parts[0]) for part in parts)
    if nranks == len(rows):
        expected = parts
    elif same:
        expected = [parts[0]] * nranks
    else:
        expected = np.array_split(whole, nranks)
    shapes = shapes_on(manifest, "a", nranks)
    assert shapes == [part.shape for part in expected]
    for actual, part in zip(restored(parts, shapes), expected, strict=True):
        np.testing.assert_array_equal(actual, part)


def test_parts_that_are_the_same_go_to_each_rank_and_are_read_from_all_files():
    part = np.arange(6, dtype="<i4").reshape(2, 3)
    manifest = manifest_of([part, part])
    assert shapes_on(manifest, "a", 5) == [(2, 3)] * 5
    assert [one.rank for (one,) in sources_of(manifest, "a", "INT32", [(2, 3)] * 5)] == [0, 1, 0, 1, 0]


def test_the_same_parts_are_cut_where_they_go_to_smaller_ones():
    """Arrays of zeros look as if they were the same on all ranks; who has made them knows better."""
    for actual in restored([np.zeros((2, 3), "<i4")] * 2, [(1, 3)] * 4):
        assert actual.shape == (1, 3)


def test_as_many_ranks_with_other_cuts():
    whole = np.arange(7, dtype="<i4")
    for actual, part in zip(restored([whole[:1], whole[1:]], [(4,), (3,)]), np.array_split(whole, 2), strict=True):
        np.testing.assert_array_equal(actual, part)


@pytest.mark.parametrize(
    ("parts", "shapes", "said"),
    [
        ([(3,), (4,)], [(2,), (3,), (3,)], r"has shape \(3,\) on rank 0 of 3, but goes to one of shape \(2,\)"),
        ([(2, 3), (2, 4)], [(2, 3)], r"cannot be put together for 1 along its first axis: shapes \(2, 3\), \(2, 4\)"),
        ([(), ()], [()], r"cannot be put together for 1"),
    ],
)
def test_shapes_that_do_not_fit(parts: list[tuple[int, ...]], shapes: list[tuple[int, ...]], said: str):
    made = [np.full(shape, rank, "<i4") for rank, shape in enumerate(parts)]
    with pytest.raises(InvalidValue, match=said):
        sources_of(manifest_of(made), "a", "INT32", shapes)


def test_another_type_or_name():
    manifest = manifest_of([np.arange(3, dtype="<i4")])
    with pytest.raises(InvalidValue, match="a has type INT32 in the checkpoint, and FLOAT32 where"):
        sources_of(manifest, "a", "FLOAT32", [(3,)])
    with pytest.raises(InvalidValue, match="has no array 'b'; it has a"):
        sources_of(manifest, "b", "INT32", [(3,)])
