"""Which tests a worker of a run takes together, and in which order they begin (`pytest -n 2`).

A file's tests stay together, for what the file makes once. Files that take long begin first, so that no worker is left
alone with one in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# What shares work within a process, though in several files: SmolLM2, quantized in PyTorch.
TOGETHER = {"tests/real_model/test_delegates.py": "tests/real_model/test_quantized.py"}
FIRST = (
    "tests/real_model/test_quantized.py",
    "tests/real_model/test_float.py",
    "tests/test_readme.py",
    "tests/test_numerics.py",
    # Meanwhile the bundles that all share are built: what needs none of them does not wait.
    "tests/native/test_layers_of_a_model.py",
    "tests/native/test_rows.py",
    "tests/native/test_products.py",
    "tests/runtime/test_soak.py",
    "tests/cli/test_kill.py",
    "tests/test_families_run.py",
    "tests/assemble/test_add.py",
    "tests/test_static.py",
    "tests/link/test_stretch.py",
    "tests/real_model/test_configurations.py",
    "tests/real_model/test_stock_runner.py",
    "tests/quantize/test_choice.py",
)


def group_of(nodeid: str) -> str:
    """The group of a test, by its id: the file that leads it."""
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file, file)


def in_order(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Group by group, the long ones first."""
    places = {group: place for place, group in enumerate(FIRST)}
    return sorted(items, key=lambda item: places.get(group_of(item.nodeid), len(places)))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's own scheduler of groups, which hands them out in the order of `in_order`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)
