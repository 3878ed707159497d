"""calibrate against its formulas written out for one transformer in float64, and at its edges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.reproduce.digits.vit import VisionTransformer
from surgery_kernels.surgery import calibrate
from tests.adapter_cases import calls_of
from tests.encoders import CASES, Case, Encoder, made, perturbed, samples
from tests.fits import refusal
from tests.surgery.test_attach import called

pytestmark = pytest.mark.any_isa

TASKS = ["a", "b"]
EPS = 1e-8
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    """merged, base, experts and batches, of different sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = VisionTransformer(patch_size=4, width=8, depth=2, num_heads=2, num_features=5).double().eval()
    experts = {task: perturbed(base, seed, 0.2) for seed, task in enumerate(TASKS)}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(expert.get_parameter(name) for expert in experts.values()) / 2)
    return merged, base, experts, {"a": samples(7, 8, 8).double(), "b": samples(4, 8, 8, seed=1).double()}


def layers_of(model: nn.Module, block: int, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What goes into each layer of a block, and what comes out of it."""
    b, inputs = model.blocks[block], {}

    def through(name: str, x: Tensor) -> Tensor:
        inputs[name] = x
        return getattr(b, name)(x)

    n, s, d = u.shape
    q, k, v = through("qkv", through("norm1", u)).view(n, s, 3, b.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
    a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, d)
    u = u + through("out", a)
    hidden = nn.functional.gelu(through("expand", through("norm2", u)))
    return inputs, u + through("contract", hidden)


def behind(model: nn.Module, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    z = model.norm(u[:, 0])
    return {"norm": u[:, 0], "projection": z}, model.projection(z)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
def by_formula(
    merged: nn.Module, base: State, experts: dict[str, nn.Module], batches: dict[str, Tensor], lam: float, rho: float,
    alpha: float, unread: float,
) -> State:  # fmt: skip
    model = copy.deepcopy(merged)
    u = {task: model.embed(x) for task, x in batches.items()}
    v = {task: experts[task].embed(x) for task, x in batches.items()}
    stages: list[Any] = [*range(len(model.blocks)), None]
    for stage in stages:
        prefix = "" if stage is None else f"blocks.{stage}."

        def run(m: nn.Module, x: Tensor, stage: Any = stage) -> tuple[dict[str, Tensor], Tensor]:
            return behind(m, x) if stage is None else layers_of(m, stage, x)

        of_tasks = {task: (run(model, u[task]), run(experts[task], v[task])) for task in batches}
        found = {}
        for name in next(iter(of_tasks.values()))[0][0]:
            full = prefix + name
            gram: Any = 0
            wanted: Any = 0
            later, norms = [], []
            for task, ((student, _), (teacher, _)) in of_tasks.items():
                weights = torch.ones(student[name].shape[:-1]).double()
                # in the last block the class token alone is read, but of what keys and values are made of
                if stage == len(model.blocks) - 1 and name in ("out", "norm2", "expand", "contract"):
                    weights[:, 1:] = unread
                weights = weights.flatten() / weights.sum()
                x, e = student[name].flatten(0, -2), teacher[name].flatten(0, -2)
                expert = experts[task].get_submodule(full)
                if name.startswith("norm"):
                    z = standardised(x)
                    norms.append((weights @ z, weights @ z**2, expert.weight, expert.bias))
                    continue
                t = alpha * e + (1 - alpha) * x
                g, c = (x.T * weights) @ x, (x.T * weights) @ t
                k = 1 / max(float(g.norm()), EPS)
                gram, wanted = gram + k * g, wanted + k * c @ expert.weight.T
                bias = 0 if expert.bias is None else expert.bias
                later.append((k, expert.weight @ (weights @ t) + bias, weights @ x))
            layer = model.get_submodule(full)

            def anchored(kind: str, layer: nn.Module = layer, full: str = full) -> Tensor:
                return rho * getattr(layer, kind) + (1 - rho) * base[f"{full}.{kind}"]

            if norms:
                means, squares = sum(p for p, *_ in norms), sum(e for _, e, *_ in norms)
                count = torch.full_like(means, len(norms) + lam)
                rows = [torch.stack([squares + lam, means], -1), torch.stack([means, count], -1)]
                matrix = torch.stack(rows, -2)
                right = torch.stack([
                    sum(e * g + p * b for p, e, g, b in norms) + lam * anchored("weight"),
                    sum(p * g + b for p, e, g, b in norms) + lam * anchored("bias"),
                ], -1)  # fmt: skip
                solution = torch.linalg.solve(matrix, right)
                found[f"{full}.weight"], found[f"{full}.bias"] = solution[:, 0], solution[:, 1]
                continue
            eye = torch.eye(len(gram)).double()
            w = torch.linalg.solve(gram + (lam + EPS) * eye, wanted + lam * anchored("weight").T).T
            found[f"{full}.weight"] = w
            if layer.bias is not None:
                total = sum(k * (answer - w @ m) for k, answer, m in later) + lam * anchored("bias")
                found[f"{full}.bias"] = total / (sum(k for k, *_ in later) + lam)
        model.load_state_dict(found, strict=False)
        for task in batches:
            v[task] = of_tasks[task][1][1]
            u[task] = run(model, u[task])[1]
    return model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lam": 1e-4, "anchor": 1.0, "teacher": 1.0},
        {"lam": 0.3, "anchor": -1.0, "teacher": 0.0, "unread_weight": 1.0},
        {"unread_weight": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_formulas(models: Any, options: dict[str, float], batch_size: int) -> None:
    merged, base, experts, batches = models
    given = {"lam": 0.05, "anchor": 2.0, "teacher": 0.3, "unread_weight": 0.01, **options}
    expected = by_formula(
        merged, base.state_dict(), experts, batches,
        given["lam"], given["anchor"], given["teacher"], given["unread_weight"],
    )  # fmt: skip
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    result = calibrate(merged, base, experts, batches, batch_size=batch_size, progress=False, **options)
    assert list(result.state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert len(result.solved) == 2 * 6 + 2 and result.kept == ()
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())
    moved = [name for name in before if not torch.equal(before[name], result.state[name])]
    assert moved == [name for name in before if name.startswith(("blocks.", "norm.", "projection."))]


def test_experts_equal_to_the_merge_are_a_fixed_point(models: Any) -> None:
    merged, base, _, batches = models
    experts = dict.fromkeys(TASKS, merged.state_dict())
    result = calibrate(merged, base, experts, batches, anchor=1.0, progress=False)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=0, atol=1e-6)


def test_one_expert_comes_back_where_there_are_data(models: Any) -> None:
    merged, base, experts, _ = models
    batches = {"a": samples(60, 8, 8).double()}
    near = {
        **merged.state_dict(),
        **{k: v for k, v in experts["a"].state_dict().items() if not k.startswith("blocks.")},
    }
    start = copy.deepcopy(merged)
    start.load_state_dict(near)
    alone = {"a": experts["a"]}
    result = calibrate(start, base, alone, batches, lam=1e-9, anchor=1.0, teacher=0.0, progress=False)
    start.load_state_dict(result.state)
    with torch.no_grad():
        torch.testing.assert_close(start(batches["a"]), experts["a"](batches["a"]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_model(case: Callable[[], Case]) -> None:
    """Every layer of the blocks is solved for, and what cannot be is said."""
    it = made(case)
    experts = {task: perturbed(it.model, seed, 0.02) for seed, task in enumerate(TASKS)}
    merged = perturbed(it.model, 5, 0.01)
    result = calibrate(merged, it.model, experts, dict.fromkeys(TASKS, it.inputs), anchor=1.0, progress=False)
    attention = case.__name__.startswith("open_clip")  # nn.MultiheadAttention calls no layers
    assert bool(result.kept) == attention and all("attn" in name for name in result.kept)
    in_blocks = [name for name, _ in merged.named_parameters() if name.startswith(it.blocks)]
    for name in in_blocks:
        assert (name in result.kept) == torch.equal(result.state[name], merged.state_dict()[name]), name
    calibrated = copy.deepcopy(merged)
    calibrated.load_state_dict(result.state)
    with torch.no_grad():
        before, after = (it.representation(called(m, it.inputs)) for m in (merged, calibrated))
    assert after.isfinite().all() and not torch.equal(before, after)


def test_layers_with_the_same_inputs_share_their_products() -> None:
    it = made(CASES[3])  # CLIP, whose queries, keys and values are layers of their own
    with calls_of("gram_cross") as calls:
        calibrate(it.model, it.model, {"a": it.model}, {"a": it.inputs}, progress=False)
    # six layers in each of two blocks and the projection; in the last block and behind it rows are not read alike
    assert len(calls) == 4 + 6 + 1


def test_padding_takes_no_part() -> None:
    it = made(CASES[6])
    assert isinstance(it.inputs, dict) and "attention_mask" in it.inputs
    experts = {task: perturbed(it.model, seed, 0.05) for seed, task in enumerate(TASKS)}
    inputs = it.inputs
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    states = [
        calibrate(it.model, it.model, experts, dict.fromkeys(TASKS, x), progress=False).state for x in (inputs, other)
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """A normalisation whose class name says less than it does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def normed(kind: Callable[[int], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder(depth=2, width=8)
        model.blocks = nn.ModuleList(Normed(kind(8)) for _ in range(2))
    return model.double().eval()


def test_a_norm_that_computes_something_else_is_kept() -> None:
    kept = {}
    for kind in (nn.RMSNorm, type("GemmaRMSNorm", (Shifted,), {})):
        model = normed(kind)
        experts = {task: perturbed(model, seed) for seed, task in enumerate(TASKS)}
        kept[kind.__name__] = calibrate(
            model, model, experts, dict.fromkeys(TASKS, samples(6, 5, 3).double()), progress=False
        ).kept
    unused = [f"blocks.{i}.unused.{name}" for i in range(2) for name in ("weight", "bias")]
    assert list(kept["RMSNorm"]) == unused
    assert sorted(kept["GemmaRMSNorm"]) == sorted([*unused, "blocks.0.norm.weight", "blocks.1.norm.weight"])


def test_rms_norm_by_formula() -> None:
    model = normed(nn.RMSNorm)
    expert, x, lam = perturbed(model, 1), samples(6, 5, 3).double(), 0.2
    state = calibrate(model, model, {"a": expert}, {"a": x}, lam=lam, progress=False).state
    with torch.no_grad():
        u = model.embed(x).flatten(0, 1)
        z = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps)
        squares = z.square().mean(0)
        expected = (squares * expert.blocks[0].norm.weight + lam * model.blocks[0].norm.weight) / (squares + lam)
    torch.testing.assert_close(state["blocks.0.norm.weight"], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lam": 0.0}, "lam must be finite and greater than 0, got 0.0"),
        ({"anchor": torch.inf}, "anchor must be finite, got inf"),
        ({"teacher": 1.5}, "teacher must be in [0, 1], got 1.5"),
        ({"unread_weight": -0.1}, "unread_weight must be in [0, 1], got -0.1"),
        ({"batch_size": 0}, "batch_size must be 1 or greater, got 0"),
        ({"base": 3}, "base must be a module or a state dict, got int"),
        ({"base": {}}, "base must have 'blocks.0.norm1.bias' of shape (8,), got none"),
        ({"batches": {}}, "batches must have samples for every task of experts, got [] for ['a', 'b']"),
        (
            {"batches": {task: torch.full((4, 8, 8), torch.nan).double() for task in TASKS}},
            "inputs of 'blocks.0.norm1' in merged for task 'a' must be finite, got NaN",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(models: Any, wrong: dict[str, Any], message: str) -> None:
    merged, base, experts, batches = models
    call = {"base": base, "experts": experts, "batches": batches, "progress": False, **wrong}
    assert refusal(lambda: calibrate(merged, **call)) == message


def test_shared_parameters_are_refused(models: Any) -> None:
    merged, base, experts, batches = models
    tied = copy.deepcopy(merged)
    tied.blocks[1].out = tied.blocks[0].out
    message = (
        "merged must not share parameters between layers, got 'blocks.0.out.weight' that is 'blocks.1.out.weight' too"
    )
    assert refusal(lambda: calibrate(tied, base, experts, batches, progress=False)) == message
