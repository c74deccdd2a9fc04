"""A server of the toy bundle, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from live import serving

import bedplate


@pytest.fixture(scope="session")
def address(toy_bundle: bedplate.Bundle) -> Iterator[str]:
    """Of a server of the toy bundle, called `toy`, with the adapters `all`, `all2` and `all8`."""
    with serving({"toy": toy_bundle}) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(toy_bundle: bedplate.Bundle) -> Iterator[bedplate.Engine]:
    """An engine beside the server, for what the answers should be."""
    with bedplate.Engine(toy_bundle, threads=1, cache_bytes=0) as engine:
        yield engine
