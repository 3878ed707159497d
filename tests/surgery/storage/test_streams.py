"""Tokens of many batches, in memory and in files while they last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery_kernels.surgery.storage.streams import Streams
from tests.cases import assert_same
from tests.encoders import samples

pytestmark = pytest.mark.any_isa


@pytest.mark.parametrize("on_disk", [False, True])
def test_streams(on_disk: bool, tmp_path: Path) -> None:
    """Batches of their own lengths, blocks that change width and dtype, and one that is empty."""
    folder = tmp_path / "cache" if on_disk else None
    first = [samples(2, 5, 3), samples(1, 4, 3, seed=1), torch.empty(0, 4, 3)]
    with Streams(folder) as streams:
        for tensor in first:
            streams.append(tensor)
        assert all(torch.equal(x, y) for x, y in zip(streams, first, strict=True))
        streams[0] = first[0] + 1
        streams[1] = wide = samples(1, 4, 7).bfloat16()
        assert_same(streams[0], first[0] + 1)
        assert_same(streams[1], wide)
        assert len(streams) == 3 and streams[2].shape == (0, 4, 3)
        if on_disk:
            assert sum(path.stat().st_size for path in tmp_path.glob("cache/*/*")) == 4 * 30 + 2 * 28
    assert not on_disk or not list((tmp_path / "cache").iterdir())
