"""The same launches under the address sanitizer and the one for undefined behaviour.

Each operand is an allocation that ends where the operand does, so one byte too many is a report. So is a 16-byte access
at an address that is no multiple of 16, an index outside an array, and a signed overflow.
"""

from __future__ import annotations

import itertools

import pytest

from dsml_gpu.reduction import DTYPES, OPERATORS
from tests.kernels import cases
from tests.kernels.cases import check
from tests.kernels.on_cpu import Program


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_reductions(sanitized: Program, dtype_name: str):
    for operator in OPERATORS:
        assert check(sanitized, cases.breadth(operator, dtype_name, each=1, guard=0)) == 64
    assert check(sanitized, itertools.islice(cases.boundaries(dtype_name, guard=0), 0, None, 3)) > 100


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_weights(sanitized: Program, dtype_name: str):
    assert check(sanitized, cases.weighings(dtype_name, guard=0)) > 100


def test_copies(sanitized: Program):
    assert check(sanitized, itertools.islice(cases.copies(guard=0), 0, None, 3)) > 300
