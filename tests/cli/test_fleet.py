"""Which GPU each server of a fleet is told to use. That fleets work is tested wherever one is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from dsml_gpu.cli import fleet
from dsml_gpu.memory.backend import NUMPY, Backend, BackendUnavailable

CUPY = replace(NUMPY, name="cupy")


@pytest.mark.parametrize(
    ("backends", "options", "expected"),
    [
        ((CUPY, CUPY), [], [["--gpu", "0"], ["--gpu", "1"], ["--gpu", "0"]]),
        ((CUPY,), ["--memory", "8MiB"], [["--gpu", "0"]] * 3),
        ((NUMPY,), [], [[]] * 3),
        ((CUPY, CUPY), ["--gpu", "1"], [[]] * 3),
        ((CUPY, CUPY), ["--gpu=1"], [[]] * 3),
        ((CUPY, CUPY), ["--backend", "numpy"], [[]] * 3),
        ((CUPY, CUPY), ["--backend=numpy"], [[]] * 3),
        ((CUPY, CUPY), ["--backend", "cupy"], [["--gpu", "0"], ["--gpu", "1"], ["--gpu", "0"]]),
        ((), [], [[]] * 3),
    ],
)
def test_servers_take_the_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, backends: tuple[Backend, ...], options: list[str], expected: list[list[str]]
) -> None:
    def select_backends(name: str, gpus: Sequence[int] = ()) -> tuple[tuple[Backend, ...], str]:
        assert not gpus
        if not backends:
            raise BackendUnavailable("no CuPy")
        return ((NUMPY,) if name == "numpy" else backends), ""

    monkeypatch.setattr(fleet, "select_backends", select_backends)
    found = fleet._gpus_for(options)
    assert [fleet._gpu_option(found, index) for index in range(3)] == expected
