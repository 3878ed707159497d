"""Methods that keep a part of every task vector: at random (DARE, DELLA) or without its extremes (breadcrumbs).

What is kept goes into the merge of TIES: each with an election of signs and without, rounded once or as mergekit does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.masks import check_epsilon, check_seed
from ...ops.torch_masks import torch_masks
from ..method import SHARE, Method, arithmetic_of, model_weights, nonfinite_policy, per_model, shared, task_vector_scale
from ..scope import Scope
from .linear import scaled_by_sum

NEXT_TO_NONE = 1e-300  # a probability that no number is below
SMALLEST_NORM = 1e-7  # below it nothing is rescaled
STREAMS = ("counter", "mergekit")


@dataclass(frozen=True)
class Sparse(Method):
    """What the family shares."""

    ignored = ("int8_mask",)
    decides = "tensor"
    elect: ClassVar[str]

    density: PerExpert = per_model(recipe_default=1.0, range=SHARE, meaning="share of its entries an expert keeps")
    lam: float = task_vector_scale()
    weights: PerExpert | None = model_weights()
    normalize: bool = shared(False, kind=bool, meaning="divide by the sum of the weights (that agree)")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    def _merge(self, scope: Scope, **kept: Any) -> None:
        weights = arguments.check_weights(self.weights, scope.num_tasks)
        lam, normalize = self.lam, self.normalize
        if self.arithmetic == "exact" and self.elect == "none" and normalize:
            # by the weights of all, kept or not: the op's exact mean divides by those of what is kept
            lam, normalize = scaled_by_sum(lam, weights), False
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base,
            scope.flat_experts,
            [1.0] * scope.num_tasks,
            lam=lam,
            weights=weights,
            semantics=self.arithmetic,
            elect=self.elect,
            normalize=normalize,
            nonfinite=self.nonfinite if scope.decided is None else scope.checked(self.nonfinite),
            names=scope.names,
            out=scope.out,
            **kept,
        )


@dataclass(frozen=True)
class Random(Sparse):
    """What the random methods share: where their numbers come from, and how what is kept makes up for the rest."""

    rule: ClassVar[str]

    rescale: bool = shared(True, kind=bool, meaning="scale what is kept to the L1 norm of the task vector")
    random_seed: int | None = shared(None, kind=int, key=None, meaning="of the masks; none: 0, drawn by counter")
    stream: str | None = shared(
        None,
        choices=STREAMS,
        key=None,
        meaning="by counter, or torch's generator in mergekit's order; none: the latter where a seed is given",
    )

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        check_seed(self.seed)

    @property
    def seed(self) -> int:
        return 0 if self.random_seed is None else int(self.random_seed)

    @property
    def randomness(self) -> str:
        how = "as mergekit draws them" if self._as_mergekit else "by counter"
        return f"random masks of seed {self.seed}, drawn {how}"

    @property
    def _as_mergekit(self) -> bool:
        return (self.stream or ("counter" if self.random_seed is None else "mergekit")) == "mergekit"

    def generator(self) -> torch.Generator | None:
        """What a merge draws from, tensor after tensor by name; None: every entry from its own counter."""
        return torch.Generator().manual_seed(self.seed) if self._as_mergekit else None

    def num_draws(self, numel: int, num_tasks: int) -> int:
        """How many numbers of the generator a tensor takes."""
        return sum(numel for density in self._densities(num_tasks) if self._draws(density))

    def merge(self, scope: Scope) -> None:
        densities = self._densities(scope.num_tasks)
        if scope.generator is None and not self.rescale and self.rule == "random":
            # nothing has to be known of a tensor before its entries are drawn: one read
            self._merge(scope, keep_density=densities, seed=check_seed(self.seed), tensor_ids=scope.tensor_ids)
            return
        if scope.generator is None:
            keep, sums = self._by_counter(scope, densities)
            factors: dict[str, Any] = {"scales": self._scales(scope, sums) if self.rescale else None}
        else:
            keep = [self._drawn(scope, part, densities) for part in range(len(scope.names))]
            factors = {"rescale": self.rescale}
        for bits in keep:
            for t, density in enumerate(arguments.per_expert("density", self.density, scope.num_tasks)):
                if density == 0:  # an op may know it by another density
                    bits[t] = 0
        self._merge(scope, keep=keep, **factors)

    def _by_counter(self, scope: Scope, densities: list[float]) -> tuple[list[Tensor], Tensor]:
        return torch.ops.surgery_kernels.masks(
            scope.base,
            scope.flat_experts,
            densities,
            rule=self.rule,
            epsilon=self._epsilons(scope.num_tasks),
            seed=check_seed(self.seed),
            tensor_ids=scope.tensor_ids,
            nonfinite=self.nonfinite,
            names=scope.names,
        )

    def _drawn(self, scope: Scope, part: int, densities: list[float]) -> Tensor:
        return torch_masks(
            scope.base[part],
            scope.experts[part],
            density=densities,
            rule=self.rule,
            epsilon=self._epsilons(scope.num_tasks),
            generator=scope.generator,
        )

    def _scales(self, scope: Scope, sums: Tensor) -> Tensor:
        """[num_tensors, num_tasks]; mergekit rounds in bfloat16 for bfloat16, else in float32 or wider."""
        scales = torch.ones(sums.shape[:2], dtype=torch.float64)
        for part, experts in enumerate(scope.experts):
            dtype = experts[0].dtype
            work = dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
            work = work if self.arithmetic == "mergekit" else torch.float64
            before, after = sums[part, :, 1].to(work), sums[part, :, 2].to(work)
            kept = (before >= SMALLEST_NORM) & (after >= SMALLEST_NORM)
            scales[part] = torch.where(kept, before / after, 1.0).double().cpu()
        return scales

    def _densities(self, num_tasks: int) -> list[float]:
        """As the ops take them: 0 keeps nothing, but draws as mergekit does."""
        return [density or NEXT_TO_NONE for density in arguments.per_expert("density", self.density, num_tasks)]

    def _epsilons(self, num_tasks: int) -> list[float] | None:
        return None

    def _draws(self, density: float) -> bool:
        return density < 1


@dataclass(frozen=True)
class DareLinear(Random):
    """Drops entries of every task vector at random, scales up the rest, and adds the task vectors."""

    name = "dare_linear"
    title = "linear DARE"
    formula = "base + lam * sum_t weights[t] * scale_t * m_t * (expert_t - base), m_t ~ Bernoulli(density_t)"
    source = "DARE (arXiv 2311.03099); mergekit 0.1.5 `dare_linear`"
    elect = "none"
    rule = "random"


@dataclass(frozen=True)
class DareTies(Random):
    """Drops entries of every task vector at random, scales up the rest, and elects signs as TIES does."""

    name = "dare_ties"
    title = "DARE TIES"
    formula = "base + lam * sum over agreeing t of weights[t] * scale_t * m_t * (expert_t - base)"
    source = "DARE (arXiv 2311.03099); mergekit 0.1.5 `dare_ties`"
    elect = "sum"
    rule = "random"


@dataclass(frozen=True)
class Ranked(Random):
    """What DELLA's two share: entries of a row are kept the more often the larger they are."""

    decides = "row"
    rule = "della"

    epsilon: PerExpert = per_model(0.15, meaning="how far the probability of keeping goes below and above the density")

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        self._epsilons(num_tasks)

    def _densities(self, num_tasks: int) -> list[float]:
        """As the ops take them: nothing is drawn for 0."""
        return [density or 1.0 for density in arguments.per_expert("density", self.density, num_tasks)]

    def _epsilons(self, num_tasks: int) -> list[float] | None:
        return check_epsilon(self.epsilon, self._densities(num_tasks), "della")


@dataclass(frozen=True)
class DellaLinear(Ranked):
    """Drops entries at random, small ones of a row more often, scales up the rest, and adds the task vectors."""

    name = "della_linear"
    title = "linear DELLA"
    formula = "base + lam * sum_t weights[t] * scale_t * m_t * (expert_t - base), m_t by rank within a row"
    source = "DELLA (arXiv 2406.11617); mergekit 0.1.5 `della_linear`"
    elect = "none"


@dataclass(frozen=True)
class Della(Ranked):
    """Drops entries at random, small ones of a row more often, scales up the rest, and elects signs as TIES does."""

    name = "della"
    title = "DELLA"
    formula = "base + lam * mean over agreeing t of weights[t] * scale_t * m_t * (expert_t - base)"
    source = "DELLA (arXiv 2406.11617); mergekit 0.1.5 `della`"
    elect = "sum"

    normalize: bool = shared(True, kind=bool, meaning="divide by the sum of the weights that agree")


@dataclass(frozen=True)
class Breadcrumbs(Sparse):
    """Drops the largest entries of every task vector and the smallest, and adds the task vectors."""

    name = "breadcrumbs"
    title = "Model Breadcrumbs"
    formula = "base + lam * sum_t weights[t] * m_t * (expert_t - base), m_t: ranks between both tails"
    source = "Model Breadcrumbs (arXiv 2312.06795); mergekit 0.1.5 `breadcrumbs`"
    elect = "none"
    decides = "scope"
    decides_by = ("density", "gamma")

    gamma: PerExpert = per_model(0.01, range=SHARE, meaning="share of the largest entries that go, where enough remain")
    rescale: bool = shared(False, kind=bool, meaning="scale what is kept to the L1 norm of the task vector")

    @property
    def reads(self) -> int:
        return 3 if self.rescale else 2

    def decide(self, scope: Scope) -> dict[str, Any]:
        """Limits over the scope, read once; under ``nonfinite="error"`` it is known to be finite afterwards."""
        thresholds, cuts = self._limits(scope)
        return {"thresholds": thresholds.tolist(), "cuts": cuts.tolist()}

    def merge(self, scope: Scope) -> None:
        if scope.decided is None:
            thresholds, cuts = self._limits(scope)
        else:
            thresholds = torch.tensor(scope.decided["thresholds"], dtype=torch.float64)
            cuts = torch.tensor(scope.decided["cuts"], dtype=torch.int64) - scope.offset
        self._merge(
            scope,
            thresholds=thresholds[::2],
            cuts=cuts[::2].tolist(),
            upper=thresholds[1::2],
            upper_cuts=cuts[1::2].tolist(),
            rescale=self.rescale,
        )

    def _limits(self, scope: Scope) -> tuple[Tensor, Tensor]:
        """Thresholds and cuts [2 * num_tasks]: what an expert's entries that are not among the smallest have at least,
        and what its largest, which go, have."""
        numel = sum(experts[0].numel() for experts in scope.experts)
        ranks: list[int] = []
        densities = arguments.per_expert("density", self.density, scope.num_tasks)
        gammas = arguments.per_expert("gamma", self.gamma, scope.num_tasks)
        for density, gamma in zip(densities, gammas, strict=True):
            ranks += kept_ranks(numel, density, gamma)
        return torch.ops.surgery_kernels.trim_limits(
            scope.base,
            scope.flat_experts,
            [1.0] * scope.num_tasks,
            semantics="mergekit",
            nonfinite=self.nonfinite,
            names=scope.names,
            ranks=ranks,
        )


@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """Drops the largest entries of every task vector and the smallest, and elects signs as TIES does."""

    name = "breadcrumbs_ties"
    title = "Model Breadcrumbs with TIES"
    formula = "base + lam * sum over agreeing t of weights[t] * m_t * (expert_t - base), m_t: ranks between both tails"
    source = "Model Breadcrumbs (arXiv 2312.06795); mergekit 0.1.5 `breadcrumbs_ties`"
    elect = "sum"


def kept_ranks(numel: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest entries hold what is kept, and how many of those go as outliers."""
    if density >= 1:
        return numel, 0
    keep, largest = int(density * numel), int(gamma * numel)
    smallest = max(0, numel - keep - largest)  # where nothing small is left to drop, fewer of the largest go
    return numel - smallest, numel - smallest - keep
