"""Methods on the sphere: linear in the models, with coefficients that follow from nothing but their dot products.

Two reads: one for all dot products (`gram`), one for the combination (`mix`). Between them a few float64 numbers per
tensor or row, however many iterations a method takes. What mergekit makes of 16 bits is in `spherical_rounded.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import arguments
from ...ops.arguments import PerExpert
from ..method import ABOVE_0, AT_LEAST_0, Method, arithmetic_of, model_weights, nonfinite_policy, shared
from ..scope import Scope
from . import spherical_rounded

SMALLEST_NORM = 1e-8  # below it slerp does not normalise
ALMOST_PARALLEL = 0.9995  # cosine beyond which slerp is linear
OPPOSITE = 1e-6  # sine of an angle below which there is no one way between two directions
SMALLEST_SUM = 1e-6  # of two weights; below it nuslerp takes the middle


@dataclass(frozen=True)
class Spherical(Method):
    """What the family shares."""

    decides = "tensor"

    @property
    def batched(self) -> bool:
        return True


class SphericalOfMergekit(Spherical):
    """What those share that can also round as mergekit does: tensors of 16 bits alone, others do not round."""

    arithmetic: str

    def merge(self, scope: Scope) -> None:
        rounds = [self.arithmetic == "mergekit" and out.dtype.itemsize == 2 for out in scope.out]
        for rounded, merge in ((True, self._merge_rounded), (False, self._merge_exactly)):
            if chosen := [i for i, of_tensor in enumerate(rounds) if of_tensor is rounded]:
                merge(scope.of_tensors(chosen))

    @abstractmethod
    def _merge_rounded(self, scope: Scope) -> None: ...

    @abstractmethod
    def _merge_exactly(self, scope: Scope) -> None: ...


@dataclass(frozen=True)
class Slerp(Spherical):
    """Along the great circle from the base (t = 0) to the expert (t = 1), each tensor as one vector.

    Linear where the two are almost parallel or opposite. A vector of norm 1e-8 or less counts as having norm 1.
    """

    name = "slerp"
    title = "spherical interpolation"
    formula = "(sin((1 - t) theta) * base + sin(t theta) * expert) / sin(theta), theta = angle(base, expert)"
    source = "Shoemake, Animating Rotation with Quaternion Curves (1985); mergekit 0.1.5 `slerp`"
    num_experts = (1, 1)

    t: float = shared(meaning="place between the base (0) and the expert (1)")
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        pair = scope.with_base_first()
        gram = pair.gram(task_vectors=False, nonfinite=self.nonfinite)
        norms = _norms(gram)
        norms = torch.where(norms > SMALLEST_NORM, norms, 1.0)
        cosine = (gram[:, 0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
        coefficients = interpolation(cosine, self.t, cosine.abs() > ALMOST_PARALLEL)
        pair.mix(coefficients, task_vectors=False, nonfinite=scope.checked(self.nonfinite))


@dataclass(frozen=True)
class NuSlerp(SphericalOfMergekit):
    """Along the great circle between two models, or between their task vectors where there is a base.

    Linear only where the angle vanishes; vectors are whole tensors, or the rows or columns of matrices.
    """

    name = "nuslerp"
    title = "NuSLERP"
    formula = "base + slerp(expert_0 - base, expert_1 - base, t), t = weights[1] / (weights[0] + weights[1])"
    source = "mergekit 0.1.5 `nuslerp`"
    base = "optional"
    num_experts = (2, 2)

    weights: PerExpert = model_weights("weight of each model; their shares are the place between", default=1.0)
    flatten: bool = shared(True, kind=bool, key="nuslerp_flatten", meaning="each tensor is one vector")
    row_wise: bool = shared(
        False, kind=bool, key="nuslerp_row_wise", meaning="without flatten: vectors along dimension 0, not the last"
    )
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    @property
    def _t(self) -> float:
        first, second = arguments.check_weights(self.weights, 2)
        total = first + second
        return 0.5 if abs(total) < SMALLEST_SUM else second / total

    @property
    def _axis(self) -> str:
        return "tensor" if self.flatten else "column" if self.row_wise else "row"

    def _merge_rounded(self, scope: Scope) -> None:
        first = spherical_rounded.first_read(2, bool(scope.base))
        for part, squares in spherical_rounded.known_tensors(scope, first, self._axis, self.nonfinite):
            spherical_rounded.nuslerp(part, squares, self._t, self._axis)

    def _merge_exactly(self, scope: Scope) -> None:
        gram = scope.gram(axis=self._axis, nonfinite=self.nonfinite)
        norms = _norms(gram).clamp(min=1e-7)
        cosine = (gram[:, 0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
        coefficients = interpolation(cosine, self._t, 1 - cosine.square() <= 1e-16)
        scope.mix(coefficients, axis=self._axis, nonfinite=scope.checked(self.nonfinite))


@dataclass(frozen=True)
class MultiSlerp(SphericalOfMergekit):
    """One step of the weighted mean on the sphere, of any number of models, or of their task vectors.

    The models are projected onto the tangent plane at their mean direction, averaged there, and projected back. One
    model alone is the result.
    """

    name = "multislerp"
    title = "Multi-SLERP"
    formula = "exp_m(sum_t w_t log_m(x_t / |x_t|)) * sum_t w_t |x_t|, m = direction of sum_t w_t x_t / |x_t|"
    source = "goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit 0.1.5 `multislerp`"
    base = "optional"

    weights: PerExpert = model_weights("weight of each model", default=1.0)
    normalize_weights: bool = shared(True, kind=bool, meaning="divide the weights by their sum")
    eps: float = shared(1e-8, range=ABOVE_0, meaning="smallest norm of the mean direction, and what norms get added")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        if self.normalize_weights and sum(arguments.check_weights(self.weights, num_tasks)) == 0:
            raise ValueError(f"weights must have a sum other than 0, got {self.weights}")

    def merge(self, scope: Scope) -> None:
        if scope.num_tasks == 1:
            scope.copy(scope.flat_experts)
        else:
            super().merge(scope)

    def _merge_rounded(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, scope.num_tasks)
        first = spherical_rounded.first_read(scope.num_tasks, bool(scope.base))
        for part, squares in spherical_rounded.known_tensors(scope, first, "tensor", self.nonfinite):
            spherical_rounded.multislerp(part, squares, weights, self.normalize_weights, self.eps)

    def _merge_exactly(self, scope: Scope) -> None:
        weights = torch.tensor(arguments.check_weights(self.weights, scope.num_tasks), dtype=torch.float64)
        if self.normalize_weights:
            weights = weights / weights.sum()
        gram = scope.gram(nonfinite=self.nonfinite)
        scope.mix(self._coefficients(scope, gram, weights), nonfinite=scope.checked(self.nonfinite))

    def _coefficients(self, scope: Scope, gram: Tensor, weights: Tensor) -> Tensor:
        """[num_tasks, num_tensors]: every vector below is a sum of the models, given by its coefficients."""
        norms = _norms(gram)  # [num_tasks, num_tensors]
        weights = weights[:, None]
        mean = weights / (norms + self.eps)
        length = _length(gram, mean)
        vanishes = length < self.eps
        cancel = vanishes & (norms.amax(dim=0) > 0)  # where all are zero nothing changes
        if scope.num_tasks > 2 and cancel.any():
            name = scope.names[int(cancel.nonzero()[0])]
            raise ValueError(f"weights must leave a mean direction, got models that cancel in tensor {name!r}")
        safe = torch.where(vanishes, 1.0, length)
        cosines = torch.einsum("bij,jb->ib", gram, mean) / safe / (norms + self.eps)
        tangent = mean - (weights * cosines).sum(dim=0) * mean / safe
        angle = _length(gram, tangent) + self.eps
        result = (weights * norms).sum(dim=0) * (angle.cos() * mean / safe + angle.sin() / angle * tangent)
        return torch.where(vanishes, weights.expand_as(result), result)


@dataclass(frozen=True)
class Karcher(SphericalOfMergekit):
    """The mean of the models' directions on the sphere, found by iteration, times the mean of their norms.

    All models count alike. One whose tensor has norm `tol` or less takes no part in the direction. In bfloat16 and
    float16 mergekit iterates on rounded directions, which leaves noise as large as what the models differ in; here, and
    in recipes, the iteration runs on float64 dot products unless `arithmetic` is "mergekit".
    """

    name = "karcher"
    title = "the Karcher mean"
    formula = "argmin_u sum_t angle(u, x_t)^2 * mean_t |x_t|"
    source = "Karcher means in model merging (arXiv 2603.04972); mergekit 0.1.5 `karcher`"
    base = "none"

    max_iter: int = shared(10, kind=int, range=AT_LEAST_0, meaning="iterations at most")
    tol: float = shared(1e-5, range=AT_LEAST_0, meaning="angle and norm below which nothing moves")
    arithmetic: str = arithmetic_of(default="exact")
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        if scope.num_tasks == 1:
            scope.copy(scope.flat_experts)
        else:
            super().merge(scope)

    def _merge_rounded(self, scope: Scope) -> None:
        first = spherical_rounded.first_read(scope.num_tasks, False)
        for part, squares in spherical_rounded.known_tensors(scope, first, "tensor", self.nonfinite):
            spherical_rounded.karcher(part, squares, self.max_iter, self.tol)

    def _merge_exactly(self, scope: Scope) -> None:
        gram = scope.gram(task_vectors=False, nonfinite=self.nonfinite)
        coefficients = torch.stack([self._coefficients(of_tensor) for of_tensor in gram], dim=1)
        scope.mix(coefficients, task_vectors=False, nonfinite=scope.checked(self.nonfinite))

    def _coefficients(self, gram: Tensor) -> Tensor:
        """[num_tasks]: the direction is a sum of the models' directions, given by its coefficients."""
        norms = gram.diagonal().sqrt()
        valid = norms > self.tol
        if not valid.any():
            return torch.zeros_like(norms)
        units = torch.where(valid, 1 / norms, 0.0)
        cosines = gram * units[:, None] * units
        share = valid.double() / valid.sum()
        mean, length = share, _length(cosines, share)
        if length < self.tol:  # the first direction stands in
            mean = torch.zeros_like(share)
            mean[int(valid.nonzero()[0])] = 1.0
        else:
            mean = mean / length
        for _ in range(self.max_iter):
            cosine = (cosines @ mean).clamp(-1, 1)
            angle = cosine.acos()
            far = valid & (angle >= self.tol) & (angle.sin() > OPPOSITE)
            pull = torch.where(far, share * angle / torch.where(far, angle.sin(), 1.0), 0.0)
            tangent = pull - (pull * cosine).sum() * mean
            step = _length(cosines, tangent)
            if step < self.tol:
                break
            mean = step.cos() * mean + step.sin() * tangent / step
            length = _length(cosines, mean)
            if length > self.tol:
                mean = mean / length
        return norms.mean() * mean * units


@dataclass(frozen=True)
class ModelStock(SphericalOfMergekit):
    """Between the base and the mean of the experts, as far as the angles between their task vectors say."""

    name = "model_stock"
    title = "Model Stock"
    formula = "t * mean_t expert_t + (1 - t) * base, t = N c / (1 + (N - 1) c), c = mean cosine of the task vectors"
    source = "Model Stock (arXiv 2403.19522); mergekit 0.1.5 `model_stock`"
    num_experts = (2, None)

    filter_wise: bool = shared(False, kind=bool, meaning="decide for every row of the last dimension, not per tensor")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    @property
    def _axis(self) -> str:
        return "row" if self.filter_wise else "tensor"

    def _merge_rounded(self, scope: Scope) -> None:
        first = spherical_rounded.first_read(scope.num_tasks, True, spherical_rounded.PAIRS)
        for part, sums in spherical_rounded.known_tensors(scope, first, self._axis, self.nonfinite):
            spherical_rounded.model_stock(part, sums, self._axis)

    def _merge_exactly(self, scope: Scope) -> None:
        gram = scope.gram(axis=self._axis, nonfinite=self.nonfinite)
        norms = _norms(gram)  # [num_tasks, num_blocks]
        i, j = torch.triu_indices(scope.num_tasks, scope.num_tasks, 1)
        cosine = (gram[:, i, j].T / (norms[i] * norms[j]).clamp(min=1e-6)).clamp(-1, 1).mean(dim=0)
        below = 1 + (scope.num_tasks - 1) * cosine
        singular = below.abs() < 1e-6
        t = torch.where(singular, 0.0, scope.num_tasks * cosine / torch.where(singular, 1.0, below))
        scope.mix(
            (t / scope.num_tasks).expand(scope.num_tasks, -1), axis=self._axis, nonfinite=scope.checked(self.nonfinite)
        )


def interpolation(cosine: Tensor, t: float, linear: Tensor) -> Tensor:
    """The coefficients of two vectors with such cosines on the arc between them, or on the chord.  # [2, num_blocks]"""
    angle = torch.where(linear, 0.5, cosine.clamp(-1, 1).acos())  # any: the chord needs none
    arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
    chord = torch.tensor([[1 - t], [t]], dtype=cosine.dtype, device=cosine.device)
    return torch.where(linear, chord, arc)


def _norms(gram: Tensor) -> Tensor:
    """[num_tasks, num_blocks]"""
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().T


def _length(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Of the vector with these coefficients, [num_vectors] or [num_vectors, num_blocks]."""
    if gram.dim() == 2:
        return (coefficients @ gram @ coefficients).clamp(min=0).sqrt()
    return torch.einsum("ib,bij,jb->b", coefficients, gram, coefficients).clamp(min=0).sqrt()
