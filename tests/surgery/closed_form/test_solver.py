"""fit in closed form against its formulas in plain PyTorch, and at its edges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import ClosedForm, Fit, SurgeryAdapters, attach, fit, representation_bias
from tests.encoders import CASES, Case, Encoder, bert, made, perturbed, ragged, samples
from tests.fits import TASKS, Samples, refusal, ridge_map
from tests.surgery.test_attach import MIXED, called

pytestmark = pytest.mark.any_isa


def solved(merged: nn.Module, experts: Any, batches: Any, mode: str = "v2", **options: Any) -> Fit:
    defaults = {"solver": "closed_form", "rank": 3, "batch_size": 5, "progress": False}
    return fit(merged, experts, batches, mode, **{**defaults, **options})


@torch.no_grad()
def by_formula(merged: Encoder, expert: Encoder, x: Tensor, rank: int, ridge: float) -> Tensor:
    """The repaired representation, block after block; the class token alone is read."""
    u, v = merged.embed(x), expert.embed(x)
    for i, (block, of_expert) in enumerate(zip(merged.blocks, expert.blocks, strict=True)):
        u, v = block(u), of_expert(v)
        weights = torch.ones(u.shape[:2], dtype=u.dtype)
        if i == len(merged.blocks) - 1:
            weights[:, 1:] = 0.01
        rows, distances = u.flatten(0, 1), (u - v).flatten(0, 1)
        matrix, shift = ridge_map(rows, distances, weights.flatten(), rank, ridge)
        u = u - (u @ matrix + shift)
    h, f = merged.head(u[:, 0]), expert.head(v[:, 0])
    matrix, shift = ridge_map(h, h - f, torch.ones(len(h), dtype=u.dtype), rank, 0.5)
    return h - (h @ matrix + shift)


@pytest.mark.parametrize("rank", [1, 3, "full"])
@pytest.mark.parametrize("ridge", [1e-3, 1e-2])
def test_the_formula(
    merged: Encoder, experts: dict[str, Encoder], batches: dict[str, Tensor], rank: int | str, ridge: float
) -> None:
    how = ClosedForm(ridge=ridge, final_ridge=0.5)
    repaired = solved(merged, experts, batches, rank=rank, solver=how)
    with attach(merged.eval(), repaired.adapters) as surgery, torch.no_grad():
        for task in TASKS:
            expected = by_formula(
                merged, experts[task].eval(), batches[task], 99 if rank == "full" else int(rank), ridge
            )
            torch.testing.assert_close(surgery(batches[task], task=task), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_model(case: Callable[[], Case]) -> None:
    """What the solver corrected is what the attached adapters correct, in any mixture of tasks."""
    it = made(case)
    experts = {task: perturbed(it.model, seed, 0.05) for seed, task in enumerate(TASKS)}
    batches = dict.fromkeys(TASKS, it.inputs)
    repaired = solved(it.model, experts, batches, rank=4, batch_size=4, holdout=batches)
    log = repaired.log
    assert log.held_out is not None
    torch.testing.assert_close(log.held_out[1], log.bias[1], rtol=1e-3, atol=1e-5)
    assert (log.held_out[1, :, -1] < 0.8 * log.held_out[0, :, -1]).all()
    assert (log.bias[1] <= log.bias[0]).float().mean() > 0.8
    with attach(it.model, repaired.adapters) as surgery, torch.no_grad():
        mixed = it.representation(called(surgery, it.inputs, task=MIXED))
        for task in range(3):
            alone = it.representation(called(surgery, it.inputs, task=task))
            torch.testing.assert_close(mixed[task == MIXED], alone[task == MIXED], rtol=1e-4, atol=1e-5)


def test_v1_corrects_the_representation_alone(merged: nn.Module, experts: Any, batches: dict[str, Tensor]) -> None:
    repaired = solved(merged, experts, batches, "v1", rank="full", holdout=batches)
    assert repaired.adapters.sites == ("",)
    for t, task in enumerate(TASKS):
        before = representation_bias(merged, experts[task], batches[task])
        with attach(merged, repaired.adapters) as surgery:
            after = representation_bias(surgery, experts[task], batches[task], task=task)
        assert repaired.log.bias[:, t, 0].tolist() == pytest.approx([before[""], after[""]])
        assert after["blocks.1"] == before["blocks.1"] and after[""] < before[""]
    assert repaired.log.held_out is not None
    torch.testing.assert_close(repaired.log.held_out, repaired.log.bias)


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_the_final_ridge_is_that_of_the_blocks_where_samples_outnumber_ranks(
    merged: nn.Module, experts: Any, batches: dict[str, Tensor], mode: str
) -> None:
    default = solved(merged, experts, batches, mode).adapters
    given = solved(merged, experts, batches, mode, solver=ClosedForm(final_ridge=1e-2)).adapters
    same = [torch.equal(x, y) for x, y in zip(default.bias[-1], given.bias[-1], strict=True)]
    # 11, 3 and 64 samples at rank 3
    assert same == ([True, False, True] if mode == "v2" else [False] * 3)


def test_tasks_and_batches_do_not_matter_to_one_another(
    merged: nn.Module, experts: Any, batches: dict[str, Tensor]
) -> None:
    together = solved(merged, experts, batches).adapters
    alone = solved(merged, {"cars": experts["cars"]}, {"cars": batches["cars"]}).adapters
    for name in ("down", "up", "bias"):
        for x, y in zip(getattr(together, name), getattr(alone, name), strict=True):
            assert torch.equal(x[1], y[0])
    in_one = solved(merged, experts, batches, batch_size=100).adapters
    features = samples(4, 5, 16).double()
    for site in range(3):
        torch.testing.assert_close(in_one(site, features, slice(2, 3)), together(site, features, slice(2, 3)))


@pytest.mark.parametrize("mode", ["v1", "v2"])
@pytest.mark.parametrize("rank", [2, 12, "full"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_few_samples(merged: nn.Module, experts: Any, mode: str, rank: int | str, count: int) -> None:
    """More ranks than there are rows, too: the bias of what was seen falls."""
    batches = {task: samples(count, 5, 3, seed=count).double() for task in TASKS}
    repaired = solved(merged, experts, batches, mode, rank=rank)
    assert all(parameter.isfinite().all() for parameter in repaired.adapters.parameters())
    assert (repaired.log.bias[1, :, -1] < repaired.log.bias[0, :, -1]).all()
    if count == 1:
        assert repaired.log.bias[1, :, -1].max() < 1e-6  # the shift alone


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_features_that_never_change(merged: nn.Module, experts: Any, mode: str) -> None:
    batches = {task: samples(1, 1, 3).double().expand(6, 5, 3) for task in TASKS}
    repaired = solved(merged, experts, batches, mode)
    assert repaired.log.bias[1].max() < 1e-6
    assert not any(down.any() for down in repaired.adapters.down)


def test_experts_equal_to_the_merge(merged: nn.Module, batches: dict[str, Tensor]) -> None:
    repaired = solved(merged, dict.fromkeys(TASKS, merged.state_dict()), batches)
    assert repaired.log.bias.max() == 0
    assert not any(parameter.any() for name in ("down", "bias") for parameter in getattr(repaired.adapters, name))


class Padded(nn.Module):
    """Tokens that may be padding, which the representation leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(PaddedBlock() for _ in range(2))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens, mask = self.embed(ids), attention_mask[..., None].float()
        for block in self.blocks:
            tokens = block(tokens, mask)
        return (tokens * mask).sum(1) / mask.sum(1)


class PaddedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens + torch.tanh(self.linear(tokens + (tokens * mask).sum(1, keepdim=True)))


def padded() -> tuple[nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Padded()
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(7) < torch.randint(2, 8, (12, 1), generator=g)).long()
    return (
        model,
        {"a": perturbed(model, 1)},
        {"ids": torch.randint(0, 20, (12, 7), generator=g), "attention_mask": mask},
    )


def test_padding_takes_no_part() -> None:
    model, experts, inputs = padded()
    adapters = solved(model, experts, {"a": inputs}).adapters
    other = {**inputs, "ids": torch.where(inputs["attention_mask"] == 1, inputs["ids"], 3)}
    for x, y in zip(adapters.parameters(), solved(model, experts, {"a": other}).adapters.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    everything = solved(
        model, experts, {"a": inputs}, solver=ClosedForm(row_weights=lambda x: torch.ones(x["ids"].shape))
    )
    assert not torch.allclose(adapters.bias[0], everything.adapters.bias[0], rtol=1e-3)


def test_padding_of_a_real_encoder_takes_no_part() -> None:
    """Batches of their own lengths are those padded to one; what stands in the padding does not matter."""
    it = made(bert)
    experts = {"a": perturbed(it.model, 1, 0.05)}
    together, own = ragged(on_the_left=False, pad=0)
    expected = solved(it.model, experts, {"a": together}).adapters
    other = {**together, "input_ids": torch.where(together["attention_mask"] == 1, together["input_ids"], 7)}
    for inputs in (own, other):
        for x, y in zip(solved(it.model, experts, {"a": inputs}).adapters.bias, expected.bias, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    everything = ClosedForm(row_weights=lambda x: torch.ones(x["input_ids"].shape))
    counted = solved(it.model, experts, {"a": together}, solver=everything).adapters
    assert not torch.allclose(counted.bias[0], expected.bias[0], rtol=1e-2)


def test_row_weights_of_the_users_own() -> None:
    model, experts, inputs = padded()
    default = solved(model, experts, {"a": inputs}).adapters
    doubled = ClosedForm(row_weights=lambda x: 2 * x["attention_mask"])
    for x, y in zip(
        default.parameters(), solved(model, experts, {"a": inputs}, solver=doubled).adapters.parameters(), strict=True
    ):
        torch.testing.assert_close(x, y)
    for weights, message in [
        (lambda _: torch.ones(5, 3), "row_weights must give [batch, tokens] of the blocks, [5, 7], got [5, 3]"),
        (lambda _: None, "row_weights must give [batch, tokens] of the blocks, [5, 7], got NoneType"),
        (lambda x: -x["ids"].float() - 1, "row_weights must be finite and 0 or greater, got others"),
        (lambda x: x["ids"] * torch.nan, "row_weights must be finite and 0 or greater, got others"),
        (lambda x: x["ids"] * 0, "row_weights of task 'a' must leave tokens, got 0 for all of them"),
    ]:
        assert (
            refusal(lambda w=weights: solved(model, experts, {"a": inputs}, solver=ClosedForm(row_weights=w)))
            == message
        )


def test_tokens_that_are_not_read_count_less(merged: nn.Module, experts: Any, batches: dict[str, Tensor]) -> None:
    """Of a class token's model the other tokens of the last block; where all are averaged, none."""
    class_token, pooled = merged, padded()
    last = {}
    for weight in (0.0, 1.0):
        how = ClosedForm(unread_weight=weight)
        adapters = solved(class_token, experts, batches, solver=how).adapters
        last[weight] = [adapters.bias[i].detach() for i in range(3)]
        adapters = solved(pooled[0], pooled[1], {"a": pooled[2]}, solver=how).adapters
        last[weight] += [adapters.bias[i].detach() for i in range(3)]
    same = [torch.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in zip(last[0.0], last[1.0], strict=True)]
    assert same == [True, True, False, True, True, True]


@pytest.mark.parametrize("rank", [3, "full"])
def test_saved_and_loaded(
    merged: nn.Module, experts: Any, batches: dict[str, Tensor], rank: int | str, tmp_path: Path
) -> None:
    adapters = solved(merged, experts, batches, rank=rank).adapters
    adapters.save(tmp_path / "adapters.safetensors")
    loaded = SurgeryAdapters.load(tmp_path / "adapters.safetensors")
    assert (loaded.kind, loaded.rank, loaded.widths, loaded.tasks) == ("linear", rank, adapters.widths, tuple(TASKS))
    for x, y in zip(loaded.parameters(), adapters.parameters(), strict=True):
        assert torch.equal(x, y)
    stored = (tmp_path / "adapters.safetensors").stat().st_size
    assert stored < 8 * 3 * adapters.num_parameters + 2_000


def test_autocast_and_datasets(merged: nn.Module, experts: Any, batches: dict[str, Tensor]) -> None:
    merged = merged.float()
    experts = {task: expert.float() for task, expert in experts.items()}
    plain = {task: x.float() for task, x in batches.items()}
    whole = solved(merged, experts, plain)
    for given in (
        {task: Samples(x) for task, x in plain.items()},
        {task: [(part, 0) for part in x.split(3)] for task, x in plain.items()},
    ):
        for x, y in zip(solved(merged, experts, given).adapters.parameters(), whole.adapters.parameters(), strict=True):
            assert torch.equal(x, y)
    narrow = solved(merged, experts, plain, autocast=torch.bfloat16)
    assert narrow.adapters.down[0].dtype == torch.float32
    assert (narrow.log.bias[1, :, -1] < narrow.log.bias[0, :, -1]).all()


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_a_cache_on_disk(
    merged: nn.Module, experts: Any, batches: dict[str, Tensor], mode: str, tmp_path: Path
) -> None:
    """The second call runs no expert; the gradient's means are files of their own, streams are gone at the end."""
    first = solved(merged, experts, batches, mode, cache=tmp_path)
    assert not list(tmp_path.glob("streams-*"))
    if mode == "v2":
        fit(merged, experts, batches, mode, steps=1, cache=tmp_path, progress=False)
    passes = []
    for expert in experts.values():
        expert.register_forward_hook(lambda *_: passes.append(1))
    again = solved(merged, experts, batches, mode, cache=tmp_path)
    assert not passes
    for result in (again, solved(merged, experts, batches, mode)):
        for x, y in zip(result.adapters.parameters(), first.adapters.parameters(), strict=True):
            assert torch.equal(x, y)
    assert passes


def test_models_are_as_before(merged: nn.Module, experts: Any, batches: dict[str, Tensor]) -> None:
    merged.train()
    merged.embed.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in merged.state_dict().items()}
    with torch.inference_mode():
        adapters = solved(merged, experts, batches).adapters
    assert merged.training and not merged.embed.weight.requires_grad and merged.head.weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in merged.state_dict().items())
    assert not any(vars(module)["_forward_hooks"] or vars(module)["_forward_pre_hooks"] for module in merged.modules())
    assert adapters.down[0].requires_grad and not adapters.down[0].is_inference()


NAN = torch.full((4, 5, 3), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "exact"}, "solver must be one of 'gradient', 'closed_form', 'closed_form+gradient', got 'exact'"),
        ({"rank": 0}, "rank must be 1 or greater, got 0"),
        ({"rank": "half"}, "rank must be 'full' or an integer, got 'half'"),
        ({"rank": "full", "solver": "gradient"}, "rank must be an integer, got 'full'"),
        *(
            ({name: value}, f"{name} must be left out with solver='closed_form', got another than its default")
            for name, value in {
                "steps": 10, "lr": 0.1, "legacy_zero_grad": True, "detach_layers": True,
            }.items()
        ),
        ({"holdout": {"cars": NAN}}, "holdout must have samples for the tasks of experts, got ['cars']"),
        ({"holdout": {}, "solver": "gradient"}, "holdout must be None with solver='gradient', got samples"),
        ({"cars": NAN}, "targets of task 'cars' at site 'blocks.0' must be finite, got NaN"),
        ({"cars": NAN, "mode": "v1"}, "targets of task 'cars' at site '' must be finite, got NaN"),
        (
            {"expert": Encoder(depth=3, width=8).double()},
            "targets of task 'cars' at site 'blocks.0' must have the width of the merged model, 16, got 8",
        ),
        (
            {"expert": Encoder(depth=3, num_features=7).double()},
            "targets of task 'cars' at site '' must have the width of the merged model, 12, got 7",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_refused(merged: nn.Module, experts: Any, batches: Any, wrong: dict[str, Any], message: str) -> None:
    options = dict(wrong)
    batches["cars"] = options.pop("cars", batches["cars"])
    experts["cars"] = options.pop("expert", experts["cars"])
    assert refusal(lambda: solved(merged, experts, batches, **options)) == message


def test_features_whose_squares_are_infinite(merged: nn.Module, experts: Any, batches: Any) -> None:
    for model in (merged, *experts.values()):
        model.float()
    merged.embed.weight.data *= 1e25
    message = refusal(lambda: solved(merged, experts, {task: x.float() for task, x in batches.items()}))
    assert message == "products of features of task 'mnist' at site 'blocks.0' must be finite, got NaN"


def test_a_merged_model_that_is_not_finite(merged: nn.Module, experts: Any, batches: Any) -> None:
    merged.blocks[1].linear.bias.data[0] = torch.nan
    message = refusal(lambda: solved(merged, experts, batches))
    assert message == "features of task 'mnist' at site 'blocks.1' must be finite, got NaN"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge must be finite and greater than 0, got 0.0"),
        ({"final_ridge": -1.0}, "final_ridge must be finite and greater than 0, got -1.0"),
        ({"unread_weight": 1.5}, "unread_weight must be in [0, 1], got 1.5"),
    ],
    ids=str,
)
def test_refused_options(options: dict[str, float], message: str) -> None:
    assert refusal(lambda: ClosedForm(**options)) == message
