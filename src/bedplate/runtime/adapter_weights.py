"""The constants of an adapter → what the native layer is made of: what it adds to the model, and has of its own."""

from __future__ import annotations

from typing import Any

from bedplate import _native
from bedplate.bundle.manifest import AdapterInfo
from bedplate.bundle.named import NamedConstants, Source
from bedplate.runtime.places import EMBEDDING, HEAD, Reader
from bedplate.spec import NORMS, ModelSpec

_MOST_TOKENS, _MOST_LAYERS = 1 << 24, 4096  # as the native layer has it


# What is in a name of a constant that is no half of a branch.
_BEYOND_BRANCHES = (
    (".factor", "DoRA"),
    (".shift", "trained biases"),
    ("norm.weight", "norms of its own"),
    ("norm.bias", "norms of its own"),
    (".rows.", "trained tokens"),
    (HEAD, "a head of its own"),
    (EMBEDDING, "an embedding of its own"),
)


def beyond_branches(info: AdapterInfo, spec: ModelSpec) -> str | None:
    """What an adapter has beside A and B, so that it cannot be added to others. None: nothing."""
    if info.invocation is not None:
        return "an invocation (activated LoRA)"
    if info.layers is not None:
        return "layers that are used more than once"
    if info.vocab != spec.vocab_size:
        return "more tokens than the base"
    names = [constant.name for constant in (*info.constants, *info.shared)]
    return next((what for part, what in _BEYOND_BRANCHES if any(part in name for name in names)), None)


class AdapterReader(Reader):
    """Reads the constants of an adapter. BundleError, NativeError: one is missing, or does not fit.

    replicated: the base's layer of each of its layers. None: each once, in their order.
    """

    def __init__(self, constants: NamedConstants, spec: ModelSpec, info: AdapterInfo) -> None:
        super().__init__(constants, spec, info.ranks)
        own = tuple(range(spec.n_layers))
        self._layers = own if info.layers is None else info.layers
        wrong = next((base for base in self._layers if not 0 <= base < spec.n_layers), None)
        if wrong is not None:
            raise _native.NativeError(f"the adapter uses layer {wrong} of a model of {spec.n_layers}")
        if not 1 <= len(self._layers) <= _MOST_LAYERS:
            raise _native.NativeError(f"the adapter has {len(self._layers)} layers")
        if not spec.vocab_size <= info.vocab <= _MOST_TOKENS:
            raise _native.NativeError(f"the adapter has {info.vocab} tokens; the model has {spec.vocab_size}")
        self._vocab = info.vocab
        self.replicated = None if self._layers == own else self._layers
        self._check_invocation(info)

    def _check_invocation(self, info: AdapterInfo) -> None:
        """Before it, the base computes: with as many tokens and the same layers."""
        if info.invocation is None:
            return
        if not info.invocation or not all(0 <= token < self._vocab for token in info.invocation):
            raise _native.NativeError("the invocation of the adapter is not of tokens of the model")
        if self.replicated is not None or self._vocab != self.spec.vocab_size:
            raise _native.NativeError(
                "the adapter has an invocation, and other tokens or layers than the base"
            )

    def parts(self) -> dict[str, Any]:
        """The arguments of `_native.Adapter`."""
        return {
            "vocab": self._vocab,
            "layers": [self._layer(number, base) for number, base in enumerate(self._layers)],
            "norm": self._own_norm("norm"),
            "embedding": self._embedding(),
            "head": self._head(),
        }

    def _layer(self, number: int, base: int) -> _native.AdapterLayer:
        return _native.AdapterLayer(
            base=base,
            norms=[
                self._own_norm(f"layers.{number}.{name}") if name in self.spec.norms else (None, None)
                for name in NORMS
            ],
            head_norms=[
                self.head_norm(number, part)
                if self.constants.has(f"layers.{number}.self_attn.{part}_norm.weight")
                else None
                for part in ("q", "k")
            ],
            places=[self._change(number, linears) for linears in self.places.values()],
        )

    def _change(self, number: int, linears: tuple[str, ...]) -> _native.Change:
        affines = [self._affine(f"layers.{number}.{name}", self.rows_of_linear(name)) for name in linears]
        return self.branch(number, linears), affines if any(map(any, affines)) else []

    def _affine(self, name: str, rows: int) -> tuple[Source | None, Source | None]:
        return self._floats(f"{name}.factor", rows), self._floats(f"{name}.shift", rows)

    def _own_norm(self, name: str) -> _native.Norm:
        dim = self.spec.dim
        bias = self._floats(f"{name}.bias", dim) if self.spec.norm_bias else None
        return self._floats(f"{name}.weight", dim), bias

    def _floats(self, name: str, count: int) -> Source | None:
        return self.constants.floats(name, count) if self.constants.has(name) else None

    def _embedding(self) -> _native.AdapterEmbedding:
        constants = self.constants
        own, of_head = constants.has(EMBEDDING), constants.same_bytes(EMBEDDING, HEAD)
        parts: dict[str, Any] = {"of_head": of_head}
        if own and not of_head:
            parts["table"] = _native.Table(constants.matrix(EMBEDDING))
        if constants.has("embed_tokens.lora_a.weight"):
            wide = constants.matrix("embed_tokens.lora_b.weight")
            parts["narrow"] = _native.Table(constants.matrix("embed_tokens.lora_a.weight"))
            parts["back"] = _native.BackMatrix(wide, 0, wide.columns, linear=0, narrow=0)
        if constants.has("embed_tokens.rows.ids"):
            parts["ids"] = constants.ids("embed_tokens.rows.ids")
            parts["rows"] = _native.Table(constants.matrix("embed_tokens.rows.weight"))
        return _native.AdapterEmbedding(**parts)

    def _head(self) -> _native.AdapterHead:
        constants, parts = self.constants, dict[str, Any]()
        own = constants.has(HEAD)
        # Tokens that the base does not have get their logits from rows of their own, if the head is the base's.
        rows = self._vocab if own else self.spec.vocab_size
        if own:
            parts["matrix"] = _native.Matrix([constants.matrix(HEAD)])
        factor, shift = (
            source and source.slice(0, 4 * rows) for source in self._affine("lm_head", self._vocab)
        )
        parts["change"] = (self._head_branch(rows), [(factor, shift)] if factor or shift else [])
        if constants.has("lm_head.rows.ids"):
            parts["ids"] = constants.ids("lm_head.rows.ids")
            parts["rows"] = _native.Matrix([constants.matrix("lm_head.rows.weight")])
        return _native.AdapterHead(**parts)

    def _head_branch(self, rows: int) -> _native.Branch | None:
        if not self.constants.has("lm_head.lora_a.weight"):
            return None
        narrow, wide = (self.constants.matrix(f"lm_head.{half}.weight") for half in ("lora_a", "lora_b"))
        if (wide.rows, wide.columns) != (self._vocab, narrow.rows):
            raise _native.NativeError(
                f"lm_head.lora_b.weight: [{wide.rows}, {wide.columns}], not [{self._vocab}, {narrow.rows}]"
            )
        back = _native.BackMatrix(wide.slice(0, rows), 0, narrow.rows, linear=0, narrow=0)
        return _native.Branch(_native.Matrix([narrow]), [back])
