"""Whether there can be a model of a description: every number within bounds, every part fitting the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bedplate.spec import NORMS, ModelSpec, RopeTable

_MOST = 1 << 24  # of any dimension: as the native layer
_MOST_HEAD_DIM = 4096
_MOST_POSITIONS = (1 << 31) - 1
_MOST_TABLES = 16
LARGEST_FACTOR, SMALLEST_FACTOR = 1e6, 1e-9
_SIZES = ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_positions")
_FACTORS = ("embedding_scale", "residual_scale", "attention_scale", "logit_scale", "score_cap", "logit_cap")


def flaw(spec: ModelSpec) -> str | None:
    """What is wrong with a description, in words. None: nothing."""
    return next(_flaws(spec), None)


def _flaws(spec: ModelSpec) -> Iterator[str]:
    for name in _SIZES:
        most = {"head_dim": _MOST_HEAD_DIM, "max_positions": _MOST_POSITIONS}.get(name, _MOST)
        if not 1 <= getattr(spec, name) <= most:
            yield f"the field {name!r} is {getattr(spec, name)}"
    if spec.head_dim % 2 or spec.n_heads % spec.n_kv_heads:
        yield f"{spec.n_heads} heads of {spec.head_dim} cannot read {spec.n_kv_heads} kv heads"
    if not 0 < spec.norm_eps < 1:
        yield f"the field 'norm_eps' is {spec.norm_eps}"
    for name in _FACTORS:
        value = getattr(spec, name)
        if value is not None and not SMALLEST_FACTOR <= value <= LARGEST_FACTOR:
            yield f"the field {name!r} is {value}"
    if list(spec.norms) != [name for name in NORMS if name in spec.norms]:
        yield f"the field 'norms' is {spec.norms}"
    if spec.parallel and spec.norms != ("attention_norm",):
        yield f"a parallel layer has one norm, not {spec.norms}"
    if spec.norm_bias and spec.norm != "layer":
        yield f"a norm of the kind {spec.norm!r} has no bias"
    growth = spec.query_growth
    if growth and not (
        SMALLEST_FACTOR <= growth.beta <= LARGEST_FACTOR and 1 <= growth.original_positions <= _MOST_POSITIONS
    ):
        yield f"the field 'query_growth' is {growth}"
    yield from _rotary_flaws(spec)


def _rotary_flaws(spec: ModelSpec) -> Iterator[str]:
    if spec.rotary.width % 2 or not 2 <= spec.rotary.width <= spec.head_dim:
        yield f"{spec.rotary.width} rows of a head of {spec.head_dim} cannot turn"
    if len(spec.ropes) > _MOST_TABLES:
        yield f"there are {len(spec.ropes)} rotary embeddings"
    for number, table in enumerate(spec.ropes):
        if not _is_table(table, spec.head_dim // 2):
            yield f"the rotary embedding {number} has frequencies or a scale that cannot be"
    if not 1 <= len(spec.layers) <= _MOST:
        yield f"there are {len(spec.layers)} layers"
    for number, layer in enumerate(spec.layers):
        if layer.rope is not None and not 0 <= layer.rope < len(spec.ropes):
            yield f"layer {number} has the rotary embedding {layer.rope} of {len(spec.ropes)}"
        if layer.window is not None and not 1 <= layer.window <= _MOST_POSITIONS:
            yield f"layer {number} has a window of {layer.window}"


def _is_table(table: RopeTable, pairs: int) -> bool:
    if not SMALLEST_FACTOR <= table.scale <= LARGEST_FACTOR or not _are_frequencies(table.frequencies, pairs):
        return False
    long = table.long
    return long is None or (1 <= long.above <= _MOST_POSITIONS and _are_frequencies(long.frequencies, pairs))


def _are_frequencies(values: Sequence[float], pairs: int) -> bool:
    return len(values) == pairs and all(
        0 <= value <= LARGEST_FACTOR for value in values
    )  # NaN compares as false
