"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, with the names and words of vLLM."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from bedplate.serve.api import TEXT, Api, post
from bedplate.serve.server import Server
from bedplate.serve.wire import Strict

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class LoadAdapterRequest(Strict):
    """lora_path: a folder or a URL, in a place that the server allows.  load_inplace: also if there is one of this
    name, whose place it takes.  base_model: which base it is for, if the server has several.
    """

    lora_name: _Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False
    base_model: str | None = None


class UnloadAdapterRequest(Strict):
    """base_model: as in `LoadAdapterRequest`.  lora_int_id: vLLM takes it, and does not use it."""

    lora_name: _Name
    lora_int_id: int | None = None
    base_model: str | None = None


def routes(server: Server) -> list[Api]:
    live, one = server.live, asyncio.Lock()  # so that those that wait take no threads

    async def load(request: Request, asked: LoadAdapterRequest) -> Response:
        async with one:
            await run_in_threadpool(
                live.load,
                asked.lora_name,
                asked.lora_path,
                base_model=asked.base_model,
                replace=asked.load_inplace,
            )
        return _success(asked.lora_name, "added")

    async def unload(request: Request, asked: UnloadAdapterRequest) -> Response:
        await run_in_threadpool(live.unload, asked.lora_name, base_model=asked.base_model)
        return _success(asked.lora_name, "removed")

    errors = {403, 404, 500}
    return [
        post(
            "/v1/load_lora_adapter",
            LoadAdapterRequest,
            load,
            "Load an adapter",
            media=(TEXT,),
            errors=errors,
        ),
        post(
            "/v1/unload_lora_adapter",
            UnloadAdapterRequest,
            unload,
            "Unload an adapter",
            media=(TEXT,),
            errors=errors,
        ),
    ]


def _success(name: str, done: str) -> Response:
    return PlainTextResponse(f"Success: LoRA adapter {name!r} {done} successfully.")
