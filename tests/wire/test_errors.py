"""Refusals: one exception class for each name on the wire, with the code that the contract gives it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsml_gpu.errors import BY_REFUSAL, DsmlError, InvalidArgument, NotFound, OperationTimeout, error_from
from dsml_gpu.wire import gpu_sim_pb2 as pb

PROTO = Path(__file__).parents[2] / "proto" / "gpu_sim.proto"


def documented_codes() -> dict[str, str]:
    """Refusal -> code, from the comments in the contract."""
    body = re.search(r"enum Refusal \{(.*?)\n\}", PROTO.read_text(), re.DOTALL)
    assert body is not None
    documented = re.findall(r"// ([A-Z_]+): [^\n]*(?:\n  //[^\n]*)*\n  ([A-Z_]+) =", body[1])
    return {name: code for code, name in documented}


def test_every_refusal_has_one_class_with_the_documented_code() -> None:
    codes = documented_codes()
    names = set(pb.Refusal.keys()) - {"REFUSAL_UNSPECIFIED"}
    assert set(codes) == names
    assert set(BY_REFUSAL) - {"REFUSAL_UNSPECIFIED"} == names
    for name, code in codes.items():
        cls = BY_REFUSAL[name]
        assert cls.code == code, name
        assert cls.refusal == name


@pytest.mark.parametrize("name", sorted(set(pb.Refusal.keys()) - {"REFUSAL_UNSPECIFIED"}))
def test_a_refusal_survives_the_wire(name: str) -> None:
    cls = BY_REFUSAL[name]
    error = error_from(cls.code, "expected 1, got 2", name)
    assert type(error) is cls
    assert str(error) == "expected 1, got 2"


def test_a_status_without_refusal_becomes_the_general_class() -> None:
    assert type(error_from("NOT_FOUND", "x")) is NotFound
    assert type(error_from("INVALID_ARGUMENT", "x", "A_LATER_VERSION")) is InvalidArgument
    assert type(error_from("DEADLINE_EXCEEDED", "x")) is OperationTimeout
    unknown = error_from("UNAUTHENTICATED", "who are you")
    assert type(unknown) is DsmlError
    assert str(unknown) == "UNAUTHENTICATED: who are you"


def test_errors_are_also_the_builtin_ones_a_python_user_expects() -> None:
    for name, builtin in {
        "ADDRESS_OUT_OF_RANGE": IndexError,
        "INVALID_VALUE": ValueError,
        "COMM_NOT_FOUND": LookupError,
        "OUT_OF_MEMORY": MemoryError,
        "PEER_UNAVAILABLE": ConnectionError,
        "OPERATION_TIMEOUT": TimeoutError,
    }.items():
        assert issubclass(BY_REFUSAL[name], builtin)
