"""Settings of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")
# machines are shared: how long an example takes proves nothing
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; where there is none they are skipped, and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
