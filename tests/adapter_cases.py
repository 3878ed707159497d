"""Features and adapters for the tests of surgery_adapter, on the CPU and in Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import generator

OPS = torch.ops.surgery_kernels
Adapter = Callable[..., Any]
Problem = tuple[Tensor, Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def problem(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float32, num_tasks: int | None = None
) -> Problem:
    """Gaussian features, and adapters that move them by about as much as they are."""
    g = generator(shape, rank, num_tasks)
    num_tasks, dim = shape[0] if num_tasks is None else num_tasks, shape[-1]
    features = torch.randn(shape, generator=g, dtype=torch.float64)
    down = torch.randn(num_tasks, rank, dim, generator=g, dtype=torch.float64) / max(dim, 1) ** 0.5
    up = torch.randn(num_tasks, dim, rank, generator=g, dtype=torch.float64) / max(rank, 1) ** 0.5
    return features.to(dtype), down.to(wide(dtype)), up.to(wide(dtype))


def token_major(features: Tensor) -> Tensor:
    """[num_tasks, batch, tokens, dim] as a view of [tokens, num_tasks * batch, dim]."""
    activations = features.permute(2, 0, 1, 3).contiguous()
    return activations.permute(1, 2, 0, 3)


def weights_like(x: Tensor) -> Tensor:
    """The incoming gradient of x: uneven, exact in every dtype."""
    return ((torch.arange(x.numel(), device=x.device) * 7 % 33 - 16) / 16).reshape(x.shape).to(x.dtype)


def bias_for(down: Tensor) -> Tensor:
    """One for the adapters of `problem`."""
    num_tasks, _, dim = down.shape
    return torch.randn(num_tasks, dim, generator=generator(down.shape), dtype=torch.float64).to(down.dtype)


LINEAR = [{"activation": "none"}, {"bias": True}, {"bias": True, "activation": "none"}]  # bias: that of `bias_for`


def results_of(
    adapter: Adapter, features: Tensor, down: Tensor, up: Tensor, bias: bool = False, **options: Any
) -> list[Tensor]:
    """Corrected features, means where asked for, and the gradients of features, down and up, and of the bias."""
    given = (features, down, up, bias_for(down)) if bias else (features, down, up)
    leaves = [x.detach().requires_grad_() for x in given]
    if bias:
        options["bias"] = leaves[3]
    results = adapter(*leaves[:3], **options)
    results = list(results) if options.get("token_mean") else [results]
    gradients = torch.autograd.grad(results, leaves, [weights_like(x) for x in results])
    return [*(x.detach() for x in results), *gradients]


@contextmanager
def calls_of(op: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """The arguments and results of every call of an op."""
    calls = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket is getattr(OPS, op):
                calls.append((args, result))
            return result

    with Spy():
        yield calls
