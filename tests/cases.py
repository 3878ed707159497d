"""Inputs that reach every branch of the trim, the election and the merge, and the comparison with the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (0,), (1,), (3, 0, 2), (63,), (64,), (65,), (257,), (7, 3, 5), (20_001,)]
NUM_TASKS = [1, 2, 3, 8, 20, 33, 64]
SEMANTICS = ["paper", "mergekit", "peft"]

Inputs = tuple[Tensor, list[Tensor]]


def generator(*seed: Any) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(repr(seed))) % 2**63)


def gaussian(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    base = torch.randn(n, generator=g, dtype=torch.float64)
    return base.to(dtype), [
        (base + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype) for _ in range(num_tasks)
    ]


def grid(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Multiples of 1/64: sums are exact, magnitudes tie by the thousand."""
    base = torch.randint(-64, 65, (n,), generator=g) / 64
    return base.to(dtype), [(base + torch.randint(-5, 6, (n,), generator=g) / 64).to(dtype) for _ in range(num_tasks)]


def sparse(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Nearly every entry of a task vector is zero: so is the threshold."""
    base = torch.randint(-64, 65, (n,), generator=g) / 64
    steps = [torch.randint(-9, 10, (n,), generator=g) * (torch.rand(n, generator=g) < 0.04) for _ in range(num_tasks)]
    return base.to(dtype), [(base + step / 64).to(dtype) for step in steps]


def equal(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """One magnitude everywhere: the tie rule alone decides."""
    base = torch.randint(-64, 65, (n,), generator=g) / 64
    signs = [torch.randint(0, 2, (n,), generator=g) * 2 - 1 for _ in range(num_tasks)]
    return base.to(dtype), [(base + sign / 4).to(dtype) for sign in signs]


def cancelling(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator, lean: int = 0) -> Inputs:
    """Experts in opposing pairs: elections are draws, and `lean` is the sign that most of the others take."""
    base = torch.zeros(n)
    experts = []
    for t in range(num_tasks // 2):
        step = (torch.randint(1, 9, (n,), generator=g) * (torch.randint(0, 2, (n,), generator=g) * 2 - 1)) / 64
        decided = torch.arange(n) % 5 == t % 5
        experts += [step, torch.where(decided & (lean != 0), lean * step.abs(), -step)]
    experts += [torch.zeros(n) for _ in range(num_tasks % 2)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def leaning_up(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    return cancelling(n, num_tasks, dtype, g, lean=1)


def leaning_down(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    return cancelling(n, num_tasks, dtype, g, lean=-1)


def denormal(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    whole = [torch.randint(-40, 41, (n,), generator=g).to(torch.float64) * step for _ in range(num_tasks + 1)]
    return whole[0].to(dtype), [expert.to(dtype) for expert in whole[1:]]


def large(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Task vectors near the largest number: sums overflow, task vectors do not."""
    limit = torch.finfo(dtype).max / 4
    whole = [(torch.rand(n, generator=g, dtype=torch.float64) * 2 - 1) * limit for _ in range(num_tasks + 1)]
    return whole[0].to(dtype), [expert.to(dtype) for expert in whole[1:]]


def rows(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Magnitudes that grow by row over several decades: a sample of a few places misjudges them."""
    scale = 10 ** (torch.arange(n) * 8 // max(n, 1) * 0.5 - 3).to(torch.float64)
    noise = [torch.randn(n, generator=g, dtype=torch.float64) * scale for _ in range(num_tasks)]
    return torch.zeros(n, dtype=dtype), [x.to(dtype) for x in noise]


def rising(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Sorted magnitudes, every other expert downwards."""
    base, experts = gaussian(n, num_tasks, dtype, g)
    steps = [(expert - base).sort().values for expert in experts]
    return torch.zeros_like(base), [step if t % 2 else step.flip(0) for t, step in enumerate(steps)]


Kind = Callable[[int, int, torch.dtype, torch.Generator], Inputs]
KINDS: list[Kind] = [
    gaussian, grid, sparse, equal, cancelling, leaning_up, leaning_down, denormal, large, rows, rising,
]  # fmt: skip


def inputs(kind: Kind, shape: int | Sequence[int], num_tasks: int, dtype: torch.dtype) -> Inputs:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    base, experts = kind(math.prod(shape), num_tasks, dtype, generator(kind.__name__, shape, num_tasks, dtype))
    return base.reshape(shape), [expert.reshape(shape) for expert in experts]


NOT_FINITE = {  # what an op over the tensors "a" and "b" says of `not_finite`
    "base": "base must be finite, got 1 NaN or infinite values in tensor 'b'",
    "expert": "experts[1] must be finite, got 2 NaN or infinite values in tensor 'b'",
    "overflow": "experts[0] - base must be finite, got 1 overflows in tensor 'b'",
}


def not_finite(which: str) -> tuple[list[Tensor], list[Tensor]]:
    """The bases of two tensors, and two experts of the first, then of the second, which is not finite."""
    bases, experts = [], []
    for _ in range(2):
        base, of_tensor = inputs(grid, (30, 3), 2, torch.float32)
        bases.append(base)
        experts += of_tensor
    if which == "base":
        bases[1][2, 2] = math.inf
    elif which == "expert":
        experts[3][29, :2] = math.nan
    else:
        bases[1][0, 0], experts[2][0, 0] = -3e38, 3e38
    return bases, experts


def weights_of(num_tasks: int) -> list[float]:
    """Uneven, one of them zero and one negative."""
    return [[0.7, -0.3, 0.0, 1.1, 0.45][t % 5] for t in range(num_tasks)]


def densities_of(num_tasks: int) -> list[float]:
    return [[0.2, 1.0, 0.5, 0.003, 0.77][t % 5] for t in range(num_tasks)]


def merge_options() -> list[dict[str, Any]]:
    """Every combination of the options that are not numbers; weights=True asks for `weights_of`."""
    options: list[dict[str, Any]] = []
    for elect in ("sum", "count", "none"):
        for reduce, weights, rescale in itertools.product(("mean", "sum"), (None, True), (False, True)):
            mergekit = {"semantics": "mergekit", "elect": elect, "weights": weights, "rescale": rescale}
            options.append({**mergekit, "reduce": reduce})
            if reduce == "mean":
                options.append({**mergekit, "reduce": "mean", "normalize": False})
    for elect in ("sum", "count"):
        for reduce in ("mean", "sum", "max"):
            options.append({"semantics": "paper", "elect": elect, "reduce": reduce})
        for reduce, weights in itertools.product(("mean", "sum"), (None, True)):
            options.append({"semantics": "peft", "elect": elect, "reduce": reduce, "weights": weights})
    return options


def split_options() -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = []
    for elect, weights, rescale in itertools.product(("sum", "count", "none"), (None, True), (False, True)):
        options.append({"semantics": "mergekit", "elect": elect, "weights": weights, "rescale": rescale})
    for elect in ("sum", "count"):
        options.append({"semantics": "paper", "elect": elect})
        for weights in (None, True):
            options.append({"semantics": "peft", "elect": elect, "weights": weights})
    return options


def with_weights(options: dict[str, Any], num_tasks: int) -> dict[str, Any]:
    return {**options, "weights": weights_of(num_tasks)} if options.get("weights") is True else options


def option_id(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(
            str(v) if isinstance(v, str) else k for k, v in value.items() if v is not None and v is not False
        )
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values [12, 21] at other strides or addresses."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        wide = torch.full((24, 63), math.nan, dtype=x.dtype)
        wide[::2, ::3] = x
        return wide[::2, ::3]
    shifted = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
    shifted[1:] = x.reshape(-1)
    return shifted[1:].view(x.shape)


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal in dtype, shape and every value, NaN equal to NaN."""
    assert actual.dtype == expected.dtype, f"{what} dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what} shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} {int(wrong.sum())} of {wrong.numel()} values differ, "
            f"first at {first}: {actual[first].item()!r}, expected {expected[first].item()!r}"
        )


def bits(x: Tensor) -> Tensor:
    """The stored bits: unlike ==, they tell -0 from 0."""
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])
