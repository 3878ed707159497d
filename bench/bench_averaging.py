"""One step of experts weights averaging over the feed-forward networks of a ViT-B layer, 8 experts of 4.7M parameters.

Bound: every expert is read once and written once, in place. Eager: the formula by `torch._foreach`, and the least that
it can be done with: the mean, and a `lerp` of every expert towards it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from torch import Tensor, nn

from surgery_kernels.routed import ExpertsAveraging, RandomExperts

WIDTH, NUM_EXPERTS, SHARE = 768, 8, 0.3
NUM_PARAMS = 8 * WIDTH * WIDTH + 5 * WIDTH
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def experts(dtype: torch.dtype) -> RandomExperts:
    network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).to(dtype)
    mixture = RandomExperts(network, NUM_EXPERTS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return mixture


def lists_of(mixture: RandomExperts) -> list[list[Tensor]]:
    """[expert][parameter]"""
    return [[parameter.detach() for parameter in expert.parameters()] for expert in mixture.experts]


def eager_formula(lists: list[list[Tensor]]) -> None:
    moved = []
    for i, own in enumerate(lists):
        total = torch._foreach_mul(own, 1 - SHARE)
        for j, other in enumerate(lists):
            if j != i:
                torch._foreach_add_(total, other, alpha=SHARE / (NUM_EXPERTS - 1))
        moved.append(total)
    for own, new in zip(lists, moved, strict=True):
        torch._foreach_copy_(own, new)


def eager_mean(lists: list[list[Tensor]]) -> None:
    mean = torch._foreach_add(lists[0], lists[1])
    for other in lists[2:]:
        torch._foreach_add_(mean, other)
    torch._foreach_div_(mean, NUM_EXPERTS)
    for own in lists:
        torch._foreach_lerp_(own, mean, SHARE * NUM_EXPERTS / (NUM_EXPERTS - 1))


EAGER: dict[str, Callable[[list[list[Tensor]]], None]] = {"averaging": eager_formula, "averaging by a mean": eager_mean}


def contender_of(kind: str, contender: str) -> Callable[[list[list[Tensor]]], None]:
    torch.compiler.reset()
    return torch.compile(EAGER[kind], dynamic=False) if contender == "compiled" else EAGER[kind]


def describe(kind: str, dtype: str, contender: str) -> dict[str, Any]:
    return {
        "op": f"mix {kind}",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_EXPERTS,
        "dtype": dtype,
        "contender": contender,
        "semantics": "paper",
        "least_bytes": 2 * NUM_EXPERTS * NUM_PARAMS * DTYPES[dtype].itemsize,
    }


def differing_share(call: Callable[[list[list[Tensor]]], None], dtype: str) -> float:
    """One step of both from the same parameters: they differ by roundings alone."""
    theirs, ours = experts(DTYPES[dtype]), experts(DTYPES[dtype])
    call(lists_of(theirs))
    ExpertsAveraging(ours, SHARE).step()
    slack = NUM_EXPERTS * torch.finfo(DTYPES[dtype]).eps * 0.1  # nearly all parameters are below 0.1
    pairs = list(zip(theirs.parameters(), ours.parameters(), strict=True))
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=0, atol=slack)
    return torch.cat([(x != y).flatten() for x, y in pairs]).float().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contender", ["eager", "compiled"])
@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.benchmark(group="mix")
def test_baseline(measure: Measure, rounds: int, kind: str, contender: str, dtype: str) -> None:
    theirs, call = lists_of(experts(DTYPES[dtype])), contender_of(kind, contender)
    averaging = ExpertsAveraging(experts(DTYPES[dtype]), SHARE)
    measure(
        lambda: call(theirs),
        ours=averaging.step,
        check=lambda _: differing_share(call, dtype),
        rounds=2 * rounds,
        extra=describe(kind, dtype, contender),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.benchmark(group="mix")
def test_ours(measure: Measure, rounds: int, kind: str, dtype: str) -> None:
    averaging = ExpertsAveraging(experts(DTYPES[dtype]), SHARE)
    measure(
        averaging.step,
        check=lambda _: differing_share(eager_formula, dtype),
        rounds=8 * rounds,
        extra=describe(kind, dtype, "ours"),
    )
