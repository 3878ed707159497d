"""Fisher merging and the diagonal Fisher information, against their formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import _C, merge_state_dicts
from surgery_kernels.merging import diagonal_fisher
from tests.cases import DTYPES, assert_same, generator, option_id

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
SHAPES = {"weight": (5, 4), "bias": (5,), "scale": ()}


def random_state(*seed: Any, dtype: torch.dtype = torch.float32) -> StateDict:
    g = generator(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def models(dtype: torch.dtype = torch.float32, num_tasks: int = 3) -> tuple[StateDict, list[StateDict]]:
    return random_state("base", dtype=dtype), [random_state("expert", t, dtype=dtype) for t in range(num_tasks)]


def fishers(num_tasks: int = 3) -> list[StateDict]:
    return [{name: x.square() for name, x in random_state("fisher", t).items()} for t in range(num_tasks)]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_formula(dtype: torch.dtype) -> None:
    base, experts = models(dtype)
    certainty, weights = fishers(), [1.0, 0.5, 2.0]
    merged = merge_state_dicts(base, experts, method="fisher", fishers=certainty, weights=weights)
    for name in SHAPES:
        mass = [w * f[name].double().clamp(min=1e-6) for w, f in zip(weights, certainty, strict=True)]
        expected = sum(m * expert[name].double() for m, expert in zip(mass, experts, strict=True)) / sum(mass)
        torch.testing.assert_close(merged[name], expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_one_read(dtype: torch.dtype) -> None:
    experts = [{"w": torch.randn(1_000, generator=generator(t)).to(dtype)} for t in range(3)]
    certainty = [{"w": torch.rand(1_000, generator=generator(t))} for t in range(3)]
    before = _C.bytes_read()
    merge_state_dicts(None, experts, method="fisher", fishers=certainty)
    assert _C.bytes_read() - before == 3 * 1_000 * (dtype.itemsize + 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=option_id)
def test_fishers_of_other_dtypes(dtype: torch.dtype) -> None:
    """As they are stored, however many kinds there are."""
    base, experts = models()
    for given in ([dtype] * 3, [dtype, torch.float32, torch.bfloat16]):
        stored = [{name: x.to(d) for name, x in f.items()} for f, d in zip(fishers(), given, strict=True)]
        merged = merge_state_dicts(base, experts, method="fisher", fishers=stored)
        widened = [{name: x.float() for name, x in f.items()} for f in stored]
        expected = merge_state_dicts(base, experts, method="fisher", fishers=widened)
        for name in SHAPES:
            assert_same(merged[name], expected[name])


def test_the_robust_fine_tuning_of_wise_ft() -> None:
    """Its option of that name: the base is a model like the other, and tensors without information are averaged."""
    base, (expert, *_) = models(torch.float64)
    certainty = [{name: f[name] for name in ("weight", "scale")} for f in fishers(2)]
    merged = merge_state_dicts(None, [base, expert], method="fisher", fishers=certainty, weights=[0.3, 0.7], floor=1e-8)
    for name in SHAPES:
        f0, f1 = (f[name].double().clamp(min=1e-8) if name in f else 1.0 for f in certainty)
        mass = 0.3 * f0 + 0.7 * f1
        torch.testing.assert_close(merged[name], (0.3 * f0 * base[name] + 0.7 * f1 * expert[name]) / mass)


def test_equal_certainty_is_the_average() -> None:
    base, experts = models()
    average = merge_state_dicts(base, experts, method="average")
    for same in ({name: torch.full(shape, 0.25) for name, shape in SHAPES.items()}, {}):
        merged = merge_state_dicts(base, experts, method="fisher", fishers=[same] * 3)
        for name in SHAPES:
            torch.testing.assert_close(merged[name], average[name])


def test_a_certain_expert_decides() -> None:
    base, experts = models()
    certainty = [{name: torch.full(shape, float(t == 1)) for name, shape in SHAPES.items()} for t in range(3)]
    merged = merge_state_dicts(base, experts, method="fisher", fishers=certainty)
    for name in SHAPES:
        torch.testing.assert_close(merged[name], experts[1][name], rtol=0, atol=1e-5)


def test_what_has_no_fisher_is_averaged() -> None:
    base, experts = models()
    for t, model in enumerate((base, *experts)):
        model["steps"] = torch.tensor(t + 4)
    merged = merge_state_dicts(
        base, experts, method="fisher", fishers=[{"bias": f["bias"]} for f in fishers()], weights=[1.0, 1.0, 0.0]
    )
    torch.testing.assert_close(merged["weight"], (experts[0]["weight"] + experts[1]["weight"]) / 2)
    assert_same(merged["steps"], base["steps"])


def test_tied_tensors_are_known_by_any_of_their_names() -> None:
    base, experts = models()
    expected = merge_state_dicts(base, experts, method="fisher", fishers=fishers())
    for model in (base, *experts):
        model["head"] = model["weight"]
    renamed = [{{"weight": "head"}.get(name, name): x for name, x in f.items()} for f in fishers()]
    for known in (fishers(), renamed):
        merged = merge_state_dicts(base, experts, method="fisher", fishers=known)
        assert merged["head"].data_ptr() == merged["weight"].data_ptr()
        assert_same(merged["weight"], expected["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fishers": []}, "fishers must be one mapping per expert (3), got 0"),
        ({"weights": -1.0}, "weights must be finite and 0 or greater, got -1.0"),
        ({"weights": [0.0] * 3}, "weights must have a sum above 0, got [0.0, 0.0, 0.0]"),
        ({"weights": [1.0]}, "weights must be one number or one per expert (3), got 1"),
        ({"floor": 0.0}, "floor must be finite and above 0, got 0.0"),
        ({"fishers": [{"bias": torch.ones(5)}, {}, {}]}, "fishers[1] must have the names of fishers[0], got others"),
        (
            {"fishers": [{"module.bias": torch.ones(5)}] * 3},
            "fishers must have names of floating-point tensors of base, got 'module.bias'",
        ),
        (
            {"fishers": [{"bias": torch.ones(5)}, {"bias": torch.ones(4)}, {"bias": torch.ones(5)}]},
            "fishers[1]['bias'] must be a tensor of shape (5,), got (4,)",
        ),
        ({"fishers": [{"scale": 1.0}] * 3}, "fishers[0]['scale'] must be a tensor of shape (), got float"),
        (
            {"fishers": [{"scale": torch.tensor(-1.0)}] * 3},
            "fishers[0] must be finite and 0 or greater, got 1 other values in tensor 'scale'",
        ),
        (
            {"fishers": [{"scale": torch.tensor(math.nan)}] * 3},
            "fishers[0] must be finite and 0 or greater, got 1 other values in tensor 'scale'",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(options: dict[str, Any], message: str) -> None:
    base, experts = models()
    with pytest.raises((ValueError, RuntimeError), match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method="fisher", **{"fishers": fishers(), **options})


class Classifier(nn.Module):
    """Its second layer is called twice; the parameters of the third are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.twin = self.second
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.second(self.first(x).tanh()).tanh())


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier().eval().requires_grad_(False)


def test_diagonal_fisher_is_the_mean_over_labels() -> None:
    """Many draws for one input come near the expectation over its labels."""
    model, x = classifier(), torch.tensor([[0.3, -1.0, 0.7]])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    drawn = diagonal_fisher(model, [x.expand(2_000, 3), x], seed=1)
    model.requires_grad_(True)
    log_p = model(x).log_softmax(-1)[0]
    for name, p in model.named_parameters():
        squares = [
            torch.autograd.grad(log_p[label], p, retain_graph=True, allow_unused=True, materialize_grads=True)[0] ** 2
            for label in range(4)
        ]
        expected = sum(log_p[label].exp() * square for label, square in enumerate(squares)).detach()
        torch.testing.assert_close(drawn[name], expected, rtol=0.15, atol=1e-4)
    for name, p in before.items():
        assert_same(model.state_dict()[name], p, name)


def test_diagonal_fisher_is_reproducible() -> None:
    x = torch.randn(12, 3, generator=generator("inputs"))
    first, same, other = (
        diagonal_fisher(classifier(), batches, lambda outputs: outputs[:, :3], seed=seed)
        for batches, seed in (([x], 0), (x.split(5), 0), ([x], 1))
    )
    assert list(first) == [name for name, _ in classifier().named_parameters()]
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_diagonal_fisher_with_gradients_off_outside(off: Callable[[], Any]) -> None:
    x = torch.randn(4, 3, generator=generator("inputs"))
    model = classifier()
    expected = diagonal_fisher(model, [x])
    with off():
        actual = diagonal_fisher(model, [x])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_diagonal_fisher_refused() -> None:
    with pytest.raises(ValueError, match="^model must be in evaluation mode, got training mode$"):
        diagonal_fisher(Classifier(), [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="^batches must hold at least one input, got none$"):
        diagonal_fisher(classifier(), [])


def test_a_model_is_merged_with_its_own_fishers() -> None:
    base, x = classifier(), torch.randn(8, 3, generator=generator("inputs"))
    experts = [classifier() for _ in range(2)]
    for t, expert in enumerate(experts):
        for p in expert.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator(t, p.shape))
    known = [diagonal_fisher(expert, [x]) for expert in experts]
    merged = merge_state_dicts(
        base.state_dict(), [expert.state_dict() for expert in experts], method="fisher", fishers=known
    )
    base.load_state_dict(merged)
    torch.testing.assert_close(base.unused.weight, (experts[0].unused.weight + experts[1].unused.weight) / 2)
