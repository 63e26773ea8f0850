"""Reductions are compiled once, in a thread, and waited for only where they must be."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from dsml_gpu.device.preparation import Preparation
from dsml_gpu.reduction import DTYPES, OPERATORS, Operator

SUM, F16 = OPERATORS[0], DTYPES["FLOAT16"]


class SlowReducer:
    """Is ready when `compiled` is set, and counts how often it was told to prepare."""

    def __init__(self, must_be_ready: bool, failure: Exception | None = None) -> None:
        self.must_be_ready = must_be_ready
        self.failure = failure
        self.may_end = threading.Event()
        self.prepared = 0
        self.ready = False

    def is_ready(
        self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, destinations: int = 1, *, weighted: bool = False
    ) -> bool:
        return self.ready

    def prepare(self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, *, weighted: bool = False) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.prepared += 1
        assert self.may_end.wait(10)
        if self.failure is not None:
            raise self.failure
        self.ready = True

    def reduce(self, *arguments: Any) -> None:
        raise AssertionError("nothing is reduced here")

    def weigh(self, *arguments: Any) -> None:
        raise AssertionError("nothing is weighed here")


async def until(holds: Any) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not holds():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.001)


def test_a_reducer_that_must_be_ready_is_waited_for_and_the_event_loop_goes_on() -> None:
    async def scenario() -> None:
        reducer, preparation = SlowReducer(must_be_ready=True), Preparation()
        first, second = (asyncio.ensure_future(preparation.begin(reducer, SUM, F16)) for _ in range(2))
        await until(lambda: reducer.prepared)
        assert not first.done()
        first.cancel()  # does not take it from the other
        reducer.may_end.set()
        await second
        assert reducer.ready
        await preparation.begin(reducer, SUM, F16)
        assert reducer.prepared == 1

    asyncio.run(scenario())


def test_a_reducer_that_works_without_is_not_waited_for() -> None:
    async def scenario() -> None:
        reducer, preparation = SlowReducer(must_be_ready=False), Preparation()
        for _ in range(3):
            await preparation.begin(reducer, SUM, F16)
        assert not reducer.ready
        reducer.may_end.set()
        await until(lambda: reducer.ready)
        assert reducer.prepared == 1

    asyncio.run(scenario())


def test_what_cannot_be_compiled_is_said_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        reducer, preparation = SlowReducer(must_be_ready=True, failure=RuntimeError("no compiler")), Preparation()
        reducer.may_end.set()
        for attempt in (1, 2):
            with pytest.raises(RuntimeError, match="no compiler"):
                await preparation.begin(reducer, SUM, F16)
            assert reducer.prepared == attempt

    asyncio.run(scenario())
    assert "the reduction SUM of float16 could not be compiled" in caplog.text
