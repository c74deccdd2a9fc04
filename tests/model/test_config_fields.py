"""Every field of a config of every family: with any value of it, the logits of transformers, or a refusal."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families import FULL, SLIDING, make_toy, quiet, save_toy, theirs, theirs_of, toy_fields
from rope_sections import TYPES, longrope
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

from bedplate.errors import BedplateError
from bedplate.model.checkpoint import Checkpoint, open_checkpoint
from bedplate.model.families import FAMILIES
from bedplate.model.load import float_decoder
from bedplate.spec import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = [5, 30, 7, 7, 21, 0, 42, 1, 91]
# Somebody has looked at these: transformers asks for them, but no logits depend on them. A field that is not here and
# makes no difference below is new: find out what it does, and refuse it, compute it, or list it.
WITHOUT_EFFECT = {
    # What the model is called, and what was computed and saved with.
    *("_commit_hash", "name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map"),
    # How it is computed, not what.
    *(
        "attn_implementation",
        "experts_implementation",
        "gradient_checkpointing",
        "pretraining_tp",
        "use_cache",
    ),
    # What is given back beside the logits.
    *("output_attentions", "output_hidden_states", "return_dict", "output_router_logits"),
    # Training, and classification.
    *("attention_dropout", "initializer_range", "id2label", "label2id", "num_labels", "problem_type"),
    *("embd_pdrop", "resid_pdrop", "residual_dropout", "hidden_dropout", "router_aux_loss_coef"),
    # Generation; bedplate reads these with the tokenizer.
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # Of other families, and of models that this one is a part of.
    *(
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_heterogeneous",
        "kv_sharing_modes",
        "mtp_layer_types",
        "num_heads",
    ),
    *("mlp_layer_types", "vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy"),
}
# Of the parts of Granite 4 that are refused: experts and Mamba layers.
OF_OTHER_LAYERS = {
    *("intermediate_size", "num_experts_per_tok", "time_step_limit"),
    *(
        f"mamba_{name}"
        for name in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size")
    ),
    *("mamba_conv_bias", "mamba_proj_bias"),
}
# Fields that count where another is not there.
INSTEAD_OF = {
    **dict.fromkeys(
        ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"), ("rope_parameters",)
    ),
    "original_max_position_embeddings": ("rope_parameters",),
    **dict.fromkeys(
        ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
        ("layer_types",),
    ),
    "no_rope_layer_interval": ("no_rope_layers",),
    "num_hidden_layers": ("layer_types", "no_rope_layers"),
    "layers_block_type": ("layer_types",),
}
ANY = (None, True, False, 1, 0, -1, 3, 0.5, "x", [1], {"a": 1})
MISSING = object()  # a value: the field is taken out


def fields(config: type[PreTrainedConfig]) -> set[str]:
    """Those of the config class and its bases, and those that they take besides."""
    names = {field.name for field in dataclasses.fields(config)}
    for kind in config.__mro__:
        for function in (vars(kind).get(name) for name in ("__post_init__", "convert_rope_params_to_dict")):
            if not inspect.isfunction(function):
                continue
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get" | "setdefault"),
                        args=[ast.Constant(value=str(name)), *_],
                    ):
                        names.add(name)
    return names | set(config.attribute_map)


class Walk:
    """A toy of a family, what transformers computes with it, and the same of its config with one value changed."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        given = toy_fields(family)
        changes: dict[str, Any] = {"num_hidden_layers": 2}
        if given.get("layer_types"):
            changes["layer_types"] = [SLIDING, FULL] if SLIDING in given["layer_types"] else [FULL] * 2
        if given.get("no_rope_layers"):
            changes["no_rope_layers"] = [1, 0]
        save_toy(folder / "toy", make_toy(family, **changes))
        self.config = json.loads((folder / "toy" / "config.json").read_text())
        self.kind = type(make_toy(family))
        self.base = open_checkpoint(folder / "toy")
        # The weights are always the same, so a description says all.
        self._ours: dict[ModelSpec, Tensor] = {}
        self.changed = folder / "changed"
        self.changed.mkdir()
        for file in (folder / "toy").iterdir():
            if file.name != "config.json":
                (self.changed / file.name).symlink_to(file)
        self.asked, self.expected = self._ask()
        self._state = theirs_of(self.folder / "toy").state_dict()
        self._known: dict[Any, Tensor] = {self._read(self.config)[1]: self.expected}
        self._same_class = (
            set(vars(PreTrainedConfig)) | set(vars(RotaryEmbeddingConfigMixin)) | set(dir(object))
        )

    def _ask(self) -> tuple[set[str], Tensor]:
        """The attributes of its config that transformers asks for, also in vain, to load the model and to run it."""
        names: set[str] = set()
        original = self.kind.__getattribute__

        def recorded(config: Any, name: str) -> Any:
            names.add(name)
            return original(config, name)

        with mock.patch.object(self.kind, "__getattribute__", recorded):
            expected = theirs(self.folder / "toy", TOKENS)
        assert {"is_causal", "hidden_size"} <= names
        return names | {self.kind.attribute_map.get(name, name) for name in names}, expected

    def names(self) -> list[str]:
        of_models = {name for name in self.asked if not name.startswith("_") and name not in self._same_class}
        return sorted(fields(self.kind) | of_models)

    def _read(self, config: dict[str, Any]) -> tuple[PreTrainedConfig, Any]:
        """The config as transformers has it, and all of it that the model asks for: if that is equal, logits are.

        What transformers does with a config before it is one is the same for every family: Llama shows it.
        """
        read = quiet(lambda: self.kind(**self.kind._decode_special_floats(copy.deepcopy(config))))
        return read, tuple(sorted((n, repr(v)) for n, v in vars(read).items() if n in self.asked))

    def _theirs(self, config: dict[str, Any]) -> Tensor:
        """What transformers computes with the toy's weights and this config."""
        if self.family == "llama" or "tie_word_embeddings" not in config:
            return theirs(self.changed, TOKENS)
        read, key = self._read(config)
        if key not in self._known:
            with no_init_weights():
                model = quiet(lambda: AutoModelForCausalLM.from_config(read, dtype=torch.float32)).eval()
            model.load_state_dict(self._state)
            with torch.no_grad():
                self._known[key] = model(torch.tensor([TOKENS])).logits[0]
        return self._known[key]

    def mine(self, checkpoint: Checkpoint) -> Tensor:
        """What our decoder computes with the toy's weights and this description."""
        if checkpoint.spec not in self._ours:
            self._ours[checkpoint.spec] = ours(checkpoint)
        return self._ours[checkpoint.spec]

    def check(self, name: str, value: Any, without: str | None) -> tuple[bool, str | None]:
        """Whether the field had an effect (or was refused), and what is wrong with our answer.

        without: a field that the config has not then.
        """
        config = {other: given for other, given in self.config.items() if other not in (name, without)}
        if value is not MISSING:
            config[name] = value
        (self.changed / "config.json").write_text(json.dumps(config))
        try:
            checkpoint = open_checkpoint(self.changed)
        except BedplateError as error:
            is_named = name in str(error) or "tensor" in str(error)
            return True, None if is_named else f"a refusal that does not name it: {error.what}"
        if checkpoint.spec.max_positions < len(TOKENS):
            return True, None  # so long a text is never computed
        try:
            right = self._theirs(config)
        except Exception:  # whatever it says of a value of the wrong kind
            return False, None
        found = self.mine(checkpoint)
        return not same(right, self.expected), None if same(right, found) else "other logits"


def ours(checkpoint: Checkpoint) -> Tensor:
    decoder = float_decoder(checkpoint, max_context=len(TOKENS))
    with torch.no_grad():
        return decoder(torch.tensor([TOKENS]), torch.tensor([0]), torch.zeros(len(TOKENS)))[0]  # type: ignore[no-any-return]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-3)


def values(name: str, current: Any, walk: Walk) -> Iterator[Any]:
    yield from (MISSING, *ANY)
    if name in ("hidden_act", "hidden_activation"):
        yield from ACT2FN
    if type(current) in (int, float):
        yield from (current + 1, current * 2, current / 2, current * 1.0)
    if type(current) is int:
        yield current // 2
    if isinstance(current, list):
        yield from (current[::-1], current[:-1], [*current, *current[-1:]], [], ["attention"] * 2)
        yield from ([current[0]] * 2, [current[-1]] * 2, [FULL] * 2, [SLIDING] * 2, ["chunked_attention"] * 2)
    if name == "layer_types":
        yield from ([FULL] * 2, [SLIDING, FULL], [SLIDING] * 2)
    if name in ("sliding_window", "sliding_window_pattern"):
        yield from (2, 4, 64, 4096, "LG")
    if name in ("rope_parameters", "rope_scaling"):
        yield from rope_values(walk)
    if name in (
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_local_base_freq",
    ):
        yield from (0.25, 1.0, 4, 100.0, 1e6)


def rope_values(walk: Walk) -> Iterator[Any]:
    """Sections of every type, whole and partial, and of each kind of layer."""
    spec = walk.base.spec
    theta = {"rope_theta": 300.0}
    sections = [section for of_type in TYPES.values() for section in of_type[:2]]
    sections += [longrope(pairs, 4) for pairs in {spec.head_dim // 2, spec.rotary.width // 2}]
    own = walk.config.get("rope_parameters") or {}
    for section in sections:
        yield {**theta, **section}
        yield {**section, "type": section["rope_type"]}
        older = {name: value for name, value in section.items() if name != "rope_type"}
        yield {**older, "type": section["rope_type"]}
        yield {**theta, **section, "partial_rotary_factor": 0.5}
        yield {**own, **section}
        yield {FULL: {**theta, **section}, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
        yield {SLIDING: {**theta, **section}}
        yield {**own, FULL: section}
    yield from (
        {},
        theta,
        {"partial_rotary_factor": 0.5},
        {"rope_type": "su", **theta},
        {FULL: None, SLIDING: theta},
    )
    yield {FULL: {**theta, **TYPES["yarn"][0], "truncate": False}}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in FAMILIES]
)
def test_every_field(family: str, tmp_path: Path) -> None:
    quiet(lambda: check_every_field(family, tmp_path))


def check_every_field(family: str, folder: Path) -> None:
    walk = Walk(family, folder)
    assert same(walk.expected, walk.mine(walk.base))
    wrong, without_effect = [], set()
    for name in walk.names():
        found = [
            (value, *walk.check(name, value, without))
            for without in (None, *INSTEAD_OF.get(name, ()))
            for value in values(name, walk.config.get(name), walk)
        ]
        wrong += [f"{name} = {value!r}: {what}" for value, _, what in found if what]
        if not any(has_effect for _, has_effect, _ in found):
            without_effect.add(name)
    assert not wrong, "\n".join(wrong)
    known = WITHOUT_EFFECT | (OF_OTHER_LAYERS if family == "granitemoehybrid" else set())
    assert without_effect <= known
    if family == "llama":
        assert without_effect == WITHOUT_EFFECT & set(walk.names())
