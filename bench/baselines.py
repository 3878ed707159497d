"""TIES as the toolkits compute it: the paper's formula in eager PyTorch or compiled; PEFT and mergekit by import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery_kernels import ties_merge

DENSITY = 0.2

Merge = Callable[[Tensor | None, list[Tensor]], Tensor]


def paper_merge(base: Tensor, experts: list[Tensor]) -> Tensor:
    """One tensor operation after the other, on flat tensors.  # [num_params]"""
    task_vectors = torch.stack(experts) - base
    num_params = base.numel()
    lowest_kept = num_params - int(num_params * DENSITY)
    thresholds = task_vectors.abs().kthvalue(lowest_kept, dim=1, keepdim=True).values
    trimmed = task_vectors * (task_vectors.abs() >= thresholds)
    sign = trimmed.sum(dim=0).sign()
    sign[sign == 0] = sign.sum().sign()
    selected = trimmed * torch.where(sign > 0, trimmed > 0, trimmed < 0)
    count = (selected != 0).sum(dim=0).float()
    mean = selected.sum(dim=0) / count.clamp(min=1)
    return (base + mean).to(base.dtype)


def compiled_merge() -> Merge:
    torch.compiler.reset()
    return torch.compile(paper_merge, dynamic=False)


def peft_merge() -> Merge:
    from peft.utils.merge_utils import ties

    def merge(_: None, task_vectors: list[Tensor]) -> Tensor:
        return ties(task_vectors, torch.ones(len(task_vectors)), DENSITY).to(task_vectors[0].dtype)

    return merge


def mergekit_merge() -> Merge:
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GeneralizedTaskArithmeticMerge
    from mergekit.sparsify import SparsificationMethod

    method = GeneralizedTaskArithmeticMerge(
        consensus_method=ConsensusMethod.sum,
        sparsification_method=SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties",
        method_pretty_name=None,
        method_reference_url=None,
    )

    def merge(base: Tensor, experts: list[Tensor]) -> Tensor:
        group = TensorGroup.from_tensors([base, *experts], base_index=0)
        ids = [entry.id for entry in group.non_base]
        options = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
        return method.merge_group(group, weight=dict.fromkeys(ids, 1.0), density=dict.fromkeys(ids, DENSITY), **options)

    return merge


@dataclass(frozen=True)
class Baseline:
    label: str
    semantics: str
    make: Callable[[], Merge]
    module: str = "torch"  # what must be installed
    takes_base: bool = True  # or task vectors


BASELINES = {
    "eager": Baseline("eager", "paper", lambda: paper_merge),
    "compiled": Baseline("torch.compile", "paper", compiled_merge),
    "peft": Baseline("PEFT", "peft", peft_merge, module="peft", takes_base=False),
    "mergekit": Baseline("mergekit", "mergekit", mergekit_merge, module="mergekit"),
}


def ours(semantics: str) -> Merge:
    return lambda base, experts: ties_merge(base, experts, density=DENSITY, semantics=semantics)
