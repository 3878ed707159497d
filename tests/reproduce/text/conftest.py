"""Packages of texts and an encoder, made once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from surgery_kernels.reproduce.text import experts, measure
from tests import text_packages


@pytest.fixture(scope="package")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for write in (
        text_packages.write_encoder,
        text_packages.write_ratings,
        text_packages.write_crowd,
        text_packages.write_news,
        text_packages.write_translations,
    ):
        write(folder)
    return folder


@pytest.fixture
def in_this_process(restored_threads: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs one after the other, where patches are seen."""
    torch.set_num_threads(1)

    def here() -> Executor:
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(measure, "processes", here)
    monkeypatch.setattr(experts, "processes", here)
    yield
    measure.lab_at.cache_clear()
    measure.target_features.cache_clear()
