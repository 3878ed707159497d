"""Experts weights averaging (EWA): a feed-forward network is trained as several, and is one again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..merging import merge_state_dicts
from ..ops import arguments
from ..ops.arguments import detached
from .feed_forward import find_feed_forward
from .replace import replace

Share = float | Callable[[int], float]


class RandomExperts(nn.Module):
    """Copies of a network; in training each takes an equal part of the tokens, drawn at random in every pass.

    In evaluation mode it is what `collapse` leaves: the network with the mean of all parameters, which then receive no
    gradient. Tokens are drawn with torch's generator of their device.

    Args:
        network: Gives for tokens [num_tokens, dim] an output [num_tokens, ...], each from its own token alone.
        num_experts: 2 or more; all begin as copies of `network`.

    Raises:
        ValueError: num_experts is below 2.

    Source: Experts Weights Averaging (arXiv 2308.06093): random uniform partition.
    """

    def __init__(self, network: nn.Module, num_experts: int) -> None:
        super().__init__()
        arguments.check_count("num_experts", num_experts, least=2)
        self.experts = nn.ModuleList(copy.deepcopy(network) for _ in range(num_experts))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., dim] to outputs [..., out]."""
        if not self.training:
            return functional_call(self.experts[0], self.mean(), (tokens,))
        rows = tokens.reshape(-1, tokens.shape[-1])
        order = torch.randperm(len(rows), device=rows.device)
        parts = order.tensor_split(len(self.experts))
        outputs = torch.cat([expert(rows[part]) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, tokens.shape[:-1])

    def mean(self) -> dict[str, Tensor]:
        """The state dict of the mean: of what is no floating-point number, the first expert's."""
        return merge_state_dicts(
            None, [e.state_dict() for e in self.experts], method="average", nonfinite="propagate", progress=False
        )

    def extra_repr(self) -> str:
        return f"num_experts={len(self.experts)}"


def upcycle(model: nn.Module, num_experts: int, networks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Puts `RandomExperts` in the place of feed-forward networks, in the model itself.

    Args:
        model: Any module.
        num_experts: 2 or more.
        networks: Names of the modules to replace, as in ``model.named_modules()``. None: the feed-forward networks of
            every second block, from the second on.

    Returns:
        The names of the modules replaced. Make the optimizer afterwards: it must have the experts' parameters.

    Raises:
        ValueError: a name is none of a module's, or None is given and the blocks' networks are no modules.
    """
    if networks is None:
        found = find_feed_forward(model)[1::2]
        for one in found:
            if one.module == one.block:
                raise ValueError(f"networks must be given where a block has none that is a module, got {one.block!r}")
        names = tuple(one.module for one in found)
    else:
        names = tuple(networks)
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise ValueError(f"networks must be names of modules inside the model, got {name!r}")
    for name in names:
        experts = RandomExperts(modules[name], num_experts)
        replace(model, modules[name], experts.train(modules[name].training))
    return names


def collapse(model: nn.Module) -> nn.Module:
    """Puts in the place of all `RandomExperts` the network with the mean of their parameters; gives the model.

    The model itself is changed, and is of its first class and shape again, for inference or any checkpoint.
    """
    for module in [m for m in model.modules() if isinstance(m, RandomExperts) and m is not model]:
        replace(model, module, _collapsed(module))
    return _collapsed(model) if isinstance(model, RandomExperts) else model


def _collapsed(experts: RandomExperts) -> nn.Module:
    first = experts.experts[0]
    first.load_state_dict(experts.mean())
    return first


class ExpertsAveraging:
    """After every step ``E_i <- (1 - share) E_i + share / (num_experts - 1) * sum_{j != i} E_j``, for all i at once.

    All experts of all `RandomExperts` of the model take one launch, in place: every parameter is read once and written
    once. The mean over the experts stays, up to rounding; their distance to it shrinks by
    ``1 - share * num_experts / (num_experts - 1)``. The optimizer's moments are left alone. Sums run in float32
    (float64 for float64 parameters), in the order of the experts, and give the same bits on every rank that steps
    alike: under data parallelism call `step` on each, after the optimizer's.

    Args:
        model: With `RandomExperts`, as `upcycle` makes them.
        share: In [0, 1]: how much of the others each expert takes; or a function that gives it for a step, from 0 on.
        ramp: Steps over which `share` grows linearly from 0, as the paper has it in some settings: step k takes
            ``share * min(1, (k + 1) / ramp)``. 0: it is the same in all steps.

    Raises:
        ValueError, TypeError: the model has no `RandomExperts`, or share or ramp is outside its range.

    Source: Experts Weights Averaging (arXiv 2308.06093).
    """

    def __init__(self, model: nn.Module, share: Share, *, ramp: int = 0) -> None:
        self._mixtures = [module for module in model.modules() if isinstance(module, RandomExperts)]
        if not self._mixtures:
            raise ValueError("model must have RandomExperts, got none: upcycle it first")
        arguments.check_count("ramp", ramp, least=0)
        if ramp and callable(share):
            raise ValueError("ramp must be 0 where share is a function, got another number")
        self._share, self._ramp = share, ramp
        self.steps = 0  # done so far
        if not callable(share):
            self.share_of(0)

    def share_of(self, step: int) -> float:
        """What each expert takes of the others in a step, from 0 on."""
        share = arguments.number("share", self._share(step) if callable(self._share) else self._share)
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        return share * min(1.0, (step + 1) / self._ramp) if self._ramp else share

    @torch.no_grad()
    def step(self) -> None:
        """Averages once; call it after every step of the optimizer."""
        share = self.share_of(self.steps)
        self.steps += 1
        if share == 0:
            return
        launches: dict[tuple[int, torch.device, bool], list[nn.Parameter]] = {}
        for mixture in self._mixtures:
            for copies in _copies(mixture):
                launch = (len(copies), copies[0].device, copies[0].dtype == torch.float64)
                launches.setdefault(launch, []).extend(copies)
        for (count, _, _), parameters in launches.items():
            coefficients = torch.full((count, count), share / (count - 1), dtype=torch.float64)
            coefficients.fill_diagonal_(1 - share)
            tensors = [detached(parameter) for parameter in parameters]
            torch.ops.surgery_kernels.mix_out(
                [], tensors, coefficients[..., None], task_vectors=False, nonfinite="propagate", out=tensors
            )
            for parameter in parameters:
                torch.autograd.graph.increment_version(parameter)  # a graph that saved it must notice

    def after(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Has every step of the optimizer followed by one of this; the handle's `remove` ends that."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def state_dict(self) -> dict[str, Any]:
        """How many steps were done: what a run that goes on needs for its `ramp`."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


def _copies(mixture: RandomExperts) -> Iterator[list[nn.Parameter]]:
    """Every parameter of the network, once for each expert; tied ones count once."""
    yield from (list(of_all) for of_all in zip(*(e.parameters() for e in mixture.experts), strict=True))
