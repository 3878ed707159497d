"""Merges of diffusion models that are another model at every stage of the denoising."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import arguments, mix, ties_merge
from ..ops.masks import check_seed
from .state_dicts import StateDict, owners_of


@dataclass(frozen=True)
class BySteps:
    """A model for each stage: the steps above a number, down from the noise."""

    states: dict[float, dict[str, Tensor]]  # by what their steps are above

    def at(self, step: float) -> dict[str, Tensor]:
        """The state dict for a denoising step; for steps above none of the numbers, that of the lowest."""
        below = [above for above in self.states if above < step]
        return self.states[max(below) if below else min(self.states)]


def merge_by_steps(
    base: StateDict,
    experts: Sequence[StateDict],
    coefficients: Mapping[float, Sequence[float]],
    *,
    nonfinite: str = "error",
) -> BySteps:
    """``base + sum_t coefficients[above][t] * (expert_t - base)`` for the steps above each number, all from one read.

    Args:
        base, experts: As of `merge_state_dicts`.
        coefficients: For each stage a finite number per expert, by the step that its steps are above: ``{500: [0.0],
            0: [1.0]}`` is the base for noisy steps and the expert for those from 500 down.
        nonfinite: As in `mix`.

    Returns:
        One state dict for each stage; those are as many models in memory. Integer and boolean tensors are the base's,
        and what shares memory in all models does in each result.

    Raises:
        ValueError, TypeError: no stage, a coefficient that is missing or not finite, or the state dicts differ.
        RuntimeError: NaN or infinity under ``nonfinite="error"``.

    Source: the decoupling over time of Extrapolating and Decoupling (arXiv 2503.00948), section 3.3, for any merge.
    """
    if not coefficients:
        raise ValueError("coefficients must be of at least one stage, got none")
    if not experts:
        raise ValueError("experts must be at least one state dict, got none")
    table = [arguments.per_expert("coefficients", list(row), len(experts)) for row in coefficients.values()]
    owner = owners_of(base, experts, "base")
    states: list[dict[str, Tensor]] = [{} for _ in table]
    for name, tensor in base.items():
        if owner[name] != name:
            made = [state[owner[name]] for state in states]
        elif tensor.is_floating_point():
            made = list(mix(tensor, [expert[name] for expert in experts], table, nonfinite=nonfinite))
        else:
            made = [tensor.detach().clone() for _ in states]
        for state, one in zip(states, made, strict=True):
            state[name] = one
    return BySteps(dict(zip(coefficients, states, strict=True)))


def extrapolate_and_decouple(
    base: StateDict,
    expert: StateDict,
    *,
    extrapolation: float = 0.25,
    dynamics: float = 0.75,
    expert_weight: float = 1.0,
    adaptation: float = 0.25,
    density: float = 0.3,
    boundary: float = 500,
    seed: int = 0,
    nonfinite: str = "error",
) -> BySteps:
    """Noisy steps go away from the fine-tuning that took the motion out of a model, late steps follow it: EDG.

    ``base - dynamics * extrapolation * m_1 * tau / density`` for steps above `boundary`, else
    ``expert_weight * expert + adaptation * m_2 * tau / density``; tau = expert - base, m_1 and m_2 ~ Bernoulli(density)
    entry by entry (DARE). Tensors of one dimension or none have m = density: nothing is dropped, nothing scaled up.

    Args:
        base: The pretrained state dict.
        expert: The fine-tuned one. It may have tensors that the base lacks (an adapter's); both results get them.
        extrapolation: How far to go beyond the base, in task vectors; finite (the paper's code: dyn-alpha).
        dynamics: The share of that which is taken; finite (dyn-beta).
        expert_weight: Factor of the expert in late steps; finite (con-alpha).
        adaptation: How much of its task vector is added once more; finite (con-beta).
        density: Probability of keeping an entry, in (0, 1].
        boundary: The last step of the late stage; of 1000 steps, half.
        seed: Of the masks, any integer of 64 bits: by seed and name of the tensor, m_1 as of task 0, m_2 as of task 1.
        nonfinite: As in `ties_merge`.

    Returns:
        Both state dicts: ``result.at(step)``. With the default `expert_weight` each entry is rounded once.

    Raises:
        ValueError, TypeError: an argument is outside its range, or a tensor of the base has no equal in the expert.
        RuntimeError: NaN or infinity under ``nonfinite="error"``.

    Source: Extrapolating and Decoupling Image-to-Video Generation Models (arXiv 2503.00948), sections 3.2 and 3.3.
    """
    for argument, value in (
        ("extrapolation", extrapolation),
        ("dynamics", dynamics),
        ("expert_weight", expert_weight),
        ("adaptation", adaptation),
        ("boundary", boundary),
    ):
        if not math.isfinite(arguments.number(argument, value)):
            raise ValueError(f"{argument} must be finite, got {value}")
    arguments.check_density(density, 1)
    check_seed(seed)
    shared = {name: expert[name] for name in expert if name in base}
    owner = owners_of(base, [shared], "base")
    early: dict[str, Tensor] = {}
    late: dict[str, Tensor] = {}

    def moved(name: str, start: Tensor, towards: Tensor, lam: float, task: int) -> Tensor:
        """``start + lam * m * (towards - start) / density``."""
        if start.dim() < 2:
            return mix(start, [towards], [lam], nonfinite=nonfinite)  # type: ignore[return-value]
        drawn = {"keep_density": density, "seed": seed, "tensor_id": zlib.crc32(name.encode()), "task_ids": [task]}
        how = {"density": 1.0, "semantics": "exact", "elect": "none", "normalize": False, "nonfinite": nonfinite}
        return ties_merge(start, [towards], lam=lam / density, **how, **drawn)  # type: ignore[arg-type]

    for name, a in base.items():
        if owner[name] != name:
            early[name], late[name] = early[owner[name]], late[owner[name]]
        elif not a.is_floating_point():
            early[name], late[name] = a.detach().clone(), a.detach().clone()
        else:
            b = shared[name]
            early[name] = moved(name, a, b, -dynamics * extrapolation, 0)
            late[name] = moved(name, b, a, -adaptation, 1)
            if expert_weight != 1:
                more = late[name].to(compute := torch.promote_types(a.dtype, torch.float32))
                late[name] = (more + (expert_weight - 1) * b.detach().to(compute)).to(a.dtype)
    for name in expert:
        if name not in base:
            early[name], late[name] = expert[name].detach().clone(), expert[name].detach().clone()
    return BySteps({float(boundary): early, -math.inf: late})
