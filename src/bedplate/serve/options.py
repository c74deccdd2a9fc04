"""What a request says of how tokens are chosen, as the engine takes it."""

from __future__ import annotations

from typing import Any

from bedplate.runtime import arguments
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError
from bedplate.serve.lengths import check_known
from bedplate.serve.wire import Sampled


def sampling_options(model: Model, request: Sampled) -> dict[str, Any]:
    """Options of `Session.events`. ApiError: `logit_bias` has a name that is no token of the model."""
    bias = {_token(name): value for name, value in (request.logit_bias or {}).items()}
    check_known(model, bias, "logit_bias")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": bias,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "stop": [text for text in stop if text],
    }


def _token(name: str) -> int:
    token = arguments.token_of(name)
    if token is None:
        field = f"logit_bias.{name}"
        raise ApiError(400, f"{field}: this is no token id.", param=field)
    return token
