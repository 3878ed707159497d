"""Merges by mergekit and by this library."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from surgery_kernels.checkpoint import merge
from tests.llama_checkpoints import Merges, StateDict, loaded


@pytest.fixture
def merges(tmp_path: Path) -> Merges:
    """The tensors of mergekit's merge and of ours."""
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    command = importlib.import_module("mergekit.scripts.run_yaml").main

    def both(given: Mapping[str, Any], max_shard_bytes: int = 10**9) -> tuple[StateDict, StateDict]:
        path = tmp_path / f"{len(list(tmp_path.glob('*.yml')))}.yml"
        path.write_text(json.dumps(given))  # JSON is YAML
        stock, ours = path.with_suffix(".mergekit"), path.with_suffix(".ours")
        options = ["--out-shard-size", str(max_shard_bytes), "--no-copy-tokenizer", "--quiet"]
        command.main([str(path), str(stock), *options], standalone_mode=False)
        merge(path, ours, max_shard_bytes=max_shard_bytes)
        return loaded(stock), loaded(ours)

    return both
