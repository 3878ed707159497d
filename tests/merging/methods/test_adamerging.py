"""AdaMerging and its objective, on a small network and two tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgery_kernels import merge_state_dicts, reference, ties_split
from surgery_kernels.merging import Learned, entropy_objective
from tests.cases import assert_same, generator

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
TASKS = ["even", "odd"]


class Network(nn.Module):
    """Batch normalisation has buffers, of floats and of integers; one layer is called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4, bias=False)
        self.twin = self.again

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twin(self.again(self.norm(self.first(x)).relu()).relu()))


def network(dtype: torch.dtype = torch.float32) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().to(dtype).eval()


def models(dtype: torch.dtype = torch.float32) -> tuple[StateDict, list[StateDict]]:
    """Experts a large step away; tied tensors stay tied."""
    base = network(dtype)
    experts = []
    for task in TASKS:
        expert = network(dtype)
        with torch.no_grad():
            for p in expert.parameters():
                p += torch.randn(p.shape, generator=generator(task, p.shape), dtype=torch.float64).to(dtype)
        experts.append(expert.state_dict())
    return base.state_dict(), experts


def images() -> dict[str, Tensor]:
    return {task: torch.randn(24, 6, generator=generator(task)) for task in TASKS}


def learn(base: StateDict, experts: list[StateDict], **options: Any) -> tuple[StateDict, Learned]:
    learned: list[Learned] = []
    defaults = {"objective": entropy_objective(network(), images(), batch_size=24), "steps": 60, "lr": 0.02}
    merged = merge_state_dicts(base, experts, method="adamerging", receive=learned.append, **{**defaults, **options})
    return merged, learned[0]


def entropy_of(state: StateDict) -> float:
    state = {name: state[name] for name in floats(state)}
    with torch.no_grad():
        outputs = [functional_call(network(), state, (x,)).softmax(-1) for x in images().values()]
    return sum(torch.special.entr(p).sum(-1).mean().item() for p in outputs)


def floats(state: StateDict) -> list[str]:
    """Names of the merged tensors: of tied ones the first."""
    return [name for name, x in state.items() if x.is_floating_point() and not name.startswith("twin")]


@pytest.mark.parametrize("density", [None, 0.5], ids=["plain", "++"])
@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_entropy_falls(granularity: str, density: float | None) -> None:
    base, experts = models()
    options = {"granularity": granularity, "density": density}
    start, _ = learn(base, experts, steps=0, **options)
    merged, learned = learn(base, experts, **options)
    assert learned.losses[-1] < learned.losses[0] - 0.01
    assert entropy_of(merged) < entropy_of(start) - 0.01
    torch.testing.assert_close(entropy_of(start), learned.losses[0].item())
    assert learned.names == floats(base)
    assert learned.coefficients.shape == (2, len(learned.names) if granularity == "layer" else 1)
    assert (learned.coefficients >= 0).all() and (learned.coefficients <= 1).all()
    assert not learned.coefficients.requires_grad and not any(x.requires_grad for x in merged.values())
    if granularity == "layer":  # buffers get no gradient
        of_buffers = torch.tensor(["running" in name for name in learned.names])
        assert torch.equal((learned.coefficients == 0.3).all(dim=0), of_buffers)


def test_coefficients_are_those_of_the_result() -> None:
    base, experts = models()
    merged, learned = learn(base, experts)
    for name, column in zip(learned.names, learned.coefficients.unbind(1), strict=True):
        task_vectors = [expert[name] - base[name] for expert in experts]
        expected = base[name] + (column[0] * task_vectors[0] + column[1] * task_vectors[1])
        assert_same(merged[name], expected, name)
    assert_same(merged["norm.num_batches_tracked"], base["norm.num_batches_tracked"])
    assert merged["twin.weight"].data_ptr() == merged["again.weight"].data_ptr()
    again, _ = learn(base, experts, initial=learned.coefficients, steps=0)
    for name in merged:
        assert_same(again[name], merged[name], name)


def test_without_steps_it_is_task_arithmetic() -> None:
    base, experts = models()
    for dtype in (torch.float32, torch.bfloat16):
        cast = [{name: x.to(dtype) if x.is_floating_point() else x for name, x in m.items()} for m in (base, *experts)]
        merged, learned = learn(cast[0], cast[1:], steps=0, initial=0.25)
        expected = merge_state_dicts(cast[0], cast[1:], method="task_arithmetic", lam=0.25)
        eps = torch.finfo(dtype).eps
        for name in floats(base):
            torch.testing.assert_close(merged[name], expected[name], rtol=2 * eps, atol=2 * eps)
        assert (learned.coefficients == 0.25).all() and len(learned.losses) == 0


def test_plus_plus_combines_what_ties_elects() -> None:
    base, experts = models()
    merged, learned = learn(base, experts, density=0.4, initial=0.5, steps=0)
    flat = [torch.cat([model[name].reshape(-1) for name in floats(base)]) for model in (base, *experts)]
    split = ties_split(flat[0], flat[1:], density=0.4)
    offsets = torch.tensor([0, *(base[name].numel() for name in floats(base))]).cumsum(0)
    expected = reference.combine(flat[0], split, learned.coefficients, offsets)
    assert_same(torch.cat([merged[name].reshape(-1) for name in floats(base)]), expected)


def test_it_is_reproducible() -> None:
    base, experts = models()
    runs = []
    for seed in (0, 0, 1):
        objective = entropy_objective(network(), images(), batch_size=4, seed=seed)
        runs.append(learn(base, experts, objective=objective)[1].coefficients)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_gradients_are_those_of_autograd() -> None:
    """The loop that the method replaces, tensor by tensor."""
    base, experts = models()
    names = floats(base)
    raw = torch.full((2, len(names)), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.02)
    objective = entropy_objective(network(), images(), batch_size=24)
    losses = []
    for step in range(5):
        factors = raw.clamp(0, 1)
        state = {
            name: base[name] + sum(factors[t, i] * (expert[name] - base[name]) for t, expert in enumerate(experts))
            for i, name in enumerate(names)
        }
        optimizer.zero_grad()
        loss = objective(state, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _, learned = learn(base, experts, steps=5)
    torch.testing.assert_close(learned.coefficients, raw.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learned.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_coefficients_stay_within_zero_and_one() -> None:
    base, experts = models()

    def norm(merged: StateDict, step: int) -> Tensor:
        return (1 if step < 30 else -1) * sum(x.sum() for x in merged.values())

    for steps in (15, 40):
        _, learned = learn(base, experts, objective=norm, steps=steps, lr=0.3)
        assert learned.coefficients.aminmax() == (0, 1)


def test_mixed_dtypes() -> None:
    base, experts = models()
    for model in (base, *experts):
        for name in ("again.weight", "twin.weight"):
            model[name] = model["again.weight"].bfloat16() if name == "again.weight" else model["again.weight"]
    seen: dict[str, torch.dtype] = {}

    def objective(merged: StateDict, step: int) -> Tensor:
        seen.update({name: x.dtype for name, x in merged.items()})
        return sum(x.float().square().sum() for x in merged.values())

    merged, learned = learn(base, experts, objective=objective, steps=2)
    assert {name: x.dtype for name, x in merged.items()} == {name: x.dtype for name, x in base.items()}
    assert seen == {name: base[name].dtype for name in learned.names}


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_outside_and_with_parameters(off: Callable[[], Any]) -> None:
    base, experts = models()
    expected, _ = learn(base, experts, steps=3)
    as_parameters = [
        {name: nn.Parameter(x) if x.is_floating_point() else x for name, x in model.items()}
        for model in (base, *experts)
    ]
    with off():
        merged, _ = learn(as_parameters[0], as_parameters[1:], steps=3)
    for name in floats(base):
        assert_same(merged[name], expected[name], name)


def test_inputs_stay_as_they_are() -> None:
    base, experts = models()
    before = [{name: x.clone() for name, x in model.items()} for model in (base, *experts)]
    model = network()
    learn(base, experts, objective=entropy_objective(model, images()), density=0.5, steps=3)
    for state, copy in zip((base, *experts, model.state_dict()), (*before, before[0]), strict=True):
        for name, x in copy.items():
            assert_same(state[name], x, name)


def test_a_head_for_each_task_and_datasets_with_labels() -> None:
    heads = {"even": torch.eye(4)[:, :2], "odd": torch.eye(4)[:, 2:]}
    asked: list[str] = []

    def classify(outputs: Tensor, task: str) -> Tensor:
        asked.append(task)
        return outputs @ heads[task]

    base, tensors = network().state_dict(), images()
    base = {name: base[name] for name in floats(base)}
    labelled = {task: [(x, 7) for x in of_task] for task, of_task in tensors.items()}
    values = [entropy_objective(network(), x, classify, batch_size=5)(base, 3) for x in (tensors, labelled)]
    assert asked == TASKS * 2
    assert_same(values[0], values[1])
    assert values[0] <= 2 * math.log(2)


def test_tied_tensors_are_replaced_wherever_they_are() -> None:
    """Under one name in two modules, and in one module under two names; the model gets its own back."""
    embed, head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    head.weight = embed.weight
    for model in (nn.Sequential(embed, head), nn.Sequential(embed, embed)):
        own, replaced = embed.weight.detach().clone(), torch.randn(6, 6, generator=generator("replaced"))
        x = images()["even"]
        loss = entropy_objective(model.eval(), {"even": x}, batch_size=24)({"0.weight": replaced}, 0)
        p = (x @ replaced.T @ replaced.T).softmax(-1)
        torch.testing.assert_close(loss, torch.special.entr(p).sum(-1).mean())
        assert_same(embed.weight.detach(), own)


def test_empty_models() -> None:
    assert merge_state_dicts({}, [{}], method="adamerging", objective=lambda merged, step: None) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": None}, "objective must be callable, got NoneType"),
        ({"receive": 3}, "receive must be callable or None, got int"),
        ({"granularity": "model"}, "granularity must be one of 'layer', 'task', got 'model'"),
        ({"density": 0.0}, "density must be in (0, 1], got 0.0"),
        ({"density": [0.2, 0.3, 0.4]}, "density must be one number or one per expert (2), got 3"),
        ({"lr": 0.0}, "lr must be finite and above 0, got 0.0"),
        ({"lr": math.inf}, "lr must be finite and above 0, got inf"),
        ({"steps": -1}, "steps must be finite and 0 or greater, got -1"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"initial": math.nan}, "initial must be finite, got nan"),
        ({"initial": torch.zeros(2, 1)}, "initial must be a number or have shape (2, 9), got (2, 1)"),
        ({"lam": 0.3}, "options of method='adamerging' must be among objective, granularity, density, initial, lr, "
                       "steps, receive, got 'lam'"),
        ({"objective": lambda merged, step: 1.0},
         "objective must return a scalar tensor that depends on the merged ones, got 1.0"),
        ({"objective": lambda merged, step: torch.tensor(1.0)},
         "objective must return a scalar tensor that depends on the merged ones, got 1.0"),
        ({"objective": lambda merged, step: merged["first.bias"].sum() * math.nan},
         "objective must return a finite number, got nan at step 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_refused(options: dict[str, Any], message: str) -> None:
    base, experts = models()
    call: dict[str, Any] = {"objective": entropy_objective(network(), images()), **options}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method="adamerging", **call)


@pytest.mark.parametrize("method", ["adamerging", "fisher", "regmean"])
def test_nonfinite_values_are_named(method: str) -> None:
    base, experts = models()
    experts[1]["first.bias"][[0, 3]] = torch.tensor([math.nan, math.inf])
    options: dict[str, Any] = {
        "adamerging": {"objective": entropy_objective(network(), images())},
        "fisher": {"fishers": [{}, {}]},
        "regmean": {"grams": [{}, {}]},
    }[method]
    message = "experts[1] must be finite, got 2 NaN or infinite values in tensor 'first.bias'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method=method, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Network()}, "model must be in evaluation mode, got training mode"),
        ({"inputs": {}}, "inputs must be of at least one task, got none"),
        ({"inputs": {"odd": torch.zeros(0, 6)}}, "inputs['odd'] must hold at least one sample, got none"),
        ({"batch_size": 0}, "batch_size must be 1 or greater, got 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_by_the_objective(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"model": network(), "inputs": images(), **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        entropy_objective(**call)
