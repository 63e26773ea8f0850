"""Bugs planted in the kernels' source are found by the checks that the source itself passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dsml_gpu.reduction import OPERATORS, kernels
from tests.kernels import cases
from tests.kernels.cases import Case, check
from tests.kernels.on_cpu import SANITIZE, Crashed, Program, build, sanitizes

BY_NAME = {operator.name: operator for operator in OPERATORS}


@dataclass(frozen=True)
class Bug:
    """A change of one place.

    Attributes:
        file: in kernels/.
        right, wrong: what is there once, and what takes its place.
        cases: those of one of the other tests.
        found: a part of the message that tells what was found.
    """

    file: str
    right: str
    wrong: str
    cases: Callable[[], Iterable[Case]]
    found: str


def breadth(operator: str, dtype_name: str) -> Callable[[], Iterable[Case]]:
    return lambda: cases.breadth(BY_NAME[operator], dtype_name)


BUGS = {
    "the tail ends one too early": Bug(
        "reduce.cu",
        "i < count - packed; i += threads",
        "i < count - packed - 1; i += threads",
        lambda: cases.boundaries("FLOAT32"),
        "1 of 1 elements differ",
    ),
    "bfloat16 is cut off, not rounded": Bug(
        "element.cuh",
        "all | 0x400000u : all + 0x7fffu + ((all >> 16) & 1u);",
        "all | 0x400000u : all;",
        breadth("SUM", "BFLOAT16"),
        "elements differ",
    ),
    "the least of a number and NaN is the number": Bug(
        "operators.cuh",
        "return a < b || a != a ? a : b;",
        "return a < b ? a : b;",
        breadth("MIN", "FLOAT32"),
        "expected nan",
    ),
    "half types are rounded after every source": Bug(
        "reduce.cu",
        "value = Op::combine(value, Element<T>::widened(sources[k]));",
        "value = Element<T>::widened(Element<T>::narrowed(Op::combine(value, Element<T>::widened(sources[k]))));",
        breadth("SUM", "FLOAT16"),
        "elements differ",
    ),
    "the weight of a float is taken for a number": Bug(
        "operators.cuh",
        "return bit_cast<float>(static_cast<unsigned int>(scaling.weight));",
        "return static_cast<float>(scaling.weight);",
        lambda: cases.weighings("FLOAT32"),
        "elements differ",
    ),
    "a weight is rounded to the half type": Bug(
        "operators.cuh",
        "return Element<T>::narrowed(product(value, weight_of<typename Element<T>::Accumulator>(scaling)));",
        "return Element<T>::narrowed(product(value, Element<T>::widened(Element<T>::narrowed("
        "weight_of<typename Element<T>::Accumulator>(scaling)))));",
        lambda: cases.weighings("BFLOAT16"),
        "elements differ",
    ),
    "what does not fill a pack is copied, not weighed": Bug(
        "reduce.cu",
        "const T result = copies ? sources[0]",
        "const T result = kMaxSources == 1 ? sources[0]",
        lambda: cases.weighings("INT8"),
        "elements differ",
    ),
    "a pack goes beyond the end": Bug(
        "reduce.cu",
        "const long long packs = (count - head) / kPerPack;",
        "const long long packs = (count - head + kPerPack - 1) / kPerPack;",
        lambda: cases.boundaries("FLOAT32"),
        "bytes beside operand",
    ),
}


def plant(bug: Bug, at: Path) -> Path:
    shutil.copytree(kernels.directory(), at)
    text = (at / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.right) == 1, f"{bug.file} must have this once: {bug.right}"
    (at / bug.file).write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    return at


@pytest.mark.parametrize("name", BUGS)
def test_it_is_found(program: Program, tmp_path: Path, name: str):
    bug = BUGS[name]
    listed = list(bug.cases())
    check(program, listed)
    broken = build(tmp_path / "build", plant(bug, tmp_path / "kernels"), {case.launch.kernel for case in listed})

    with pytest.raises(AssertionError) as found:
        check(broken, listed)

    assert not isinstance(found.value, Crashed)
    assert bug.found in str(found.value)


def test_the_address_sanitizer_finds_a_pack_beyond_the_end(tmp_path: Path):
    if not sanitizes():
        pytest.skip("the C++ compiler here has no working sanitizers")
    # As many elements as whole packs and one more.
    case = cases.reduction(np.random.default_rng(0), BY_NAME["SUM"], "FLOAT32", 2, 1, count=13, alignment=(0,), guard=0)
    bug = BUGS["a pack goes beyond the end"]
    right = build(tmp_path / "right", kernels.directory(), [case.launch.kernel], SANITIZE)
    wrong = build(tmp_path / "wrong", plant(bug, tmp_path / "kernels"), [case.launch.kernel], SANITIZE)

    check(right, [case])
    with pytest.raises(Crashed, match="AddressSanitizer: heap-buffer-overflow"):
        check(wrong, [case])


def test_the_sanitizer_finds_a_pack_at_an_odd_address(tmp_path: Path):
    """A head that is one element short leaves every access of 16 bytes beside its place."""
    if not sanitizes():
        pytest.skip("the C++ compiler here has no working sanitizers")
    case = cases.reduction(np.random.default_rng(0), BY_NAME["SUM"], "FLOAT32", 2, 1, count=32, alignment=(8,), guard=0)
    case.launch.arguments["head"] -= 1
    right = build(tmp_path / "right", kernels.directory(), [case.launch.kernel], SANITIZE)

    with pytest.raises(Crashed, match="misaligned address"):
        check(right, [case])
