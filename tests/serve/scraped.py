"""What a server's `/metrics` tell."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class Got(NamedTuple):
    """A response. kind: its content type."""

    status: int
    kind: str
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def get(url: str, **headers: str) -> Got:
    """Whatever its status is."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return Got(response.status, response.headers["content-type"], response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Got(error.code, error.headers["content-type"], error.read().decode())


class Scraped:
    """types: of the metrics, by name."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.types = {family.name: family.type for family in families}
        self._samples = [sample for family in families for sample in family.samples]

    def all(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of a metric."""
        return [(dict(one.labels), one.value) for one in self._samples if one.name == name]

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample that has these labels, and maybe others."""
        found = [value for has, value in self.all(name) if labels.items() <= has.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0]


def scrape(address: str) -> Scraped:
    got = get(f"{address}/metrics")
    assert got.status == 200 and got.kind.startswith("text/plain")
    return Scraped(got.text)
