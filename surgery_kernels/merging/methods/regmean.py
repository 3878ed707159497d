"""RegMean: every linear layer predicts, as well as one layer can, what the experts' layers predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...modules.device import device_of
from ...modules.inputs import run, to_device
from ...modules.pools import Batches, batches_of
from ...modules.visits import Visit, watched
from ..method import SHARE, Method, shared
from ..scope import Scope


@dataclass(frozen=True)
class RegMean(Method):
    """Merges the weights W_t [in, out] of linear layers by least squares on their inputs; averages the rest.

    Args:
        grams: For each expert the Gram matrices [in, in] of its layers' inputs by the names of the weights, as
            `gram_matrices` gives them, for some or all of the linear layers, the same for every expert. One is held at
            a time: a mapping may read them from disk.
        off_diagonal: In [0, 1]: the entries of the Gram matrices off their diagonals are multiplied by it. 0 weighs
            inputs alone, 1 is the least-squares solution itself.

    Where the inputs say nothing (an input that always was 0, fewer rows than inputs) the experts are averaged. The base
    is not read. Solved in float64.
    """

    name = "regmean"
    title = "RegMean"
    formula = "(sum_t G_t)^-1 sum_t G_t W_t"
    source = "RegMean (arXiv 2212.09849)"
    base = "none"
    decides = "model"
    in_recipes = False
    from_inputs = True

    grams: Sequence[Mapping[str, Tensor]] = shared((), kind=object, meaning="Gram matrices of each expert's inputs")
    off_diagonal: float = shared(0.9, range=SHARE, meaning="factor of the Gram matrices' entries off the diagonal")

    @property
    def reads(self) -> int:
        return 1

    def check(self, num_tasks: int) -> None:
        if len(self.grams) != num_tasks:
            raise ValueError(f"grams must be one mapping per expert ({num_tasks}), got {len(self.grams)}")
        super().check(num_tasks)

    def merge(self, scope: Scope) -> None:
        known = scope.check_by_name("grams", self.grams, lambda weight: tuple(weight.shape[-1:]) * 2)
        for name, (weight, *_) in zip(scope.names, scope.experts, strict=True):
            if name in known and weight.dim() != 2:
                raise ValueError(f"grams must be for matrices, got {known[name]!r} of shape {tuple(weight.shape)}")
        scope.check_finite(task_vectors=False)
        for name, experts, out in zip(scope.names, scope.experts, scope.out, strict=True):
            mean = sum((expert.double() for expert in experts), torch.zeros_like(out, dtype=torch.float64))
            mean /= len(experts)
            out.copy_(mean + self._correction(known[name], experts, mean) if name in known else mean)

    def _correction(self, name: str, experts: Sequence[Tensor], mean: Tensor) -> Tensor:
        """From the mean to what minimises sum_t |X_t (W - W_t)|^2; 0 in directions that no input has.  # [out, in]"""
        gram = torch.zeros(mean.shape[-1], mean.shape[-1], dtype=torch.float64, device=mean.device)
        wanted = torch.zeros_like(mean)  # [out, in]
        for t, (of_expert, expert) in enumerate(zip(self.grams, experts, strict=True)):
            inputs = of_expert[name].double()
            if not inputs.isfinite().all():
                raise ValueError(f"grams[{t}][{name!r}] must be finite, got NaN or infinity")
            scaled = self.off_diagonal * inputs
            scaled.diagonal().copy_(inputs.diagonal())
            gram += scaled
            wanted += (expert.double() - mean) @ scaled
        if self.off_diagonal == 1:
            return wanted @ torch.linalg.pinv(gram, hermitian=True)
        # With unit diagonal the eigenvalues are 1 - off_diagonal or more: no pivot vanishes.
        width = gram.diagonal().sqrt()
        width[width == 0] = 1
        gram = gram / width / width[:, None]
        gram.diagonal().fill_(1)
        return torch.cholesky_solve((wanted / width).T, torch.linalg.cholesky(gram)).T / width


def gram_matrices(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """``mean_row x^T x`` of the inputs x of every nn.Linear that is called.

    Args:
        model: In evaluation mode; called with each batch under no_grad.
        batches: Unlabeled inputs in every form that `fit` takes; of an iterable of batches one is held at a time.

    Returns:
        [in, in] by the names of the weights, float32 (float64 for float64 inputs). Layers that share a weight have one,
        by its first name; a layer whose weight is used without calling it (inside nn.MultiheadAttention) has none.

    Raises:
        ValueError: the model is in training mode, or there are no inputs.

    Source: RegMean (arXiv 2212.09849).
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode")
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(visit: Visit) -> None:
        x = visit.inputs.detach().flatten(end_dim=-2).to(torch.promote_types(visit.inputs.dtype, torch.float32))
        name = visit.name
        sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
        rows[name] = rows.get(name, 0) + len(x)

    first: dict[int, str] = {}  # name of every weight
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = [(first.setdefault(id(module.weight), f"{path}.weight"), module) for path, module in layers]
    with watched(named, add), torch.no_grad():
        for batch in batches_of("batches", batches):
            run(model, to_device(batch, device_of(model)))
    if not sums:
        raise ValueError("batches must reach at least one nn.Linear, got none")
    return {name: total / rows[name] for name, total in sums.items()}
