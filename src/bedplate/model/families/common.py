"""What the files of families share: what a family is, and the description of a decoder that is like Llama."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import Fields, shown
from bedplate.model.rope_config import MOST_POSITIONS, Rope, Rules, read_rope
from bedplate.spec import LayerSpec, ModelSpec, NormPlace, RopeTable

FULL, SLIDING = "full_attention", "sliding_attention"
NEVER = "use a model without this field: bedplate never ignores what changes the result"
_OTHER_MODEL = (
    "the weights may be those of another model: remove the field if transformers gives right answers"
)
# Fields with which transformers computes something else, or that say that the weights mean something else: the values
# with which they change nothing, and what to do about all others.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), NEVER),  # transformers takes null as false
    "per_layer_config": ((None, {}), NEVER),
    "attention_chunk_size": ((None,), NEVER),
    "fusion_config": ((None,), NEVER),
    "quantization_config": ((None,), "give the checkpoint before it was quantized"),
    "rope_interleaved": ((None, False), _OTHER_MODEL),
}
# Fields of some families. In a config of another family they say that the weights mean something else.
_OF_SOME = ("layer_types", "sliding_window", "use_bidirectional_attention")
# transformers has several names for one function.
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "relu2"]] = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"
    ),
    "relu2": "relu2",
}
# Names of norms in transformers' layers: of what the halves of a layer read, and of what they give.
NORMS_BEFORE = {"input_layernorm": ("attention_norm",), "post_attention_layernorm": ("mlp_norm",)}
NORMS_AFTER = {
    "post_attention_layernorm": ("attention_output_norm",),
    "post_feedforward_layernorm": ("mlp_output_norm",),
}
AFTER: tuple[NormPlace, ...] = ("attention_output_norm", "mlp_output_norm")
BEFORE_AND_AFTER: tuple[NormPlace, ...] = (
    "attention_norm",
    "attention_output_norm",
    "mlp_norm",
    "mlp_output_norm",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that transformers knows by a `model_type`.

    architecture: its causal language model in transformers.
    defaults: what transformers takes for a field that a config leaves out. It names every field that only some
        families have, and that this one has.
    read: a config → the description of the model.
    modules: by their names in a layer of transformers' model, those that are called otherwise here. Several names: the
        rows of one module are those of several, one below the other.
    norm_offset: what is added to the stored weights of all norms.
    rope: how transformers reads and computes the rotary embedding.
    gguf: llama.cpp's name for the architecture, if bedplate reads its adapters.
    meta_rows: llama.cpp and torchtune keep Meta's order of the rows of q and k, in which neighbours turn together.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelSpec]
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NORMS_BEFORE)
    norm_offset: float = 0.0
    rope: Rules = field(default_factory=Rules)
    gguf: str | None = None
    meta_rows: bool = False


def read_family(config: Fields, family: Family) -> ModelSpec:
    """The description of a model of this family. Raises UnsupportedError or CheckpointError, naming the field."""
    for name, (allowed, hint) in _ONLY.items():
        config.only(name, *allowed, hint=hint)
    for name in _OF_SOME:
        if name not in family.defaults:
            config.only(name, None, hint=_OTHER_MODEL)
    return family.read(Fields({**family.defaults, **config.values}, config.where))


def decoder(
    config: Fields,
    family: Family,
    *,
    kinds: Sequence[str] | None = None,
    rope: Rope | None = None,
    eps: str = "rms_norm_eps",
    hidden: str = "intermediate_size",
    activation: str = "hidden_act",
) -> ModelSpec:
    """A decoder like Llama. What a family does otherwise, it replaces.

    kinds: of each layer (see `layer_kinds`). None: all of them see everything.
    rope: None: all layers have the same.
    eps, hidden, activation: the names of these fields.
    """
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    n_kv_heads = config.count("num_key_value_heads", default=n_heads)
    check_divides(config, "num_attention_heads", n_heads, "num_key_value_heads", n_kv_heads)
    head_dim, max_positions = width_of_heads(config), positions(config)
    n_layers = config.count("num_hidden_layers")
    kinds = [FULL] * n_layers if kinds is None else kinds
    if rope is None:
        rope = read_rope(
            config, set(kinds), head_dim=head_dim, max_positions=max_positions, rules=family.rope
        )
    ropes, layers = _layers(config, kinds, rope, max_positions)
    return ModelSpec(
        model_type=family.model_type,
        architecture=family.architecture,
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=config.count(hidden),
        vocab_size=config.count("vocab_size"),
        max_positions=max_positions,
        tied_head=config.flag("tie_word_embeddings"),
        rotary=rope.rows,
        ropes=ropes,
        layers=layers,
        norm="rms",
        norm_eps=_eps(config, eps),
        norm_bias=False,
        norms=("attention_norm", "mlp_norm"),
        parallel=False,
        qk_norm=None,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        activation=_activation(config, activation),
        gated=True,
        embedding_scale=1.0,
        residual_scale=1.0,
        attention_scale=head_dim**-0.5,
        logit_scale=1.0,
        score_cap=None,
        logit_cap=None,
        query_growth=None,
    )


def _layers(
    config: Fields, kinds: Sequence[str], rope: Rope, max_positions: int
) -> tuple[tuple[RopeTable, ...], tuple[LayerSpec, ...]]:
    """The rotary embeddings that layers of these kinds use, and the layers."""
    used = dict.fromkeys(kinds)
    tables = tuple(dict.fromkeys(rope.tables[kind] for kind in used))
    layer_of = {
        kind: LayerSpec(rope=tables.index(rope.tables[kind]), window=_window(config, kind, max_positions))
        for kind in used
    }
    return tables, tuple(layer_of[kind] for kind in kinds)


def width_of_heads(config: Fields) -> int:
    """head_dim; where it is not given, as wide as they fit."""
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    if config.get("head_dim") is None:
        check_divides(config, "hidden_size", dim, "num_attention_heads", n_heads)
    head_dim = config.count("head_dim", default=dim // n_heads)
    if head_dim % 2:
        raise UnsupportedError(
            f"head_dim {head_dim} is odd, but RoPE needs an even number",
            where=config.where,
            hint="use another model",
        )
    return head_dim


def positions(config: Fields) -> int:
    return config.count("max_position_embeddings", most=MOST_POSITIONS)


def layer_kinds(config: Fields, slides: Callable[[int], bool], name: str = "layer_types") -> list[str]:
    """The kind of each layer, as the field says. Where it is not given: whether the layer of an index `slides`."""
    n_layers, given = config.count("num_hidden_layers"), config.get(name)
    if given is None:
        return [SLIDING if slides(index) else FULL for index in range(n_layers)]
    if not isinstance(given, list) or len(given) != n_layers:
        raise config.wrong(name, f"a list of kinds, as many as num_hidden_layers = {n_layers}")
    kinds = [FULL if kind == "attention" else kind for kind in given]
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise UnsupportedError(
                f"a layer of the kind {shown(kind)} is not supported ({name})",
                where=config.where,
                hint=f"supported: {FULL}, {SLIDING}",
            )
    return kinds


def all_slide(config: Fields) -> list[str]:
    """The kinds of layers of a family in which `sliding_window` is of all layers, or null."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * config.count("num_hidden_layers")


def turning(spec: ModelSpec, layers: Sequence[bool]) -> tuple[LayerSpec, ...]:
    """The layers of a description, of which only those turn q and k that `layers` says."""
    return tuple(
        layer if turns else replace(layer, rope=None)
        for layer, turns in zip(spec.layers, layers, strict=True)
    )


def check_divides(config: Fields, whole: str, size: int, part: str, count: int) -> None:
    if size % count:
        raise CheckpointError(
            f"{whole} {size} is not a multiple of {part} {count}",
            where=config.where,
            hint="correct these fields, or download the file again",
        )


def _window(config: Fields, kind: str, max_positions: int) -> int | None:
    """None where it is as wide as the longest sequence."""
    if kind != SLIDING:
        return None
    if config.get("sliding_window") is None:
        raise CheckpointError(
            f"layer_types has {SLIDING!r}, but there is no sliding_window, or use_sliding_window is false",
            where=config.where,
            hint="correct these fields, or download the file again",
        )
    window = config.count("sliding_window", most=MOST_POSITIONS)
    return window if window < max_positions else None


def _eps(config: Fields, name: str) -> float:
    value = config.number(name)
    if value >= 1:
        raise config.wrong(name, "below 1")
    return value


def _activation(config: Fields, name: str) -> Literal["silu", "gelu_tanh", "relu2"]:
    value = config.get(name)
    found = _ACTIVATIONS.get(value) if isinstance(value, str) else None
    if found is None:
        raise UnsupportedError(
            f"{name} = {shown(value)} is not supported",
            where=config.where,
            hint=f"supported: {', '.join(_ACTIVATIONS)}",
        )
    return found
