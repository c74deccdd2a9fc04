"""What is in memory, and which requests run or wait: as it is when the metrics are read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from weakref import ref

from prometheus_client.core import GaugeMetricFamily, Metric

from bedplate.bundle.entries import AdapterEntry
from bedplate.errors import BedplateError
from bedplate.runtime.activity import MemoryUse
from bedplate.serve.catalog import Base, Model

_MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


class Ranks:
    """Ranks of adapters. A file that says one is long, so it is read once."""

    def __init__(self) -> None:
        # Weakly: the files of an adapter that was unloaded are removed when nobody holds its entry.
        self._known: dict[tuple[str, str], tuple[ref[AdapterEntry], str]] = {}

    def of(self, base: Base, name: str) -> str:
        """Empty: nothing says it any more."""
        entry = base.engine.bundle.adapters.get(name)
        if entry is None:
            self._known.pop((base.name, name), None)
            return ""
        known = self._known.get((base.name, name))
        if known is None or known[0]() is not entry:
            try:
                known = ref(entry), str(entry.read_info().rank)
            except (BedplateError, OSError):
                return ""
            self._known[base.name, name] = known
        return known[1]


class Residency:
    """running, waiting: the models of requests."""

    def __init__(
        self, bases: Iterable[Base], ranks: Ranks, running: Sequence[Model], waiting: Sequence[Model]
    ) -> None:
        self._memory = {base: base.engine.memory() for base in bases}
        self._ranks, self._running, self._waiting = ranks, running, waiting

    def families(self) -> Iterator[Metric]:
        """Names that begin with `vllm:` are those that gateways read."""
        yield from self._requests()
        yield self._kv_usage()
        yield self._lora_requests()
        yield self._parts()
        yield from self._adapters()

    def _requests(self) -> Iterator[Metric]:
        for state, models in (("running", self._running), ("waiting", self._waiting)):
            for prefix in ("bedplate_requests", "vllm:num_requests"):
                family = _gauge(f"{prefix}_{state}", f"Requests that are {state}.", "model_name")
                for base in self._memory:
                    count = sum(model.base.name == base.name for model in models)
                    family.add_metric([base.name], count)
                yield family

    def _kv_usage(self) -> Metric:
        said = "Keys and values of requests, as a part of what they could take. 1: all is taken."
        family = _gauge("vllm:kv_cache_usage_perc", said, "model_name")
        for base, memory in self._memory.items():
            family.add_metric([base.name], _usage(memory, base.engine.memory_bytes))
        return family

    def _lora_requests(self) -> Metric:
        """Of all bases together: of several series, gateways read one."""
        loaded = {name for memory in self._memory.values() for name in memory.adapters}
        running = loaded | {name for model in self._running for name in model.adapters}
        waiting = {name for model in self._waiting for name in model.adapters}
        # Nothing but memory limits how many are loaded: all that there are.
        most = sum(len(base.engine.bundle.adapters) for base in self._memory)
        said = "Adapters that are loaded, and those that requests wait for. The value is the time."
        family = _gauge(
            "vllm:lora_requests_info", said, "max_lora", "running_lora_adapters", "waiting_lora_adapters"
        )
        family.add_metric(
            [str(max(most, len(running))), ",".join(sorted(running)), ",".join(sorted(waiting))], time.time()
        )
        return family

    def _parts(self) -> Metric:
        family = _gauge("bedplate_memory_bytes", "Memory by what it holds.", "model_name", "part")
        for base, memory in self._memory.items():
            family.add_metric([base.name, "foundation"], memory.foundation)
            family.add_metric([base.name, "adapters"], sum(memory.adapters.values()))
            family.add_metric([base.name, "kv"], memory.kv)
            family.add_metric([base.name, "cache"], memory.cache)
        return family

    def _adapters(self) -> Iterator[Metric]:
        loaded = _gauge(
            "bedplate_lora_adapter_loaded",
            "1 for each adapter in memory.",
            "model_name",
            "adapter_name",
            "level",
            "rank",
        )
        size = _gauge("bedplate_lora_adapter_bytes", "Its memory.", "model_name", "adapter_name")
        for base, memory in self._memory.items():
            for name, nbytes in memory.adapters.items():
                size.add_metric([base.name, name], nbytes)
                loaded.add_metric([base.name, name, "cpu", self._ranks.of(base, name)], 1)
        yield loaded
        yield size


def _usage(memory: MemoryUse, limit: int | None) -> float:
    """Cached keys and values give way, so they do not count."""
    room = _MACHINE if limit is None else limit - sum(memory.adapters.values())
    return min(1.0, memory.kv / room) if room > 0 else 1.0


def _gauge(name: str, said: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, said, labels=labels)
