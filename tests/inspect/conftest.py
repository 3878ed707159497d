from __future__ import annotations

import pytest

from surgery_kernels.inspect import Inspection, inspect_models
from tests.fighting_models import EXPERTS, fighting_models


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fighting_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def inspection(folders: dict[str, str]) -> Inspection:
    return inspect_models([folders[name] for name in EXPERTS], folders["base"])
