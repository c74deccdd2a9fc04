"""Imports torch and PEFT without what they log: a worker of pytest-xdist would print that after the summary of a run."""

from bedplate.quiet import import_modules

import_modules(("torch", "torchao", "peft"))
