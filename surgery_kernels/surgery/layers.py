"""Layers that calibration knows, and which of their parameters answer best to what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..modules.visits import Visit
from ..ops import GramCross, gram_cross

RowsOf = Callable[[int], Tensor | None]  # by the number of a call the weights of its rows; None: all of them 1
EPS = 1e-8  # least norm of a Gram matrix, and what is added to every ridge


def known_layers(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Linear layers and normalisations below a module, by name."""
    return {
        f"{prefix}.{name}".strip("."): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or is_norm(layer)
    }


def is_norm(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    named = isinstance(layer, nn.LayerNorm) or type(layer).__name__.endswith("RMSNorm")
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation multiplies with its weight."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def answers_as_known(layer: nn.Module, visit: Visit) -> bool:
    """Whether a normalisation computes what its class name says: some multiply with 1 + weight."""
    z, weight = normalised(layer, visit.inputs), layer.weight
    expected = z * weight if getattr(layer, "bias", None) is None else z * weight + layer.bias  # type: ignore[operator]
    return torch.allclose(visit.output.to(expected), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


class LinearMoments:
    """Of what goes into a linear layer of the student, and of that with what goes into the expert's."""

    def __init__(self) -> None:
        self.rows = 0.0
        self.sums: list[Tensor] = []  # gram and cross [in, in], student and expert [in]

    def add(self, products: GramCross, rows: float) -> None:
        sums = [part[0].double() for part in products if part is not None]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.rows += rows


class NormMoments:
    """Of normalised rows z and of their squares."""

    def __init__(self) -> None:
        self.rows = 0.0
        self.sums: list[Tensor] = []  # [dim] each

    def add(self, z: Tensor, weights: Tensor | None) -> None:
        """z: [rows, dim]; weights: [rows], None for ones."""
        if weights is None:
            sums = [z.sum(0), z.square().sum(0)]
        else:
            z = torch.where(weights[:, None] == 0, 0.0, z)
            sums = [weights @ z, weights @ z.square()]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.rows += float(len(z) if weights is None else weights.sum())


class TaskMoments:
    """Of all layers of a stage, for the rows of one task."""

    def __init__(self) -> None:
        self.of: dict[str, LinearMoments | NormMoments] = {}
        self._shared: dict[tuple[int, int], GramCross] = {}

    def add(
        self, layers: Mapping[str, nn.Module], visits: Sequence[Visit], answers: Sequence[Visit], weights: RowsOf
    ) -> None:
        """The calls of one batch; layers with the same inputs share their products."""
        self._shared.clear()
        for number, (visit, answer) in enumerate(zip(visits, answers, strict=True)):
            layer, of_rows = layers[visit.name], weights(number)
            x = visit.inputs.detach().flatten(0, -2)
            if isinstance(layer, nn.Linear):
                moments = self.of.setdefault(visit.name, LinearMoments())
                assert isinstance(moments, LinearMoments)
                products = self._products(x, answer.inputs.detach().flatten(0, -2), of_rows, (visit, answer))
                moments.add(products, float(len(x) if of_rows is None else of_rows.sum()))
            elif answers_as_known(layer, visit):
                of_norm = self.of.setdefault(visit.name, NormMoments())
                assert isinstance(of_norm, NormMoments)
                of_norm.add(normalised(layer, x).double(), of_rows)

    def _products(self, x: Tensor, y: Tensor, weights: Tensor | None, pair: tuple[Visit, Visit]) -> GramCross:
        key = (id(pair[0].inputs), id(pair[1].inputs))
        if weights is None and key in self._shared:
            return self._shared[key]
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = None if weights is None else weights.to(dtype)[None]
        products = gram_cross(x.to(dtype)[None], y.to(dtype)[None], weights=weights)
        if weights is None:
            self._shared[key] = products
        return products


class LinearSolver:
    """``minimise sum_t k_t E |W x_s - W_t x_t|^2 + lam |W - A|^2``, then the bias, over tasks added one by one.

    x_s is what goes into the layer of the model that is calibrated, x_t a mixture of that and what goes into the
    expert's, and k_t = 1 / |E x_s x_s^T|: tasks weigh alike, and lam is relative.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._wanted: Tensor | None = None  # [in, out]
        self._biases: list[tuple[float, Tensor, Tensor]] = []  # k_t, b_t + W_t m_t, m_s

    def add(self, moments: LinearMoments, teacher: float, weight: Tensor, bias: Tensor | None) -> None:
        """A task's: `weight` [out, in] and `bias` of its expert."""
        if moments.rows == 0 or not moments.sums[0].any():
            return  # inputs that always are 0 say nothing
        gram, cross, student, expert = (part / moments.rows for part in moments.sums)
        cross = teacher * cross + (1 - teacher) * gram
        mixed = teacher * expert + (1 - teacher) * student
        scale, w = 1 / max(float(gram.norm()), EPS), weight.double()
        self._gram = scale * gram if self._gram is None else self._gram + scale * gram
        wanted = scale * cross @ w.T
        self._wanted = wanted if self._wanted is None else self._wanted + wanted
        answer = w @ mixed if bias is None else w @ mixed + bias.double()
        self._biases.append((scale, answer, student))

    def solve(self, lam: float, anchor: Tensor, anchor_bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias in float64; None if no task said anything."""
        if self._gram is None or self._wanted is None:
            return None
        eye = torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        factor = torch.linalg.cholesky(self._gram + (lam + EPS) * eye)
        weight = torch.cholesky_solve(self._wanted + lam * anchor.double().T, factor).T
        if anchor_bias is None:
            return weight, None
        total = sum(
            (k * (answer - weight @ student) for k, answer, student in self._biases), lam * anchor_bias.double()
        )
        return weight, total / (sum(k for k, *_ in self._biases) + lam)


class NormSolver:
    """``minimise sum_t E |gamma z + beta - gamma_t z - beta_t|^2 + lam |(gamma, beta) - (anchors)|^2``.

    Channel by channel; z is the normalised input in the model that is calibrated.
    """

    def __init__(self) -> None:
        self._tasks: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []  # E z, E z^2, gamma_t, beta_t

    def add(self, moments: NormMoments, gamma: Tensor, beta: Tensor | None) -> None:
        if moments.rows > 0:
            mean, square = (part / moments.rows for part in moments.sums)
            self._tasks.append((mean, square, gamma.double(), None if beta is None else beta.double()))

    def solve(self, lam: float, gamma: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        if not self._tasks:
            return None
        squares = sum((e for _, e, *_ in self._tasks), torch.zeros_like(self._tasks[0][1])) + lam
        wanted = sum((e * g for _, e, g, _ in self._tasks), lam * gamma.double())
        if beta is None:
            return wanted / squares.clamp_min(EPS), None
        means = sum((p for p, *_ in self._tasks), torch.zeros_like(squares))
        of_beta = lam * beta.double()
        for p, _, g, b in self._tasks:
            assert b is not None
            wanted = wanted + p * b
            of_beta = of_beta + p * g + b
        count = len(self._tasks) + lam
        determinant = (squares * count - means.square()).clamp_min(EPS)
        return (count * wanted - means * of_beta) / determinant, (squares * of_beta - means * wanted) / determinant
