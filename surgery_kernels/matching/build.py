"""The merged model: its tensors from those of two models, and modules as wide as they are."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..modules.layers import CONVOLUTIONS
from .partial import Plan, Units
from .symmetries import StateDict

BatchNorm = nn.modules.batchnorm._BatchNorm


def widened(model: nn.Module, tensors: StateDict) -> nn.Module:
    """A copy of the model with these tensors in place of its own, which may have other shapes."""
    copied = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for path, module in copied.named_modules():
        for name in [*module._parameters, *module._buffers]:
            full = f"{path}.{name}".strip(".")
            if full not in tensors:
                continue
            if name in module._buffers:
                module._buffers[name] = tensors[full].clone()
                continue
            before = module._parameters[name]
            assert before is not None
            if id(before) not in made:
                made[id(before)] = nn.Parameter(tensors[full].clone(), before.requires_grad)
            module._parameters[name] = made[id(before)]
        _tell_sizes(module)
    return copied


def _tell_sizes(module: nn.Module) -> None:
    """What a module says of its own width is as its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        out = len(module.weight)
        if module.groups == module.in_channels > 1:  # a channel each: of others none grows
            module.groups = out * module.in_channels // module.out_channels
        module.out_channels, module.in_channels = out, module.weight.shape[1] * module.groups
    elif isinstance(module, BatchNorm) and module.weight is not None:
        module.num_features = len(module.weight)


def merged_state(plan: Plan, first: StateDict, second: StateDict) -> dict[str, Tensor]:
    """Both models' tensors, merged where the plan merges units, side by side where it does not; but for heads.

    Of a matrix, with blocks of outputs and inputs that are both models', or one's: the mean where outputs are both's
    (half of what reads an input of one model only), a model's own weights where they are its own, and 0 from the inputs
    of one model to the outputs of the other.
    """
    owner, symmetries = plan.symmetries.owner, plan.symmetries
    built: dict[str, Tensor] = {}
    for name, a in first.items():
        if symmetries.in_heads(name):
            continue
        of_owner = owner.get(name, name)
        if of_owner not in built:
            built[of_owner] = _merged(plan, of_owner, a, second[name]) if a.is_floating_point() else a.clone()
        built[name] = built[of_owner]
    return {name: built[name] for name in first if name in built}


def head_state(plan: Plan, state: StateDict, which: int) -> dict[str, Tensor]:
    """A model's heads, as they read the merged model's units."""
    found = {}
    for name, tensor in state.items():
        if plan.symmetries.in_heads(name):
            dims = _axes(plan, name, tensor)
            found[name] = _gathered(tensor, [(units.first, units.second)[which] for units in dims])
    return found


def _merged(plan: Plan, name: str, a: Tensor, b: Tensor) -> Tensor:
    compute = torch.promote_types(a.dtype, torch.float32)
    axes = _axes(plan, name, a)
    read = {member.dim for _, member in plan.symmetries.of_tensor(name) if member.is_read}
    of_both = torch.ones((), dtype=torch.bool)  # by what is made, whatever it reads
    for dim, units in enumerate(axes):
        shape = [-1 if other == dim else 1 for other in range(len(axes))]
        if dim not in read:
            of_both = of_both & (units.of_first & units.of_second).view(shape)
    share = (1 - 0.5 * of_both.to(compute)).to(a.device)
    x = _gathered(a, [units.first for units in axes]).to(compute)
    y = _gathered(b, [units.second for units in axes]).to(compute)
    return (share * x + share * y).to(a.dtype)


def _axes(plan: Plan, name: str, tensor: Tensor) -> list[Units]:
    return [plan.axis(name, dim, size) for dim, size in enumerate(tensor.shape)]


def _gathered(tensor: Tensor, places: list[Tensor]) -> Tensor:
    """The entries at these places of every dimension; 0 at -1."""
    for dim, place in enumerate(places):
        place = place.to(tensor.device)
        if len(place) == tensor.shape[dim] and torch.equal(place, torch.arange(len(place), device=place.device)):
            continue
        tensor = tensor.index_select(dim, place.clamp(min=0))
        if bool((place < 0).any()):
            shape = [-1 if other == dim else 1 for other in range(tensor.dim())]
            tensor = tensor * (place >= 0).view(shape)
    return tensor.clone()
