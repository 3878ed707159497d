"""SMILE: low-rank experts beside every linear layer, and tokens that find theirs without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..merging import merge_state_dicts
from ..ops import arguments
from .layers import RoutedLayer, one_expert_each, weighed_experts
from .model import (
    Expert,
    RoutedModel,
    StateDict,
    check_finite,
    check_rank,
    differing,
    factors_of,
    layers_of,
    parameters_of,
    rank_of,
    states_of,
    wide,
)

GATES = ("change", "weight")
RESTS = ("base", "average")


class SmileLinear(RoutedLayer):
    """``W_0 x + b_0 + sum_t w_t (U_t S_t V_t^T x + b_t - b_0)``, for the `top_k` experts whose ``|G_t x|`` is largest.

    The weights w are the softmax of ``|G_t x|`` over all experts, then divided by the sum of those taken. `down`
    [num_tasks, rank, in] is V^T, `up` [num_tasks, out, rank] is U S, `shift` [num_tasks, out] is b_t - b_0, and `gate`
    [num_tasks, gate_rank, in] is G.
    """

    def __init__(self, linear: nn.Linear, num_tasks: int, rank: int, gate_rank: int, top_k: int) -> None:
        super().__init__()
        self.shared = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.top_k = top_k
        out, width = linear.weight.shape

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(linear.weight.new_empty(num_tasks, *shape), requires_grad=False)

        self.down, self.up, self.gate = empty(rank, width), empty(out, rank), empty(gate_rank, width)
        self.shift = None if linear.bias is None else empty(out)

    def fill(self, name: str, base: StateDict, states: Mapping[str, StateDict], gate_of: str) -> None:
        weight = f"{name}.weight"
        for t, state in enumerate(states.values()):
            change = wide(state[weight]) - wide(base[weight])
            rank, gate_rank = self.down.shape[1], self.gate.shape[1]
            right, left = factors_of(change, max(rank, gate_rank) if gate_of == "change" else rank)
            self.down[t], self.up[t] = right[:rank], left[:, :rank]
            self.gate[t] = right[:gate_rank] if gate_of == "change" else factors_of(state[weight], gate_rank)[0]
            if self.shift is not None:
                self.shift[t] = state[f"{name}.bias"] - base[f"{name}.bias"]

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(x)
        rows, flat = x.flatten(0, -2), out.flatten(0, -2)
        if len(self.gate) == 1:
            index = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
            return one_expert_each(rows, flat, self.down, self.up, self.shift, index).reshape(out.shape)
        projected = nn.functional.linear(rows, self.gate.flatten(0, 1)).unflatten(-1, self.gate.shape[:2])
        scores = torch.linalg.vector_norm(wide(projected), dim=-1)  # [rows, num_tasks]
        if self.top_k == 1:
            corrected = one_expert_each(rows, flat, self.down, self.up, self.shift, scores.argmax(dim=-1))
            return corrected.reshape(out.shape)
        best, chosen = scores.softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, (best / best.sum(dim=-1, keepdim=True)).to(scores.dtype))
        experts = weighed_experts(rows, self.down, self.up, self.shift, weights)
        return (flat + experts.to(flat.dtype)).reshape(out.shape)

    def extra_repr(self) -> str:
        num_tasks, rank, _ = self.down.shape
        return f"num_tasks={num_tasks}, rank={rank}, gate_rank={self.gate.shape[1]}, top_k={self.top_k}"


class Smile(RoutedModel):
    """A model whose linear layers have low-rank experts; made by `smile`."""

    kind = "smile"

    def _put_layers(self) -> None:
        options = self.configuration
        for name in options["layers"]:
            linear = self.linear(name)
            rank, gate_rank = (rank_of(options[key], *linear.weight.shape) for key in ("rank", "gate_rank"))
            self._put(name, SmileLinear(linear, len(self.tasks), rank, gate_rank, options["top_k"]))


@torch.inference_mode(False)  # what is made takes part in gradients
@torch.no_grad()
def smile(
    base: nn.Module,
    experts: Mapping[str, Expert],
    *,
    rank: int | float | None = 16,
    gate_rank: int | float = 1,
    top_k: int = 1,
    gate_of: str = "change",
    rest: str = "base",
    exclude: tuple[str, ...] = (),
) -> Smile:
    """Every linear layer keeps the base's weight, and beside it the leading directions of every expert's change.

    Each token chooses its expert in each layer by how long it is along the leading directions of the changes; nothing
    is trained and no task is known. An expert that changed nothing in a layer has the gate 0 there. Layers in which no
    expert differs stay as they are.

    Args:
        base: The pretrained module; it stays as it is.
        experts: By name of the task: modules or state dicts with the tensors of `base`.
        rank: Directions of each expert's change: a number, a share of them all, or None for all.
        gate_rank: Directions that a token is measured along: a number or a share.
        top_k: Experts of each token, at most num_tasks; of equal ones the first where it is 1.
        gate_of: "change": directions of ``expert - base``; "weight": of the expert's weight itself.
        rest: What the other tensors are, and linear layers that nothing routes: the "base", or the "average" of the
            experts.
        exclude: Patterns (``fnmatch``) of names of linear layers that have no experts. Those inside
            ``nn.MultiheadAttention``, which reads their weights, never have.

    Returns:
        A copy of the model, in the mode of `base`, in which nothing takes gradients. Results are those of another
        machine to rounding, but where two experts are nearly alike to a token, which may then choose the other.
        `unrouted` names the tensors in which experts differ and which are the same for every token.

    Raises:
        ValueError, TypeError: models differ in their tensors or are not finite, or an option is outside its range.

    Source: SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts (arXiv 2408.10174).
    """
    check_rank("rank", rank)
    if gate_rank is None:
        raise TypeError("gate_rank must be a number or a share, got None")
    check_rank("gate_rank", gate_rank)
    arguments.check_one_of("gate_of", gate_of, GATES)
    arguments.check_one_of("rest", rest, RESTS)
    of_base, states = states_of(base, experts)
    arguments.check_count("top_k", top_k)
    if top_k > len(states):
        raise ValueError(f"top_k must be at most the number of experts, {len(states)}, got {top_k}")
    changed = set(differing(list(of_base), of_base, states))
    linear = layers_of(base, exclude, (nn.Linear,))
    names = [name for name in linear if {f"{name}.weight", f"{name}.bias"} & changed]
    routed = parameters_of(base, names)
    check_finite([name for name in of_base if name in routed], {"": of_base} | states)
    configuration: dict[str, Any] = {
        "tasks": list(states),
        "layers": names,
        "rank": rank,
        "gate_rank": gate_rank,
        "top_k": top_k,
        "token_major": None,
        "unrouted": sorted(changed - routed),
    }
    model = Smile(base, configuration)
    for name in names:
        layer = model.model.get_submodule(name)
        assert isinstance(layer, SmileLinear)
        layer.fill(name, of_base, states, gate_of)
    if rest == "average":
        average = merge_state_dicts(None, list(states.values()), method="average", progress=False)
        for name, tensor in model.model.state_dict().items():
            if name in average and name not in routed:
                tensor.copy_(average[name])
    return model.train(base.training)
