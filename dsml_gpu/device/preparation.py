"""Compiles reductions beside the event loop, each once."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

import numpy as np

from dsml_gpu.reduction import Operator, Reducer

log = logging.getLogger(__name__)

_Key = tuple[Reducer, Operator, np.dtype[Any], int, bool]


class Preparation:
    """What is being compiled for the devices of one server."""

    def __init__(self) -> None:
        self._under_way: dict[_Key, asyncio.Future[None]] = {}

    async def begin(
        self,
        reducer: Reducer,
        operator: Operator,
        dtype: np.dtype[Any],
        sources: int = 2,
        destinations: int = 1,
        *,
        weighted: bool = False,
    ) -> None:
        """Compiles what is not compiled yet; waits for it only where the reducer must be ready.

        Args:
            weighted: `Reducer.weigh` is needed as well.

        Raises:
            Exception: the reducer must be ready, and it could not be compiled.
        """
        if reducer.is_ready(operator, dtype, sources, destinations, weighted=weighted):
            return
        key = (reducer, operator, dtype, sources, weighted)
        preparing = self._under_way.get(key)
        if preparing is None:
            preparing = asyncio.ensure_future(
                asyncio.to_thread(reducer.prepare, operator, dtype, sources, weighted=weighted)
            )
            preparing.add_done_callback(partial(self._end, key))
            self._under_way[key] = preparing
        if reducer.must_be_ready:
            await asyncio.shield(preparing)  # the others who wait for it still need it when this one is cancelled

    def _end(self, key: _Key, preparing: asyncio.Future[None]) -> None:
        del self._under_way[key]
        if not preparing.cancelled() and (error := preparing.exception()) is not None:
            log.error("the reduction %s of %s could not be compiled", key[1].name, key[2], exc_info=error)
