"""The choice between numpy and CuPy, on machines that lack one thing or another."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from dsml_gpu.memory.backend import NUMPY, BackendUnavailable, select_backends


def cupy_with(device_count: object) -> SimpleNamespace:
    """A CuPy that imports, as the real one does without a driver, and then answers or raises."""

    def get_device_count() -> object:
        if isinstance(device_count, Exception):
            raise device_count
        return device_count

    def get_device_properties(gpu: int) -> dict[str, bytes]:
        return {"name": b"Old GPU" if gpu else b"New GPU"}

    runtime = SimpleNamespace(getDeviceCount=get_device_count, getDeviceProperties=get_device_properties)
    return SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime))


NO_DRIVER = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
WITHOUT_GPU = pytest.mark.parametrize(
    ("cupy", "reason"),
    [
        (None, "CuPy is not installed"),
        (cupy_with(NO_DRIVER), r"CuPy 14.2.0 finds no usable CUDA driver \(cudaErrorInsufficientDriver"),
        (cupy_with(0), "CuPy 14.2.0 finds no GPU"),
    ],
)


@WITHOUT_GPU
def test_auto_falls_back_and_cupy_refuses_with_the_same_reason(
    monkeypatch: pytest.MonkeyPatch, cupy: object, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    backends, why = select_backends("auto")
    assert backends == (NUMPY,)
    assert why.startswith("numpy, because ")
    with pytest.raises(BackendUnavailable, match=reason) as refused:
        select_backends("cupy")
    assert str(refused.value) in why
    assert "\n" not in why


@WITHOUT_GPU
def test_a_gpu_that_is_named_is_no_wish(monkeypatch: pytest.MonkeyPatch, cupy: object, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(BackendUnavailable, match=reason):
        select_backends("auto", [0])


@pytest.mark.parametrize(
    ("asked", "expected"), [((), [0, 1, 2]), ((1,), [1]), ((0, 0), [0, 0]), ((2, 0, 2), [2, 0, 2])], ids=str
)
def test_one_backend_for_each_gpu_unless_they_are_named(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[int, ...], expected: list[int]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(3))
    # What it opens is not asked for here.
    monkeypatch.setitem(sys.modules, "dsml_gpu.memory.cuda", SimpleNamespace(CudaMemory=object))
    backends, why = select_backends("cupy", asked)
    assert [backend.gpu for backend in backends] == expected
    assert [backend.device_name for backend in backends] == ["Old GPU" if gpu else "New GPU" for gpu in expected]
    assert {backend.name for backend in backends} == {"cupy"}
    assert why.startswith("CuPy on ")


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(2))
    for name in ("auto", "cupy"):
        for gpu in (2, -1):
            with pytest.raises(ValueError, match=f"there is no GPU {gpu}; this machine has 2, numbered from 0"):
                select_backends(name, [0, gpu])
    with pytest.raises(ValueError, match="the numpy backend uses no GPU, but GPU 1 is asked for"):
        select_backends("numpy", [1])


def test_numpy_does_not_ask_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(NO_DRIVER))
    assert select_backends("numpy") == ((NUMPY,), "numpy, as asked")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, numpy or cupy, not 'torch'"):
        select_backends("torch")
