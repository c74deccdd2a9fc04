"""Import what builds programs without its log: it tells of CUDA libraries that are not there and not wanted."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from importlib import import_module

_TALKERS = ("torchao", "torch.utils._pytree")


def import_modules(names: Iterable[str]) -> None:
    """Import torch or its kin; seconds, the first time. ImportError: one is missing."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                import_module(name)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
