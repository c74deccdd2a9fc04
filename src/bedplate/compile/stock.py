"""Which models have stock programs."""

from __future__ import annotations

from bedplate.spec import ModelSpec


def no_stock_program(spec: ModelSpec, max_context: int) -> str | None:
    """Why ExecuTorch's operators cannot compute a model for this context, in words. None: they can."""
    return of_long_texts(spec, max_context) or _of_caps(spec)


def of_long_texts(spec: ModelSpec, max_context: int) -> str | None:
    """Why a program, which has one table of rotations, cannot compute a model for this context. None: it can."""
    above = [table.long.above for table in spec.ropes if table.long and table.long.above < max_context]
    if not above:
        return None
    return f"a text of more than {min(above)} tokens turns by other frequencies, from its first token on"


def _of_caps(spec: ModelSpec) -> str | None:
    return None if spec.score_cap is None else f"attention scores are capped at {spec.score_cap:g}"
