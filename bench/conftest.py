from __future__ import annotations

import hashlib
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pytest_benchmark.utils import get_commit_info

import tests.torchvision_operators  # noqa: F401
from surgery_kernels import _C, __version__


class Bandwidth:
    """What this machine's memory gives at this moment, in bytes a second; far more than any cache holds."""

    def __init__(self) -> None:
        self.source = torch.ones(64 << 20)  # 256 MiB
        self.target = torch.zeros_like(self.source)

    def copy(self) -> float:
        return 2 * self.source.nbytes / min(seconds(lambda: self.target.copy_(self.source)) for _ in range(2))

    def read(self) -> float:
        return self.source.nbytes / min(seconds(self.source.sum) for _ in range(2))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Others:
    """The share of the processors that other processes take from here on."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before = self.now()

    def now(self) -> tuple[float, float]:
        system, own = psutil.cpu_times(), self.process.cpu_times()
        busy = sum(system) - system.idle - getattr(system, "iowait", 0.0)
        # children too: a compiler, a measurement of memory
        return busy - sum(own[:4]), sum(system)

    def share(self) -> float:
        return max(0.0, (self.now()[0] - self.before[0]) / max(self.now()[1] - self.before[1], 1e-9))


@pytest.fixture(scope="session")
def bandwidth() -> Bandwidth:
    return Bandwidth()


class Measure:
    """One row: `call` timed with the bandwidth taken around every round, and `ours` in turn with it."""

    def __init__(self, benchmark: Any, bandwidth: Bandwidth) -> None:
        self.benchmark = benchmark
        self.bandwidth = bandwidth

    def __call__(
        self,
        call: Callable[[], Any],
        *,
        extra: dict[str, Any],
        rounds: int,
        check: Callable[[Any], float],
        ours: Callable[[], Any] | None = None,
        warm_up: bool = True,
        small: bool = False,
    ) -> None:
        """`check` gets the first result, raises where it is wrong (the row is then dropped) and returns the share of
        outputs that differ at ties. `small`: bandwidth before and after all rounds only, to leave the caches alone."""
        copies, reads, ours_seconds, results = [self.bandwidth.copy()], [self.bandwidth.read()], [], []
        shares: list[float] = []

        def before() -> None:
            if ours is not None:
                ours_seconds.append(statistics.median(seconds(ours) for _ in range(1 if small else 3)))
            if not small:
                copies.append(self.bandwidth.copy())
                reads.append(self.bandwidth.read())

        def timed() -> None:
            results.append(call())

        def after() -> None:
            result = results.pop()
            if not shares:
                shares.append(check(result))
            if not small:
                copies.append(self.bandwidth.copy())

        others = Others()
        self.benchmark.pedantic(timed, setup=before, teardown=after, rounds=rounds, warmup_rounds=int(warm_up))
        copies.append(self.bandwidth.copy())
        reads.append(self.bandwidth.read())
        data = self.benchmark.stats.stats.data
        info = self.benchmark.extra_info
        info.update(extra, differing_share=shares[0])
        info["others_cpu_share"] = others.share()
        info["copy_bytes_per_second"] = statistics.mean(copies)
        info["read_bytes_per_second"] = statistics.mean(reads)
        if ours is not None:
            pairs = list(zip(data, ours_seconds[-len(data) :], strict=True))
            info["ours_median_seconds"] = statistics.median(mine for _, mine in pairs)
            info["ours_min_seconds"] = min(mine for _, mine in pairs)
            info["speedup"] = statistics.median(theirs / mine for theirs, mine in pairs)
        elif not small:
            around = list(zip(copies[1::2], copies[2::2], strict=False))[-len(data) :]
            shares_of_bound = [
                2 * extra["least_bytes"] / (sum(rates) * took) for rates, took in zip(around, data, strict=True)
            ]
            info["share_of_bound"] = statistics.median(shares_of_bound)


@pytest.fixture
def measure(benchmark: Any, bandwidth: Bandwidth) -> Measure:
    return Measure(benchmark, bandwidth)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--large", action="store_true", help="also 8 experts x 64M parameters and checkpoints of 665M: minutes"
    )
    parser.addoption("--checkpoint-folder", help="where the checkpoints to merge are kept for the next run")
    parser.addoption("--rounds", type=int, default=5, help="rounds of the rows that take long (default 5)")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--rounds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--large"):
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: --large"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: takes minutes; runs with --large")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the numbers depend on; not whose machine it is."""
    cpu = machine_info["cpu"].get("brand_raw", platform.machine())
    machine_info.clear()
    machine_info.update(
        cpu=cpu,
        system=platform.system(),
        isa=_C.isa(),
        threads=torch.get_num_threads(),
        versions={
            "surgery_kernels": __version__,
            "build": hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:12],
            "compiler": _C.build_info()["compiler"],
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("numpy", "peft", "mergekit")},
        },
    )


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    commit = get_commit_info()
    return {"id": commit["id"], "dirty": commit["dirty"]}
