"""attach: adapters on models that know nothing of them, and models afterwards as before."""

from __future__ import annotations

import copy
import re
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import reference
from surgery_kernels.surgery import Sites, SurgeryAdapters, attach, find_sites
from tests.cases import assert_same, bits
from tests.encoders import BATCH, CASES, NUM_FEATURES, WIDTH, Case, Encoder, made, samples

pytestmark = pytest.mark.any_isa

TASKS = ["a", "b", "c"]
MIXED = torch.tensor([2, 0, 1, 1, 0, 2])

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def adapters_for(case: Case, *, mode: str = "v2", changing: bool = True) -> SurgeryAdapters:
    blocks = case.blocks if mode == "v2" else ()
    adapters = SurgeryAdapters(3, {**dict.fromkeys(blocks, WIDTH), "": case.num_features}, 4, tasks=TASKS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for up in adapters.up if changing else ():
        up.data.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return adapters


def called(model: nn.Module, inputs: Any, **options: Any) -> Any:
    return model(**inputs, **options) if isinstance(inputs, dict) else model(inputs, **options)


def state_of(model: nn.Module) -> list[object]:
    """Everything that hooks could leave behind."""
    hooks = [
        (name, key, id(value), list(value.items()))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks")
    ]
    return [hooks, list(model.state_dict()), [module.training for module in model.modules()]]


@every_case
@torch.no_grad()
def test_sites_are_found(case: Callable[[], Case]) -> None:
    it = made(case)
    assert find_sites(it.model) == Sites()
    assert find_sites(it.model, "v2") == Sites(blocks=it.blocks)


@every_case
@pytest.mark.parametrize("mode", ["v1", "v2"])
@torch.no_grad()
def test_new_adapters_change_nothing(case: Callable[[], Case], mode: str) -> None:
    it = made(case)
    before = it.representation(called(it.model, it.inputs))
    assert before.shape == (BATCH, it.num_features)
    with attach(it.model, adapters_for(it, mode=mode, changing=False)) as surgery:
        for task in ("a", 2, MIXED, ["c", "a", "a", "b", "b", "b"]):
            after = it.representation(called(surgery, it.inputs, task=task))
            assert torch.equal(bits(after), bits(before))


@every_case
@torch.no_grad()
def test_v1_is_the_adapter_of_the_representation(case: Callable[[], Case]) -> None:
    it = made(case)
    adapters = adapters_for(it, mode="v1")
    plain = called(it.model, it.inputs)
    features = it.representation(plain)
    with attach(it.model, adapters) as surgery:
        output = called(surgery, it.inputs, task=MIXED)
    expected = reference.surgery_adapter(features, adapters.down[0], adapters.up[0], task_index=MIXED)
    torch.testing.assert_close(it.representation(output), expected)
    assert type(output) is type(plain)
    if not isinstance(plain, Tensor):
        assert list(output) == list(plain)


@every_case
@torch.no_grad()
def test_a_mixed_batch_is_its_tasks_apart(case: Callable[[], Case]) -> None:
    it = made(case)
    with attach(it.model, adapters_for(it)) as surgery:
        mixed = it.representation(called(surgery, it.inputs, task=MIXED))
        by_name = it.representation(called(surgery, it.inputs, task=[TASKS[t] for t in MIXED]))
        assert_same(by_name, mixed)
        for t, task in enumerate(TASKS):
            alone = it.representation(called(surgery, it.inputs, task=task))
            rows = MIXED.eq(t)
            torch.testing.assert_close(mixed[rows], alone[rows], rtol=1e-5, atol=1e-5)
    others = it.representation(called(it.model, it.inputs))
    assert (mixed - others).abs().max() > 0.01


def test_every_token_is_corrected_and_feeds_the_next_block() -> None:
    it = made(CASES[0])
    adapters = adapters_for(it)
    tokens = it.model.embed(it.inputs)
    for block, down, up in zip(it.model.blocks, adapters.down, adapters.up, strict=False):
        tokens = reference.surgery_adapter(block(tokens)[None], down[1:2], up[1:2])[0]
    features = it.model.head(tokens[:, 0])
    expected = reference.surgery_adapter(features[None], adapters.down[2][1:2], adapters.up[2][1:2])[0]
    with attach(it.model, adapters) as surgery:
        torch.testing.assert_close(surgery(it.inputs, task="b"), expected)


@pytest.mark.parametrize(
    ("batch_first", "token_major"), [("own", "own_token_major"), ("open_clip", "open_clip_token_major")]
)
@torch.no_grad()
def test_token_major_is_the_same_model(batch_first: str, token_major: str) -> None:
    by_name = {case.__name__: case for case in CASES}
    pair = [made(by_name[name]) for name in (batch_first, token_major)]
    outputs = [attach(it.model, adapters_for(it))(it.inputs, task=MIXED) for it in pair]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_token_major_may_be_told() -> None:
    """Where batch and tokens are equally many, shapes do not tell and batch first is assumed."""
    models = [Encoder(), Encoder(token_major=True)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = samples(5, 5, 3)
    it = Case(models[0], inputs, ("blocks.0", "blocks.1"), NUM_FEATURES)
    adapters = adapters_for(it)
    with attach(models[0].eval(), adapters) as surgery:
        expected = surgery(inputs, task=[0, 1, 2, 1, 0])
    with attach(models[1].eval(), adapters, Sites(it.blocks, token_major=True)) as surgery:
        torch.testing.assert_close(surgery(inputs, task=[0, 1, 2, 1, 0]), expected, rtol=1e-5, atol=1e-5)


@every_case
@torch.no_grad()
def test_detach_leaves_no_trace(case: Callable[[], Case]) -> None:
    it = made(case)
    called(it.model, it.inputs)
    before, state = it.representation(called(it.model, it.inputs)), state_of(it.model)
    surgery = attach(it.model, adapters_for(it))
    assert state_of(it.model) != state
    assert state_of(it.model)[1:] == state[1:]
    corrected = it.representation(called(surgery, it.inputs, task="a"))
    assert torch.equal(bits(it.representation(called(it.model, it.inputs))), bits(before))  # not asked for surgery
    assert surgery.detach() is it.model
    assert state_of(it.model) == state
    assert torch.equal(bits(it.representation(called(it.model, it.inputs))), bits(before))
    assert not torch.equal(corrected, before)
    surgery.detach()
    with pytest.raises(RuntimeError, match=r"^surgery must be attached, got a detached one: call attach again$"):
        called(surgery, it.inputs, task="a")


@torch.no_grad()
def test_an_exception_leaves_no_trace() -> None:
    it = made(CASES[0])
    before, state = it.model(it.inputs), state_of(it.model)
    with pytest.raises(RuntimeError, match="shapes"), attach(it.model, adapters_for(it)) as surgery:
        surgery(samples(BATCH, 5, 4), task="a")
    assert state_of(it.model) == state
    surgery = attach(it.model, adapters_for(it))
    with pytest.raises(RuntimeError, match="shapes"):
        surgery(samples(BATCH, 5, 4), task="a")
    assert_same(it.model(it.inputs), before)  # no task is left over
    surgery.detach()
    with pytest.raises(ValueError, match="sites"):
        attach(it.model, SurgeryAdapters(1, {"blocks.0": WIDTH, "nowhere": 4}, 1))
    assert state_of(it.model) == state


def test_the_output_of_the_model_is_not_changed_in_place() -> None:
    """A model may keep what it returns."""

    class Keeping(nn.Module):
        def __init__(self, output: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.output = output

        def forward(self, features: Tensor) -> Any:
            self.kept = self.output(features)
            return self.kept

    pair = namedtuple("pair", ["features", "rest"])
    adapters = SurgeryAdapters(1, {"": 4}, 4, seed=0)
    adapters.up[0].data.fill_(1.0)
    features = samples(3, 4)
    for output, read in (
        (lambda x: {"image_embeds": x, "rest": 1}, lambda out: out["image_embeds"]),
        (lambda x: pair(x, 1), lambda out: out.features),
        (lambda x: (x, 1), lambda out: out[0]),
        (lambda x: x, lambda out: out),
    ):
        model = Keeping(output)
        corrected = attach(model, adapters)(features, task=0)
        assert type(corrected) is type(model.kept)
        assert_same(read(model.kept), features)
        assert not torch.equal(read(corrected), features)


def test_gradients_reach_the_adapters_and_the_model() -> None:
    it = made(CASES[0])
    adapters = adapters_for(it)
    with attach(it.model, adapters) as surgery:
        surgery(it.inputs, task=MIXED).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapters.parameters())
    assert all(parameter.grad is not None for parameter in it.model.parameters())


@torch.no_grad()
def test_a_copy_and_a_moved_model_work() -> None:
    it = made(CASES[0])
    surgery = attach(it.model, adapters_for(it))
    expected = surgery(it.inputs, task="c")
    assert_same(copy.deepcopy(surgery)(it.inputs, task="c"), expected)
    surgery.double()
    torch.testing.assert_close(surgery(it.inputs.double(), task="c").float(), expected)


@torch.no_grad()
def test_bfloat16_models_take_float32_adapters() -> None:
    it = made(CASES[0])
    expected = attach(it.model, adapters_for(it))(it.inputs, task=MIXED)
    low = made(CASES[0]).model.bfloat16()
    actual = attach(low, adapters_for(it))(it.inputs.bfloat16(), task=MIXED)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_an_empty_batch() -> None:
    it = made(CASES[0])
    with attach(it.model, adapters_for(it)) as surgery:
        for task in ("a", []):
            assert surgery(it.inputs[:0], task=task).shape == (0, NUM_FEATURES)


@torch.no_grad()
def test_parts_of_the_model_may_be_called_alone() -> None:
    it = made(CASES[0])
    tokens = samples(BATCH, 5, WIDTH)
    expected = it.model.blocks[0](tokens)
    with attach(it.model, adapters_for(it)) as surgery:
        for _ in range(2):
            assert_same(it.model.blocks[0](tokens), expected)
        surgery(it.inputs, task="a")
        assert_same(it.model.blocks[0](tokens), expected)


def test_attach_twice() -> None:
    it = made(CASES[0])
    attach(it.model, adapters_for(it))
    message = r"^model must be without adapters, got one with adapters attached: detach them first$"
    for model in (it.model, nn.Sequential(it.model)):
        with pytest.raises(ValueError, match=message):
            attach(model, adapters_for(it))


class Blocks(nn.Module):
    def __init__(self, **lists: nn.Module) -> None:
        super().__init__()
        for name, blocks in lists.items():
            setattr(self, name, blocks)


def block() -> nn.Module:
    return nn.ModuleDict({"attention": nn.Linear(4, 4)})


def test_the_longest_outer_list_of_composed_modules() -> None:
    layers = nn.ModuleList(Blocks(heads=nn.ModuleList(block() for _ in range(5))) for _ in range(3))
    heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    stem = nn.Sequential(block(), block())
    model = Blocks(stem=stem, encoder=Blocks(layers=layers), heads=heads)
    assert find_sites(model, "v2").blocks == ("encoder.layers.0", "encoder.layers.1", "encoder.layers.2")
    assert find_sites(nn.Sequential(block(), block()), "v2").blocks == ("0", "1")


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Linear(4, 4), "none"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "none"),
        (
            Blocks(text=nn.ModuleList([block(), block()]), vision=nn.ModuleList([block(), block()])),
            "'text' and 'vision'",
        ),
    ],
    ids=["a layer", "layers", "two towers"],
)
def test_no_list_of_blocks(model: nn.Module, got: str) -> None:
    message = f"model must have one longest list of blocks of one class, got {got}: give sites"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_sites(model, "v2")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def test_refused() -> None:
    it = made(CASES[0])
    model, adapters = it.model, adapters_for(it)
    assert refusal(lambda: find_sites(model, "v3")) == "mode must be one of 'v1', 'v2', got 'v3'"
    assert refusal(lambda: attach(model, adapters, Sites())) == (
        "sites must be those of the adapters, ['blocks.0', 'blocks.1', ''], got ['']"
    )
    assert refusal(lambda: attach(model, SurgeryAdapters(1, {"blocks.9": WIDTH, "": NUM_FEATURES}, 1))) == (
        "sites must be names of modules of model, got 'blocks.9'"
    )
    twice = Sites(blocks=("blocks.0", "blocks.0"))
    assert refusal(lambda: attach(model, adapters, twice)).startswith("sites must be those of the adapters")
    narrow = SurgeryAdapters(1, {"blocks.0": WIDTH, "": 5}, 1)
    with attach(model, narrow) as surgery:
        assert refusal(lambda: surgery(it.inputs, task=0)) == "features at site '' must have width 5, got 12"
    with attach(model, adapters) as surgery:
        assert refusal(lambda: surgery(it.inputs, task=[0, 1])) == "task must be one per sample (6), got 2"
        assert refusal(lambda: surgery(it.inputs, task="d")) == "task must be one of 'a', 'b', 'c', got 'd'"
        with pytest.raises(TypeError, match="task"):
            surgery(it.inputs)


def test_outputs_that_hold_no_features() -> None:
    adapters = SurgeryAdapters(1, {"0": 4, "": 4}, 1)
    cases: list[tuple[Callable[[Tensor], Any], str]] = [
        (
            lambda x: {"loss": x},
            "output at site '' must be a tensor, a tuple that starts with one or a mapping with one of image_embeds, "
            "text_embeds, image_features, text_features, pooler_output, last_hidden_state, got dict",
        ),
        (
            lambda x: x[None],
            "features at site '' must have shape [batch, dim] or [batch, tokens, dim], got (1, 3, 5, 4)",
        ),
    ]

    class Root(nn.Module):
        def __init__(self, output: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.add_module("0", nn.Identity())
            self.output = output

        def forward(self, x: Tensor) -> Any:
            return self.output(self.get_submodule("0")(x))

    for output, message in cases:
        surgery = attach(Root(output), adapters)
        assert refusal(lambda: surgery(samples(3, 5, 4), task=0)) == message  # noqa: B023  # called at once
    surgery = attach(Root(lambda x: x), adapters)
    assert refusal(lambda: surgery(samples(3, 4), task=0)) == (
        "features at site '0' must have shape [batch, tokens, dim], got (3, 4)"
    )


def test_a_block_that_runs_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))[:, 0]

    surgery = attach(Shared(), SurgeryAdapters(1, {"block": 4, "": 4}, 1))
    assert refusal(lambda: surgery(samples(3, 5, 4), task=0)) == (
        "site 'block' must run once in a forward pass, got a second time"
    )
