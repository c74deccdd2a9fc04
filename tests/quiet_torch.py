"""Imports torch and PEFT without what they log, which a worker of pytest-xdist would print after a run's summary."""

from bedplate.quiet import import_modules

import_modules(("torch", "torchao", "peft"))
