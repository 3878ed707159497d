"""PEFT's merge of LoRA adapters (`add_weighted_adapter`) with our ops. Needs the extra `peft`.

    with surgery_kernels.integrations.peft.accelerated():
        model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "merged", combination_type="ties", density=0.2)

The five functions below stand in for those of the same name in `peft.utils.merge_utils`, and give the same values:
of entries tied at the threshold the first in flat order are kept, where PEFT's choice is unspecified, and from five
adapters on sums may differ in the last bit, since torch adds them in another order. Random masks stay PEFT's, number
for number. What the ops do not take (other devices and dtypes, gradients, weights that are not float32, a density that
trims nothing) goes to PEFT.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import mix, ties_merge
from .extras import missing
from .tensors import NONFINITE, mergeable

try:
    from peft.tuners.lora import model as lora
    from peft.utils import merge_utils
except ImportError as error:
    raise missing("peft", "peft", error) from error

MajoritySign = Literal["total", "frequency"]
ELECT = {"total": "sum", "frequency": "count"}


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """``sum_t weights[t] * task_tensors[t]``."""
    if not _takes(task_tensors, weights):
        return merge_utils.task_arithmetic(task_tensors, weights)
    return _weighted_sum(_widened(task_tensors), weights.tolist())


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest ``int(density * numel)`` entries of each."""
    if not (_takes(task_tensors, weights) and _trims(density)):
        return merge_utils.magnitude_prune(task_tensors, weights, density)
    # an expert alone always agrees with the sign it elects: what is left of TIES is the trim
    trimmed = [_ties([tensor], [1.0], density, "sum") for tensor in _widened(task_tensors)]
    return _weighted_sum(trimmed, weights.tolist())


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: MajoritySign = "total"
) -> Tensor:
    """Trim, elect, and the mean of the weighted entries that agree."""
    if not (_takes(task_tensors, weights) and _trims(density) and majority_sign_method in ELECT):
        return merge_utils.ties(task_tensors, weights, density, majority_sign_method)
    return _ties(_widened(task_tensors), weights.tolist(), density, ELECT[majority_sign_method])


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what PEFT's random mask leaves, over `density`."""
    if not _takes(task_tensors, weights):
        return merge_utils.dare_linear(task_tensors, weights, density)
    return _weighted_sum(_widened(_masked(task_tensors, density)), weights.tolist())


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: MajoritySign = "total"
) -> Tensor:
    """TIES without a trim of what PEFT's random mask leaves, over `density`."""
    if not (_takes(task_tensors, weights) and majority_sign_method in ELECT):
        return merge_utils.dare_ties(task_tensors, weights, density, majority_sign_method)
    masked = _widened(_masked(task_tensors, density))
    return _ties(masked, weights.tolist(), 1.0, ELECT[majority_sign_method])


MERGES: tuple[Callable[..., Tensor], ...] = (ties, dare_ties, dare_linear, magnitude_prune, task_arithmetic)

_lock = threading.Lock()
_inside = 0
_replaced: dict[str, Any] = {}


@contextmanager
def accelerated() -> Iterator[None]:
    """`add_weighted_adapter` merges with our ops inside the block, and as before after it, however it ends.

    Blocks may nest and overlap between threads: the first to begin swaps PEFT's functions and the last to end brings
    them back. The swap holds for the process: while any thread is inside, adapters that other threads merge go through
    our ops too.
    """
    global _inside
    with _lock:
        if _inside == 0:
            for merge in MERGES:
                _replaced[merge.__name__] = getattr(lora, merge.__name__)
                setattr(lora, merge.__name__, torch.no_grad()(merge))  # PEFT takes the .data of the result
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                while _replaced:
                    setattr(lora, *_replaced.popitem())


def _takes(task_tensors: Sequence[Tensor], weights: Tensor) -> bool:
    return (
        mergeable(task_tensors)
        and weights.shape == (len(task_tensors),)
        and weights.dtype == torch.float32
        and not weights.requires_grad
        and all(map(math.isfinite, weights.tolist()))
    )


def _trims(density: Any) -> bool:
    return isinstance(density, float) and 0 < density < 1


def _widened(task_tensors: Sequence[Tensor]) -> list[Tensor]:
    """PEFT's float32 weights make float32 of 16-bit tensors before any sum; their trim and election stay the same."""
    wide = torch.promote_types(task_tensors[0].dtype, torch.float32)
    return [tensor.to(wide) for tensor in task_tensors]


def _masked(task_tensors: Sequence[Tensor], density: float) -> list[Tensor]:
    return [merge_utils.prune(tensor, density, method="random", rescale=True) for tensor in task_tensors]


def _weighted_sum(task_tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    (merged,) = mix(None, task_tensors, [weights], nonfinite=NONFINITE)
    return merged


def _ties(task_tensors: Sequence[Tensor], weights: list[float], density: float, elect: str) -> Tensor:
    return ties_merge(
        None, task_tensors, density=density, weights=weights, semantics="peft", elect=elect, nonfinite=NONFINITE
    )
