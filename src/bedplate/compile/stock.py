"""Which models have stock programs."""

from __future__ import annotations

from bedplate.model.decoder import no_stock_attention
from bedplate.spec import ModelSpec


def no_stock_program(spec: ModelSpec, max_context: int) -> str | None:
    """Why ExecuTorch's operators cannot compute a model for this context, in words. None: they can."""
    reasons = (no_stock_attention(spec, layer, max_context) for layer in dict.fromkeys(spec.layers))
    return next((reason for reason in reasons if reason is not None), None)


def not_lowered(spec: ModelSpec, max_context: int) -> str | None:
    """What of a model that could have a program bedplate cannot lower yet, in words. None: it can lower all of it."""
    return next(iter(unlowered(spec, max_context)), None)


def unlowered(spec: ModelSpec, max_context: int) -> list[str]:
    """All of a model that bedplate cannot lower yet, in words."""
    parts = {
        "layer norms": spec.norm != "rms",
        "norms in these places": spec.norms != ("attention_norm", "mlp_norm"),
        "parallel halves of a layer": spec.parallel,
        "norms of q and k": spec.qk_norm is not None,
        "an activation other than silu": spec.activation != "silu",
        "an MLP without a gate": not spec.gated,
        "an embedding scale": spec.embedding_scale != 1,
        "a residual scale": spec.residual_scale != 1,
        "an attention scale": spec.attention_scale != spec.head_dim**-0.5,
        "a logit scale": spec.logit_scale != 1,
        "capped logits": spec.logit_cap is not None,
        "queries that grow": spec.query_growth is not None
        and max_context > spec.query_growth.original_positions,
        "layers of several kinds": {layer.rope for layer in spec.layers} != {0},
    }
    return [what for what, is_there in parts.items() if is_there]
