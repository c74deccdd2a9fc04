"""The metrics of many replicas as one text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def together(texts: Mapping[str, str]) -> bytes:
    """The metrics of replicas by their names, each sample with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            same = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            same.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Of(families.values()))
    return generate_latest(registry)


class _Of(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
