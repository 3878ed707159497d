"""What calibration may be told, with the defaults that belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...ops import arguments

ORDERS = ("block", "layer")


@dataclass(frozen=True)
class Settings:
    """As of `calibrate`; of what is None the published value, with `residual` the one that suits such targets."""

    lam: float
    anchor: float
    teacher: float
    unread_weight: float
    residual: bool
    order: str

    @classmethod
    def of(
        cls,
        *,
        lam: float | None,
        anchor: float | None,
        teacher: float | None,
        unread_weight: float,
        residual: bool,
        order: str | None,
    ) -> Settings:
        """Raises ValueError and TypeError where one is outside its range."""
        if not isinstance(residual, bool):
            raise TypeError(f"residual must be True or False, got {residual!r}")
        lam = (1e-3 if residual else 0.05) if lam is None else lam
        anchor = (1.0 if residual else 2.0) if anchor is None else anchor
        teacher = (1.0 if residual else 0.3) if teacher is None else teacher
        order = ORDERS[residual] if order is None else order
        if not 0 < arguments.number("lam", lam) < math.inf:
            raise ValueError(f"lam must be finite and greater than 0, got {lam}")
        if not -math.inf < arguments.number("anchor", anchor) < math.inf:
            raise ValueError(f"anchor must be finite, got {anchor}")
        for name, share in {"teacher": teacher, "unread_weight": unread_weight}.items():
            if not 0 <= arguments.number(name, share) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        arguments.check_one_of("order", order, ORDERS)
        return cls(lam, anchor, teacher, unread_weight, residual, order)
