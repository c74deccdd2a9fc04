"""The constants of a bundle → the weights that the native decoder computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from bedplate import _native
from bedplate.background import Background
from bedplate.bundle import strict_json
from bedplate.bundle.manifest import CHAT_TEMPLATE, FOUNDATION, FOUNDATION_INFO, TOKENIZER
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.store import AdapterEntry, Bundle
from bedplate.errors import BundleError, UnsupportedError
from bedplate.runtime.adapter_weights import AdapterReader, beyond_branches
from bedplate.runtime.places import EMBEDDING, HEAD, Reader
from bedplate.runtime.prefix_cache import PrefixCache, digest
from bedplate.runtime.weights import BASE, Content, Precision, Weights
from bedplate.spec import NORMS, ModelSpec

_T = TypeVar("_T")


def load_foundation(
    bundle: Bundle,
    spec: ModelSpec,
    *,
    threads: int,
    max_context: int,
    precision: Precision,
    meter: _native.Meter | None = None,
    cache_bytes: int = 0,
    meanwhile: Callable[[], None] | None = None,
) -> Weights:
    """Load the foundation. BundleError: a constant is missing or has a wrong size.

    meter: counts the memory of keys and values.  cache_bytes: of those that its cache keeps.
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
            meter=meter,
        )
        decoder = read() if meanwhile is None else _beside(read, meanwhile)
    _native.return_memory()  # what the lists of constants, and the tokenizer's file, took
    # Each load counts as a new foundation: it does not use the keys and values of an earlier one.
    return Weights(
        decoder=decoder,
        adapter=None,
        content=Content(object(), _digest_of_foundation(bundle, spec), BASE, decoder.instruction_set),
        cache=PrefixCache(cache_bytes),
        precision=precision,
        long_above=next(iter(_long_above(spec)), None),
        vocab=spec.vocab_size,
        layers=None,
    )


def _digest_of_foundation(bundle: Bundle, spec: ModelSpec) -> str:
    files = bundle.manifest.files
    return digest(
        constants=files[FOUNDATION].sha256,
        names=files[FOUNDATION_INFO].sha256,
        model=strict_json.dump(vars(spec)),
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
    said, file = entry.read_info_bytes(), entry.weights
    info = entry.decode_info(said)  # not kept: the lists take 0.3 MB
    sha256 = entry.record.files[file.name].sha256
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
    # What the file of constants does not say, how they are named and which layers they are for, `adapter.json` does.
    content = base.content._replace(adapter=digest(constants=sha256, info=said))
    return base._replace(
        adapter=adapter,
        content=content,
        vocab=info.vocab,
        layers=reader.replicated,
        unscalable=_unscalable([constant.name for constant in named]),
        unsummable=beyond_branches(info, spec) or _own_text(bundle, entry),
        invocation=info.invocation,
        file=sha256,
    )


def _unscalable(names: Sequence[str]) -> str | None:
    """What an adapter has beside A and B that would have to change with their scale. As in PEFT, what it has in place
    of weights of the base stays.
    """
    if any(name.endswith(".factor") for name in names):
        return "magnitudes (DoRA)"
    if any(name.endswith(".shift") for name in names):
        return "biases"
    return None


def _own_text(bundle: Bundle, entry: AdapterEntry) -> str | None:
    """What an adapter has in place of the base's tokenizer and chat template."""
    own, base = entry.record, bundle.manifest
    if TOKENIZER in own.files:
        return "a tokenizer of its own"
    template = own.files.get(CHAT_TEMPLATE)
    if template is not None and template != base.files.get(CHAT_TEMPLATE):
        return "a chat template of its own"
    if own.special_tokens not in (None, base.tokenizer.special_tokens):
        return "special tokens of its own"
    return None


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
