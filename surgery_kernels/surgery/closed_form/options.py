"""How the closed form is to be solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...modules.inputs import Inputs
from ...ops import arguments

RowWeights = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class ClosedForm:
    """Repair by ridge regression, for ``fit(..., solver=ClosedForm(...))``.

    Args:
        ridge: What is added to the variances of a block's tokens, as a share of their mean; greater than 0.
        final_ridge: The same for the final representation, of which there is one row per sample. None: `ridge` where
            blocks were corrected before and samples outnumber ranks; else the one whose predictions are best for
            samples that were left out, from 1e-3 to 1e3: greater for fewer samples.
        unread_weight: In [0, 1]: what a token of the last block counts if the final representation is not made of it,
            as are all but the class token.
        row_weights: From a batch of inputs the weights [batch, tokens] of the blocks' tokens, 0 or greater; None: their
            attention mask where they have one, so that padding takes no part.
        refine: Whether the gradient takes its steps from there, as with ``solver="closed_form+gradient"``.
    """

    ridge: float = 1e-2
    final_ridge: float | None = None
    unread_weight: float = 0.01
    row_weights: RowWeights | None = None
    refine: bool = False

    def __post_init__(self) -> None:
        for name, ridge in {"ridge": self.ridge, "final_ridge": self.final_ridge}.items():
            if ridge is not None and not 0 < arguments.number(name, ridge) < math.inf:
                raise ValueError(f"{name} must be finite and greater than 0, got {ridge}")
        if not 0 <= arguments.number("unread_weight", self.unread_weight) <= 1:
            raise ValueError(f"unread_weight must be in [0, 1], got {self.unread_weight}")
