"""The choice between numpy and CuPy, on machines that lack one thing or another."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from dsml_gpu.memory.backend import NUMPY, BackendUnavailable, select_backend


def cupy_with(device_count: object) -> SimpleNamespace:
    """A CuPy that imports, as the real one does without a driver, and then answers or raises."""

    def get_device_count() -> object:
        if isinstance(device_count, Exception):
            raise device_count
        return device_count

    return SimpleNamespace(
        __version__="14.2.0", cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=get_device_count))
    )


NO_DRIVER = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")


@pytest.mark.parametrize(
    ("cupy", "reason"),
    [
        (None, "CuPy is not installed"),
        (cupy_with(NO_DRIVER), r"CuPy 14.2.0 finds no usable CUDA driver \(cudaErrorInsufficientDriver"),
        (cupy_with(0), "CuPy 14.2.0 finds no GPU"),
    ],
)
def test_auto_falls_back_and_cupy_refuses_with_the_same_reason(
    monkeypatch: pytest.MonkeyPatch, cupy: object, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend, why = select_backend("auto")
    assert backend is NUMPY
    assert why.startswith("numpy, because ")
    with pytest.raises(BackendUnavailable, match=reason) as refused:
        select_backend("cupy")
    assert str(refused.value) in why
    assert "\n" not in why


def test_numpy_does_not_ask_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(NO_DRIVER))
    assert select_backend("numpy") == (NUMPY, "numpy, as asked")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be auto, numpy or cupy, not 'torch'"):
        select_backend("torch")
