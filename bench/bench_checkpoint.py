"""4 checkpoints merged by TIES from files to a file, by `mergekit-yaml` and `surgery-kernels merge` as whole processes.

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
from contextlib import ExitStack, closing
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

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint.reading.opening import open_checkpoint

SIZES = [(8, 512), pytest.param((20, 1536), marks=pytest.mark.large)]  # layers and width: 58M and 665M parameters
COMMANDS = {
    "ours": [sys.executable, "-m", "surgery_kernels.cli", "merge", "--quiet"],
    "mergekit": [sys.executable, str(Path(__file__).with_name("mergekit_yaml.py")), "--no-copy-tokenizer", "--quiet"],
}
MERGES = [  # mergekit has no scope beyond a tensor
    ("ties", "mergekit"),
    ("ties", "ours"),
    ("ties from disk", "ours"),
    ("ties over the model", "ours"),
]


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

    def take(self, models: Models, prepare: Callable[[list[Path]], None]) -> None:
        prepare(models.files)
        self.reads.append(models.nbytes / seconds(lambda: read(models.files)))
        self.writes.append(models.nbytes_merged / seconds(lambda: write(models.folder, models.nbytes_merged)))

    def summary(self, models: Models) -> dict[str, float]:
        """With the seconds that no merge can beat: reading and writing can go on at the same time."""
        read_rate, write_rate = statistics.mean(self.reads), statistics.mean(self.writes)
        return {
            "file_read_bytes_per_second": read_rate,
            "file_write_bytes_per_second": write_rate,
            "bound_seconds": max(models.nbytes / read_rate, models.nbytes_merged / write_rate),
        }


@pytest.mark.parametrize(("name", "contender"), MERGES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.benchmark(group="checkpoint")
def test_merge(
    benchmark: Any, models: Any, rounds: int, size: tuple[int, int], name: str, contender: str, tmp_path: Path
) -> None:
    if contender == "mergekit" and importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed")
    cold = name == "ties from disk"
    if cold and not hasattr(os, "posix_fadvise"):
        pytest.skip("this system does not say how files leave its page cache")
    generated = models(size)
    scope = "model" if name == "ties over the model" else "tensor"
    recipe = tmp_path / "recipe.yml"
    generated.write_recipe(recipe, **({} if scope == "tensor" else {"scope": scope}))
    prepare = forget if cold else read
    rates, peaks, shares, ours_seconds = Rates(), [], [], []

    def merge(command: str, out: Path) -> int:
        return run([*COMMANDS[command], str(recipe), str(out)])

    def before() -> tuple[tuple[Path], dict[str, Any]]:
        rates.take(generated, prepare)
        out = Path(tempfile.mkdtemp(dir=generated.folder)) / "out"  # on the disk that the rates are of
        if contender != "ours":
            prepare(generated.files)
            ours_seconds.append(seconds(lambda: merge("ours", out)))
            shutil.rmtree(out)
        prepare(generated.files)
        return (out,), {}

    def timed(out: Path) -> None:
        peaks.append(merge(contender, out))

    def after(out: Path) -> None:
        if not shares:
            shares.append(check(generated, out, scope, contender))
        shutil.rmtree(out.parent)

    others = Others()
    benchmark.pedantic(timed, setup=before, teardown=after, rounds=1 if contender == "mergekit" else rounds)
    rates.take(generated, prepare)
    median = statistics.median(benchmark.stats.stats.data)
    info = benchmark.extra_info
    info.update(
        rates.summary(generated),
        op=f"checkpoint {name}",
        num_params=generated.num_params,
        num_tasks=NUM_TASKS,
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


def check(models: Models, out: Path, scope: str, contender: str) -> float:
    """The share of parameters that differ from the merged state dicts: none of ours, of mergekit's those at ties."""
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(open_checkpoint(path))) for path in (out, *models.files)]
        merged, base, *experts = ({name: source.tensor(name) for name in source.tensors} for source in sources)
        expected = merge_state_dicts(base, experts, density=DENSITY, semantics="mergekit", scope=scope)
        assert merged.keys() == expected.keys()
        if contender == "ours":
            assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
            return 0.0
        shares = [
            differing_share(merged[name], x, base[name], [expert[name] for expert in experts], BASELINES[contender])
            for name, x in expected.items()
        ]
        sizes = [x.numel() for x in expected.values()]
        return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
