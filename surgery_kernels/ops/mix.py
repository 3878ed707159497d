"""Linear combinations of a base and experts: several of them from one read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts

_ops = torch.ops.surgery_kernels

AXES = ("tensor", "row", "column")

Numbers = float | Sequence["Numbers"] | Tensor


def num_blocks_of(shape: Sequence[int], axis: str) -> int:
    """How many coefficients a tensor takes for every expert."""
    if axis == "tensor" or len(shape) < 2:
        return 1
    return math.prod(shape[:-1] if axis == "row" else shape[1:])


def mix(
    base: Tensor | None,
    experts: Experts,
    coefficients: Numbers,
    *,
    base_coefficients: Numbers | None = None,
    divisor: float = 1.0,
    task_vectors: bool = True,
    fused: bool = False,
    axis: str = "tensor",
    nonfinite: str = "error",
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """``base + sum_t coefficients[t] * (expert_t - base) / divisor``; one tensor for every list of coefficients.

    Bit-identical on every instruction set, thread count and split of the work. Experts are added in their order in
    float32 (float64 for float64 inputs), and the result is rounded once. However many outputs there are, the inputs are
    read once (twice where `nonfinite` is "error" and `out` is given); inputs that are not contiguous are copied first.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None: the experts are summed and
            nothing is added.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        coefficients: [num_tasks] for one output, [num_outputs, num_tasks] for several; with an `axis` other than
            "tensor" [..., num_tasks, num_blocks]. Finite numbers in lists, or a tensor of any finite or other numbers.
        base_coefficients: Factors of the base: one number for one output, [num_outputs] for several, with an `axis`
            [..., num_blocks]. None: the base is added as it is.
        divisor: What the sum over the experts is divided by before the base is added; 1 divides nothing.
        task_vectors: Whether `base` is subtracted from every expert.
        fused: Round a product and its addition once (a fused multiply-add), as mergekit's `linear` does, instead of
            twice.
        axis: What shares a coefficient: the "tensor"; a "row" along its last dimension (num_blocks: how many there
            are); or a "column" of the tensor seen as [shape[0], num_blocks]. A tensor of one dimension or none is one
            block. num_blocks may be 1: the same everywhere.
        nonfinite: What NaN or infinity in an input or a task vector does: "error" raises before anything is written,
            "propagate" lets it take part, "drop" takes an entry of a task vector (of an expert where no base is
            subtracted) as 0.
        out: Tensor like `base` that receives the result, or a list of one for each output; may be memory-mapped files.
            One may be an input, the very same tensor; no other overlap is allowed.

    Returns:
        A tensor like `base`, or a list of num_outputs of them; `out` where given. Carries no gradient. Empty for empty
        inputs.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: an `out` overlaps an input or another, or NaN or infinity under ``nonfinite="error"``; `out` is
            untouched.

    Source: Model Soups (arXiv 2203.05482); WiSE-FT (arXiv 2109.01903), section 3; Editing Models (arXiv 2212.04089).
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("axis", axis, AXES)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    divisor = arguments.number("divisor", divisor)
    if not -math.inf < divisor < math.inf or divisor == 0:
        raise ValueError(f"divisor must be finite and not 0, got {divisor}")
    first = experts[0]
    blocks = [] if axis == "tensor" else [num_blocks_of(first.shape, axis)]
    table = _numbers("coefficients", coefficients, first.device)
    several = table.dim() == 2 + len(blocks)
    outputs = list(table.shape[:1]) if several else []
    if outputs == [0]:
        raise ValueError("coefficients must be of at least one output, got none")
    table = _with_blocks("coefficients", table, [*outputs, len(experts)], blocks)
    of_base = None
    if base_coefficients is not None:
        if base is None:
            raise ValueError("base_coefficients must be None without base, got some")
        of_base = _numbers("base_coefficients", base_coefficients, first.device)
        of_base = _with_blocks("base_coefficients", of_base, outputs, blocks)
        if of_base.shape[-1] != table.shape[-1]:  # one of them is the same in every block
            table, of_base = (x.expand(*x.shape[:-1], *blocks) for x in (table, of_base))
        of_base = of_base if several else of_base[None]
    results = _outputs(out, first, outputs)
    _ops.mix_out(
        [] if base is None else [base],
        experts,
        table if several else table.unsqueeze(0),
        of_base,
        divisor=divisor,
        task_vectors=bool(task_vectors),
        fused=bool(fused),
        axis=axis,
        nonfinite=nonfinite,
        fresh=out is None,
        out=[arguments.detached(result) for result in results],
    )
    if out is not None:
        for result in results:
            torch.autograd.graph.increment_version(result)  # a graph that saved it must notice
    return results if several else results[0]


def _numbers(argument: str, value: Numbers, device: torch.device) -> Tensor:
    """In float64, from lists in lists of finite numbers or from a tensor."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"{argument} must be on the CPU or on the device of experts[0], got {value.device}")
        return value.detach().to(torch.float64)

    def checked(value: Numbers) -> Any:
        if type(value) is not float and isinstance(value, Sequence) and not isinstance(value, str):
            return [checked(entry) for entry in value]
        number = arguments.number(argument, value, "numbers in lists")
        if not math.isfinite(number):
            raise ValueError(f"{argument} must be finite, got {number}")
        return number

    numbers = checked(value)
    try:
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        raise ValueError(f"{argument} must be numbers in lists of one length, got {value!r}") from None


def _with_blocks(argument: str, table: Tensor, shape: list[int], blocks: list[int]) -> Tensor:
    """[*shape, num_blocks], checked; num_blocks may be 1."""
    if list(table.shape) != [*shape, *blocks] and not (blocks and list(table.shape) == [*shape, 1]):
        raise ValueError(f"{argument} must have shape {(*shape, *blocks)}, got {tuple(table.shape)}")
    return table if blocks else table.unsqueeze(-1)


def _outputs(out: Tensor | Sequence[Tensor] | None, first: Tensor, outputs: list[int]) -> list[Tensor]:
    """The tensors to fill; `outputs`: how many where there are several."""
    count = outputs[0] if outputs else 1
    if out is None:
        return [torch.empty_like(first, memory_format=torch.contiguous_format) for _ in range(count)]
    if not outputs:
        arguments.check_like("out", out, first, "experts[0]")
    given = [out] if isinstance(out, Tensor) else list(out)
    if len(given) != count:
        raise ValueError(f"out must be one tensor for each of {count} outputs, got {len(given)}")
    for j, tensor in enumerate(given):
        arguments.check_like(f"out[{j}]", tensor, first, "experts[0]")
    return given


@torch.library.register_fake("surgery_kernels::mix_out")
def _(*_: object, **__: object) -> None:
    return None
