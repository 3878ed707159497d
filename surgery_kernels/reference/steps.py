"""Programs of element-wise steps, one instruction after the other."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops.masks import pack
from ..ops.steps import Code
from .gram import RUN
from .sums import block_sum, fold_halves

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TO_INTEGER = 1.5 * 2.0**52  # added to a small number it leaves the nearest integer in the low bits
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


def steps(
    inputs: Sequence[Tensor],
    num_inputs: int,
    program: Sequence[int],
    numbers: Tensor,
    *,
    axis: str = "tensor",
    wide: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """The outputs and the sums of `torch.ops.surgery_kernels.steps_out`."""
    outputs, sums = [], []
    first = 0
    for i in range(0, len(inputs), num_inputs):
        block_of = _blocks(inputs[i].shape, axis)
        count = _num_blocks(inputs[i].shape, axis)
        of_tensor = numbers if len(numbers) == 1 else numbers[first : first + count]
        stored, columns = run(inputs[i : i + num_inputs], program, of_tensor, block_of, wide)
        outputs += [x if x.dtype == torch.uint8 else x.reshape(inputs[i].shape) for x in stored]
        sums.append(_add_up(columns, inputs[i].shape, axis, count))
        first += count
    return outputs, torch.cat(sums)


def steps_limits(
    inputs: Sequence[Tensor],
    num_inputs: int,
    program: Sequence[int],
    numbers: Tensor,
    ranks: Sequence[int],
    *,
    axis: str = "tensor",
    wide: bool = False,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """Thresholds and cuts of `torch.ops.surgery_kernels.steps_limits`, by stable sorts."""
    limits = []
    first = 0
    for i in range(0, len(inputs), num_inputs):
        block_of = _blocks(inputs[i].shape, axis)
        count = _num_blocks(inputs[i].shape, axis)
        of_tensor = numbers if len(numbers) == 1 else numbers[first : first + count]
        (keys,), _ = run(inputs[i : i + num_inputs], program, of_tensor, block_of, wide, keys=True)
        chosen = [block_of >= 0] if whole else [block_of == block for block in range(count)]
        limits += [[_limit(keys.abs(), of_block, rank) for rank in ranks] for of_block in chosen]
        first += count
    compute = torch.float64 if wide else torch.promote_types(inputs[0].dtype, torch.float32)
    thresholds = torch.tensor([[threshold for threshold, _ in of_block] for of_block in limits], dtype=compute)
    cuts = torch.tensor([[cut for _, cut in of_block] for of_block in limits], dtype=torch.int64)
    return thresholds.reshape(-1, len(ranks)), cuts.reshape(-1, len(ranks))


def _limit(keys: Tensor, chosen: Tensor, rank: int) -> tuple[float, int]:
    if rank == 0:
        return math.inf, 0
    places = chosen.nonzero()[:, 0]
    order = keys[places].sort(descending=rank > 0, stable=True).indices[: abs(rank)]
    threshold = keys[places][order[-1]]
    ties = (keys == threshold) | (keys.isnan() & threshold.isnan())
    return threshold.item(), int(places[order][ties[places[order]]].max()) + 1


@np.errstate(all="ignore")
def run(
    inputs: Sequence[Tensor], program: Sequence[int], numbers: Tensor, block_of: Tensor, wide: bool, keys: bool = False
) -> tuple[list[Tensor], Tensor]:
    """The outputs of one tensor, flat, as stored or where `keys` as computed, and what its sums add up.

    block_of: the block of every element.  # results: [num_params] each, [num_sums, num_params] float64
    """
    stored = inputs[0].dtype
    compute = torch.float64 if wide else torch.promote_types(stored, torch.float32)
    flat = [x.reshape(-1).to(compute) for x in inputs]
    place = torch.arange(flat[0].numel())
    r: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}

    def number(k: int, dtype: torch.dtype) -> Tensor:
        return numbers[:, k].to(dtype)[block_of if len(numbers) > 1 else torch.zeros_like(block_of)]

    for i in range(0, len(program), 5):
        code, d, a, b, rounds = Code(program[i]), *program[i + 1 : i + 5]
        match code:
            case Code.STORE:
                outputs[d] = r[a] if keys else r[a].to(stored)
                continue
            case Code.BITS:
                outputs[d] = pack((r[a] != 0)[None])[0]
                continue
            case Code.SUM:
                sums[d] = r[a].double()
                continue
            case Code.DOT:
                sums[d] = r[a].double() * r[b].double()
                continue
            case Code.LOAD:
                x = flat[a]
            case Code.NUMBER:
                x = number(a, compute)
            case Code.ADD:
                x = r[a] + r[b]
            case Code.SUB:
                x = r[a] - r[b]
            case Code.MUL:
                x = r[a] * r[b]
            case Code.DIV:
                x = r[a] / r[b]
            case Code.FMA:
                x = fused_multiply_add(r[a], r[b], r[d])
            case Code.MIN:
                x = torch.where(r[a].isnan() | (r[a] < r[b]), r[a], r[b])
            case Code.MAX:
                x = torch.where(r[a].isnan() | (r[a] > r[b]), r[a], r[b])
            case Code.ABS:
                x = r[a].abs()
            case Code.NEG:
                x = -r[a]
            case Code.SQRT:
                x = torch.from_numpy(np.sqrt(r[a].numpy()))  # torch's own is not exact on the CPU
            case Code.EXP:
                x = exponential(r[a].double()).to(compute)
            case Code.LOG:
                x = logarithm(r[a].double()).to(compute)
            case Code.GT:
                x = (r[a] > r[b]).to(compute)
            case Code.GE:
                x = (r[a] >= r[b]).to(compute)
            case Code.EQ:
                x = (r[a] == r[b]).to(compute)
            case Code.SELECT:
                x = torch.where(r[d] != 0, r[a], r[b])
            case Code.WITHIN:
                limit, cut = number(b, compute), number(b + 1, torch.float64)
                x = ((r[a] > limit) | (r[a] == limit) & (place < cut)).to(compute)
        r[d] = x.to(stored).to(compute) if rounds else x
    empty = torch.zeros(0, flat[0].numel(), dtype=torch.float64)
    return [outputs[j] for j in sorted(outputs)], torch.stack([sums[s] for s in sorted(sums)]) if sums else empty


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once."""
    name, number = ("fma", ctypes.c_double) if a.dtype == torch.float64 else ("fmaf", ctypes.c_float)
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [number] * 3, number
    results = np.frompyfunc(function, 3, 1)(a.numpy(), b.numpy(), c.numpy())
    return torch.from_numpy(np.asarray(results, dtype=a.numpy().dtype)).reshape(a.shape)


def exponential(x: Tensor) -> Tensor:
    """e^x of float64: 2^n e^r, |r| <= ln(2) / 2, by its power series."""
    y = torch.where(x > 710, 710.0, x)
    y = torch.where(y < -746, -746.0, y)
    n = y * 1.44269504088896338700 + _TO_INTEGER - _TO_INTEGER
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, 1 / math.factorial(13))
    for k in range(12, 1, -1):
        p = p * r + 1 / math.factorial(k)
    p = 1.0 + (r + r * r * p)
    half = (n * 0.5 + _TO_INTEGER) - _TO_INTEGER  # two factors: the result may be subnormal or too large
    return torch.where(x.isnan(), x, p * _power_of_two(half) * _power_of_two(n - half))


def exponential_f32(x: Tensor) -> Tensor:
    """The same of float32, to its precision."""
    to_integer = 1.5 * 2.0**23
    y = torch.where(x > 89, 89.0, x)
    y = torch.where(y < -104, -104.0, y)
    n = y * 1.44269504 + to_integer - to_integer
    r = (y - n * 0.693145752) - n * 1.42860677e-6
    p = torch.full_like(r, 1 / math.factorial(7))
    for k in range(6, 1, -1):
        p = p * r + 1 / math.factorial(k)
    p = 1.0 + (r + r * r * p)
    half = (n * 0.5 + to_integer) - to_integer
    factors = [((m.nan_to_num().int() + 127) << 23).view(torch.float32) for m in (half, n - half)]
    return torch.where(x.isnan(), x, p * factors[0] * factors[1])


def logarithm(x: Tensor) -> Tensor:
    """The natural logarithm of float64: x = 2^k (1 + f), log(1 + f) = 2 atanh(s), s = f / (2 + f), by its series."""
    small = x < 2.0**-1022
    bits = torch.where(small, x * 2.0**54, x).view(torch.int64) + ((1023 << 52) - _SQRT_HALF_BITS)
    k = (bits >> 52).double() - 1023.0 - torch.where(small, 54.0, 0.0).double()
    f = ((bits & 0x000FFFFFFFFFFFFF) + _SQRT_HALF_BITS).view(torch.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    p = torch.full_like(z, 2 / 23)
    for i in range(21, 2, -2):
        p = p * z + 2 / i
    square = 0.5 * f * f
    y = k * _LN2_HIGH - ((square - (s * (square + z * p) + k * _LN2_LOW)) - f)
    special = torch.where(x == 0, -torch.inf, torch.where(x < 0, torch.nan, x))
    return torch.where((x > 0) & (x < torch.inf), y, special)


def _power_of_two(n: Tensor) -> Tensor:
    return (n.nan_to_num().long() + 1023 << 52).view(torch.float64)


def _num_blocks(shape: Sequence[int], axis: str) -> int:
    if axis == "tensor" or len(shape) < 2:
        return 1
    return math.prod(shape[:-1] if axis == "row" else shape[1:])


def _blocks(shape: Sequence[int], axis: str) -> Tensor:
    """The block of every element."""
    place = torch.arange(math.prod(shape))
    if axis == "tensor" or len(shape) < 2:
        return torch.zeros_like(place)
    return place // max(1, shape[-1]) if axis == "row" else place % max(1, math.prod(shape[1:]))


def _add_up(terms: Tensor, shape: Sequence[int], axis: str, count: int) -> Tensor:
    """Sums in the order that all backends keep.  # [num_sums, num_params] -> [count, num_sums]"""
    num_sums, num_params = terms.shape
    if count == 0 or num_params == 0:
        return torch.zeros(count, num_sums, dtype=torch.float64)
    if axis != "column" or len(shape) < 2:
        return block_sum(terms.reshape(num_sums, count, num_params // count)).T
    runs = terms.reshape(num_sums, shape[0], count).split(RUN, dim=1)
    return fold_halves(torch.stack([_one_after_the_other(run) for run in runs], dim=2)).T


def _one_after_the_other(x: Tensor) -> Tensor:
    """The sum over the second dimension."""
    total = torch.zeros_like(x[:, 0])
    for term in x.unbind(1):
        total = total + term
    return total
