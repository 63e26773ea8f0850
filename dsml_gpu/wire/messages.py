"""Small questions to messages."""

from __future__ import annotations

from typing import Any

from dsml_gpu.errors import MissingField


def require(message: Any, *fields: str) -> None:
    """Raises MissingField where a message field is absent."""
    for field in fields:
        if not message.HasField(field):
            raise MissingField(f"{type(message).__name__} needs the field {field}")
