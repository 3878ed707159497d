"""What an adapter makes of one weight, in blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...merging.low_rank import LowRank
from .lora_targets import Product
from .source import Source

BLOCK = 1 << 18  # elements of a product in memory: 1 MiB stays in the cache


def add_products(
    weight: Tensor, products: Sequence[Product], adapter: Source, dtype: torch.dtype, first_expert: int = 0
) -> Tensor:
    """``weight + sum of scaling * up @ down``, rounded once; DoRA gives every output a norm of its own.

    `weight`: Of fused ones also those from `first_expert` on alone.

    Source: LoRA (arXiv 2106.09685), section 4.1; DoRA (arXiv 2402.09353), equation 5.
    """
    compute = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
    out = torch.empty_like(weight, dtype=dtype)
    if not weight.numel():
        return out
    if products[0].num_experts is not None:
        for expert in range(len(weight)):
            factors = [_of_expert(product, first_expert + expert, adapter, compute) for product in products]
            _add(out[expert], weight[expert], products, factors)
        return out
    factors = [_factors(product, adapter, compute) for product in products]
    into, rows = (x.view(len(factors[0][0]), -1) for x in (out, weight))
    _add(into, rows, products, factors)
    for product in products:
        if product.magnitude is not None:
            _normalize(into, rows, products, factors, adapter.tensor(product.magnitude).to(compute).flatten())
    return out


def as_low_rank(products: Sequence[Product], adapter: Source, dtype: torch.dtype) -> LowRank | None:
    """The sum of plain products as one; None where it is more: DoRA, fused experts, a bias."""
    if any(one.down is None or one.magnitude or one.num_experts is not None for one in products):
        return None
    transposed = {one.transposed for one in products}
    if len(transposed) > 1:
        return None
    ups = [adapter.tensor(one.up).to(dtype).flatten(1) * one.scaling for one in products]
    downs = [adapter.tensor(one.down).to(dtype).flatten(1) for one in products if one.down]
    return LowRank(torch.cat(ups, dim=1), torch.cat(downs), transposed.pop())


def _add(into: Tensor, weight: Tensor, products: Sequence[Product], factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    compute = factors[0][0].dtype
    num_rows = max(1, BLOCK // weight.shape[1])
    # one block for all: fresh memory costs more than the product
    memory = None if compute == into.dtype else torch.empty(num_rows, weight.shape[1], dtype=compute)
    for begin in range(0, len(weight), num_rows):
        part = into[begin : begin + num_rows]
        part.copy_(_sum(part if memory is None else memory[: len(part)], weight, begin, products, factors))


def _sum(
    block: Tensor, weight: Tensor, begin: int, products: Sequence[Product], factors: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Fills a block of rows of the sum, in the dtype that is computed in."""
    end = begin + len(block)
    block.copy_(weight[begin:end])
    for product, (left, right) in zip(products, factors, strict=True):
        block.addmm_(left[begin:end], right, alpha=product.scaling)
    return block


def _normalize(
    into: Tensor,
    weight: Tensor,
    products: Sequence[Product],
    factors: Sequence[tuple[Tensor, Tensor]],
    magnitude: Tensor,
) -> None:
    """The sum with the norm `magnitude` for every output, which is a column of a transposed weight."""
    compute, by_column = magnitude.dtype, products[0].transposed
    num_rows = max(1, BLOCK // weight.shape[1])
    memory = torch.empty(num_rows, weight.shape[1], dtype=compute)
    starts = range(0, len(weight), num_rows)
    squares = torch.zeros_like(magnitude)
    for begin in starts if by_column else ():
        squares += _sum(memory[: len(weight) - begin], weight, begin, products, factors).square().sum(0)
    for begin in starts:
        block = _sum(memory[: len(weight) - begin], weight, begin, products, factors)
        if by_column:
            block *= magnitude / squares.sqrt()
        else:
            block *= (magnitude[begin : begin + len(block)] / torch.linalg.vector_norm(block, dim=1))[:, None]
        into[begin : begin + len(block)].copy_(block)


def _factors(product: Product, adapter: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As matrices in the layout of the weight.  # [rows, rank], [rank, columns]"""
    up = adapter.tensor(product.up).to(dtype)
    if product.down is None:
        return up[:, None], up.new_ones(1, 1)
    down = adapter.tensor(product.down).to(dtype)
    up, down = up.flatten(1), down.flatten(1)
    return (down.T, up.T) if product.transposed else (up, down)


def _of_expert(product: Product, expert: int, adapter: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PEFT has the ranks of one expert together in lora_A, and the experts of one rank together in lora_B."""
    assert product.down is not None and product.num_experts is not None
    down = adapter.tensor(product.down).view(product.num_experts, -1, adapter.tensors[product.down].shape[1])[expert]
    up = adapter.tensor(product.up)
    up = up.view(len(up), -1, product.num_experts)[..., expert]
    left, right = (down.T, up.T) if product.transposed else (up, down)
    return left.to(dtype), right.to(dtype)
