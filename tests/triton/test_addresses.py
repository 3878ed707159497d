"""Tables of addresses: alignment tensor by tensor, and words that reach the device while a CUDA graph is captured."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton for this platform")
from surgery_kernels.triton import addresses, combine, finite, gram, masks, mix, ties_keep, ties_merge, trim
from tests.cases import assert_same, gaussian, grid, inputs
from tests.guards import guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

SHIFTS = (0, 1, 0)  # elements behind an address that is a multiple of 16 bytes
LOOKING: tuple[ModuleType, ...] = (addresses, combine, finite, ties_keep)  # where a capture makes a difference


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def switch(on: bool) -> None:
        for module in LOOKING:
            monkeypatch.setattr(module, "is_capturing", lambda device: on)

    return switch


@pytest.mark.parametrize(
    "words",
    [
        torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1]),
        torch.tensor([[math.nan, -math.inf, -0.0], [5e-324, 0.1, 1e308]], dtype=torch.float64),
        torch.tensor([0.1, math.nan, -3.0]),
        torch.tensor([True, False, True]),
        torch.arange(300),
        torch.arange(12).view(3, 4).T,
        torch.zeros(0, 4),
    ],
    ids=lambda words: f"{words.dtype} {list(words.shape)}",
)
def test_words_as_arguments(words: Tensor, capturing: Callable[[bool], None], gpu: torch.device) -> None:
    capturing(True)
    before = words.clone()
    sent = addresses.upload(words, gpu)
    words.zero_()
    assert sent.dtype == before.dtype and sent.shape == before.shape
    assert sent.cpu().contiguous().view(-1).view(torch.uint8).tolist() == before.reshape(-1).view(torch.uint8).tolist()


def calls(base: Tensor, experts: list[Tensor]) -> dict[str, Callable[[str], Any]]:
    """Of every op that may raise for NaN, by `nonfinite`."""
    density, coefficients = [0.3] * 3, torch.full((1, 3, 1), 0.3, dtype=torch.float64)
    out = [torch.empty_like(base)]

    def filled(call: Callable[..., None], *arguments: Any, **options: Any) -> list[Tensor]:
        call([base], experts, *arguments, **options, out=out)
        return [x.clone() for x in out]

    factors = {"semantics": "mergekit", "scales": torch.full((1, 3), 0.5, dtype=torch.float64), "weights": [0.1] * 3}
    drawn = {"keep_density": [0.5] * 3, "upper": torch.ones(3), "upper_cuts": [5] * 3, "seed": 2**62 + 1}
    return {
        "trim_limits": lambda nonfinite: trim.trim_limits([base], experts, density, "mergekit", nonfinite),
        "ranks": lambda nonfinite: trim.trim_limits([base], experts, density, nonfinite=nonfinite, ranks=[5, -7, 9]),
        "ties_merge": lambda nonfinite: filled(ties_merge.ties_merge_out, density, nonfinite=nonfinite),
        "narrowed": lambda nonfinite: filled(
            ties_merge.ties_merge_out, density, **factors, **drawn, nonfinite=nonfinite
        ),
        "mix": lambda nonfinite: filled(mix.mix_out, coefficients, divisor=3.0, nonfinite=nonfinite),
        "masks": lambda nonfinite: masks.masks([base], experts, density, "della", [0.1] * 3, nonfinite=nonfinite),
        "gram": lambda nonfinite: gram.gram([base], experts, 3, nonfinite=nonfinite),
    }


CALLS = list(calls(torch.zeros(1), [torch.zeros(1)] * 3))


@pytest.mark.parametrize("name", CALLS)
def test_captured(name: str, capturing: Callable[[bool], None], gpu: torch.device) -> None:
    base, experts = inputs(gaussian, 700, 3, torch.float32)
    call = calls(base.to(gpu), [expert.to(gpu) for expert in experts])[name]

    def tensors(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else [x for part in result for x in tensors(part)]

    capturing(False)
    expected = tensors(call("propagate"))
    capturing(True)
    captured = tensors(call("propagate"))
    for x, y in zip(captured, expected, strict=True):
        assert_same(x, y, name)
    with pytest.raises(ValueError, match="^nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured"):
        call("error")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_unaligned_tensor_is_read_by_itself(dtype: torch.dtype, gpu: torch.device) -> None:
    pairs = [inputs(grid, addresses.CHUNK + 5, 3, dtype) for _ in range(3)]
    moved = [
        [guarded(x, gpu, shift) for x in (base, *experts)] for (base, experts), shift in zip(pairs, SHIFTS, strict=True)
    ]
    bases, experts = [base for base, *_ in moved], [expert for _, *of_tensor in moved for expert in of_tensor]
    table = addresses.Scope(bases, experts, 3).groups[0].table
    assert table[:, addresses.ALIGNED.value].tolist() == [1, 0, 1]
    out = [torch.empty_like(base) for base in bases]
    expected = [torch.empty_like(base) for base, _ in pairs]
    flat = [x for _, of_tensor in pairs for x in of_tensor]
    options: dict[str, Any] = {"semantics": "mergekit", "rescale": True}
    ties_merge.ties_merge_out(bases, experts, [0.3] * 3, **options, out=out)
    torch.ops.surgery_kernels.ties_merge_out([base for base, _ in pairs], flat, [0.3] * 3, **options, out=expected)
    for x, y in zip(out, expected, strict=True):
        assert_same(x.cpu(), y)
