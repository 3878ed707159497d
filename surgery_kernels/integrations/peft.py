"""PEFT's merge of LoRA adapters (`add_weighted_adapter`) with our ops. Needs the extra `peft`.

    with surgery_kernels.integrations.peft.accelerated():
        model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "merged", combination_type="ties", density=0.2)

The five functions in `MERGES` stand in for those of the same name in `peft.utils.merge_utils`, on CPU and CUDA tensors,
and give the same values: of entries tied at the threshold the first in flat order are kept, where PEFT's choice is
unspecified, and from five adapters on sums may differ in the last bit, since torch adds them in another order.

`dare_linear` and `dare_ties` draw masks of PEFT's distribution, but not PEFT's, from a counter while they merge; its
seed is torch's next number, so that `torch.manual_seed` decides them too. ``accelerated(exact_draws=True)`` draws
PEFT's own, number for number. At density 0 nothing is kept and the result is 0, where PEFT's is NaN. A merge of
rank-stabilized adapters has the scale it was merged for, where PEFT's is too large by the square root of its rank.

What the ops do not take (other devices and dtypes, gradients, weights that are not float32, a density that trims
nothing) goes to PEFT.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import mix, ties_merge
from .extras import missing
from .tensors import NONFINITE, mergeable, next_seed

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


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float, *, exact_draws: bool = False) -> Tensor:
    """The weighted sum of what a random mask leaves, over `density`."""
    if not _takes(task_tensors, weights):
        return merge_utils.dare_linear(task_tensors, weights, density)
    if _draws(density, exact_draws):
        return _drawn(task_tensors, weights, density, semantics="exact", elect="none", reduce="sum")
    return _weighted_sum(_widened(_masked(task_tensors, density)), weights.tolist())


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: MajoritySign = "total",
    *,
    exact_draws: bool = False,
) -> Tensor:
    """TIES without a trim of what a random mask leaves, over `density`."""
    if not (_takes(task_tensors, weights) and majority_sign_method in ELECT):
        return merge_utils.dare_ties(task_tensors, weights, density, majority_sign_method)
    if _draws(density, exact_draws):
        return _drawn(task_tensors, weights, density, semantics="peft", elect=ELECT[majority_sign_method])
    masked = _widened(_masked(task_tensors, density))
    return _ties(masked, weights.tolist(), 1.0, ELECT[majority_sign_method])


MERGES: tuple[Callable[..., Tensor], ...] = (ties, dare_ties, dare_linear, magnitude_prune, task_arithmetic)

RANDOM = (dare_ties, dare_linear)

_lock = threading.Lock()
_inside = 0
_exact_draws = False  # of the blocks inside
_replaced: list[tuple[Any, str, Any]] = []


@contextmanager
def accelerated(*, exact_draws: bool = False) -> Iterator[None]:
    """`add_weighted_adapter` merges with our ops inside the block, and as before after it, however it ends.

    Blocks may nest and overlap between threads: the first to begin swaps PEFT's functions and the last to end brings
    them back. The swap holds for the process: while any thread is inside, adapters that other threads merge go through
    our ops too.

    Args:
        exact_draws: Random masks are PEFT's, drawn from torch's generator one number after the other.

    Raises:
        ValueError: another block is inside with another `exact_draws`.
    """
    global _inside, _exact_draws
    with _lock:
        if _inside and exact_draws != _exact_draws:
            raise ValueError(f"exact_draws must be {_exact_draws} as in the block around, got {exact_draws}")
        if _inside == 0:
            _exact_draws = exact_draws
            for merge in MERGES:
                ours = partial(merge, exact_draws=exact_draws) if merge in RANDOM else merge
                _replace(lora, merge.__name__, torch.no_grad()(ours))  # PEFT takes the .data of the result
            _replace(lora.LoraModel, "add_weighted_adapter", _scaled_once(lora.LoraModel.add_weighted_adapter))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                while _replaced:
                    setattr(*_replaced.pop())


def _replace(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, ours)


def _scaled_once(add_weighted_adapter: Callable[..., None]) -> Callable[..., None]:
    """With adapters of rank r and lora_alpha r whose scale is 1: what they are merged from is scaled already."""

    @wraps(add_weighted_adapter)
    def scaled_once(model: Any, adapters: Any, weights: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        is_new = adapter_name not in model.peft_config
        add_weighted_adapter(model, adapters, weights, adapter_name, *args, **kwargs)
        if is_new and model.peft_config[adapter_name].use_rslora:
            model.peft_config[adapter_name].use_rslora = False  # lora_alpha / r, when it is loaded again too
            for layer in model.modules():
                if isinstance(layer, lora.LoraLayer) and adapter_name in layer.scaling:
                    layer.use_rslora[adapter_name] = False
                    layer.set_scale(adapter_name, 1.0)

    return scaled_once


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


def _draws(density: float, exact_draws: bool) -> bool:
    """Whether the masks are ours; at density 0 every mask is the same, and PEFT would divide by it."""
    return density == 0 or (0 < density < 1 and not exact_draws)


def _drawn(task_tensors: Sequence[Tensor], weights: Tensor, density: float, **options: Any) -> Tensor:
    """Merged while the masks are drawn: dividing by the density scales all sums alike."""
    return ties_merge(
        None,
        _widened(task_tensors),
        density=1.0,
        lam=1 / density if density else 1.0,
        weights=weights.tolist(),
        nonfinite=NONFINITE,
        keep_density=density,
        seed=next_seed(),
        **options,
    )


def _masked(task_tensors: Sequence[Tensor], density: float) -> list[Tensor]:
    return [merge_utils.prune(tensor, density, method="random", rescale=True) for tensor in task_tensors]


def _weighted_sum(task_tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    (merged,) = mix(None, task_tensors, [weights], nonfinite=NONFINITE)
    return merged


def _ties(task_tensors: Sequence[Tensor], weights: list[float], density: float, elect: str) -> Tensor:
    return ties_merge(
        None, task_tensors, density=density, weights=weights, semantics="peft", elect=elect, nonfinite=NONFINITE
    )
