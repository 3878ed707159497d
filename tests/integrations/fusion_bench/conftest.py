"""FusionBench with and without our ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


@pytest.fixture
def integration() -> ModuleType:
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    return importlib.import_module("surgery_kernels.integrations.fusion_bench")


@pytest.fixture
def installed(integration: ModuleType) -> Iterator[Callable[..., None]]:
    """`install`; FusionBench is as before afterwards."""
    with integration.restored():
        yield integration.install
