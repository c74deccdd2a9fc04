"""Imports torch and PEFT without what they log, which a worker of pytest-xdist would print after a run's summary.

Workers do not take each other's cores, nor do the processes that tests start. Before torch is imported, this holds for
all threads alike: MKL's products depend on how many threads it may have, and ExecuTorch's threads call it, too.
"""

import os

from bedplate.quiet import import_modules

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
import_modules(("torch", "torchao", "peft"))
