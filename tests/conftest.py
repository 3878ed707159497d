from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from surgery_kernels import _C

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import tests.torchvision_operators  # noqa: F401

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: processes that share the files end together then."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu() -> torch.device:
    """Where Triton kernels run: on the GPU, or without one in Triton's interpreter on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    from tests import interpreter

    interpreter.repair()
    return torch.device("cpu")


def merging_ops() -> list[str]:
    from surgery_kernels.triton import MODULES

    stems = ("trim", "ties_merge", "masks", "mix", "gram", "gram_cross", "steps", "weighted_merge")
    return [op for op, stem in MODULES.items() if stem in stems or stem.startswith("combine")]


@pytest.fixture
def device(gpu: torch.device) -> Iterator[torch.device]:
    """Where the merging ops run the Triton kernels; without a GPU these take CPU tensors while the test lasts."""
    if gpu.type == "cuda":
        yield gpu
        return
    from surgery_kernels.triton import _implementation

    with torch.library._scoped_library("surgery_kernels", "IMPL") as library:
        with warnings.catch_warnings():  # of the override
            warnings.simplefilter("ignore", UserWarning)
            for op in merging_ops():
                library.impl(op, _implementation(op), "CPU", allow_override=True)
        yield gpu


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restored_isa() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


@pytest.fixture
def forced_histogram() -> Iterator[None]:
    """Every bracket counts as missed."""
    _C.force_histogram(True)
    yield
    _C.force_histogram(False)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs a process of its own with the modules this one sees; gives what it prints."""

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    return run
