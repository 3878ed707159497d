"""fit against the method written out: one task after another, plain autograd and Adam, no hooks."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgery_kernels import reference
from surgery_kernels.surgery import Fit, Sites, SurgeryAdapters, attach, fit
from surgery_kernels.surgery.batches import sample_order
from surgery_kernels.surgery.progress import progress_bar
from tests.cases import assert_same, bits
from tests.encoders import CASES, NUM_FEATURES, WIDTH, Case, Encoder, made, perturbed, samples

pytestmark = pytest.mark.any_isa


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """On models this small, threads wait for each other longer than they work."""
    torch.set_num_threads(1)


TASKS = ["mnist", "cars", "dtd"]
BATCH = 4
RANK = 3
POOLS = {"mnist": 11, "cars": 3, "dtd": 64}  # several epochs, less than a batch, less than an epoch


@pytest.fixture
def merged() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(depth=3).double()


@pytest.fixture
def experts(merged: nn.Module) -> dict[str, nn.Module]:
    return {task: perturbed(merged, seed) for seed, task in enumerate(TASKS)}


@pytest.fixture
def batches() -> dict[str, Tensor]:
    return {task: samples(size, 5, 3, seed=size).double() for task, size in POOLS.items()}


def fitted(merged: nn.Module, experts: Any, batches: Any, mode: str, **options: Any) -> Fit:
    defaults = {"rank": RANK, "steps": 6, "batch_size": BATCH, "lr": 0.01, "seed": 5, "progress": False}
    return fit(merged, experts, batches, mode, **{**defaults, **options})


def started(task: str, mode: str, dtype: torch.dtype = torch.float64) -> SurgeryAdapters:
    widths = (
        {"blocks.0": WIDTH, "blocks.1": WIDTH, "blocks.2": WIDTH, "": NUM_FEATURES}
        if mode == "v2"
        else {"": NUM_FEATURES}
    )
    return SurgeryAdapters(1, widths, RANK, tasks=[task], dtype=dtype, seed=5)


def representations(
    model: nn.Module, x: Tensor, adapters: SurgeryAdapters | None, detach: bool = False
) -> list[Tensor]:
    """The encoder's forward pass written out, with the adapters of SurgeryV2 or none."""

    def corrected(site: int, y: Tensor) -> Tensor:
        if adapters is None:
            return y
        return y - (y @ adapters.down[site][0].T).relu() @ adapters.up[site][0].T

    tokens, found = model.embed(x), []
    for site, block in enumerate(model.blocks):
        tokens = corrected(site, block(tokens))
        found.append(tokens.mean(dim=1))
        tokens = tokens.detach() if detach else tokens
    return [*found, corrected(len(found), model.head(tokens[:, 0]))]


def written_out(
    merged: nn.Module, expert: nn.Module, x: Tensor, task: str, mode: str, *, zero_steps: int = 0, detach: bool = False
) -> tuple[SurgeryAdapters, Tensor]:
    """Six steps of one task; the bias by step and site."""
    merged.eval(), expert.eval()
    adapters = started(task, mode)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.01)
    log = []
    for numbers in sample_order(5, task, len(x), 6, BATCH):
        targets = [target.detach() for target in representations(expert, x[numbers], None)]
        if mode == "v1":
            h = representations(merged, x[numbers], None)[-1].detach()
            features = [h - (h @ adapters.down[0][0].T).relu() @ adapters.up[0][0].T]
        else:
            features = representations(merged, x[numbers], adapters, detach)
        targets = targets[-len(features) :]
        losses = torch.stack([(f - r).abs().mean() for f, r in zip(features, targets, strict=True)])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        for _ in range(zero_steps):
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        log.append(losses.detach())
    return adapters, torch.stack(log)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


VARIANTS = {
    "v1": ("v1", {}, {}),
    "v2": ("v2", {}, {}),
    "v1-legacy": ("v1", {"legacy_zero_grad": True}, {"zero_steps": 2}),
    "v2-legacy": ("v2", {"legacy_zero_grad": True}, {"zero_steps": 2}),
    "v2-detached": ("v2", {"detach_layers": True}, {"detach": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_method_written_out(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], variant: str
) -> None:
    """All tasks in one batch, through hooks and fused ops, are the tasks one after another."""
    mode, options, written = VARIANTS[variant]
    result = fitted(merged, experts, batches, mode, **options)
    assert result.log.tasks == tuple(TASKS)
    assert result.log.sites == (("blocks.0", "blocks.1", "blocks.2", "") if mode == "v2" else ("",))
    for t, task in enumerate(TASKS):
        expected, bias = written_out(merged, experts[task], batches[task], task, mode, **written)
        assert_same(result.log.bias[:, t], result.log.bias[:, t].float())
        torch.testing.assert_close(result.log.bias[:, t], bias.float())
        for actual, adapter in zip(result.adapters.parameters(), expected.parameters(), strict=True):
            assert_close(actual[t], adapter[0])
    assert all((up != 0).any() for up in result.adapters.up)
    assert result.log.bias[-1].mean() < result.log.bias[0].mean()


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_a_task_learns_the_same_alone(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str
) -> None:
    together = fitted(merged, experts, batches, mode)
    alone = fitted(merged, {"dtd": experts["dtd"]}, {"dtd": batches["dtd"]}, mode)
    for of_all, of_one in zip(together.adapters.parameters(), alone.adapters.parameters(), strict=True):
        assert_close(of_all[2], of_one[0])


def test_legacy_is_an_optimizer_that_tasks_take_turns_at(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor]
) -> None:
    """One Adam for all tasks whose gradients are zeroed, not dropped, as torch < 2 did."""
    result = fitted(merged, experts, batches, "v1", legacy_zero_grad=True)
    adapters = {task: started(task, "v1") for task in TASKS}
    optimizer = torch.optim.Adam([p for task in TASKS for p in adapters[task].parameters()], lr=0.01)
    merged.eval()
    for step in range(6):
        for t, task in enumerate(TASKS):
            x = batches[task][sample_order(5, task, POOLS[task], 6, BATCH)[step]]
            target = representations(experts[task].eval(), x, None)[-1].detach()
            h = representations(merged, x, None)[-1].detach()
            loss = (reference.surgery_adapter(h[None], adapters[task].down[0], adapters[task].up[0])[0] - target).abs()
            torch.testing.assert_close(result.log.bias[step, t, 0], loss.mean().detach().float())
            optimizer.zero_grad(set_to_none=False)
            loss.mean().backward()
            optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_models_of_every_kind_come_closer_to_their_experts(case: Callable[[], Case], mode: str) -> None:
    it = made(case)
    names = ["a", "b"]
    expert_models = {name: perturbed(it.model, seed, 0.05) for seed, name in enumerate(names)}
    result = fit(
        it.model, expert_models, dict.fromkeys(names, it.inputs), mode,
        rank=8, steps=40, batch_size=6, lr=0.01, progress=False,
    )  # fmt: skip
    assert result.adapters.tasks == ("a", "b")
    first, last = result.log.bias[0, :, -1], result.log.bias[-1, :, -1]
    assert (last < 0.8 * first).all()

    def run(model: nn.Module, **options: Any) -> Tensor:
        with torch.no_grad():
            return it.representation(
                model(**it.inputs, **options) if case.__name__ == "bert" else model(it.inputs, **options)
            )

    with attach(it.model, result.adapters) as surgery:
        for task, expert in expert_models.items():
            target = run(expert.eval())
            assert (run(surgery, task=task) - target).abs().mean() < (run(it.model) - target).abs().mean()


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 12])
def test_token_major_models_learn_the_same(merged: nn.Module, experts: dict[str, nn.Module], num_tokens: int) -> None:
    """Also with batches as long as their samples have tokens: 12 in a step, 3 at the end of a pool."""
    batches = {task: samples(size, num_tokens, 3, seed=size).double() for task, size in POOLS.items()}

    def token_major(model: nn.Module) -> nn.Module:
        turned = Encoder(depth=3, token_major=True).double()
        turned.load_state_dict(model.state_dict())
        return turned

    turned = {task: token_major(expert) for task, expert in experts.items()}
    actual = fitted(token_major(merged), turned, batches, "v2")
    assert_close(actual.log.bias, fitted(merged, experts, batches, "v2").log.bias)


def test_v1_and_v2_see_the_same_samples() -> None:
    """A function of seed, task and step: shuffled per epoch, the same for more steps."""
    order = sample_order(5, "mnist", 11, 6, BATCH)
    assert order.shape == (6, BATCH)
    assert order.dtype == torch.int64
    flat = order.flatten()
    for epoch in (flat[:11], flat[11:22]):
        assert sorted(epoch.tolist()) == list(range(11))
    assert not torch.equal(flat[:11], flat[11:22])
    assert_same(sample_order(5, "mnist", 11, 60, BATCH)[:6], order)
    assert not torch.equal(sample_order(6, "mnist", 11, 6, BATCH), order)
    assert not torch.equal(sample_order(5, "cars", 11, 6, BATCH), order)
    assert sorted(sample_order(0, "a", 2, 1, 4).flatten().tolist()) == [0, 0, 1, 1]


def test_only_the_samples_in_use_are_run(merged: nn.Module, experts: dict[str, nn.Module]) -> None:
    seen = []
    experts["dtd"].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    fitted(merged, {"dtd": experts["dtd"]}, {"dtd": samples(64, 5, 3).double()}, "v2", steps=2)
    assert sum(seen) == 1 + 2 * BATCH  # one alone tells the layout


class Samples(torch.utils.data.Dataset):
    """A dataset of (sample, label) that fails at its n-th access."""

    def __init__(self, inputs: Tensor, fails_at: float = math.inf) -> None:
        self.inputs = inputs
        self.left = fails_at

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inputs[number], 7


class Stream(torch.utils.data.IterableDataset):
    """Batches of three, whose number is known."""

    def __init__(self, inputs: Tensor) -> None:
        self.batches = inputs.split(3)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_every_form_of_batches(merged: nn.Module, experts: dict[str, nn.Module], mode: str) -> None:
    expert = {"dtd": experts["dtd"]}
    x = samples(10, 5, 3).double()
    expected = fitted(merged, expert, {"dtd": x}, mode)
    forms: list[Any] = [
        Samples(x),
        Stream(x),
        TensorDataset(x, torch.zeros(10)),
        [x[:7], x[7:]],
        [(x[:7], torch.zeros(7)), (x[7:], torch.zeros(3))],
        (batch for batch in x.split(3)),
        DataLoader(TensorDataset(x, torch.zeros(10)), batch_size=3),
        {"samples": x, "labels": torch.zeros(10)},
        [{"samples": x[:7]}, {"samples": x[7:]}],
    ]
    for form in forms:
        result = fitted(merged, expert, {"dtd": form}, mode)
        for actual, adapter in zip(result.adapters.parameters(), expected.adapters.parameters(), strict=True):
            assert_same(actual.detach(), adapter.detach())


def test_a_dataset_may_be_read_by_workers(merged: nn.Module, experts: dict[str, nn.Module]) -> None:
    before = torch.random.get_rng_state()
    x = samples(10, 5, 3).double()
    expected = fitted(merged, {"dtd": experts["dtd"]}, {"dtd": x}, "v2", steps=2)
    actual = fitted(merged, {"dtd": experts["dtd"]}, {"dtd": Samples(x)}, "v2", steps=2, num_workers=1)
    assert_same(actual.log.bias, expected.log.bias)
    assert_same(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_every_form_of_experts(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str
) -> None:
    expected = fitted(merged, experts, batches, mode)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    for forms in (states, {t: lambda t=t: experts[t] for t in TASKS}, {t: lambda t=t: states[t] for t in TASKS}):
        assert_same(fitted(merged, forms, batches, mode).log.bias, expected.log.bias)
    for name, tensor in merged.state_dict().items():
        assert_same(tensor, before[name])


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_the_models_are_as_before(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str
) -> None:
    merged.train()
    merged.blocks[1].eval()
    merged.head.bias.requires_grad_(False)
    experts["cars"].train()

    def state() -> list[object]:
        models = [merged, *experts.values()]
        return [
            [
                (module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks))
                for module in model.modules()
            ]
            + [(p.requires_grad, p.grad) for p in model.parameters()]
            for model in models
        ]

    before = state()
    fitted(merged, experts, batches, mode)
    assert state() == before
    wrong = {**batches, "cars": torch.full((4, 5, 3), math.nan, dtype=torch.float64)}
    with pytest.raises(ValueError, match="NaN"):
        fitted(merged, experts, wrong, mode)
    assert state() == before
    with pytest.raises(KeyboardInterrupt):
        fitted(merged, experts, {**batches, "cars": Samples(batches["cars"], fails_at=4)}, mode)
    assert state() == before


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_gradients_may_be_off_outside(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str, off: Callable[[], Any]
) -> None:
    expected = fitted(merged, experts, batches, mode).log.bias
    with off():
        result = fitted(merged, experts, {task: x.clone() for task, x in batches.items()}, mode)
    assert_same(result.log.bias, expected)
    assert not any(parameter.is_inference() for parameter in result.adapters.parameters())


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    with pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path, variant: str
) -> None:
    """Interrupted, or given more steps, the result has the same bits; the log too."""
    mode, options, _ = VARIANTS[variant]
    expected = fitted(merged, experts, batches, mode, steps=10, **options)
    options = {**options, "checkpoint": tmp_path / "runs" / "fit.pt", "checkpoint_every": 4}
    results = []
    if mode == "v2":
        # Targets take 3 samples, every one of the 10 steps 4: the sixth step fails, after a checkpoint at the fourth.
        failing = {**batches, "cars": Samples(batches["cars"], fails_at=1 + 3 + 5 * BATCH + 2)}
        with interrupted():
            fitted(merged, experts, failing, mode, steps=10, **options)
        assert torch.load(options["checkpoint"])["step"] == 4
        results.append(fitted(merged, experts, batches, mode, steps=10, **options))
    for steps in (7, 10, 10):
        results.append(fitted(merged, experts, batches, mode, steps=steps, resume=steps != 7, **options))
    assert_same(results.pop(-3).log.bias, expected.log.bias[:7])
    for result in results:
        assert_same(result.log.bias, expected.log.bias)
        for actual, adapter in zip(result.adapters.parameters(), expected.adapters.parameters(), strict=True):
            assert torch.equal(bits(actual.detach()), bits(adapter.detach()))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["fit.pt"]
    with pytest.raises(ValueError, match=r"^steps must be 10 or greater, as in checkpoint, got 9$"):
        fitted(merged, experts, batches, mode, steps=9, **options)
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with seed=6, got 5$"):
        fitted(merged, experts, batches, mode, steps=10, **{**options, "seed": 6})
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with merged='\w+', got '\w+'$"):
        fitted(perturbed(merged, 9), experts, batches, mode, steps=10, **options)
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with experts\['cars'\]='\w+', got '\w+'$"):
        fitted(merged, {**experts, "cars": experts["dtd"]}, batches, mode, steps=10, **options)
    reordered = {task: experts[task] for task in sorted(TASKS)}
    message = "checkpoint must be of a fit with tasks=['cars', 'dtd', 'mnist'], got ['mnist', 'cars', 'dtd']"
    assert refusal(lambda: fitted(merged, reordered, batches, mode, steps=10, **options)) == message


def test_a_checkpoint_that_is_none(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").touch()
    torch.save([1], tmp_path / "list")
    torch.save({"step": 1}, tmp_path / "other")
    for path in (tmp_path, *tmp_path.iterdir()):
        message = refusal(lambda path=path: fitted(merged, experts, batches, "v1", checkpoint=path))
        assert message == f"checkpoint must be a file written by fit, got {str(path)!r}"


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_features_on_disk(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path, mode: str
) -> None:
    expected = fitted(merged, experts, batches, mode)
    runs: list[str] = []

    def result(**changed: Any) -> Fit:
        runs.clear()
        handles = [
            model.register_forward_pre_hook(lambda _, __, task=task: runs.append(task))
            for task, model in experts.items()
        ]
        made = fitted(merged, experts, changed.pop("batches", batches), mode, cache=tmp_path, **changed)
        for handle in handles:
            handle.remove()
        return made

    for ran in (TASKS, []):
        assert_same(result().log.bias, expected.log.bias)
        assert sorted(set(runs)) == sorted(ran)
    names = [
        f"{what} of {task}" for task in TASKS for what in (["features", "targets"] if mode == "v1" else ["targets"])
    ]
    assert sorted(path.stem for path in tmp_path.glob("*.npy")) == sorted(name.replace(" ", "%20") for name in names)

    experts["cars"].head.bias.data += 1
    assert not torch.equal(result().log.bias, expected.log.bias)
    assert set(runs) == {"cars"}
    result(batches={**batches, "dtd": batches["dtd"] + 1})
    assert set(runs) == {"dtd"}
    result(batches={**batches, "dtd": batches["dtd"] + 1}, steps=5)
    assert set(runs) == {"dtd"}  # of the others, five steps use the samples of six
    (tmp_path / "targets%20of%20mnist.json").unlink()  # as if interrupted while it was written
    result(batches={**batches, "dtd": batches["dtd"] + 1}, steps=5)
    assert set(runs) == {"mnist"}


def test_names_of_tasks_may_be_anything(merged: nn.Module, experts: dict[str, nn.Module], tmp_path: Path) -> None:
    name = "../a/b: c"
    x = samples(5, 5, 3).double()
    fitted(merged, {name: experts["dtd"]}, {name: x}, "v1", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert json.loads(next((tmp_path / "cache").glob("targets*.json")).read_text())["shape"] == [5, 12]


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_autocast(merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str) -> None:
    low = {task: x.float() for task, x in batches.items()}
    experts = {task: expert.float() for task, expert in experts.items()}
    expected = fitted(merged.float(), experts, low, mode)
    actual = fitted(merged, experts, low, mode, autocast=torch.bfloat16)
    assert actual.adapters.down[0].dtype == torch.float32
    assert not torch.equal(actual.log.bias, expected.log.bias)
    torch.testing.assert_close(actual.log.bias, expected.log.bias, rtol=0.1, atol=0.02)
    assert not torch.is_autocast_enabled("cpu")


def test_progress(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(merged, experts, batches, "v2", progress=False)
    assert capsys.readouterr().err == ""
    fitted(merged, experts, batches, "v2", progress=True)
    shown_text = capsys.readouterr().err
    assert re.search(r"surgery: 100%.* 6/6 .*loss=\d", shown_text)
    assert "features: 100%" in shown_text
    with progress_bar(6, "surgery", "step", shown=None) as bar:
        assert bar.delay == 2


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


NAN = torch.full((4, 5, 3), math.nan, dtype=torch.float64)

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mode": "v3"}, "mode must be one of 'v1', 'v2', got 'v3'"),
    ({"rank": 0}, "rank must be 1 or greater, got 0"),
    ({"steps": 0}, "steps must be 1 or greater, got 0"),
    ({"steps": 1.5}, "steps must be an integer, got 1.5"),
    ({"batch_size": 0}, "batch_size must be 1 or greater, got 0"),
    ({"checkpoint_every": 0}, "checkpoint_every must be 1 or greater, got 0"),
    ({"lr": 0.0}, "lr must be finite and greater than 0, got 0.0"),
    ({"lr": math.inf}, "lr must be finite and greater than 0, got inf"),
    ({"lr": math.nan}, "lr must be finite and greater than 0, got nan"),
    ({"num_workers": -1}, "num_workers must be 0 or greater, got -1"),
    ({"autocast": "bfloat16"}, "autocast must be bfloat16, float16 or None, got 'bfloat16'"),
    ({"autocast": torch.float32}, "autocast must be bfloat16, float16 or None, got torch.float32"),
    ({"mode": "v1", "detach_layers": True}, "detach_layers must be False with mode='v1', got True"),
    ({"experts": {}}, "experts must be of at least one task, got none"),
    ({"experts": [Encoder()]}, "experts must be a mapping from names of tasks, got list"),
    ({"experts": {1: Encoder(), 2: Encoder()}}, "experts must be a mapping from names of tasks, got [1, 2]"),
    ({"batches": [samples(4, 5, 3)]}, "batches must be a mapping from names of tasks, got list"),
    ({"without": "experts"}, "experts must have one for every task of batches, got none for 'cars'"),
    ({"without": "batches"}, "batches must have samples for every task of experts, got none for 'cars'"),
    ({"cars": torch.empty(0, 5, 3)}, "batches['cars'] must hold at least one sample, got none"),
    ({"cars": []}, "batches['cars'] must hold at least one sample, got none"),
    (
        {"cars": 3},
        "batches['cars'] must be a tensor, a mapping of tensors, a dataset or an iterable of batches, got int",
    ),
    (
        {"cars": ["x"]},
        "batches['cars'] must be tensors, tuples that start with one or mappings of tensors, got str",
    ),
    (
        {"cars": [samples(4, 5, 3), samples(4, 6, 3)]},
        "batches['cars'] must hold samples of one shape, got (5, 3) and (6, 3)",
    ),
    (
        {"cars": (samples(4, 5, 3), torch.zeros(4))},  # a pair of inputs and labels is no list of batches
        "batches['cars'] must hold samples of one shape, got (5, 3) and ()",
    ),
    (
        {"cars": {"samples": samples(4, 5, 3), "mask": torch.ones(3, 5)}},
        "batches['cars'] must be tensors with a row per sample each, got {'samples': (4, 5, 3), 'mask': (3, 5)}",
    ),
    ({"cars": samples(4, 6, 3)}, "batches['cars'] must hold samples like those of 'mnist', (5, 3), got (6, 3)"),
    ({"cars": NAN}, "targets of task 'cars' at site 'blocks.0' must be finite, got NaN"),
    ({"cars": NAN, "mode": "v1"}, "features of task 'cars' at site '' must be finite, got NaN"),
    (
        {"cars": torch.full((4, 5, 3), math.inf, dtype=torch.float64), "mode": "v1"},
        "features of task 'cars' at site '' must be finite, got NaN",
    ),
    ({"expert": 3}, "experts['cars'] must be a module or a state dict, got int"),
    (
        {"expert": Encoder(depth=3, width=8).double()},
        "targets of task 'cars' at site 'blocks.0' must have the width of the merged model, 16, got 8",
    ),
    (
        {"expert": Encoder(depth=3, num_features=7).double(), "mode": "v1"},
        "targets of task 'cars' at site '' must have the width of the merged model, 12, got 7",
    ),
    ({"sites": Sites()}, "sites must have at least one block with mode='v2', got 0"),
    ({"sites": Sites(blocks=("blocks.0",)), "mode": "v1"}, "sites must have no blocks with mode='v1', got 1"),
    ({"sites": Sites(blocks=("blocks.7",))}, "sites must be names of modules of merged, got 'blocks.7'"),
    ({"sites": Sites(blocks=("blocks.0", "blocks.0"))}, "sites must be different modules, got 'blocks.0' twice"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_refused(
    merged: nn.Module,
    experts: dict[str, Any],
    batches: dict[str, Any],
    wrong: dict[str, Any],
    message: str,
) -> None:
    options = {"mode": "v2", **wrong}
    if "cars" in options:
        batches["cars"] = options.pop("cars")
    if "expert" in options:
        experts["cars"] = options.pop("expert")
    missing = options.pop("without", None)
    if missing:
        del {"experts": experts, "batches": batches}[missing]["cars"]
    experts, batches = options.pop("experts", experts), options.pop("batches", batches)
    assert refusal(lambda: fitted(merged, experts, batches, **options)) == message


def test_an_expert_of_another_architecture(
    merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]
) -> None:
    experts["cars"] = Encoder(depth=2).state_dict()
    message = refusal(lambda: fitted(merged, experts, batches, "v2"))
    assert message.startswith("experts['cars'] must be a state dict of the merged model, got ")
    assert "blocks.2.linear.weight" in message
    experts["cars"] = Encoder(depth=2).double()
    message = refusal(lambda: fitted(merged, experts, batches, "v2"))
    assert message == "sites must be names of modules of experts['cars'], got 'blocks.2'"


def test_a_merged_model_with_adapters(merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]) -> None:
    result = fitted(merged, experts, batches, "v1")
    with attach(merged, result.adapters):
        message = refusal(lambda: fitted(merged, experts, batches, "v1"))
    assert message == "merged must be without adapters, got one with adapters attached: detach them first"


def test_a_block_that_is_skipped(merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]) -> None:
    for model in (merged, *experts.values()):
        model.unused = nn.Linear(2, 2)
    sites = Sites(blocks=("blocks.0", "unused"))
    message = refusal(lambda: fitted(merged, experts, batches, "v2", sites=sites))
    assert message == "site 'unused' must run once in a forward pass, got none"


def test_training_that_diverges(merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]) -> None:
    message = refusal(lambda: fitted(merged, experts, batches, "v2", lr=1e300))
    assert re.fullmatch(r"features of task '\w+' at site '[\w.]*' must be finite, got (NaN|infinity)", message)
