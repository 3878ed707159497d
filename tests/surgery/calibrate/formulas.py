"""FeatCal and RegMean++ written out for one transformer, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
EPS = 1e-8


def layers_of(model: nn.Module, block: int, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What goes into each layer of a block, what those that write to the stream add to, and what comes out."""
    b, inputs, stream = model.blocks[block], {}, {}

    def through(name: str, x: Tensor) -> Tensor:
        inputs[name] = x
        return getattr(b, name)(x)

    n, s, d = u.shape
    q, k, v = through("qkv", through("norm1", u)).view(n, s, 3, b.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
    a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, d)
    stream["out"] = u
    u = u + through("out", a)
    hidden = nn.functional.gelu(through("expand", through("norm2", u)))
    stream["contract"] = u
    return inputs, stream, u + through("contract", hidden)


def behind(model: nn.Module, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    z = model.norm(u[:, 0])
    return {"norm": u[:, 0], "projection": z}, {}, model.projection(z)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
def featcal(
    merged: nn.Module,
    base: State,
    experts: dict[str, nn.Module],
    batches: dict[str, Tensor],
    *,
    lam: float = 0.05,
    anchor: float = 2.0,
    teacher: float = 0.3,
    unread_weight: float = 0.01,
    residual: bool = False,
    order: str = "block",
) -> State:
    model = copy.deepcopy(merged)
    u = {task: model.embed(x) for task, x in batches.items()}
    v = {task: experts[task].embed(x) for task, x in batches.items()}
    for stage in (*range(len(model.blocks)), None):
        prefix = "" if stage is None else f"blocks.{stage}."

        def run(m: nn.Module, x: Tensor, stage: Any = stage) -> Any:
            return behind(m, x) if stage is None else layers_of(m, stage, x)

        of_experts = {task: run(experts[task], v[task]) for task in batches}
        names = tuple(next(iter(of_experts.values()))[0])
        groups = [(name,) for name in names] if order == "layer" else [names]
        for group in groups:
            of_students = {task: run(model, u[task]) for task in batches}
            found = {}
            for name in group:
                rows = []
                for task in batches:
                    (student, r_s, _), (of_expert, r_e, _) = of_students[task], of_experts[task]
                    weights = torch.ones(student[name].shape[:-1]).double()
                    # in the last block the class token alone is read, but of what keys and values are made of
                    if stage == len(model.blocks) - 1 and name in ("out", "norm2", "expand", "contract"):
                        weights[:, 1:] = unread_weight
                    weights = weights.flatten() / weights.sum()
                    drift = (r_e[name] - r_s[name]).flatten(0, -2) if residual and name in r_s else 0.0
                    x, e = student[name].flatten(0, -2), of_expert[name].flatten(0, -2)
                    rows.append((weights, x, e, drift, experts[task].get_submodule(prefix + name)))
                layer = model.get_submodule(prefix + name)
                anchors = {
                    kind: anchor * p + (1 - anchor) * base[f"{prefix}{name}.{kind}"]
                    for kind, p in layer.named_parameters()
                }
                solve = norm if name.startswith("norm") else jointly if residual else linear
                for kind, value in solve(rows, anchors, lam, teacher, residual).items():
                    found[f"{prefix}{name}.{kind}"] = value
            model.load_state_dict(found, strict=False)
        for task in batches:
            v[task] = of_experts[task][2]
            u[task] = run(model, u[task])[2]
    return model.state_dict()


def linear(rows: Any, anchors: State, lam: float, teacher: float, _: bool) -> State:
    """The weight by its normal equations, the bias from it."""
    gram: Any = 0
    wanted: Any = 0
    later = []
    for weights, x, e, _drift, expert in rows:
        t = teacher * e + (1 - teacher) * x
        g = (x.T * weights) @ x
        k = 1 / max(float(g.norm()), EPS)
        gram, wanted = gram + k * g, wanted + k * (x.T * weights) @ t @ expert.weight.T
        later.append((k, expert.weight @ (weights @ t) + (0 if expert.bias is None else expert.bias), weights @ x))
    eye = torch.eye(len(gram)).double()
    w = torch.linalg.solve(gram + (lam + EPS) * eye, wanted + lam * anchors["weight"].T).T
    if "bias" not in anchors:
        return {"weight": w}
    total = sum(k * (answer - w @ m) for k, answer, m in later) + lam * anchors["bias"]
    return {"weight": w, "bias": total / (sum(k for k, *_ in later) + lam)}


def jointly(rows: Any, anchors: State, lam: float, teacher: float, _: bool) -> State:
    """Least squares over [x, 1], onto what brings the stream to the expert's."""
    has_bias = "bias" in anchors
    anchor = torch.cat([anchors["weight"].T, anchors["bias"][None]]) if has_bias else anchors["weight"].T
    gram, wanted = torch.zeros(len(anchor), len(anchor)).double(), torch.zeros_like(anchor)
    for weights, x, e, drift, expert in rows:
        k = 1 / max(float(((x.T * weights) @ x).norm()), EPS)
        y = teacher * (expert(e) + drift) + (1 - teacher) * expert(x)
        ones = torch.cat([x, torch.ones(len(x), 1).double()], dim=1) if has_bias else x
        gram += k * (ones.T * weights) @ ones
        wanted += k * (ones.T * weights) @ y
    solution = torch.linalg.solve(gram + (lam + EPS) * torch.eye(len(gram)).double(), wanted + lam * anchor)
    return {"weight": solution[:-1].T, "bias": solution[-1]} if has_bias else {"weight": solution.T}


def norm(rows: Any, anchors: State, lam: float, teacher: float, residual: bool) -> State:
    """Channel by channel: onto the expert's affine of the student's rows, or onto what the expert makes of its own."""
    matrix: Any = 0
    right: Any = 0
    for weights, x, e, _, expert in rows:
        z = standardised(x)
        y = z * expert.weight + expert.bias
        if residual:
            y = teacher * expert(e) + (1 - teacher) * y
        p, square, one = weights @ z, weights @ z**2, torch.ones_like(z[0])
        matrix = matrix + torch.stack([torch.stack([square, p], -1), torch.stack([p, one], -1)], -2)
        right = right + torch.stack([weights @ (z * y), weights @ y], -1)
    solution = torch.linalg.solve(
        matrix + lam * torch.eye(2).double(), right + lam * torch.stack([anchors["weight"], anchors["bias"]], -1)
    )
    return {"weight": solution[:, 0], "bias": solution[:, 1]}


@torch.no_grad()
def regmean_plus_plus(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], off_diagonal: float
) -> State:
    model = copy.deepcopy(merged)
    u = {task: model.embed(x) for task, x in batches.items()}
    for block in range(len(model.blocks)):
        inputs = {task: layers_of(experts[task], block, u[task])[0] for task in batches}
        for name in ("qkv", "out", "expand", "contract"):
            gram: Any = 0
            wanted: Any = 0
            for task in batches:
                x = inputs[task][name].flatten(0, -2)
                g = x.T @ x / len(x)
                g = off_diagonal * g + (1 - off_diagonal) * torch.diag(g.diagonal())
                gram, wanted = gram + g, wanted + g @ experts[task].blocks[block].get_submodule(name).weight.T
            model.blocks[block].get_submodule(name).weight.copy_(torch.linalg.solve(gram, wanted).T)
        for task in batches:
            u[task] = layers_of(model, block, u[task])[2]
    return model.state_dict()
