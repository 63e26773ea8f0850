"""What sending, receiving and reducing cost a rank's processor: the constants of the simulator.

The model is LogGP (Alexandrov, Ionescu, Schauser and Scheiman, "LogGP: Incorporating long messages into the LogP model",
SPAA 1995) with the parts kept apart that contend for different things. Latency L and the gap per byte G belong to links
(`topology`). The overhead o and its addition per byte are time of a processor, which a rank shares with its other streams,
and a host's ranks with each other; they are here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

#: No constant is higher, so that every prediction is finite.
_MAX_COST_S = 1e6


@dataclass(frozen=True, slots=True)
class Costs:
    """What one transport costs, all in seconds.

    Attributes:
        operation_s: a collective that moves nothing between two ranks: the client's call, the round of control messages
            and its end.
        rank_s: what each rank adds to that.
        stream_s: processor time at each end to open and close one stream; there is one for each ordered pair of ranks
            between which data moves.
        message_s: processor time at each end of one message, however short.
        send_byte_s: processor time at the sender for each byte.
        recv_byte_s: processor time at the receiver for each byte, until it is where it can be used.
        reduce_byte_s: to reduce a byte that was received into one that was there.
        copy_byte_s: to copy a byte that was received to its place.
        meet_byte_s: in addition to `recv_byte_s`, for each other rank that sends to the receiver in the same step of the
            schedule: what comes from many at a time is cold when it is used, and memory for it comes from the system.
            Measured for few ranks and not to be carried over to many, so only the event simulation counts it.

    Raises:
        ValueError: one of them is negative, infinite or no number.
    """

    operation_s: float
    rank_s: float
    stream_s: float
    message_s: float
    send_byte_s: float
    recv_byte_s: float
    reduce_byte_s: float
    copy_byte_s: float
    meet_byte_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= _MAX_COST_S:
                raise ValueError(f"{field.name} must be a number of seconds from 0 to {_MAX_COST_S:g}, not {value!r}")

    def control_s(self, nranks: int) -> float:
        """Time of a collective's control messages."""
        return self.operation_s + self.rank_s * nranks

    def combine_byte_s(self, reduce: bool) -> float:
        """To bring a byte that was received to where it belongs."""
        return self.reduce_byte_s if reduce else self.copy_byte_s


@dataclass(frozen=True, slots=True)
class CostModel:
    """The costs of each transport.

    Attributes:
        p2p: between ranks of one process; the receiver reads the sender's memory.
        grpc: between processes.
    """

    p2p: Costs
    grpc: Costs

    def costs(self, p2p: bool) -> Costs:
        """Those of one transport."""
        return self.p2p if p2p else self.grpc

    def to_json(self) -> str:
        """A JSON object that `from_json` reads."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """The model that `to_json` wrote.

        Raises:
            ValueError: it is none; the message says where.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a cost model must be JSON: {error}") from None
        _require_keys("a cost model", content, {"version", "p2p", "grpc"})
        if content["version"] != _VERSION:
            raise ValueError(f"the cost model has version {content['version']!r}; this program reads version {_VERSION}")
        return cls(p2p=_costs("p2p", content["p2p"]), grpc=_costs("grpc", content["grpc"]))


_VERSION = 1


def _costs(transport: str, content: Any) -> Costs:
    _require_keys(transport, content, {field.name for field in fields(Costs)})
    try:
        return Costs(**content)
    except ValueError as error:
        raise ValueError(f"{transport}: {error}") from None


def _require_keys(what: str, content: Any, keys: set[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be a JSON object, not {content!r}")
    for problem, names in (("lacks", keys - content.keys()), ("has unknown", content.keys() - keys)):
        if names:
            raise ValueError(f"{what} {problem} {', '.join(sorted(names))}")


#: Processors and memory cost nothing: what is left is what the links do.
LINKS_ONLY = CostModel(p2p=Costs(*[0.0] * 9), grpc=Costs(*[0.0] * 9))

#: All-reduces by ring, direct, recursive_doubling and double_binary_tree on 2, 4 and 8 ranks, 1 KiB to 16 MB, in host memory
#: on two cores of a 2020s server under Python 3.11; fitted with an error of 8 % (gRPC) and 4 % (p2p, up to 4 MiB: what no
#: cache holds is slower). On another machine they are good for an order of algorithms, not for times; `dsml-gpu tune` fits
#: them to it.
DEFAULT_COST_MODEL = CostModel(
    p2p=Costs(
        operation_s=570e-6,
        rank_s=87e-6,
        stream_s=9.8e-6,
        message_s=3.7e-6,
        send_byte_s=0.0,
        recv_byte_s=0.0,
        reduce_byte_s=0.11e-9,
        copy_byte_s=0.05e-9,
        meet_byte_s=0.0,
    ),
    grpc=Costs(
        operation_s=1500e-6,
        rank_s=910e-6,
        stream_s=360e-6,
        message_s=75e-6,
        send_byte_s=1.15e-9,
        recv_byte_s=1.15e-9,
        reduce_byte_s=0.11e-9,
        copy_byte_s=0.05e-9,
        meet_byte_s=0.0,
    ),
)
