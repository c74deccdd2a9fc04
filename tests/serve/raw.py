"""Clients that speak HTTP by hand, so that they can do it badly."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MESSAGES = [{"role": "user", "content": "the fox"}]


class Said(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["error"]
        return found


def ask(
    address: str,
    body: Any = None,
    *,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
) -> Said:
    """One request on a connection of its own. body: None for GET."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request("GET" if data is None else "POST", path, data, headers or {})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    said = {name.lower(): value for name, value in answer.getheaders()}
    is_json = said.get("content-type", "").startswith("application/json")
    return Said(answer.status, said, json.loads(text) if is_json else text)


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a request."""
    return {"model": "all", "messages": MESSAGES, "temperature": 0, **fields}


def open_request(address: str, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """Send a request, and leave the answer to the caller."""
    to = urlsplit(address)
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(60)
    made.connect((to.hostname, to.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {to.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
    made.sendall(head.encode() + data)
    return made


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
