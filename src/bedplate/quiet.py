"""Import what builds programs: without its log, which tells of CUDA libraries that are not there and not wanted, and
with threads that sleep while they wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module

_TALKERS = ("torchao", "torch.utils._pytree")


def import_modules(names: Iterable[str]) -> None:
    """Import torch or its kin; seconds, the first time. ImportError: one is missing."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _patience():
            warnings.simplefilter("ignore")
            for name in names:
                import_module(name)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """OpenMP reads this when it is loaded. Otherwise its threads look for each other without end, and a core that has
    other work makes a build take fifty times as long.
    """
    name = "OMP_WAIT_POLICY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "passive"
    try:
        yield
    finally:
        del os.environ[name]
