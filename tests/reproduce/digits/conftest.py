"""The checkpoints of a tiny digits experiment, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery_kernels.reproduce.digits.experts import load_experts
from tests.tiny_digits import TINY


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_experts(TINY, folder)
    return folder
