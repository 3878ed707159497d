"""Methods that say which experts need an entry of a vector that all share: Consensus, TALL masks, EMR.

Consensus merges what several need. TALL masks and EMR keep the model of every expert as one shared model and masks:
here as the model of one of them, in `checkpoint.packed` as files from which any of them is put together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.steps import Steps
from ...ops.ties_merge import check_options
from ..method import AT_LEAST_0, SHARE_ABOVE_0, Method, nonfinite_policy, per_model, shared, task_vector_scale
from ..scope import Scope
from . import mask_programs

RESCALES = ("norms", "tensor_means")


@dataclass(frozen=True)
class Masked(Method):
    """What the family shares: each tensor alone, and that NaN and infinity show in the sums of a read."""

    nonfinite: str = nonfinite_policy()

    @property
    def _drop(self) -> bool:
        return self.nonfinite == "drop"

    def merge(self, scope: Scope) -> None:
        facts = self.decide(scope) if scope.decided is None else scope.decided
        for part in scope.parts():
            if part.out[0].numel():
                self._merge_tensor(part, facts)

    @abstractmethod
    def _merge_tensor(self, scope: Scope, facts: Any) -> None: ...

    def _run(self, steps: Steps, scope: Scope, numbers: Sequence[float], out: Sequence[Tensor]) -> Tensor:
        """The sums, which are of finite numbers where they are finite; else these are looked for.

        Raises:
            RuntimeError: as `merge_state_dicts` has it.
        """
        sums = steps.run(scope.inputs, numbers, out=out)
        if self.nonfinite == "error" and not sums.isfinite().all():
            scope.check_finite()
        return sums


@dataclass(frozen=True)
class Tall(Masked):
    """What methods share that ask which experts need an entry, by how near it is to them."""

    selectivity: PerExpert = per_model(
        0.4, range=AT_LEAST_0, meaning="how much nearer to the base than to the shared model an unneeded entry may be"
    )

    def _selectivities(self, num_tasks: int) -> list[float]:
        return arguments.per_expert("selectivity", self.selectivity, num_tasks)


@dataclass(frozen=True)
class ConsensusTa(Tall):
    """Adds the task vectors where several experts need what they add up to, and nothing elsewhere."""

    name = "consensus_ta"
    title = "Consensus task arithmetic"
    formula = "base + lam * tau where sum of m_t >= agreement, tau = sum of tau_t, m_t as for tall_masks"
    source = "Localizing Task Information (arXiv 2405.07813), section 4"

    lam: float = task_vector_scale()
    agreement: int = shared(2, kind=int, range=AT_LEAST_0, meaning="how many experts must need an entry; 0: none")

    @property
    def reads(self) -> int:
        return 1

    def _merge_tensor(self, scope: Scope, facts: Any) -> None:
        numbers = [self.lam, self.agreement, *self._selectivities(scope.num_tasks)]
        self._run(mask_programs.consensus(scope.num_tasks, self._drop), scope, numbers, scope.out)


@dataclass(frozen=True)
class ConsensusTies(ConsensusTa):
    """Merges as TIES does, by sums, where several experts need the result, and nothing elsewhere."""

    name = "consensus_ties"
    title = "Consensus TIES"
    formula = "base + lam * tau where sum of m_t >= agreement, tau: the paper's TIES, summed, m_t as for tall_masks"
    source = "Localizing Task Information (arXiv 2405.07813), section 4; TIES-Merging (arXiv 2306.01708)"
    decides = "scope"
    decides_by = ("density",)
    scope = "model"
    recipe_scope = "model"

    density: PerExpert = per_model(0.2, meaning="share of its entries an expert keeps", range=SHARE_ABOVE_0)

    @property
    def reads(self) -> int:
        return 3

    def decide(self, scope: Scope) -> dict[str, Any]:
        """Thresholds over the scope, and the sign of draws: that of most elections."""
        checked = check_options(scope.num_tasks, density=self.density, nonfinite=self.nonfinite)
        thresholds, _ = torch.ops.surgery_kernels.trim_limits(
            scope.base,
            scope.flat_experts,
            checked["density"],
            semantics="paper",
            nonfinite=self.nonfinite,
            names=scope.names,
        )
        numbers = thresholds.double().tolist()
        sign = mask_programs.votes(scope.num_tasks, self._drop).run(scope.inputs, numbers).sum().sign()
        return {"thresholds": numbers, "sign": sign.item()}

    def _merge_tensor(self, scope: Scope, facts: Any) -> None:
        numbers = [self.lam, self.agreement, facts["sign"], *facts["thresholds"]]
        numbers += self._selectivities(scope.num_tasks)
        self._run(mask_programs.consensus_of_ties(scope.num_tasks, self._drop), scope, numbers, scope.out)


class Packable(Masked):
    """What methods share that keep every expert's model as one shared model, masks and scales."""

    task: int

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        if self.task >= num_tasks:
            raise ValueError(f"task must be in [0, {num_tasks}), got {self.task}")

    @abstractmethod
    def pack(self, scope: Scope, bits: Sequence[Tensor]) -> list[float]:
        """Fills `scope.out` with the shared model and `bits` with the masks, one read; returns the experts' scales.

        bits: of every tensor, uint8 [num_tasks, ceil(numel / 8)].
        """


def which_task() -> Any:
    return shared(kind=int, range=AT_LEAST_0, meaning="the expert whose model it is, counted from 0")


@dataclass(frozen=True)
class TallMasks(Packable, Tall):
    """One expert's model from the sum of all task vectors: the entries that this expert needs."""

    name = "tall_masks"
    title = "TALL masks"
    formula = "base + m_task * tau, tau = sum of tau_t, m_t = |tau_t| > selectivity_t * |tau - tau_t|"
    source = "Localizing Task Information (arXiv 2405.07813), section 3"

    task: int = which_task()

    @property
    def reads(self) -> int:
        return 1

    def _merge_tensor(self, scope: Scope, facts: Any) -> None:
        steps = mask_programs.tall(scope.num_tasks, int(self.task), self._drop)
        self._run(steps, scope, self._selectivities(scope.num_tasks), scope.out)

    def pack(self, scope: Scope, bits: Sequence[Tensor]) -> list[float]:
        steps, numbers = mask_programs.tall_packed(scope.num_tasks, self._drop), self._selectivities(scope.num_tasks)
        for part, masks in zip(scope.parts(), bits, strict=True):
            self._run(steps, part, numbers, [*part.out, *masks])
        return [1.0] * scope.num_tasks


@dataclass(frozen=True)
class Emr(Packable):
    """One expert's model from the entries that moved furthest the way that all together did: elect, mask, rescale."""

    name = "emr"
    title = "EMR-Merging"
    formula = "base + r_task * m_task * tau, tau: the largest tau_t of the sign of their sum, m_t: where tau_t has it"
    source = "EMR-Merging (arXiv 2405.17461), algorithm 1"
    decides = "scope"
    scope = "model"
    recipe_scope = "model"

    task: int = which_task()
    rescale: str = shared(
        "norms",
        choices=RESCALES,
        meaning="r_t = |tau_t| / |m_t tau|: of L1 norms, as in the paper, or of tensors' means, as in its script",
    )

    def decide(self, scope: Scope) -> dict[str, Any]:
        """The scale of every expert over the scope."""
        steps = mask_programs.emr_norms(scope.num_tasks, self._drop)
        return {"scales": self._scales(scope, [self._run(steps, part, (), ()) for part in scope.parts()])}

    def _scales(self, scope: Scope, norms: Sequence[Tensor]) -> list[float]:
        """norms: [1, 2 * num_tasks] of every tensor."""
        table = torch.cat([*norms]).cpu().view(-1, 2, scope.num_tasks)
        if self.rescale == "tensor_means":
            table = table / torch.tensor([max(1, experts[0].numel()) for experts in scope.experts])[:, None, None]
        before, kept = table.sum(dim=0)
        return torch.where(kept > 0, before / kept, 0.0).tolist()

    def _merge_tensor(self, scope: Scope, facts: Any) -> None:
        steps = mask_programs.emr(scope.num_tasks, int(self.task), self._drop)
        steps.run(scope.inputs, [facts["scales"][int(self.task)]], out=scope.out)

    def pack(self, scope: Scope, bits: Sequence[Tensor]) -> list[float]:
        steps = mask_programs.emr_packed(scope.num_tasks, self._drop)
        pairs = zip(scope.parts(), bits, strict=True)
        return self._scales(scope, [self._run(steps, part, (), [*part.out, *masks]) for part, masks in pairs])
