"""Which parameters of a layer answer best, over tasks that are added one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import LinearMoments, NormMoments

EPS = 1e-8  # least norm of a Gram matrix, and what is added to every ridge

Solution = tuple[Tensor, Tensor | None]  # weight and bias, float64


class LinearSolver:
    """``minimise sum_t k_t E |W x_s - W_t x_t|^2 + lam |W - A|^2``, then the bias; or both at once.

    x_s is what goes into the layer of the model that is calibrated, x_t a mixture of that and what goes into the
    expert's, and k_t = 1 / |E x_s x_s^T|: tasks weigh alike, and lam is relative. Where moments are of outputs, a drift
    may be among what is to be answered.
    """

    def __init__(self, *, joint: bool = False) -> None:
        self._joint = joint
        self._gram = self._wanted = torch.empty(0)  # sums of k_t times: [in, in], [in, out] without biases
        self._tasks: list[tuple[float, Tensor, Tensor, Tensor | None]] = []  # k_t, E x_s, E of the answer, b_t

    def add(self, moments: LinearMoments, teacher: float, weight: Tensor, bias: Tensor | None) -> None:
        """A task's: `weight` [out, in] and `bias` of its expert."""
        if moments.rows == 0 or not moments.sums[0].any():
            return  # inputs that always are 0 say nothing
        gram, cross, x, y = (part / moments.rows for part in moments.sums)
        w, b = weight.double(), None if bias is None else bias.double()
        if moments.of_outputs:
            if b is not None:
                cross, y = cross - torch.outer(x, b), y - b
            answers = teacher * cross + (1 - teacher) * gram @ w.T
            mean = teacher * y + (1 - teacher) * w @ x
        else:
            answers = (teacher * cross + (1 - teacher) * gram) @ w.T
            mean = w @ (teacher * y + (1 - teacher) * x)
        k = 1 / max(float(gram.norm()), EPS)
        gram, answers = gram.mul_(k), answers.mul_(k)
        if self._tasks:
            self._gram += gram
            self._wanted += answers
        else:
            self._gram, self._wanted = gram, answers
        self._tasks.append((k, x, mean, b))

    def solve(self, lam: float, anchor: Tensor, anchor_bias: Tensor | None) -> Solution | None:
        """Anchors float64; None if no task said anything. The sums are used up."""
        if not self._tasks:
            return None
        if self._joint and anchor_bias is not None:
            return self._solve_jointly(lam, anchor, anchor_bias)
        weight = _ridge(self._gram, self._wanted + lam * anchor.T, lam).T
        if anchor_bias is None:
            return weight, None
        bias = lam * anchor_bias
        for k, x, answer, of_expert in self._tasks:
            bias = bias + k * (answer - weight @ x if of_expert is None else of_expert + answer - weight @ x)
        return weight, bias / (sum(k for k, *_ in self._tasks) + lam)

    def _solve_jointly(self, lam: float, anchor: Tensor, anchor_bias: Tensor) -> Solution:
        """The bias is the weight of one more input, which always is 1."""
        dim = len(self._gram)
        gram = self._gram.new_zeros(dim + 1, dim + 1)
        wanted = lam * torch.cat([anchor.T, anchor_bias[None]])
        gram[:dim, :dim] = self._gram
        wanted[:dim] += self._wanted
        for k, x, answer, of_expert in self._tasks:
            gram[dim, :dim] += k * x
            gram[dim, dim] += k
            wanted[dim] += k * answer
            if of_expert is not None:
                wanted += k * torch.outer(torch.cat([x, x.new_ones(1)]), of_expert)
        gram[:dim, dim] = gram[dim, :dim]
        solution = _ridge(gram, wanted, lam)
        return solution[:dim].T, solution[dim]


class NormSolver:
    """``minimise sum_t E |gamma z + beta - y_t|^2 + lam |(gamma, beta) - (anchors)|^2``, channel by channel.

    z is the normalised input in the model that is calibrated. y_t is gamma_t z + beta_t; `residual`: mixed with what
    the expert's own layer returns.
    """

    def __init__(self, *, residual: bool = False) -> None:
        self._residual = residual
        self._gain = 0.0
        self._tasks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # E z, E z^2, E y, E z y

    def add(self, moments: NormMoments, teacher: float, gamma: Tensor, beta: Tensor | None) -> None:
        self._gain = moments.gain
        if moments.rows == 0:
            return
        z, squares, y, products = (part / moments.rows for part in moments.sums)
        gamma = gamma.double() + moments.gain
        own, own_products = gamma * z, gamma * squares
        if beta is not None:
            own, own_products = own + beta.double(), own_products + beta.double() * z
        if self._residual:
            own = teacher * y + (1 - teacher) * own
            own_products = teacher * products + (1 - teacher) * own_products
        self._tasks.append((z, squares, own, own_products))

    def solve(self, lam: float, anchor: Tensor, anchor_bias: Tensor | None) -> Solution | None:
        if not self._tasks:
            return None
        means, squares, answers, products = (sum(parts) for parts in zip(*self._tasks, strict=True))
        squares = squares + lam
        wanted = products + lam * (anchor + self._gain)
        if anchor_bias is None:
            return wanted / squares.clamp_min(EPS) - self._gain, None
        of_bias = answers + lam * anchor_bias
        count = len(self._tasks) + lam
        determinant = (squares * count - means.square()).clamp_min(EPS)
        gamma = (count * wanted - means * of_bias) / determinant
        return gamma - self._gain, (squares * of_bias - means * wanted) / determinant


def _ridge(gram: Tensor, wanted: Tensor, lam: float) -> Tensor:
    """(gram + lam)^-1 wanted, in the memory of gram: it may be the largest matrix there is."""
    gram.diagonal().add_(lam + EPS)
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(gram))
