"""The constants of a bundle → the weights that the native decoder computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

from bedplate import _native
from bedplate.background import Background
from bedplate.bundle.named import NamedConstants, Part, Source
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError, UnsupportedError
from bedplate.spec import NORMS, ModelSpec, correction_places, linear_shapes

_T = TypeVar("_T")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"

Precision = Literal["float16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("float16", "float32")
# What computes the tokens of a session: one load of the foundation, and the SHA-256 of the adapter or "base".
Content = tuple[object, str]


class Limits(NamedTuple):
    """max_rows: how many tokens one step takes.  max_context: how many positions a session can hold.  vocab: how many
    token ids there are.
    """

    max_rows: int
    max_context: int
    vocab: int


class Weights(NamedTuple):
    """The weights that compute the tokens of a session. adapter None: the base.

    content: what they are. They do not use keys and values that other content computed.
    precision: of the keys and values of a session.
    long_above: a text with more tokens is a long one. All its tokens turn by other frequencies. None: no text is.
    """

    decoder: _native.Decoder
    adapter: _native.Adapter | None
    content: Content
    precision: Precision
    long_above: int | None

    @property
    def nbytes(self) -> int:
        """How many bytes the adapter's own weights take in memory."""
        return 0 if self.adapter is None else self.adapter.nbytes

    def is_long(self, length: int) -> bool:
        """Whether a text of so many tokens is a long one."""
        return self.long_above is not None and length > self.long_above

    def new_kv(self, length: int) -> _native.Kv:
        """For a text of so many tokens."""
        return self.decoder.kv(half=self.precision == "float16", of_long=self.is_long(length))


def load_foundation(
    bundle: Bundle,
    spec: ModelSpec,
    *,
    threads: int,
    max_context: int,
    precision: Precision,
    meanwhile: Callable[[], None] | None = None,
) -> Weights:
    """Load the foundation. BundleError: a constant is missing or has a wrong size.

    meanwhile: what else to do while the native layer reads. It takes one of the threads. Its errors are raised too.
    """
    check_native(spec, bundle.path)
    with (
        NamedConstants(bundle.foundation, bundle.foundation_info.constants) as constants,
        _fitting(bundle.foundation),
    ):
        reader = _Reader(constants, spec)
        layers = [
            _native.Layer(
                norms=[
                    reader.norm(f"layers.{number}.{name}") if name in spec.norms else (None, None)
                    for name in NORMS
                ],
                head_norms=[reader.head_norm(number, part) for part in ("q", "k")],
                rope=-1 if layer.rope is None else layer.rope,
                window=layer.window or 0,
                places=[reader.place(number, place) for place in reader.places],
            )
            for number, layer in enumerate(spec.layers)
        ]
        read = partial(
            _native.Decoder,
            dim=spec.dim,
            heads=spec.n_heads,
            kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            hidden=spec.hidden_dim,
            vocab=spec.vocab_size,
            max_positions=max_context,
            rules=_rules(spec),
            ropes=[
                (table.frequencies, table.long.frequencies if table.long else (), table.scale)
                for table in spec.ropes
            ],
            embedding=_embedding(constants),
            head=_native.Matrix([constants.matrix(_HEAD)]),
            norm=reader.norm("norm"),
            layers=layers,
            threads=threads,
            readers=threads if meanwhile is None else max(1, threads - 1),
        )
        decoder = read() if meanwhile is None else _beside(read, meanwhile)
    _native.return_memory()  # what the lists of constants, and the tokenizer's file, took
    # Each load counts as a new foundation: it does not use the keys and values of an earlier one.
    content = (object(), "base")
    long_above = next(iter(_long_above(spec)), None)
    return Weights(decoder=decoder, adapter=None, content=content, precision=precision, long_above=long_above)


def check_native(spec: ModelSpec, where: Path) -> None:
    """UnsupportedError: the native decoder does not compute something that the model needs."""
    if len(_long_above(spec)) > 1:
        raise UnsupportedError(
            "bedplate's runtime does not compute this model: layers differ in when a text is a long one (longrope)",
            where=where,
            hint="docs/inputs.md lists the models that run",
        )


def _long_above(spec: ModelSpec) -> set[int]:
    """A text with more tokens than this is a long one. Empty: no text is."""
    return {table.long.above for table in spec.ropes if table.long}


def _rules(spec: ModelSpec) -> _native.Rules:
    growth = spec.query_growth
    return _native.Rules(
        layer_norm=spec.norm == "layer",
        norm_eps=spec.norm_eps,
        parallel=spec.parallel,
        activation=spec.activation,
        gated=spec.gated,
        embedding_scale=spec.embedding_scale,
        residual_scale=spec.residual_scale,
        attention_scale=spec.attention_scale,
        logit_scale=spec.logit_scale,
        score_cap=spec.score_cap or 0.0,
        logit_cap=spec.logit_cap or 0.0,
        query_growth=growth.beta if growth else 0.0,
        growth_positions=growth.original_positions if growth else 1,
    )


def load_adapter(base: Weights, bundle: Bundle, name: str, spec: ModelSpec) -> Weights:
    """Load an adapter for the decoder of `base`.

    BundleError: the file has another SHA-256, or a constant is missing or has a wrong size.
    """
    entry = bundle.adapters[name]
    info, file = entry.read_info(), entry.weights  # not kept: the lists take 0.3 MB
    sha256 = bundle.manifest.adapters[name].files[file.name].sha256
    with ExitStack() as stack:
        foundation = None
        if info.shared:
            foundation = stack.enter_context(NamedConstants(bundle.foundation, info.shared))
        named = (*info.constants, *info.shared)
        constants = stack.enter_context(NamedConstants(file, named, beside=foundation))
        stack.enter_context(_fitting(file))
        reader = _Reader(constants, spec, info.ranks)
        layers = [
            [reader.branch(layer, linears) for linears in reader.places.values()]
            for layer in range(spec.n_layers)
        ]
        read = partial(_native.Adapter, layers, readers=max(1, base.decoder.threads - 1))
        adapter = _beside(read, partial(constants.check, sha256))
        base.decoder.check(adapter)
    loaded, _ = base.content
    return base._replace(adapter=adapter, content=(loaded, sha256))


def _beside(read: Callable[[], _T], meanwhile: Callable[[], None]) -> _T:
    """read(), which gives up the GIL, in a thread beside meanwhile(), which need not. Raises the errors of both."""
    reading = Background(read)
    try:
        meanwhile()
    finally:
        reading.wait()
    return reading.result()


def _embedding(constants: NamedConstants) -> _native.Table | None:
    """None: the head has the same numbers."""
    if constants.same_bytes(_EMBEDDING, _HEAD):
        return None
    return _native.Table(constants.matrix(_EMBEDDING))


class _Reader:
    """Reads weights by place.

    places: the linears of each, by its name in a layer.  ranks: of the branches beside the linears.
    """

    def __init__(
        self,
        constants: NamedConstants,
        spec: ModelSpec,
        ranks: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.places = correction_places(spec)
        self._spec, self._constants, self._ranks = spec, constants, ranks
        self._rows = {name.rpartition(".")[2]: rows for name, (rows, _) in linear_shapes(spec).items()}
        self._parts: dict[str, Part] = {}  # of joined matrices
        self._units: dict[tuple[str, str, int], float | None] = {}

    def norm(self, name: str) -> _native.Norm:
        dim, bias = self._spec.dim, f"{name}.bias"
        return (
            self._constants.floats(f"{name}.weight", dim),
            self._constants.floats(bias, dim) if self._spec.norm_bias else None,
        )

    def head_norm(self, layer: int, part: str) -> Source | None:
        """The norm of the queries' or the keys' heads. None: there is none."""
        if self._spec.qk_norm is None:
            return None
        heads = {"q": self._spec.n_heads, "k": self._spec.n_kv_heads}[part]
        width = self._spec.head_dim * (heads if self._spec.qk_norm == "whole" else 1)
        return self._constants.floats(f"layers.{layer}.self_attn.{part}_norm.weight", width)

    def place(self, layer: int, place: str) -> tuple[list[_native.Matrix], _native.Branch | None]:
        """The linears of a place with their offsets and biases, and the rest of their correction."""
        linears, at = self.places[place], f"layers.{layer}.{place}"
        weights = [self.matrix(f"layers.{layer}.{name}.weight") for name in linears]
        biases = [
            self._bias(f"layers.{layer}.{name}.bias", part.rows)
            for name, part in zip(linears, weights, strict=True)
        ]
        names = [f"{at}.{name.rpartition('.')[2]}.weight" for name in linears]
        # Linears of one input may have a correction or none, as their bits differ.
        backs = [self.matrix(name) if self._constants.has(name) else None for name in names]
        if not any(backs):
            return [
                _native.Matrix([part], None, bias) for part, bias in zip(weights, biases, strict=True)
            ], None
        directions = self.matrix(f"{at}.directions.weight")
        offsets = [
            self._offsets(weight, f"{at}.directions.weight", directions, back)
            for weight, back in zip(weights, backs, strict=True)
        ]
        matrices = [
            _native.Matrix([part], offset, bias)
            for part, offset, bias in zip(weights, offsets, biases, strict=True)
        ]
        return matrices, _beyond_offsets(directions, backs, offsets, weights)

    def _offsets(self, weight: Part, name: str, directions: Part, back: Part | None) -> Offsets | None:
        """The offsets of a weight's groups, if the first directions are the sums of those; None: they are not."""
        if back is None or weight.bits != 4 or weight.group == 0 or back.bits != 8:
            return None
        groups = weight.columns // weight.group
        place = (*self._constants.keys_of(name), groups)
        if place not in self._units:  # all layers share the same directions, unless some were recovered
            self._units[place] = _native.unit_of_groups(directions, groups)
        unit = self._units[place]
        return None if unit is None else (back.columns, weight.group, unit, back.codes, back.scales)

    def branch(self, layer: int, linears: tuple[str, ...]) -> _native.Branch | None:
        """The branch of an adapter at the linears of one input. None: it adapts none of them."""
        narrow, backs, rank = [], [], 0
        for number, name in enumerate(linears):
            if name not in self._ranks:
                continue
            a, b = (self.matrix(f"layers.{layer}.{name}.{half}.weight") for half in ("lora_a", "lora_b"))
            before = self._constants.before_on_diagonal(f"layers.{layer}.{name}.lora_b.weight")
            column = sum(self._rank_of(part) for part in before)
            narrow.append(a)
            backs.append(_native.BackMatrix(b, column, a.rows, linear=number, narrow=rank))
            rank += a.rows
        return _native.Branch(_native.Matrix(narrow), backs) if narrow else None

    def matrix(self, name: str) -> Part:
        """The matrix of this name, without what it is joined with. BundleError: there is no such matrix."""
        if name in self._parts:
            return self._parts[name]
        whole, names = self._constants.matrix(name), self._constants.joined_with(name)
        if len(names) == 1:
            return whole
        counts = [self._rows_of(part) for part in names]
        if sum(counts) != whole.rows:
            raise _native.NativeError(
                f"{name}: {whole.rows} rows of {len(names)} matrices, not {sum(counts)}"
            )
        first = 0
        for part, count in zip(names, counts, strict=True):
            self._parts[part] = whole.slice(first, count)
            first += count
        return self._parts[name]

    def _rank_of(self, name: str) -> int:
        """The rank of the branch that a constant belongs to. NativeError: the adapter has none there."""
        linear = name.split(".", 2)[2].rpartition(".lora_")[0]
        if linear not in self._ranks:
            raise _native.NativeError(f"{name}: the adapter has no branch there")
        return self._ranks[linear]

    def _rows_of(self, name: str) -> int:
        """Rows of a part: those of its linear, but for the narrow halves of branches."""
        if name.endswith(".lora_a.weight"):
            return self._rank_of(name)
        return next(self._rows[piece] for piece in name.split(".") if piece in self._rows)

    def _bias(self, name: str, rows: int) -> Source | None:
        if not self._constants.has(name):
            return None
        names = self._constants.joined_with(name)
        counts = [self._rows_of(part) for part in names] if len(names) > 1 else [rows]
        start = sum(counts[: names.index(name)])
        whole = self._constants.floats(name, sum(counts))
        return whole.slice(4 * start, 4 * rows)


Offsets = tuple[int, int, float, Source, Source]  # as the native layer's `Offsets`


def _beyond_offsets(
    directions: Part, backs: list[Part | None], offsets: list[Offsets | None], weights: list[Part]
) -> _native.Branch | None:
    """The rest of a correction: the directions after the offsets. All directions, if a linear has no offsets."""
    done = [
        0 if own is None else weight.columns // own[1] for own, weight in zip(offsets, weights, strict=True)
    ]
    first = min(begun for back, begun in zip(backs, done, strict=True) if back is not None)
    if first == directions.rows:
        return None
    narrow = _native.Matrix([directions.slice(first, directions.rows - first)])
    return _native.Branch(
        narrow,
        [
            _native.BackMatrix(back, start, back.columns - start, linear=number, narrow=start - first)
            for number, (back, start) in enumerate(zip(backs, done, strict=True))
            if back is not None and start < back.columns
        ],
    )


@contextmanager
def _fitting(file: Path) -> Iterator[None]:
    """If sizes do not fit, the file is wrong."""
    try:
        yield
    except _native.NativeError as error:
        hint = "bedplate verify BUNDLE checks every file; restore it from a copy, or write it again"
        raise BundleError(str(error), where=file, hint=hint) from error
