"""Import what builds programs: without its log, which tells of CUDA libraries that are not there and not wanted, with
threads that sleep while they wait, with sums that do not depend on where a tensor lies, and few looks for cycles.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module

_TALKERS = ("torchao", "torch.utils._pytree")
_RARELY = 100_000  # objects made between two looks for cycles
_SETTINGS = {
    # OpenMP's threads look for each other without end otherwise, and a core that has other work makes a build take
    # fifty times as long.
    "OMP_WAIT_POLICY": "passive",
    # MKL multiplies a row in an order that depends on its address otherwise, on processors of AMD. Same input, same
    # bytes: worth a fifth of the speed of large products.
    "MKL_CBWR": "AUTO,STRICT",
}


def import_modules(names: Iterable[str]) -> None:
    """Import torch or its kin; seconds, the first time. ImportError: one is missing."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _unless_set(_SETTINGS), rare_collections():
            warnings.simplefilter("ignore")
            for name in names:
                import_module(name)
            if torch := sys.modules.get("torch"):
                torch.mm(torch.ones(1, 1), torch.ones(1, 1))  # MKL reads its setting now
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _unless_set(settings: Mapping[str, str]) -> Iterator[None]:
    """Libraries read these when they are loaded, or when they first compute; other programs shall not inherit them."""
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """In this context, Python rarely looks for cycles. Where a million objects are made that stay, looking through all
    of them again and again takes a tenth of the time.
    """
    thresholds = gc.get_threshold()
    if thresholds[0] >= _RARELY:  # another thread, or the caller, restores what was before
        yield
        return
    gc.set_threshold(_RARELY, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
