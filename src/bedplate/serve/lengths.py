"""What is refused of prompts before anybody tokenizes or looks through them: too much, and what are no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

from bedplate.runtime.lengths import too_long
from bedplate.runtime.messages import Conversation
from bedplate.runtime.session import Prompt
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError


def check_length(model: Model, prompt: Prompt, most: int | None, *, param: str = "prompt") -> None:
    """In a thread: a tokenizer may be looked through.

    most: tokens that the operator allows. None: as many as the context has.
    ApiError: the prompt has more, in any case if it is a text or a conversation.
    """
    context = model.base.engine.limits.max_context
    most = context if most is None else min(most, context)
    if not isinstance(prompt, (str, Conversation)):
        if len(prompt) > most:
            message = f"{param}: it has {len(prompt)} tokens; this server takes at most {most}."
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return
    length = too_long(model.tokenizer, prompt, most)
    if length is not None:
        message = f"The prompt has {length} characters, so it has more than {most} tokens."
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def check_known(model: Model, tokens: Sequence[int] | Mapping[int, float], param: str) -> None:
    """In a thread: the file of an adapter may be read. ApiError: one of the tokens is not in the vocabulary.

    tokens: by their places, or as the names in `param`.
    """
    vocab = model.vocab_for(tokens)
    for at, token in zip(tokens if isinstance(tokens, Mapping) else count(), tokens, strict=False):
        if token >= vocab:
            field = f"{param}.{at}"
            hint = f"(hint: token ids are 0 … {vocab - 1})"
            raise ApiError(400, f"{field}: token {token} is not in the vocabulary {hint}", param=field)
