from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "any_isa: does not depend on the instruction set chosen for the run")


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element nobody wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its threads back after a test that changes their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
