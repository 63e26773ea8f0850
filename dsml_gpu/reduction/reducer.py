"""What the executor asks of whoever reduces, on the host or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dsml_gpu.reduction.operators import Operator


class Reducer(Protocol):
    """Reduces arrays of one device's memory. Calls come from one event loop, but for `prepare`.

    Attributes:
        must_be_ready: `reduce` would stop the event loop to compile; otherwise it is only slower until all is compiled.
    """

    must_be_ready: bool

    def is_ready(
        self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, destinations: int = 1, *, weighted: bool = False
    ) -> bool:
        """Whether there is nothing to `prepare`, or to gain by it, for so many. Costs next to nothing."""

    def prepare(self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, *, weighted: bool = False) -> None:
        """Compiles what `reduce` needs for so many sources. Takes up to seconds; for a thread.

        Args:
            weighted: also what `weigh` needs for the type, whatever the operator.
        """

    def reduce(
        self,
        operator: Operator,
        dtype: np.dtype[Any],
        sources: Sequence[Any],
        destinations: Sequence[Any],
        divisor: int = 1,
    ) -> None:
        """``destinations[j][i] = operator(sources[0][i], ..., sources[n-1][i])`` for all j, queued on the device.

        Sources are combined from left to right, at most 8 in one pass (`passes`). float16 and bfloat16 accumulate in float32
        and round once per pass; integers wrap; MIN and MAX propagate NaN.

        Args:
            sources, destinations: one-dimensional uint8 arrays of the same size, a multiple of the item size, at any
                address. A destination may be one of the sources; otherwise no two overlap.
            divisor: above 1 only with AVG, which is divided in the accumulator; integers truncate toward zero.
        """

    def weigh(self, dtype: np.dtype[Any], source: Any, destination: Any, weight: np.generic) -> None:
        """``destination[i] = weight * source[i]``, queued on the device.

        float16 and bfloat16 are multiplied in float32 and rounded once, to nearest, ties to even; integers wrap.

        Args:
            source, destination: one-dimensional uint8 arrays of the same size, a multiple of the item size, at any address;
                the same memory, or not overlapping.
            weight: of `weights.checked_weight` for this type.
        """
