"""Ray starts a replica when one has too much to do."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from ray_live import CONTEXT, Node, ray_running, until
from toy import BuildToy, save_toy_model, toy_config

pytestmark = pytest.mark.slow


def test_replicas_scale_by_queue(tmp_path: Path, build_toy: BuildToy) -> None:
    """Ray wants half a minute of too many requests before it believes them."""
    save_toy_model(tmp_path / "model", toy_config(max_position_embeddings=CONTEXT))
    bundle = build_toy(tmp_path / "model", out=tmp_path / "toy.bundle", max_context=CONTEXT, programs=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "bundle": str(bundle.path),
        "cache": str(tmp_path / "cache"),
        "replicas": 1,
        "max_replicas": 2,
        "target_requests": 1,
    }
    address = f"http://127.0.0.1:{port}/v1"
    with (
        ray_running(tmp_path, port, options) as process,
        openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        node = Node(process, client, tmp_path, {}, lambda adapter, tokens: "")
        assert len(node.replicas()) == 1
        answered: list[tuple[str, str]] = []
        enough = threading.Event()

        def ask() -> None:
            while not enough.is_set():
                answered.append(node.ask("toy", 3000))

        asking = [threads.submit(ask) for _ in range(4)]
        begun = time.monotonic()
        try:
            until(lambda: len({replica for replica, _ in answered}) == 2, 150)
        finally:
            enough.set()
        for one in asking:
            one.result()
        assert time.monotonic() - begun > 10 and len(node.replicas()) == 2
        assert len({said for _, said in answered}) == 1
