"""Loops that numba compiles: when, once, and what remains where it cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import numpy as np
import pytest

import dsml_gpu.reduction
from dsml_gpu.reduction import DTYPES, OPERATORS, checked_weight, host
from dsml_gpu.reduction.host import HostReducer

pytest.importorskip("numba")

from dsml_gpu.reduction import fast

SUM, PROD, MIN, MAX, AVG = OPERATORS
BFLOAT16 = DTYPES["BFLOAT16"]
HALVES = ("FLOAT16", "BFLOAT16")


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_compiled", {})


def compilations(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("compiled")]


def test_numba_is_imported_by_prepare_and_not_before() -> None:
    program = """
import sys
import numpy as np
from dsml_gpu.reduction import DTYPES, OPERATORS, checked_weight
from dsml_gpu.reduction.host import HostReducer

reducer = HostReducer()
for operator in OPERATORS:
    for dtype in DTYPES.values():
        reducer.is_ready(operator, dtype)
        a, b = np.ones((2, 64), np.uint8)
        reducer.reduce(operator, dtype, [a, b], [a])
        reducer.weigh(dtype, a, a, checked_weight(2, dtype))
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
reducer.prepare(OPERATORS[0], DTYPES["BFLOAT16"])
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=100)


def test_ready_is_what_gains_nothing() -> None:
    reducer = HostReducer()
    assert {name for name, dtype in DTYPES.items() if not reducer.is_ready(SUM, dtype)} == {"FLOAT16", "BFLOAT16"}
    assert not any(reducer.is_ready(SUM, dtype, sources=4, destinations=4) for dtype in DTYPES.values())
    assert all(HostReducer(compiles=False).is_ready(SUM, dtype, sources=4, destinations=4) for dtype in DTYPES.values())
    reducer.prepare(SUM, BFLOAT16)
    assert reducer.is_ready(SUM, BFLOAT16)
    assert reducer.is_ready(AVG, BFLOAT16), "the same loop"
    assert not reducer.is_ready(MAX, BFLOAT16)


def test_of_weights_only_the_half_types_gain() -> None:
    reducer = HostReducer()
    for name in HALVES:
        reducer.prepare(SUM, DTYPES[name])
    assert all(reducer.is_ready(SUM, dtype) for dtype in DTYPES.values())
    assert [name for name, dtype in DTYPES.items() if not reducer.is_ready(SUM, dtype, weighted=True)] == [*HALVES]
    for name in HALVES:
        reducer.prepare(SUM, DTYPES[name], weighted=True)
    assert all(reducer.is_ready(SUM, dtype, weighted=True) for dtype in DTYPES.values())
    assert not reducer.is_ready(MAX, BFLOAT16, weighted=True), "its reduction is not"
    assert HostReducer(compiles=False).is_ready(SUM, BFLOAT16, weighted=True)


@pytest.mark.usefixtures("nothing_compiled")
def test_a_loop_is_compiled_once_in_a_process_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reducers = [HostReducer() for _ in range(3)]
    threads = [threading.Thread(target=reducer.prepare, args=(MAX, BFLOAT16)) for reducer in reducers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reducers[0].prepare(MAX, BFLOAT16)
    (line,) = compilations(caplog)
    assert line.startswith("compiled the reduction maximum of bfloat16 in ")
    assert line.endswith(" s")
    assert all(reducer.is_ready(MAX, BFLOAT16) for reducer in reducers)


@pytest.mark.usefixtures("nothing_compiled")
def test_reduce_never_compiles(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reducer = HostReducer()
    operands = [np.ones(4096, BFLOAT16).view(np.uint8) for _ in range(9)]
    reducer.reduce(SUM, BFLOAT16, operands, operands)
    assert operands[0].view(BFLOAT16).astype(float).tolist() == [9.0] * 4096
    reducer.weigh(BFLOAT16, operands[0], operands[0], checked_weight(2, BFLOAT16))
    assert operands[0].view(BFLOAT16).astype(float).tolist() == [18.0] * 4096
    assert not compilations(caplog)


@pytest.mark.usefixtures("nothing_compiled")
def test_a_multiplication_is_compiled_once_in_a_process_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for operator in (SUM, AVG):
        for reducer in (HostReducer(), HostReducer()):
            reducer.prepare(operator, BFLOAT16, weighted=True)
    lines = sorted(line.rpartition(" in ")[0] for line in compilations(caplog))
    assert lines == ["compiled the multiplication by a weight of bfloat16", "compiled the reduction add of bfloat16"]


@pytest.mark.parametrize("dtype_name", HALVES)
def test_weights_give_the_same_bits_as_numpy(dtype_name: str) -> None:
    """Every half by weights of any bits, and by those that meet half way between two halves."""
    dtype = DTYPES[dtype_name]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    compiled, plain = HostReducer(), HostReducer(compiles=False)
    compiled.prepare(SUM, dtype, weighted=True)
    any_bits = np.frombuffer(np.random.default_rng(3).bytes(4 * 40), np.float32)
    for weight in [*any_bits.tolist(), 1.0, 1.5, 0.75, 3.0, 2.0**-14, 2.0**-20, 65520.0, 0.0, -0.0, np.inf, np.nan]:
        results = []
        for reducer in (compiled, plain):
            out = np.zeros_like(halves)
            reducer.weigh(dtype, halves, out, checked_weight(weight, dtype))
            results.append(out.view(dtype))
        with np.errstate(all="ignore"):
            nans = [np.isnan(result.astype(np.float32)) for result in results]
        same = (results[0].view(np.uint16) == results[1].view(np.uint16)) | (nans[0] & nans[1])
        assert same.all(), (weight, int((~same).sum()))


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_same_bits_as_numpy(dtype_name: str) -> None:
    """Over arbitrary bits, and more of them than exact arithmetic gets through."""
    dtype = DTYPES[dtype_name]
    rng = np.random.default_rng(7)
    compiled, plain = HostReducer(), HostReducer(compiles=False)
    for operator in OPERATORS:
        compiled.prepare(operator, dtype)
        for nsources in (2, 3, 5, 8, 10):
            content = [rng.bytes(30_000 * dtype.itemsize) for _ in range(nsources)]
            results = []
            for reducer in (compiled, plain):
                sources = [np.frombuffer(data, np.uint8) for data in content]
                out = np.zeros_like(sources[0])
                reducer.reduce(operator, dtype, sources, [out], nsources if operator.averages else 1)
                results.append(out.view(dtype))
            bits = [result.view(f"u{dtype.itemsize}") for result in results]
            same = bits[0] == bits[1]
            if dtype.kind not in "iu":
                with np.errstate(all="ignore"):
                    values = [result.astype(np.float64) for result in results]
                same |= np.isnan(values[0]) & np.isnan(values[1])
                if operator in (MIN, MAX):
                    same |= (values[0] == 0) & (values[1] == 0)
            assert same.all(), (operator.name, nsources, int((~same).sum()))


@pytest.mark.parametrize("dtype_name", ["FLOAT64", "FLOAT32", "BFLOAT16"])
def test_nothing_is_contracted(dtype_name: str) -> None:
    """A fused multiply-add would round once where numpy and the GPU round twice."""
    for ufunc in ("add", "multiply"):
        loop = fast.compiled_loop(ufunc, DTYPES[dtype_name])
        assert loop is not None
        assembly = loop.function._library.get_asm_str()
        assert len(assembly) > 1000
        assert "fmadd" not in assembly
        assert "fmla" not in assembly


def test_a_processor_without_half_conversion(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fast, "has_half_conversion", lambda: False)
    reducer = HostReducer()
    reducer.prepare(SUM, DTYPES["FLOAT16"])
    assert reducer.is_ready(SUM, DTYPES["FLOAT16"])
    assert "float16 reductions are left to numpy" in caplog.text
    operands = [np.full(5, 1.5, np.float16).view(np.uint8) for _ in range(2)]
    reducer.reduce(SUM, DTYPES["FLOAT16"], operands, operands)
    assert operands[1].view(np.float16).tolist() == [3.0] * 5
    reducer.prepare(SUM, DTYPES["FLOAT16"], weighted=True)
    assert reducer.is_ready(SUM, DTYPES["FLOAT16"], weighted=True)
    reducer.weigh(DTYPES["FLOAT16"], operands[1], operands[0], checked_weight(0.5, DTYPES["FLOAT16"]))
    assert operands[0].view(np.float16).tolist() == [1.5] * 5


def test_a_numba_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is the case where numpy is newer than numba knows."""
    monkeypatch.delattr(dsml_gpu.reduction, "fast")
    monkeypatch.delitem(sys.modules, "dsml_gpu.reduction.fast")
    monkeypatch.setitem(sys.modules, "numba", None)
    reducer = HostReducer()
    assert host._numba_is_installed()
    reducer.prepare(SUM, BFLOAT16, weighted=True)
    assert reducer.is_ready(SUM, BFLOAT16, weighted=True)
    assert "numba is installed but cannot be imported, so numpy reduces" in caplog.text
    operands = [np.full(5, 1.5, BFLOAT16).view(np.uint8) for _ in range(2)]
    reducer.reduce(SUM, BFLOAT16, operands, operands)
    assert operands[1].view(BFLOAT16).astype(float).tolist() == [3.0] * 5
