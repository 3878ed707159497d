"""torch_masks against mergekit's own sparsification: the same masks, and the generator left alike."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.ops.masks import unpack
from surgery_kernels.ops.torch_masks import torch_masks
from tests.cases import DTYPES, assert_same, gaussian, grid, inputs, option_id

pytestmark = pytest.mark.any_isa

SHAPES = [(1,), (7,), (2_049,), (3, 300), (300, 5), (1, 600), (4, 70, 9), (2, 3, 5, 7)]


@pytest.fixture
def sparsify() -> ModuleType:
    return pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed", exc_type=ImportError)


def without_zeros(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    """Task vectors whose kept entries show."""
    return [torch.where(x - base == 0, 0.25, x - base) for x in experts]


@pytest.mark.parametrize("most_draws", [200, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mergekit_draws_the_same(
    sparsify: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, most_draws: int
) -> None:
    for kind in (gaussian, grid):
        task_vectors = without_zeros(*inputs(kind, shape, 3, dtype))
        density = [0.3, 1.0, 0.55]
        for rule, epsilon in (("random", None), ("della", 0.2)):
            if epsilon and shape == (1,):
                continue  # mergekit divides by zero
            torch.manual_seed(11)
            expected = [
                sparsify.bernoulli(x, d) if epsilon is None else sparsify.della_magprune(x, d, epsilon)
                for x, d in zip(task_vectors, density, strict=True)
            ]
            following = torch.rand(3)
            torch.manual_seed(11)
            options = {"density": density, "rule": rule, "epsilon": epsilon, "most_draws": most_draws}
            masks = unpack(torch_masks(None, task_vectors, **options), shape)
            assert torch.equal(torch.rand(3), following)
            for mask, wanted in zip(masks, expected, strict=True):
                assert torch.equal(mask, wanted != 0), f"{kind.__name__}, {rule}"
            generator = torch.Generator().manual_seed(11)
            again = torch_masks(None, task_vectors, generator=generator, **options)
            assert torch.equal(unpack(again, shape), masks)


def test_more_numbers_than_are_drawn_at_a_time(sparsify: ModuleType) -> None:
    x = torch.randn(1_200, 1_000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        task_vector = torch.where(x == 0, 1.0, x).to(dtype)
        for epsilon in (None, 0.1):
            torch.manual_seed(5)
            expected = sparsify.sparsify(
                task_vector,
                0.3,
                sparsify.SparsificationMethod("della_magprune" if epsilon else "random"),
                0,
                epsilon or 0,
            )
            torch.manual_seed(5)
            rule = "della" if epsilon else "random"
            bits = torch_masks(None, [task_vector], density=0.3, rule=rule, epsilon=epsilon)
            assert torch.equal(unpack(bits, x.shape)[0], expected != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_task_vectors_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, (30, 41), 2, dtype)
    before = [x.clone() for x in (base, *experts)]
    drawn = []
    for given in ((base, experts), (None, [expert - base for expert in experts])):
        generator = torch.Generator().manual_seed(3)
        drawn.append(torch_masks(*given, density=0.4, rule="della", epsilon=0.2, generator=generator))
    assert torch.equal(*drawn)
    for x, untouched in zip((base, *experts), before, strict=True):
        assert_same(x, untouched)


def test_a_row_of_one_entry_and_no_entries() -> None:
    torch.manual_seed(0)
    kept = unpack(torch_masks(None, [torch.ones(4_000, 1)], density=0.3, rule="della", epsilon=0.2), (4_000,))
    assert abs(kept.double().mean() - 0.3) < 5 * 0.46 / 63
    assert torch_masks(None, [torch.ones(3, 0, 2)], density=0.3, rule="della", epsilon=0.2).shape == (1, 0)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("rule must be one of 'random', 'della', got 'x'", {"rule": "x"}),
        ("density must be in (0, 1], got 2.0", {"density": 2.0}),
        ("epsilon must be given with rule='della', got none", {"rule": "della"}),
        ("most_draws must be 8 or more, got 7", {"most_draws": 7}),
    ],
    ids=str,
)
def test_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        torch_masks(None, [torch.ones(3)], **{"density": 0.5, **changes})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^generator must be on the CPU, got cuda"):
        torch_masks(None, [torch.ones(3)], density=0.5, generator=torch.Generator("cuda"))
