"""Spectral methods on the matrices of one block of ViT-B/32, 7M parameters: the formula as its authors run it in eager
PyTorch, compiled, FusionBench's, and ours by its declaration.

Bound: the products of the way that ours goes, at the rate of one of torch's in float32 (those of Gram matrices are in
float64 for polar factors, at half of it), a symmetric one counted half, and 9 r^3 FLOPs for the eigenvectors of a
matrix [r, r].
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bench_surgery_adapter import Products
from conftest import Measure
from inputs import NUM_TASKS, vit_b32_shapes
from torch import Tensor

from surgery_kernels import merge_state_dicts

StateDict = dict[str, Tensor]
SHAPES = {
    name: shape for name, shape in vit_b32_shapes(layers=1).items() if name.endswith("weight") and len(shape) == 2
}
NUM_PARAMS = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def tsv_m(vectors: list[Tensor]) -> Tensor:
    k = min(vectors[0].shape) // len(vectors)
    parts = [torch.linalg.svd(vector, full_matrices=False) for vector in vectors]
    left = torch.cat([u[:, :k] for u, _, _ in parts], dim=1)
    values = torch.cat([s[:k] for _, s, _ in parts])
    right = torch.cat([v[:k] for _, _, v in parts])
    u_left, _, v_left = torch.linalg.svd(left, full_matrices=False)
    u_right, _, v_right = torch.linalg.svd(right, full_matrices=False)
    return torch.linalg.multi_dot((u_left, v_left, torch.diag(values), u_right, v_right))


def iso_c(vectors: list[Tensor]) -> Tensor:
    u, s, v = torch.linalg.svd(torch.stack(vectors).sum(0), full_matrices=False)
    return torch.linalg.multi_dot((u, torch.diag(torch.ones_like(s) * s.mean()), v))


def wudi(vectors: list[Tensor]) -> Tensor:
    stacked = torch.stack(vectors)
    merged = torch.nn.Parameter(stacked.sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    squares = stacked.flatten(1).square().sum(-1)[:, None, None]
    for _ in range(WUDI_STEPS):
        loss = (((merged - stacked) @ stacked.mT).square() / squares).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return merged.detach()


def svc(vectors: list[Tensor]) -> Tensor:
    """Of their sum, in float64 as FusionBench."""
    total, stacked = sum(vectors[1:], vectors[0]).double(), torch.stack(vectors).double()
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    response, own = u.T @ total, u.T @ stacked
    shares = (response * own).sum(-1) / own.square().sum(-1).clamp(min=1e-12)
    return ((u * (len(vectors) / shares.clamp(min=1).sum(0) * s)) @ v).float()


def doge(vectors: list[Tensor]) -> Tensor:
    """Without the trim, which is over the model."""
    rank, scales = min(vectors[0].shape), [0.07 / vector.norm() for vector in vectors]
    lefts = [torch.linalg.svd(vector, full_matrices=False)[0][:, : rank // len(vectors)] for vector in vectors]
    common = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)[0][:, : rank // 6]
    change = torch.nn.Parameter(torch.zeros_like(vectors[0]))
    optimizer = torch.optim.Adam([change], lr=1e-4)
    total = sum(scale * vector for scale, vector in zip(scales, vectors, strict=True))
    for _ in range(DOGE_STEPS):
        optimizer.zero_grad()
        moved = total + sum(scales) * change
        loss = sum((-vector * moved + vector * vector).sum(1).square().sum() for vector in vectors)
        loss.backward()
        change.grad -= common @ common.T @ change.grad
        optimizer.step()
    return sum(scale * (vector + change) for scale, vector in zip(scales, vectors, strict=True)).detach()


WUDI_STEPS = 5  # of 300
DOGE_STEPS = 20  # of 400


def polar_flops(m: int, c: int) -> int:
    r = min(m, c)
    return 3 * m * c * r + 9 * r**3


def tsv_m_flops(m: int, c: int) -> int:
    r = min(m, c)
    return NUM_TASKS * (m * c * r + 9 * r**3) + 4 * m * c * r + polar_flops(m, r) + polar_flops(r, c)


def svc_flops(m: int, c: int) -> int:
    r = min(m, c)
    return (3 + 2 * NUM_TASKS) * m * c * r + 9 * r**3


def doge_flops(m: int, c: int) -> int:
    r = min(m, c)
    return (NUM_TASKS + 1) * (m * c * r + 9 * r**3) + DOGE_STEPS * m * c * (4 * NUM_TASKS + 4 * r // 6)


def wudi_flops(m: int, c: int) -> int:
    return m * c * c * (2 * WUDI_STEPS + 3 * NUM_TASKS)


@dataclass(frozen=True)
class Case:
    """A method; `theirs`: module and function of FusionBench, with its options."""

    name: str
    eager: Callable[[list[Tensor]], Tensor]
    flops: Callable[[int, int], int]  # of a matrix [m, c]
    theirs: tuple[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # ours
    their_options: dict[str, Any] = field(default_factory=dict)
    scale: int = 1  # of what is run to what the row is about

    def call(self, contender: str, base: StateDict, experts: list[StateDict]) -> Callable[[], StateDict]:
        if contender == "ours":
            return lambda: merge_state_dicts(base, experts, method=self.name, progress=False, **self.options)
        if contender in ("eager", "compiled"):
            torch.compiler.reset()
            merged = self.eager if contender == "eager" else torch.compile(self.eager, dynamic=False)
            return lambda: {
                name: tensor + merged([expert[name] - tensor for expert in experts]) for name, tensor in base.items()
            }
        assert self.theirs is not None
        module = importlib.import_module(f"fusion_bench.method.{self.theirs[0]}")
        theirs = getattr(module, self.theirs[1])

        def merge() -> StateDict:
            vectors = [{name: expert[name] - tensor for name, tensor in base.items()} for expert in experts]
            merged = theirs(vectors, accelerator="cpu", **self.their_options)
            return {name: tensor + merged[name].detach() for name, tensor in base.items()}

        return merge


CASES = [
    Case("tsv_m", tsv_m, tsv_m_flops),
    Case("iso_c", iso_c, polar_flops, ("isotropic_merging.iso_utils", "iso_c")),
    Case("svc", svc, svc_flops),
    Case("doge", doge, doge_flops, None, {"steps": DOGE_STEPS, "density": 1.0}, {}, 400 // DOGE_STEPS),
    Case(
        "wudi",
        wudi,
        wudi_flops,
        ("wudi.wudi", "wudi_merging"),
        {"steps": WUDI_STEPS},
        {"iter_num": WUDI_STEPS},
        300 // WUDI_STEPS,
    ),
]
CONTENDERS = ("eager", "compiled", "fusion_bench", "ours")
WITH_LOOPS = ("wudi", "doge")  # of an optimizer: not compiled
ROWS = [
    (case, name)
    for case in CASES
    for name in CONTENDERS
    if (name != "fusion_bench" or case.theirs) and (name != "compiled" or case.name not in WITH_LOOPS)
]


@pytest.fixture(scope="module")
def models() -> list[StateDict]:
    """A base and experts whose task vectors have falling singular values, as trained ones do."""
    generator = torch.Generator().manual_seed(0)

    def vector(shape: tuple[int, ...]) -> Tensor:
        rank = min(shape)
        left, right = (torch.randn(side, rank, generator=generator) / side**0.5 for side in shape)
        return 0.02 * (left * torch.linspace(1, 0.1, rank).square()) @ right.T

    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return [base, *({name: x + vector(tuple(x.shape)) for name, x in base.items()} for _ in range(NUM_TASKS))]


@pytest.mark.parametrize(("case", "contender"), ROWS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.benchmark(group="papers")
def test_spectral(
    measure: Measure,
    rounds: int,
    models: list[StateDict],
    case: Case,
    contender: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if contender == "fusion_bench":
        pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    base, *experts = models
    ours = case.call("ours", base, experts)

    def check(result: StateDict) -> float:
        for name, tensor in ours().items():
            change = (tensor - base[name]).norm()
            assert (result[name] - tensor).norm() < 1e-2 * change, name
        return 0.0

    products = Products()
    before = products.rate()
    measure(
        case.call(contender, base, experts),
        ours=ours if contender != "ours" else None,
        check=check,
        rounds=rounds,
        extra={
            "op": f"paper {case.name}",
            "num_params": NUM_PARAMS,
            "num_tasks": NUM_TASKS,
            "dtype": "fp32",
            "contender": contender,
            "scale": case.scale,
            "least_bytes": (NUM_TASKS + 2) * sum(tensor.nbytes for tensor in base.values()),
            "flops": sum(case.flops(shape[0], math.prod(shape[1:])) for shape in SHAPES.values()),
        },
    )
    measure.benchmark.extra_info["matmul_flops_per_second"] = statistics.mean((before, products.rate()))
    capsys.readouterr()  # FusionBench prints
