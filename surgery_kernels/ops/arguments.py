"""What every op asks of its arguments, in one wording: "<argument> must be <requirement>, got <value>"."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SEMANTICS = ("paper", "mergekit", "peft", "exact")
ELECT = ("sum", "count", "none")
REDUCE = ("mean", "sum", "max", "magmax", "unique")
NONFINITE = ("error", "propagate", "drop")

Experts = Tensor | Sequence[Tensor]
PerExpert = float | Sequence[float]


def name_of(dtype: torch.dtype) -> str:
    """As recipes and configurations have it, without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_one_of(argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_like(argument: str, tensor: object, first: Tensor, first_name: str) -> None:
    """`tensor` is a tensor with the shape, dtype and device of `first`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != first.shape:
        raise ValueError(
            f"{argument} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.dtype != first.dtype:
        raise ValueError(f"{argument} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{argument} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def check_experts(
    base: Tensor | None, experts: Experts, argument: str = "experts"
) -> tuple[Tensor | None, list[Tensor]]:
    """The base and the list of experts, detached; one stacked tensor [num_tasks, ...] is taken apart."""
    if isinstance(experts, Tensor):
        if experts.dim() == 0:
            raise ValueError(f"{argument} must be a list of tensors or one tensor [num_tasks, ...], got a 0-d tensor")
        experts = experts.unbind(0)
    experts = list(experts)
    if not experts:
        raise ValueError(f"{argument} must be at least one tensor, got none")
    first, name = (experts[0], f"{argument}[0]") if base is None else (base, "base")
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(first).__name__}")
    if first.dtype not in DTYPES:
        raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, got {first.dtype}")
    kind = _kind(first)
    for i, expert in enumerate(experts):
        if not isinstance(expert, Tensor) or _kind(expert) != kind:
            check_like(f"{argument}[{i}]", expert, first, name)
    return None if base is None else detached(base), [detached(expert) for expert in experts]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return tensor.dtype, tensor.device, tensor.shape


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def per_expert(argument: str, value: PerExpert, num_tasks: int) -> list[float]:
    """One finite number per expert, from one for all or a list."""
    given = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * num_tasks
    values = [number(argument, v, "a number or a list of numbers") for v in given]
    if len(values) != num_tasks:
        raise ValueError(f"{argument} must be one number or one per expert ({num_tasks}), got {len(values)}")
    for v in values:
        if not -math.inf < v < math.inf:
            raise ValueError(f"{argument} must be finite, got {v}")
    return values


def number(argument: str, value: object, required: str = "a number") -> float:
    if type(value) is float:
        return value
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{argument} must be {required}, got {value!r}")
    return float(value)


def check_count(argument: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be {least} or greater, got {value}")


def check_density(density: PerExpert, num_tasks: int) -> list[float]:
    values = per_expert("density", density, num_tasks)
    for v in values:
        if not 0 < v <= 1:
            raise ValueError(f"density must be in (0, 1], got {v}")
    return values


def check_weights(weights: PerExpert | None, num_tasks: int) -> list[float]:
    """One for every expert where there are none."""
    return per_expert("weights", 1.0 if weights is None else weights, num_tasks)


def check_lam(lam: float) -> float:
    lam = number("lam", lam)
    if not -math.inf < lam < math.inf:
        raise ValueError(f"lam must be finite, got {lam}")
    return lam
