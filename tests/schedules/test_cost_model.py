"""The constants of the cost model, and the file that they are kept in."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY, CostModel, Costs

COSTS = st.builds(Costs, *[st.floats(0, 1e3)] * len(fields(Costs)))
VALID: dict[str, Any] = json.loads(DEFAULT_COST_MODEL.to_json())


@given(COSTS, COSTS)
def test_what_is_written_is_read(p2p: Costs, grpc: Costs) -> None:
    model = CostModel(p2p, grpc)
    assert CostModel.from_json(model.to_json()) == model


def test_each_transport_has_costs_of_its_own() -> None:
    assert DEFAULT_COST_MODEL.costs(p2p=True) is DEFAULT_COST_MODEL.p2p
    assert DEFAULT_COST_MODEL.costs(p2p=False) is DEFAULT_COST_MODEL.grpc
    assert DEFAULT_COST_MODEL.p2p != DEFAULT_COST_MODEL.grpc


def test_links_only_costs_nothing() -> None:
    assert {*asdict(LINKS_ONLY.p2p).values(), *asdict(LINKS_ONLY.grpc).values()} == {0.0}


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a cost model must be JSON: "),
        ("[1]", "a cost model must be a JSON object, not \\[1\\]"),
        (json.dumps(without(VALID, "grpc")), "a cost model lacks grpc"),
        (json.dumps(VALID | {"nccl": {}}), "a cost model has unknown nccl"),
        (json.dumps(VALID | {"version": 2}), "version 2; this program reads version 1"),
        (json.dumps(VALID | {"p2p": 3}), "p2p must be a JSON object, not 3"),
        (json.dumps(VALID | {"p2p": without(VALID["p2p"], "stream_s")}), "p2p lacks stream_s"),
        (json.dumps(VALID | {"grpc": VALID["grpc"] | {"stream_ms": 1}}), "grpc has unknown stream_ms"),
        (json.dumps(VALID | {"grpc": VALID["grpc"] | {"rank_s": -1}}), "grpc: rank_s must be .* from 0 to 1e\\+06, not -1"),
        (json.dumps(VALID | {"grpc": VALID["grpc"] | {"rank_s": "1"}}), "grpc: rank_s must be .*, not '1'"),
        (json.dumps(VALID | {"grpc": VALID["grpc"] | {"rank_s": True}}), "grpc: rank_s must be .*, not True"),
        (json.dumps(VALID | {"grpc": VALID["grpc"] | {"rank_s": math.nan}}), "grpc: rank_s must be .*, not nan"),
    ],
)
def test_what_is_no_cost_model_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CostModel.from_json(text)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
@pytest.mark.parametrize("name", [field.name for field in fields(Costs)])
def test_costs_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds from 0 to "):
        replace(LINKS_ONLY.grpc, **{name: value})
