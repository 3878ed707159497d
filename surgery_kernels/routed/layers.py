"""What layers that have experts share: the pass that runs, and products with low-rank experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import surgery_adapter


@dataclass
class Route:
    """What the layers of a model, or of a part of it, must know of the pass that runs."""

    batch: int = 0  # samples that the model was called with; 0 where that is unknown
    weights: Tensor | None = None  # [batch, num_tasks], or [1, num_tasks]: the same for all samples

    def by_sample(self, x: Tensor, token_major: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """[batch, num_tokens, dim], of rows [batch, dim] and of tokens in either order; and what brings results of that
        shape into the order of `x`. Where only the other order fits the batch, it is that."""
        if x.dim() == 2:
            tokens, token_major = x.unsqueeze(1), False
        else:
            if self.batch in x.shape[:2] and x.shape[int(token_major)] != self.batch:
                token_major = not token_major
            tokens = (x.transpose(0, 1) if token_major else x).flatten(1, -2)
        if self.weights is not None and len(self.weights) not in (1, len(tokens)):
            raise ValueError(
                f"layers with experts must see {len(self.weights)} samples, as the model does, got {len(tokens)}: "
                "exclude this layer"
            )

        def as_before(results: Tensor) -> Tensor:
            if token_major:
                return results.unflatten(1, (x.shape[0], *x.shape[2:-1])).transpose(0, 1)
            return results.reshape(*x.shape[:-1], results.shape[-1])

        return tokens, as_before


class Unread(Tensor):
    """A weight of which dtype, device and shape can be asked, as models do, and nothing computed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__get__", "size", "dim"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            f"layers with experts must be called, got {func.__name__} of a weight, which is another for every input: "
            "exclude this layer"
        )


class RoutedLayer(nn.Module):
    """A layer whose parameters depend on what goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_called)

    @property
    def weight(self) -> Tensor:
        return self._of_the_shape().detach().as_subclass(Unread)

    def _of_the_shape(self) -> Tensor:
        """A tensor like the weight of the layer that this one is."""
        return self.shared.weight  # type: ignore[return-value,union-attr]


def _called(*_: object) -> None:
    """torch's own transformer layers call their linear layers, instead of reading their weights, where hooks are."""


def one_expert_each(x: Tensor, out: Tensor, down: Tensor, up: Tensor, shift: Tensor | None, index: Tensor) -> Tensor:
    """``out[m] + up[index[m]] down[index[m]] x[m] + shift[index[m]]``, by one grouped product.

    Args:
        x: [rows, in].
        out: [rows, out].
        down: [num_tasks, rank, in].
        up: [num_tasks, out, rank].
        shift: [num_tasks, out], or None.
        index: int64 [rows].
    """
    num_tasks, rank, width = down.shape
    # The adapter corrects what it reads: it gets both side by side, reads the first and corrects the second.
    rows = torch.cat([x.to(out.dtype), out], dim=-1)
    reads = torch.cat([down, down.new_zeros(num_tasks, rank, out.shape[-1])], dim=-1)
    writes = torch.cat([up.new_zeros(num_tasks, width, rank), up.neg()], dim=1)
    bias = None if shift is None else torch.cat([shift.new_zeros(num_tasks, width), shift.neg()], dim=-1)
    if rows.dtype != reads.dtype:  # under autocast
        reads, writes, bias = reads.float(), writes.float(), None if bias is None else bias.float()
    corrected = surgery_adapter(rows, reads, writes, task_index=index, bias=bias, activation="none")
    return corrected[:, width:]


def weighed_experts(x: Tensor, down: Tensor, up: Tensor, shift: Tensor | None, weights: Tensor) -> Tensor:
    """``sum_t weights[..., t] (up[t] down[t] x + shift[t])``: two products with all experts side by side.

    Args:
        x: [..., in].
        down: [num_tasks, rank, in].
        up: [num_tasks, out, rank].
        shift: [num_tasks, out], or None.
        weights: [..., num_tasks], with as many dimensions as `x`.
    """
    hidden = nn.functional.linear(x, down.flatten(0, 1)).unflatten(-1, down.shape[:2])
    weights = weights.to(hidden.dtype)
    hidden = (hidden * weights.unsqueeze(-1)).flatten(-2)
    result = nn.functional.linear(hidden, up.transpose(0, 1).flatten(1))
    return result if shift is None else result + weights @ shift.to(weights.dtype)
