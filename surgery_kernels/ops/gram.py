"""All dot products of task vectors, or of experts, from one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts
from .mix import num_blocks_of

_ops = torch.ops.surgery_kernels

AXES = ("tensor", "row", "column", "model")


def gram(
    base: Tensor | None,
    experts: Experts,
    *,
    axis: str = "tensor",
    rounded: bool = False,
    nonfinite: str = "error",
) -> Tensor:
    """``<expert_i - base, expert_j - base>`` for all i and j in float64; lengths, distances and angles follow from it.

    Bit-identical on every instruction set, thread count and device: products of float32 and narrower vectors are
    exact, and sums are rounded in one order. A vector is cut into blocks of 32768 elements, and element i of a block is
    added to lane i % 32; then a block's lanes, and then the blocks, are folded in halves: place j takes place
    j + ceil(length / 2). A column is added up in runs of 4096 elements instead, and the runs are folded. Reads the
    inputs once; inputs that are not contiguous are copied first.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None: products of the experts
            themselves.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        axis: What a vector is: the "tensor"; a "row" along its last dimension; or a "column" of the tensor seen as
            [shape[0], num_vectors]. A tensor of one dimension or none is one vector. "model" is for the op under
            this function, which takes several tensors: here it is the tensor once more.
        rounded: Whether ``expert - base``, a float32 (float64 for float64 inputs), is rounded to the dtype of the
            inputs, as toolkits that store task vectors round it.
        nonfinite: What NaN or infinity in a vector does: "error" raises, "propagate" lets it take part, "drop" takes
            the entry as 0.

    Returns:
        float64 [num_tasks, num_tasks] for "tensor", else [num_vectors, num_tasks, num_tasks]; symmetric. Zeros for
        vectors of no elements. Products of float64 inputs may overflow to infinity. Carries no gradient.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names the expert and how many.

    Source: Model Stock (arXiv 2403.19522), section 3, and spherical interpolation need no more than these products.
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("axis", axis, AXES)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    bases = [] if base is None else [base]
    products = _ops.gram(bases, experts, len(experts), axis=axis, rounded=bool(rounded), nonfinite=nonfinite)
    return products[0] if axis == "tensor" else products


@torch.library.register_fake("surgery_kernels::gram")
def _(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    num_tasks: int,
    axis: str = "tensor",
    *_: object,
    **__: object,
) -> Tensor:
    firsts = experts[::num_tasks]
    count = 1 if axis == "model" else sum(num_blocks_of(first.shape, axis) for first in firsts)
    return experts[0].new_empty((count, num_tasks, num_tasks), dtype=torch.float64)
