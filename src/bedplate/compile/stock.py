"""Which models have stock programs."""

from __future__ import annotations

from bedplate.spec import ModelSpec


def no_stock_program(spec: ModelSpec) -> str | None:
    """Why ExecuTorch's operators cannot compute a model, in words. None: they can."""
    return None if spec.score_cap is None else f"attention scores are capped at {spec.score_cap:g}"
