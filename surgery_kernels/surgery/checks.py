"""What surgery asks of its arguments, in the wording of the ops."""

from __future__ import annotations


def check_count(argument: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be {least} or greater, got {value}")
