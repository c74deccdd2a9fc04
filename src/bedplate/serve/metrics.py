"""What `/metrics` tells: times and tokens by base, tokens by adapter, and what is in memory now.

There are histograms for bases only: those of a thousand adapters would take a second to write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from bedplate.runtime.request import Event
from bedplate.serve.answers import Choice
from bedplate.serve.catalog import Base, Model
from bedplate.serve.limits import Places
from bedplate.serve.residency import Ranks, Residency
from bedplate.serve.watch import Watch

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_ENDS = ("stop", "length", "deadline", "cancelled", "error")


class Metrics(Watch):
    """Of one server. The event loop counts, and `text` can be called in any thread.

    places: which requests run and wait.
    """

    def __init__(self, bases: Sequence[Base], places: Places) -> None:
        self._registry = CollectorRegistry()
        self._places = places
        self._bases = {base.name: base for base in bases}
        self._of_base = _counters(self._registry, self._bases)
        self._responses = _counter(
            self._registry, "responses", "Responses, by the path of their route.", "path", "status"
        )
        self._of_adapter: dict[tuple[str, str], _Tokens] = {}
        self._ranks = Ranks()
        self._registry.register(_Now(self._now))
        ProcessCollector(registry=self._registry)

    @contextmanager
    def running(self, model: Model) -> Iterator[None]:
        counted = self._of_base[model.base.name]
        counted.queued.observe(time.perf_counter() - model.since)
        for one in self._tokens(model):
            one.requests += 1
        yield
        counted.whole.observe(time.perf_counter() - model.since)

    def said(self, choice: Choice, event: Event) -> None:
        now, counted = time.perf_counter(), self._of_base[choice.model.base.name]
        adapters = self._tokens(choice.model)
        if choice.heard is None:
            if choice.index == 0:
                counted.first.observe(now - choice.model.since)
            counted.prompt.inc(choice.stats.prompt_tokens)
            counted.reused.inc(choice.stats.reused_tokens)
            for one in adapters:
                one.prompt += choice.stats.prompt_tokens
                one.reused += choice.stats.reused_tokens
        else:
            for _ in event.tokens:
                counted.gap.observe((now - choice.heard) / len(event.tokens))
        counted.generated.inc(len(event.tokens))
        for one in adapters:
            one.generated += len(event.tokens)

    def ended(self, choice: Choice, error: BaseException | None) -> None:
        counted, stats = self._of_base[choice.model.base.name], choice.stats
        counted.ends["error" if error else stats.finish_reason or "cancelled"].inc()
        counted.drafted.inc(stats.drafted_tokens)
        counted.accepted.inc(stats.accepted_tokens)

    def answered(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def text(self, accept: str) -> tuple[bytes, str]:
        """All of it, and its type. accept: what the scraper reads, a header. It takes some time."""
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is no number
            encode, kind = choose_encoder("")
        return encode(self._registry), kind

    def _tokens(self, model: Model) -> list[_Tokens]:
        """Of the adapters of a model."""
        found = []
        for name in model.adapters:
            one = self._of_adapter.get((model.base.name, name))
            if one is None:
                self._forget()
                one = self._of_adapter[model.base.name, name] = _Tokens()
            found.append(one)
        return found

    def _forget(self) -> None:
        """Adapters that are gone."""
        for base, name in list(self._of_adapter):
            if name not in self._bases[base].engine.bundle.adapters:
                self._of_adapter.pop((base, name), None)

    def _now(self) -> Iterable[Metric]:
        # Each list is copied at once, while the event loop goes on.
        running, waiting = self._places.running.copy(), self._places.waiting.copy()
        models = [place.model for place in running], [place.model for place in waiting]
        yield from Residency(self._bases.values(), self._ranks, *models).families()
        self._forget()
        yield from _adapter_families(list(self._of_adapter.items()))


@dataclass(kw_only=True)
class _Tokens:
    """Counters of an adapter."""

    requests: int = 0
    prompt: int = 0
    reused: int = 0
    generated: int = 0


@dataclass(frozen=True, kw_only=True)
class _OfBase:
    """Counters and histograms of a base and all its adapters."""

    queued: Histogram
    first: Histogram
    gap: Histogram
    whole: Histogram
    prompt: Counter
    reused: Counter
    generated: Counter
    drafted: Counter
    accepted: Counter
    ends: dict[str, Counter]


class _Now:
    """Asks when the metrics are read."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> Iterable[Metric]:
        return ()


def _counters(registry: CollectorRegistry, bases: Iterable[str]) -> dict[str, _OfBase]:
    def times(name: str, said: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"bedplate_{name}_seconds", said, ["model_name"], registry=registry, buckets=buckets)

    def count(name: str, said: str) -> Counter:
        return _counter(registry, name, said, "model_name")

    all_ = {
        "queued": times("request_queue", "From a request to its place.", _SECONDS),
        "first": times("time_to_first_token", "From a request to the first text.", _SECONDS),
        "gap": times("inter_token_latency", "From a token to the next.", _GAPS),
        "whole": times("request", "From a request to the end of its answers.", _SECONDS),
        "prompt": count("prompt_tokens", "Tokens of prompts, for each answer."),
        "reused": count("reused_tokens", "Those of them that a cache had."),
        "generated": count("generated_tokens", "Tokens of answers."),
        "drafted": count("drafted_tokens", "Tokens that lookup proposed."),
        "accepted": count("accepted_tokens", "Those of them that were right."),
    }
    ends = _counter(registry, "answers", "Answers that have ended.", "model_name", "finish_reason")
    return {
        base: _OfBase(
            **{name: one.labels(base) for name, one in all_.items()},  # type: ignore[arg-type]
            ends={reason: ends.labels(base, reason) for reason in _ENDS},
        )
        for base in bases
    }


def _counter(registry: CollectorRegistry, name: str, said: str, *labels: str) -> Counter:
    return Counter(f"bedplate_{name}", said, labels, registry=registry)


def _adapter_families(counted: Sequence[tuple[tuple[str, str], _Tokens]]) -> Iterator[Metric]:
    described = {
        "requests": "Requests that used an adapter.",
        "prompt": "Tokens of prompts, by adapter.",
        "reused": "Those of them that a cache had, by adapter.",
        "generated": "Tokens of answers, by adapter.",
    }
    for field, said in described.items():
        name = f"bedplate_adapter_{field}{'' if field == 'requests' else '_tokens'}"
        family = CounterMetricFamily(name, said, labels=["model_name", "adapter_name"])
        for labels, one in counted:
            family.add_metric(labels, getattr(one, field))
        yield family
