"""Checkpoints merged from files to a file, by `mergekit-yaml` and `surgery-kernels merge` as whole processes.

The inputs are in the page cache, but for those of "from disk". Bound: the inputs read once, or the result written and
synced where that takes longer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import BASELINES, DENSITY
from checkpoints import NUM_TASKS, Models, forget, generate, read, write
from comparison import differing_share
from conftest import Others, seconds
from process import run
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.merging import METHODS

SIZES = [(8, 512), pytest.param((20, 1536), marks=pytest.mark.large)]  # layers and width: 58M and 665M parameters
COMMANDS = {
    "ours": [sys.executable, "-m", "surgery_kernels", "merge", "--quiet"],
    "mergekit": [sys.executable, str(Path(__file__).with_name("mergekit_yaml.py")), "--no-copy-tokenizer", "--quiet"],
}
SEED = ["--random-seed", "0"]


@dataclass(frozen=True)
class Case:
    """A recipe for a base and experts."""

    name: str
    method: str
    parameters: dict[str, Any]
    num_experts: int = NUM_TASKS
    base_is_listed: bool = False
    scope: str = "tensor"
    cold: bool = False
    contenders: tuple[str, ...] = ("mergekit", "ours")

    @property
    def random(self) -> bool:
        return bool(METHODS[self.method](**self.options).randomness)

    @property
    def options(self) -> dict[str, Any]:
        """Of `merge_state_dicts`."""
        declared = METHODS[self.method]
        names = {parameter.key: parameter.name for parameter in declared.parameters()}
        return declared.recipe_defaults() | {names[key]: value for key, value in self.parameters.items()}

    def write(self, models: Models, path: Path) -> None:
        keys: dict[str, Any] = {"merge_method": self.method, "parameters": self.parameters}
        if self.scope != "tensor":
            keys["scope"] = self.scope
        models.write_recipe(path, keys, self.num_experts, self.base_is_listed)

    def files(self, models: Models) -> list[Path]:
        return models.files[: 1 + self.num_experts]


TIES = {"weight": 1, "density": DENSITY}
RANDOM = {"weight": 0.25, "density": 0.5}
CASES = [  # mergekit has no scope beyond a tensor
    Case("ties", "ties", TIES),
    Case("ties from disk", "ties", TIES, cold=True, contenders=("ours",)),
    Case("ties over the model", "ties", TIES, scope="model", contenders=("ours",)),
    Case("slerp", "slerp", {"t": 0.4}, num_experts=1, base_is_listed=True),
    Case("model_stock", "model_stock", {}),
    Case("dare_ties", "dare_ties", RANDOM),
    Case("della", "della", RANDOM),
]
MERGES = [(case, contender) for case in CASES for contender in case.contenders]


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Iterator[Callable[[tuple[int, int]], Models]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(request.config.getoption("--checkpoint-folder") or temporary).absolute()
        yield lambda size: generate(folder / f"llama_{size[0]}x{size[1]}", *size)


@dataclass
class Rates:
    """Bytes a second, taken around every round."""

    reads: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)

    def take(self, files: list[Path], models: Models, prepare: Callable[[list[Path]], None]) -> None:
        prepare(files)
        self.reads.append(nbytes(files) / seconds(lambda: read(files)))
        self.writes.append(models.nbytes_merged / seconds(lambda: write(models.folder, models.nbytes_merged)))

    def summary(self, files: list[Path], models: Models) -> dict[str, float]:
        """With the seconds that no merge can beat: reading and writing can go on at the same time."""
        read_rate, write_rate = statistics.mean(self.reads), statistics.mean(self.writes)
        return {
            "file_read_bytes_per_second": read_rate,
            "file_write_bytes_per_second": write_rate,
            "bound_seconds": max(nbytes(files) / read_rate, models.nbytes_merged / write_rate),
        }


@pytest.mark.parametrize(("case", "contender"), MERGES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.benchmark(group="checkpoint")
def test_merge(
    benchmark: Any, models: Any, rounds: int, size: tuple[int, int], case: Case, contender: str, tmp_path: Path
) -> None:
    if contender == "mergekit" and importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed")
    if case.cold and not hasattr(os, "posix_fadvise"):
        pytest.skip("this system does not say how files leave its page cache")
    generated = models(size)
    files = case.files(generated)
    recipe = tmp_path / "recipe.yml"
    case.write(generated, recipe)
    prepare = forget if case.cold else read
    rates, peaks, shares, ours_seconds = Rates(), [], [], []

    def merge(command: str, out: Path, *options: str) -> int:
        return run([*COMMANDS[command], *options, str(recipe), str(out)])

    def before() -> tuple[tuple[Path], dict[str, Any]]:
        rates.take(files, generated, prepare)
        out = Path(tempfile.mkdtemp(dir=generated.folder)) / "out"  # on the disk that the rates are of
        if contender != "ours":
            prepare(files)
            ours_seconds.append(seconds(lambda: merge("ours", out)))
            shutil.rmtree(out)
        prepare(files)
        return (out,), {}

    def timed(out: Path) -> None:
        peaks.append(merge(contender, out, *(SEED if contender == "mergekit" else [])))

    def after(out: Path) -> None:
        if not shares and contender == "ours":
            shares.append(check_ours(case, files, out))
        elif not shares:
            if case.random:  # mergekit's masks, which take ours longer than its own
                merge("ours", out.with_name("ours"), *SEED)
            else:
                merge("ours", out.with_name("ours"))
            shares.append(check_mergekits(case, files, out, out.with_name("ours")))
        shutil.rmtree(out.parent)

    others = Others()
    benchmark.pedantic(timed, setup=before, teardown=after, rounds=1 if contender == "mergekit" else rounds)
    rates.take(files, generated, prepare)
    median = statistics.median(benchmark.stats.stats.data)
    info = benchmark.extra_info
    info.update(
        rates.summary(files, generated),
        op=f"checkpoint {case.name}",
        num_params=generated.num_params,
        num_tasks=case.num_experts,
        dtype="bf16",
        contender=contender,
        differing_share=shares[0],
        others_cpu_share=others.share(),
        peak_bytes=max(peaks),
        start_seconds=seconds(lambda: run([*COMMANDS[contender], "--help"])),
    )
    if contender == "ours":
        info["share_of_bound"] = info["bound_seconds"] / median
    else:
        info["ours_median_seconds"] = statistics.median(ours_seconds)
        info["speedup"] = median / info["ours_median_seconds"]


def nbytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def check_ours(case: Case, files: list[Path], out: Path) -> float:
    """0: what is in the files is what is merged in memory."""
    with opened([out, *files]) as (merged, base, *experts):
        scope = None if case.scope == "tensor" and METHODS[case.method].decides != "scope" else case.scope
        expected = merge_state_dicts(base, experts, method=case.method, scope=scope, **case.options)
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    return 0.0


def check_mergekits(case: Case, files: list[Path], theirs: Path, ours: Path) -> float:
    """The share of parameters that differ: those at ties, and where mergekit rounds what ours computes exactly."""
    count = differing = 0
    with opened([theirs, ours, *files]) as (of_theirs, of_ours, base, *experts):
        assert of_theirs.keys() == of_ours.keys()
        for name, x in of_ours.items():
            if case.method == "ties":
                of_experts = [expert[name] for expert in experts]
                share = differing_share(of_theirs[name], x, base[name], of_experts, BASELINES["mergekit"])
            else:
                change = (x.float() - base[name].float()).abs().mean()
                limit = 0.1 * change + 2 * torch.finfo(x.dtype).eps * base[name].float().abs()
                share = ((of_theirs[name].float() - x.float()).abs() > limit).float().mean().item()
            differing, count = differing + share * x.numel(), count + x.numel()
    assert differing < 0.05 * count
    return differing / count


@contextmanager
def opened(paths: list[Path]) -> Iterator[list[dict[str, Tensor]]]:
    """All tensors of checkpoints."""
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(open_checkpoint(path))) for path in paths]
        yield [{name: source.tensor(name) for name in source.tensors} for source in sources]
