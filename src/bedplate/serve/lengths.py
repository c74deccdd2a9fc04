"""Prompts that are certainly too long are refused before anybody tokenizes them."""

from __future__ import annotations

from bedplate.runtime.lengths import too_long
from bedplate.runtime.messages import Conversation
from bedplate.runtime.session import Prompt
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError


def check_length(model: Model, prompt: Prompt, most: int | None) -> None:
    """In a thread: a tokenizer may be looked through.

    most: tokens that the operator allows. None: as many as the context has.
    ApiError: the prompt is a text or a conversation that has more in any case.
    """
    context = model.base.engine.limits.max_context
    most = context if most is None else min(most, context)
    if not isinstance(prompt, (str, Conversation)):
        return
    length = too_long(model.tokenizer, prompt, most)
    if length is not None:
        message = f"The prompt has {length} characters, so it has more than {most} tokens."
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
