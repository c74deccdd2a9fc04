"""Renders chat templates for the process that started this one, see `template_guard`.

A template is a program of whoever made the bundle. The sandbox bounds what it can reach. Here the system bounds its
time and its memory: too much of either ends this process, and nothing else.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from bedplate.errors import RunError
from bedplate.runtime.chat_template import ChatTemplate

_MEMORY = 512 << 20
_MOST_TEXT = 32 << 20  # characters


def _main(descriptor: int, seconds: float) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever Python computes
    connection = Connection(descriptor)
    with suppress(EOFError):
        while True:
            asked = connection.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, seconds)
            said = json.dumps(_answer(*pickle.loads(asked))).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(said)


def _answer(source: str, values: dict[str, Any] | None) -> dict[str, Any]:
    """values: arguments of `ChatTemplate.render`. None: what the template reads is asked for."""
    try:
        template = _template(source)
        if values is None:
            return {"names": sorted(template.names)}
        text = template.render(**values)
        if len(text) > _MOST_TEXT:
            raise RunError("the chat template writes too much", hint="shorten the messages")
        return {"text": text}
    except RunError as error:
        return {"what": error.what[:10_000], "hint": error.hint}
    except Exception as error:
        return {"what": f"the chat template fails: {type(error).__name__}", "hint": None}


@lru_cache(16)
def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source)


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
