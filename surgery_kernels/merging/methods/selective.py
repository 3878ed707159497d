"""Methods that decide for every entry by how far it moved and how much the models agree: NearSwap, SCE, RAM, Arcee.

RAM is a merge of TIES' op; the others are programs of steps (`programs.py`), with a few numbers between their reads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ops.ties_merge import check_options
from ..method import AT_LEAST_0, FINITE, SHARE, Method, arithmetic_of, nonfinite_policy, shared
from ..scope import Scope
from . import programs

SMALLEST = 1e-6  # sum of weights that is divided by


class Stepwise(Method):
    """What methods of programs share: each tensor alone, and that NaN and infinity show in the sums of a first read."""

    nonfinite: str

    def merge(self, scope: Scope) -> None:
        for part in scope.parts():
            if part.out[0].numel():
                self._merge_tensor(part)

    @abstractmethod
    def _merge_tensor(self, scope: Scope) -> None: ...

    @property
    def _rounded(self) -> bool:
        """Whether every step is rounded to the stored dtype, as mergekit's are."""
        return getattr(self, "arithmetic", "exact") == "mergekit"

    def _is_known(self, scope: Scope, sums: Tensor) -> bool:
        """Whether to go on. Sums of task vectors or their squares, which may be too large without any that is."""
        if self.nonfinite == "propagate" or bool(sums.isfinite().all()):
            return True
        if self.nonfinite == "error":
            scope.check_finite(dtype=scope.out[0].dtype if self._rounded else scope.compute)
        return self.nonfinite == "error"

    def _merge_what_is_known(self, scope: Scope) -> None:
        """Task vectors that are not finite are 0, and a base that is not stays; costs copies of all inputs."""
        merging = replace(self, nonfinite="propagate")  # type: ignore[call-arg]
        merging._merge_tensor(programs.only_finite(scope, self._rounded))
        programs.restore(scope)


@dataclass(frozen=True)
class NearSwap(Stepwise):
    """Moves every entry of the base towards the other model's, by `t` at most: near ones are swapped."""

    name = "nearswap"
    title = "NearSwap"
    formula = "w * expert + (1 - w) * base, w = clamp(t / max(|base - expert|, 1e-6), 0, 1)"
    source = "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001; mergekit 0.1.5 `nearswap`"
    num_experts = (1, 1)

    t: float = shared(range=FINITE, meaning="largest change of an entry")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    def _merge_tensor(self, scope: Scope) -> None:
        sums = programs.nearswap(self._rounded).run(scope.inputs, [self.t], out=scope.out)
        if not self._is_known(scope, sums):
            self._merge_what_is_known(scope)


@dataclass(frozen=True)
class Sce(Stepwise):
    """Selects the entries that vary most, weighs experts by how much they changed, and erases minorities."""

    name = "sce"
    title = "SCE"
    formula = "base + sum of w_t m_t tau_t / max(sum of w_t m_t, 1e-6), w_t ~ mean(tau_t^2), m_t: the elected sign"
    source = "FuseChat-3.0, SCE (arXiv 2408.07990); mergekit 0.1.5 `sce`"
    decides = "tensor"
    ignored = ("int8_mask",)

    select_topk: float = shared(1.0, range=SHARE, meaning="share of the entries with nonzero variance that are merged")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 2 if self.select_topk >= 1 else 5

    def _merge_tensor(self, scope: Scope) -> None:
        inputs = scope.inputs
        form = (scope.num_tasks, self._rounded)
        limit, squares = self._select(inputs, *form) if self.select_topk < 1 else self._take_all(inputs, *form)
        if not self._is_known(scope, squares):
            return self._merge_what_is_known(scope)
        numbers = torch.cat([limit, self._weights(scope, squares)], dim=1)
        programs.sce(*form, self.select_topk < 1).run(inputs, numbers, out=scope.out)

    def _take_all(self, inputs: list[Tensor], *form: Any) -> tuple[Tensor, Tensor]:
        squares = programs.sce_squares(*form, False).run(inputs)
        return squares[:, :0], squares

    def _select(self, inputs: list[Tensor], *form: Any) -> tuple[Tensor, Tensor]:
        """The smallest variance that is selected and where its ties end, [1, 2]; and the squares.  # [1, num_tasks]

        Where all entries vary, as in most models of float32, they need not be counted before.
        """
        counting, some = programs.nonzero_variances(*form), [_first_rows(x) for x in inputs]
        varying, counted = float(inputs[0].numel()), -1.0
        if counting.run(some).item() < some[0].numel():
            varying = counting.run(inputs).item()
        while varying != counted:
            count = int(varying * self.select_topk)
            thresholds, cuts = programs.variances(*form).limits(inputs, [count])
            limit = torch.cat([thresholds.double(), cuts], dim=1)
            sums = programs.sce_squares(*form, True).run(inputs, limit)
            varying, counted = sums[0, -1].item(), varying
        return limit, sums[:, :-1]

    def _weights(self, scope: Scope, squares: Tensor) -> Tensor:
        """Mean squares by their sum, rounded as the arithmetic says.  # float64 [1, num_tasks]"""
        dtype = scope.out[0].dtype if self._rounded else scope.compute
        means = (squares / scope.out[0].numel()).to(dtype)
        total = means.sum().item()
        return (means / total if abs(total) >= SMALLEST else torch.ones_like(means) / scope.num_tasks).double()


@dataclass(frozen=True)
class Ram(Method):
    """Keeps what one expert alone changed as it is, and averages what several changed."""

    name = "ram"
    title = "Reinforced Agent Merging"
    formula = "base + (the only tau_t that moved, or the mean of those that did), moved: |tau_t| > epsilon"
    source = "Reinforced Agent Merging (arXiv 2601.13572); mergekit 0.1.5 `ram`"

    epsilon: float = shared(1e-5, range=AT_LEAST_0, meaning="an entry that moved no further did not move")
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        self._merge(scope, None)

    def _merge(self, scope: Scope, unique_scales: Tensor | None) -> None:
        options = check_options(
            scope.num_tasks,
            density=1.0,
            semantics="exact",
            elect="none",
            reduce="unique",
            nonfinite=self.nonfinite,
        )
        above = torch.nextafter(torch.tensor(self.epsilon, dtype=torch.float32), torch.tensor(torch.inf))
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base,
            scope.flat_experts,
            **options,
            thresholds=above.expand(scope.num_tasks),
            unique_scales=unique_scales,
            names=scope.names,
            out=scope.out,
        )


@dataclass(frozen=True)
class RamPlus(Ram):
    """RAM whose lone changes grow the more an expert shares with others, tensor by tensor."""

    name = "ramplus_tl"
    title = "Reinforced Agent Merging Plus"
    formula = "RAM with a lone tau_t times 1 + r * clamp(shared_t / max(unique_t, epsilon), 0, alpha)"
    source = "Reinforced Agent Merging (arXiv 2601.13572); mergekit 0.1.5 `ramplus_tl`"
    decides = "tensor"

    r: float = shared(0.1, meaning="how much a lone change grows")
    alpha: float = shared(0.2, range=AT_LEAST_0, meaning="largest ratio of shared to lone entries that counts")

    @property
    def reads(self) -> int:
        return 2

    def merge(self, scope: Scope) -> None:
        together, alone = self._counts(scope)
        self._merge(scope, 1 + self.r * (together / alone.clamp(min=self.epsilon)).clamp(0, self.alpha))

    def _counts(self, scope: Scope) -> Tensor:
        """Of the entries that every expert moved with others, and alone.  # float64 [2, num_tensors, num_tasks]"""
        sums = programs.moved(scope.num_tasks, self.nonfinite == "drop").run(scope.inputs, [self.epsilon])
        return sums.cpu().view(-1, 2, scope.num_tasks).movedim(1, 0)


@dataclass(frozen=True)
class ArceeFusion(Stepwise):
    """Takes over the changes that matter most: far from the base, in rows whose softmax the model has changed.

    Importance is computed in float64 and the quartiles are exact. mergekit's, in bfloat16, is rounding noise, and above
    a million entries it takes the quartiles of a random sample.
    """

    name = "arcee_fusion"
    title = "Arcee Fusion"
    formula = "base + tau where |tau| * KL(softmax(expert) || softmax(base)) >= median + 1.5 * (third - first quartile)"
    source = "arcee.ai; mergekit 0.1.5 `arcee_fusion`"
    num_experts = (1, 1)
    decides = "tensor"

    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 6

    def _merge_tensor(self, scope: Scope) -> None:
        inputs = scope.inputs
        largest = [_rows_of(x).amax(dim=1).double() for x in inputs]
        sums = programs.exponentials().run(inputs, torch.stack(largest, dim=1), axis="row", wide=True)
        if not self._is_known(scope, sums):
            return self._merge_what_is_known(scope)
        numbers = torch.stack([*largest, *(1 / sums[:, :2]).unbind(dim=1)], dim=1)
        divergences = programs.divergence().run(inputs, numbers, axis="row", wide=True).clamp(min=0)  # [rows, 1]
        numel = scope.out[0].numel()
        ranks = [numel - int(share * (numel - 1)) for share in (0.25, 0.5, 0.75)]
        quartiles, _ = programs.importance().limits(inputs, ranks, divergences, axis="row", whole=True)
        first, median, third = quartiles[0]
        threshold = (median + 1.5 * (third - first)).double().expand_as(divergences)
        programs.fusion().run(inputs, torch.cat([divergences, threshold], dim=1), axis="row", out=scope.out)


def _first_rows(x: Tensor, most: int = 1 << 16) -> Tensor:
    return x[: max(1, most * len(x) // x.numel())] if x.dim() else x


def _rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
