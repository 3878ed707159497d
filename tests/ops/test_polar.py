"""The polar factor against singular value decompositions in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import polar

pytestmark = pytest.mark.any_isa

SHAPES = [(1, 1), (5, 5), (7, 4), (4, 7), (3, 40), (64, 5), (2, 3, 9, 4), (2, 4, 33)]


def expected(matrices: Tensor, tol: float = 1e-6) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    kept = values > tol * values[..., :1]
    return left @ torch.diag_embed(kept.double()) @ right, (values * kept).sum(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["64", "32"])
def test_factor_and_norm(shape: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    matrices = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    factor, norm = polar(matrices)
    wanted, total = expected(matrices)
    assert factor.dtype == norm.dtype == dtype
    torch.testing.assert_close(factor.double(), wanted, rtol=0, atol=limit)
    torch.testing.assert_close(norm.double(), total, rtol=limit, atol=0)
    gram = factor @ factor.mT if shape[-2] <= shape[-1] else factor.mT @ factor
    torch.testing.assert_close(gram, torch.eye(gram.shape[-1], dtype=dtype).expand_as(gram), rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(6, 6), (6, 30), (30, 6)], ids=str)
def test_directions_that_are_missing_are_zero(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    factor, norm = polar(matrix)
    wanted, total = expected(matrix)
    torch.testing.assert_close(factor.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.double(), total, rtol=1e-5, atol=0)
    assert torch.linalg.matrix_rank(factor, tol=1e-3) == 2
    zeros = polar(torch.zeros(shape))
    assert not zeros[0].any() and not zeros[1].any()


def test_what_counts_as_zero() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.1]))
    assert polar(matrix, tol=0.2)[0].diagonal().tolist() == pytest.approx([1, 1, 0])
    assert polar(matrix, tol=0.2)[1].item() == pytest.approx(5)
    wide = torch.cat([matrix, torch.zeros(3, 5)], dim=1)
    assert polar(wide, tol=0.2)[0].diagonal().tolist() == pytest.approx([1, 1, 0])
    assert polar(wide, tol=0)[1].item() == pytest.approx(5.1)


def test_empty() -> None:
    factor, norm = polar(torch.empty(4, 0, 3))
    assert factor.shape == (4, 0, 3) and norm.tolist() == [0.0] * 4


def test_gradient_and_compiled() -> None:
    matrix = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: polar(x), (matrix,))
    assert torch.autograd.gradcheck(lambda x: polar(x)[1], (matrix[:, :4].detach().requires_grad_(),))
    compiled = torch.compile(polar, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(matrix.detach()), polar(matrix.detach()), strict=True):
        torch.testing.assert_close(actual, wanted)


WRONG: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([1.0],), {}, TypeError, "matrices must be a tensor, got list"),
    ((torch.ones(3),), {}, ValueError, "matrices must have two dimensions or more, got shape (3,)"),
    ((torch.ones(2, 2).half(),), {}, ValueError, "matrices must be float32 or float64, got torch.float16"),
    ((torch.ones(2, 2),), {"tol": 1}, ValueError, "tol must be in [0, 1), got 1"),
]


@pytest.mark.parametrize(("positional", "named", "error", "message"), WRONG, ids=[row[3] for row in WRONG])
def test_errors(positional: Any, named: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        polar(*positional, **named)


@pytest.mark.parametrize("shape", [(40, 40), (40, 90)], ids=str)
def test_rounding_moves_small_directions_as_a_decomposition_does(shape: tuple[int, int]) -> None:
    """Singular values down to 1e-4: an error of about eps / 1e-4; Gram matrices of float32 would leave nothing."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(side, 40, dtype=torch.float64, generator=generator)).Q for side in shape)
    matrix = ((left * torch.logspace(0, -4, 40, dtype=torch.float64)) @ right.mT).float()
    wanted, _ = expected(matrix)
    assert (polar(matrix)[0].double() - wanted).norm() < 1e-3 * wanted.norm()
    residual = polar(matrix)[0] @ polar(matrix)[0].mT - torch.eye(40)
    assert residual.norm() < 1e-3 * 40**0.5
