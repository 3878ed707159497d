"""Is a baseline's result ours? Asked before any time is reported."""

from __future__ import annotations

import torch
from baselines import DENSITY, Baseline
from torch import Tensor

from surgery_kernels import trim_thresholds


def differing_share(
    theirs: Tensor, ours: Tensor, base: Tensor | None, experts: list[Tensor], baseline: Baseline
) -> float:
    """The share of outputs that differ, all of it at ties; raises where anything else differs.

    Which of the entries tied at the threshold PEFT and mergekit keep is up to an unstable sort. Sums of 8 numbers in
    another order differ by an ulp and, once in a hundred thousand outputs, decide an election; `torch.compile` of
    16-bit tensors keeps intermediate results in float32.
    """
    eps = torch.finfo(ours.dtype).eps
    differs = ~torch.isclose(theirs, ours, rtol=eps, atol=0)
    share = differs.float().mean().item()
    if baseline.semantics != "paper":
        thresholds = trim_thresholds(base, experts, density=DENSITY, semantics=baseline.semantics)
        for expert, threshold in zip(experts, thresholds, strict=True):
            differs &= (expert if base is None else expert - base).abs() != threshold.to(expert.dtype)
    allowed = 0.01 if baseline.label == "torch.compile" and eps > 1e-6 else 1e-5
    unexplained = differs.float().mean().item()
    if unexplained > allowed:
        raise AssertionError(f"{unexplained:.2%} of the outputs of {baseline.label} differ from ours")
    return share
