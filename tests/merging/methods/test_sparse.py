"""Methods that keep a part of every task vector: mergekit's masks, our own, and what is done with them."""

from __future__ import annotations

import re
import zlib
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_state_dicts as mergekits
from torch import Tensor

from surgery_kernels import masks, merge_state_dicts, reference
from surgery_kernels.ops.masks import unpack
from tests.cases import assert_same, bits, gaussian, grid, inputs
from tests.untied import untied

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANDOM = ["dare_linear", "dare_ties", "della_linear", "della"]
CRUMBS = ["breadcrumbs", "breadcrumbs_ties"]
WEIGHTS = [0.7, -0.3, 1.1]

StateDict = dict[str, Tensor]


def models(dtype: torch.dtype, num_tasks: int = 3) -> list[StateDict]:
    """A base and experts; names in another order than that of mergekit's draws, which is by name."""
    drawn = {name: untied(shape, num_tasks, dtype) for name, shape in (("b", (40, 37)), ("a", (63,)), ("c", (1, 9)))}
    return [{name: [base, *experts][t] for name, (base, experts) in drawn.items()} for t in range(num_tasks + 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(
    "numbers",
    [
        {"density": 0.5},
        {"density": [0.3, 1.0, 0.6], "rescale": False, "lambda": 0.4},
        {"density": 0.55, "normalize": True},
        {"density": 0.55, "normalize": False},
    ],
    ids=str,
)
def test_masks_of_a_seed_are_mergekits(name: str, numbers: dict[str, Any], dtype: torch.dtype) -> None:
    base, *experts = models(dtype)
    ordered = [{key: state[key] for key in sorted(state)} for state in (base, *experts)]  # it draws in their order
    parameters = {"weight": WEIGHTS, **numbers}
    torch.manual_seed(42)
    expected = mergekits(ordered, name, parameters=parameters, base=0)
    options = {"lam" if key == "lambda" else key: value for key, value in numbers.items()}
    actual = merge_state_dicts(
        base, experts, method=name, weights=WEIGHTS, random_seed=42, arithmetic="mergekit", **options
    )
    for key, tensor in expected.items():
        # a norm that lies between two float32 rounds as the order of its sum has it
        assert (bits(actual[key]) != bits(tensor)).float().mean() < (0.02 if "linear" in name else 0.05), key
        assert_close_to_a_rounding(actual[key], tensor)


@pytest.mark.parametrize("name", RANDOM)
def test_density_0_draws_as_mergekit_does(name: str) -> None:
    base, *experts = models(torch.float32)
    ordered = [{key: state[key] for key in sorted(state)} for state in (base, *experts)]
    parameters = {"weight": WEIGHTS, "density": [0.5, 0.0, 0.5], "normalize": True}
    torch.manual_seed(3)
    expected = mergekits(ordered, name, parameters=parameters, base=0)
    options = {"density": parameters["density"], "normalize": True, "random_seed": 3}
    actual = merge_state_dicts(base, experts, method=name, weights=WEIGHTS, **options)
    for key, tensor in expected.items():
        assert_close_to_a_rounding(actual[key], tensor)


def assert_close_to_a_rounding(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(actual.dtype).eps, atol=1e-3)


@pytest.mark.parametrize("name", RANDOM)
def test_own_masks(name: str) -> None:
    """Keyed by the seed and the tensor's name: the same wherever it lies, others under another seed."""
    base, *experts = models(torch.float32)
    options: dict[str, Any] = {"method": name, "weights": WEIGHTS, "density": 0.5}
    merged = merge_state_dicts(base, experts, **options)
    again = merge_state_dicts(base, experts, stream="counter", random_seed=0, **options)
    other = merge_state_dicts(base, experts, stream="counter", random_seed=1, **options)
    alone = merge_state_dicts({"b": base["b"]}, [{"b": expert["b"]} for expert in experts], **options)
    for key in base:
        assert_same(merged[key], again[key])
    assert not torch.equal(merged["b"], other["b"])
    assert_same(merged["b"], alone["b"])


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_by_hand(rescale: bool) -> None:
    base, (expert,) = inputs(gaussian, 20_001, 1, torch.float64)
    merged = merge_state_dicts({"w": base}, [{"w": expert}], method="dare_linear", density=0.25, rescale=rescale)["w"]
    task_vector = expert - base
    kept = merged != base
    assert abs(float(kept.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 20_001) ** 0.5
    scale = float(task_vector.abs().sum() / task_vector[kept].abs().sum()) if rescale else 1.0
    torch.testing.assert_close(merged, base + kept * task_vector * scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CRUMBS)
@pytest.mark.parametrize("rescale", [False, True])
def test_breadcrumbs_are_mergekits(name: str, rescale: bool, dtype: torch.dtype) -> None:
    base, *experts = models(torch.float32)
    base, *experts = ({key: x.to(dtype) for key, x in state.items()} for state in (base, *experts))
    for density, gamma in ((0.3, 0.1), (1e-5, 0.01), (0.95, 0.3), (1.0, 0.5)):
        parameters = {"weight": WEIGHTS, "density": density, "gamma": gamma, "rescale": rescale}
        expected = mergekits([base, *experts], name, parameters=parameters, base=0)
        options = {"density": density, "gamma": gamma, "rescale": rescale}
        actual = merge_state_dicts(base, experts, method=name, weights=WEIGHTS, **options)
        for key, tensor in expected.items():
            if dtype == torch.float32:  # 16 bits have equal magnitudes, among which mergekit's choice is unspecified
                torch.testing.assert_close(actual[key], tensor, rtol=1e-6, atol=1e-6)
            else:
                far = (actual[key] - tensor).abs() > 8 * torch.finfo(dtype).eps * tensor.abs().clamp(min=0.01)
                assert far.float().mean() < 0.15


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("name", CRUMBS)
def test_breadcrumbs_over_the_whole_model(name: str, dtype: torch.dtype) -> None:
    """As of one long vector."""
    kind = gaussian if dtype == torch.float64 else grid
    base, experts = inputs(kind, 3000, 3, dtype)
    sizes = {"b": 1000, "a": 1, "c": 1999}
    states = [dict(zip(sizes, x.split(list(sizes.values())), strict=True)) for x in (base, *experts)]
    for density, gamma in ((0.3, 0.1), (1e-5, 0.01), ([0.95, 0.2, 1.0], [0.3, 0.01, 0.5])):
        options: dict[str, Any] = {"method": name, "weights": WEIGHTS, "density": density, "gamma": gamma}
        merged = merge_state_dicts(states[0], states[1:], scope="model", **options)
        whole = merge_state_dicts({"w": base}, [{"w": x} for x in experts], **options)["w"]
        assert_same(torch.cat(list(merged.values())), whole)
        by_tensor = merge_state_dicts(states[0], states[1:], **options)
        assert density == 1e-5 or not torch.equal(torch.cat(list(by_tensor.values())), whole)


def test_breadcrumbs_by_hand() -> None:
    x = torch.tensor([1.0, -5, 3, 2, -4])
    kept = merge_state_dicts({"w": torch.zeros(5)}, [{"w": x}], method="breadcrumbs", density=0.4, gamma=0.2)["w"]
    assert kept.tolist() == [0, 0, 3, 0, -4]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("name", [*RANDOM, *CRUMBS])
def test_exact_arithmetic_rounds_once(name: str, dtype: torch.dtype, rescale: bool) -> None:
    base, experts = inputs(gaussian, (40, 37), 3, dtype)
    for weights, normalize in ((WEIGHTS, True), (WEIGHTS, False), ([0.5, -0.25, -0.25], True)):
        options: dict[str, Any] = {"density": [0.3, 1.0, 0.6], "weights": weights, "lam": 0.7, "rescale": rescale}
        merged = merge_state_dicts(
            {"w": base}, [{"w": x} for x in experts], method=name, normalize=normalize, **options
        )
        keep, scales = kept_by_oracle(name, base, experts, options["density"])
        if "linear" in name or name == "breadcrumbs":  # divides by the weights of all, unless they cancel
            total = sum(weights)
            elect, lam, divide = "none", 0.7 / total if normalize and total else 0.7, False
        else:
            elect, lam, divide = "sum", 0.7, normalize
        expected = reference.ties_merge(
            base,
            experts,
            density=1.0,
            lam=lam,
            weights=weights,
            semantics="exact",
            elect=elect,
            normalize=divide,
            keep=[keep],
            **({"scales": scales} if rescale and name in RANDOM else {"rescale": rescale}),
        )
        if dtype == torch.float64:  # in which sums of magnitudes are not exact
            torch.testing.assert_close(merged["w"], expected, rtol=1e-13, atol=1e-13)
        else:
            assert_same(merged["w"], expected)


def kept_by_oracle(name: str, base: Tensor, experts: list[Tensor], densities: list[float]) -> tuple[Tensor, Tensor]:
    """What every expert keeps, and the factors that restore its norm."""
    if name in RANDOM:
        rule = {"rule": "della", "epsilon": 0.15} if name.startswith("della") else {}
        keep, sums = reference.masks(base, experts, density=densities, tensor_ids=[zlib.crc32(b"w")], **rule)
        return keep, (sums[:, 1] / sums[:, 2])[None]
    keep = torch.zeros(len(experts), base.numel(), dtype=torch.bool)
    for kept, expert, density in zip(keep, experts, densities, strict=True):
        order = (expert - base).abs().flatten().sort(descending=True, stable=True).indices
        count, of_largest = int(density * base.numel()), int(0.01 * base.numel())
        largest = 0 if density == 1 else min(of_largest, base.numel() - count)
        kept[order[largest : largest + count]] = True
    return keep.reshape(len(experts), *base.shape), torch.ones(1, len(experts))


def test_exact_arithmetic_is_closer() -> None:
    """In 16 bits, where mergekit rounds at every step."""
    for name in ("dare_linear", "breadcrumbs_ties"):
        base, experts = inputs(gaussian, 4096, 5, torch.float32)
        states = [{"w": (0.01 * base + (x - base)).bfloat16()} for x in (base, *experts)]
        wide = [{"w": state["w"].double()} for state in states]
        options: dict[str, Any] = {"method": name, "density": 1.0, "weights": 0.3}
        truth = merge_state_dicts(wide[0], wide[1:], **options)["w"]
        errors = [
            (merge_state_dicts(states[0], states[1:], arithmetic=arithmetic, **options)["w"] - truth).abs().mean()
            for arithmetic in ("exact", "mergekit")
        ]
        assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("name", [*RANDOM, *CRUMBS])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_edges(name: str, dtype: torch.dtype) -> None:
    """Nothing kept, all kept, identical models, empty tensors, scalars, 64 models."""
    base, experts = inputs(gaussian, 257, 2, dtype)
    states = [{"w": expert} for expert in experts]

    def merged(base: Tensor, states: list[StateDict], **options: Any) -> Tensor:
        return merge_state_dicts({"w": base}, states, method=name, normalize=False, **options)["w"]

    assert_same(merged(base, states, density=0.0), base)
    assert_same(merged(base, [{"w": base}] * 3, density=0.5), base)
    assert merged(base[:0], [{"w": base[:0]}], density=0.5).shape == (0,)
    assert merged(base[0], [{"w": experts[0][0]}], density=0.5).shape == ()
    many = merged(base, [{"w": base}] * 63 + states[:1], density=1.0, weights=1.0)
    wide, expert = (x.to(torch.promote_types(dtype, torch.float32)) for x in (base, experts[0]))
    assert_same(many, (wide + (expert - wide)).to(dtype))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dare_ties", {}, "density must be given, got none"),
        ("dare_ties", {"density": 1.5}, "density must be in [0, 1], got 1.5"),
        (
            "della",
            {"density": 0.9},
            "epsilon must keep density - epsilon and density + epsilon in (0, 1), got 0.15 with density 0.9",
        ),
        ("breadcrumbs", {"density": 0.5, "gamma": 2}, "gamma must be in [0, 1], got 2.0"),
        ("dare_linear", {"density": 0.5, "random_seed": 1 << 64}, f"seed must have 64 bits, got {1 << 64}"),
        ("dare_linear", {"density": 0.5, "stream": "x"}, "stream must be one of 'counter', 'mergekit', got 'x'"),
    ],
)
def test_refused(name: str, options: dict[str, Any], message: str) -> None:
    base, experts = inputs(gaussian, 3, 2, torch.float32)
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], method=name, **options)


def test_masks_are_those_of_the_op() -> None:
    base, (expert,) = untied((40, 37), 1, torch.float32)
    state = {"layer.w": base}, [{"layer.w": expert}]
    merged = merge_state_dicts(*state, method="dare_linear", density=0.5, rescale=False)["layer.w"]
    packed, _ = masks(base, [expert], density=0.5, tensor_id=zlib.crc32(b"layer.w"))
    assert torch.equal(merged != base, unpack(packed, base.shape)[0])
