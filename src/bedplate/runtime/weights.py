"""The constants of a bundle → the weights that the native decoder computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from bedplate import _native
from bedplate.background import Background
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError, UnsupportedError
from bedplate.runtime.adapter_weights import AdapterReader
from bedplate.runtime.places import EMBEDDING, HEAD, Reader
from bedplate.spec import NORMS, ModelSpec

_T = TypeVar("_T")

Precision = Literal["float16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("float16", "float32")
# What computes the tokens of a session: one load of the foundation, and the SHA-256 of the adapter or "base".
Content = tuple[object, str]


class Limits(NamedTuple):
    """max_rows: how many tokens one step takes.  max_context: how many positions a session can hold.  vocab: how many
    token ids the base has.
    """

    max_rows: int
    max_context: int
    vocab: int


class Weights(NamedTuple):
    """The weights that compute the tokens of a session. adapter None: the base.

    content: what they are. They do not use keys and values that other content computed.
    precision: of the keys and values of a session.
    long_above: a text with more tokens is a long one. All its tokens turn by other frequencies. None: no text is.
    vocab: how many tokens they know.  layers: the base's layers that tokens go through. None: each once. Tokens of one
        native step have the same.
    """

    decoder: _native.Decoder
    adapter: _native.Adapter | None
    content: Content
    precision: Precision
    long_above: int | None
    vocab: int
    layers: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        """How many bytes the adapter's own weights take in memory."""
        return 0 if self.adapter is None else self.adapter.nbytes

    def is_long(self, length: int) -> bool:
        """Whether a text of so many tokens is a long one."""
        return self.long_above is not None and length > self.long_above

    def new_kv(self, length: int) -> _native.Kv:
        """For a text of so many tokens."""
        half, of_long = self.precision == "float16", self.is_long(length)
        return self.decoder.kv(half=half, adapter=self.adapter, of_long=of_long)


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
        reader = Reader(constants, spec)
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
            head=_native.Matrix([constants.matrix(HEAD)]),
            norm=reader.norm("norm"),
            layers=layers,
            threads=threads,
            readers=threads if meanwhile is None else max(1, threads - 1),
        )
        decoder = read() if meanwhile is None else _beside(read, meanwhile)
    _native.return_memory()  # what the lists of constants, and the tokenizer's file, took
    # Each load counts as a new foundation: it does not use the keys and values of an earlier one.
    return Weights(
        decoder=decoder,
        adapter=None,
        content=(object(), "base"),
        precision=precision,
        long_above=next(iter(_long_above(spec)), None),
        vocab=spec.vocab_size,
        layers=None,
    )


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

    BundleError: the file has another SHA-256, or a constant is missing, unknown or has a wrong size.
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
        reader = AdapterReader(constants, spec, info)
        parts = reader.parts()
        constants.check_all_read()
        read = partial(_native.Adapter, **parts, readers=max(1, base.decoder.threads - 1))
        adapter = _beside(read, partial(constants.check, sha256))
        base.decoder.check(adapter)
    loaded, _ = base.content
    return base._replace(
        adapter=adapter, content=(loaded, sha256), vocab=info.vocab, layers=reader.replicated
    )


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
    if constants.same_bytes(EMBEDDING, HEAD):
        return None
    return _native.Table(constants.matrix(EMBEDDING))


@contextmanager
def _fitting(file: Path) -> Iterator[None]:
    """If sizes do not fit, the file is wrong."""
    try:
        yield
    except _native.NativeError as error:
        hint = "bedplate verify BUNDLE checks every file; restore it from a copy, or write it again"
        raise BundleError(str(error), where=file, hint=hint) from error
