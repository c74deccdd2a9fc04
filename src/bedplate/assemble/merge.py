"""The weighted sum of adapters of a bundle, as an adapter. Their ranks stand side by side, so that it is exact."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bedplate.assemble.adding import Adding
from bedplate.assemble.publish import Publisher
from bedplate.assemble.report import Reporter
from bedplate.bundle import manifest
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.store import AdapterEntry, Bundle
from bedplate.bundle.values import Values
from bedplate.errors import AdapterError, NotFoundError, UnsupportedError
from bedplate.model.adapter import Adapter
from bedplate.model.adapter.text import AdapterText
from bedplate.model.adapter.types import EMBEDDING, HEAD, LoraPair, Place, folded_b, module_of
from bedplate.quantize.options import AdapterScheme
from bedplate.runtime.adapter_weights import beyond_branches
from bedplate.runtime.model_spec import read_spec
from bedplate.spec import ModelSpec, linear_shapes

_MERGE = "merge them before they are added (PEFT: add_weighted_adapter), or use adapters that are LoRAs alone"


def merge_adapters(
    bundle: Bundle,
    weights: Mapping[str, float],
    *,
    name: str,
    quantize: AdapterScheme,
    adding: Adding,
) -> None:
    """Add the sum of adapters, each by its weight, as `name`.

    Raises AdapterError, UnsupportedError, NameTakenError, NotFoundError, LoweringError. After an error, the bundle is
    as it was before.
    """
    bundle.check_name(name)
    _check(bundle, weights)
    spec = read_spec(bundle)
    publisher = Publisher(bundle, spec, adding)
    pairs: dict[Place, list[LoraPair]] = {}
    for one, weight in weights.items():
        for place, pair in _read(bundle, bundle.adapters[one], spec).items():
            pairs.setdefault(place, []).append(LoraPair(a=pair.a, b=pair.b, scale=weight))
    adapter = _adapter(bundle, {place: _side_by_side(found) for place, found in pairs.items()}, weights, spec)
    publisher.publish({name: (adapter, _text(bundle, weights, adding.reporter))}, quantize)


def _check(bundle: Bundle, weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if name not in bundle.adapters:
            known = ", ".join(sorted(bundle.adapters)) or "none"
            raise NotFoundError(f"no adapter {name!r}", where=bundle.path, hint=f"the bundle has: {known}")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or abs(weight) > 1e30:
            raise AdapterError(
                f"the weight of {name} must be a number, got {weight!r}", where=bundle.path, hint="e.g. 0.5"
            )
    if not weights:
        raise AdapterError(
            "nothing to merge", where=bundle.path, hint="name adapters with their weights: a=0.7 b=0.3"
        )


def _read(bundle: Bundle, entry: AdapterEntry, spec: ModelSpec) -> dict[Place, LoraPair]:
    """The branches of an adapter, with the scale in B and without what is zero. UnsupportedError: it has more."""
    info = entry.read_info()
    infos, what = (*info.constants, *info.shared), beyond_branches(info, spec)
    if what is not None:
        raise UnsupportedError(
            f"{entry.name} has {what}, which cannot be summed", where=bundle.path, hint=_MERGE
        )
    places: list[Place] = [
        (layer, linear) for layer in range(spec.n_layers) for linear in linear_shapes(spec)
    ]
    pairs = {}
    with (
        NamedConstants(bundle.foundation, info.shared) as shared,
        NamedConstants(entry.weights, infos, beside=shared) as constants,
    ):
        values = Values(constants, spec, info.ranks)
        for place in (*places, (None, HEAD), (None, EMBEDDING)):
            halves = [f"{module_of(place)}.{half}.weight" for half in ("lora_a", "lora_b")]
            if not values.has(halves[0]):
                continue
            a, b = (values.matrix(half) for half in halves)
            a = a.T if place == (None, EMBEDDING) else a
            used = a.any(axis=1) & b.any(axis=0)
            if used.any():
                pairs[place] = LoraPair(a=a[used], b=b[:, used], scale=1.0)
    return pairs


def _side_by_side(pairs: list[LoraPair]) -> LoraPair:
    """The sum of branches: the As one below the other, the Bs beside each other. The weights are in the Bs."""
    a: NDArray[np.float32] = np.concatenate([pair.a for pair in pairs])
    b = np.concatenate([folded_b(pair) for pair in pairs], axis=1)
    return LoraPair(a=a, b=b, scale=1.0)


def _adapter(
    bundle: Bundle, pairs: Mapping[Place, LoraPair], weights: Mapping[str, float], spec: ModelSpec
) -> Adapter:
    shapes = linear_shapes(spec)
    ranks: dict[str, int] = {}
    for linear in shapes:
        found = [len(pair.a) for (layer, name), pair in pairs.items() if name == linear and layer is not None]
        if found:
            ranks[linear] = max(found)
    digest = hashlib.sha256(b"bedplate merge v1")
    for name, weight in weights.items():
        record = bundle.manifest.adapters[name].files[manifest.ADAPTER_WEIGHTS]
        digest.update(f"{record.sha256}:{float(weight)!r};".encode())
    adapter = Adapter(
        path=bundle.path,
        format="merged",
        alpha=float(max((len(pair.a) for pair in pairs.values()), default=0)),
        spec=spec,
        layers=None,
        invocation=None,
        ranks=ranks,
        shapes={linear: shapes[linear] for linear in ranks},
        pairs=pairs,
        parameters={},
        rows={},
        fingerprint=digest.hexdigest(),
        warnings=(),
    )
    adapter.check_range(bundle.path)
    return adapter


def _text(bundle: Bundle, weights: Mapping[str, float], reporter: Reporter) -> AdapterText:
    """The chat template and the special tokens that all of them have; the base's where they differ.

    UnsupportedError: they have different tokenizers.
    """
    templates, tokens = set(), set()
    for name in weights:
        chat, own = bundle.chat_settings(name), bundle.manifest.adapters[name]
        template = (
            chat.template_file.read_text("utf-8")
            if manifest.CHAT_TEMPLATE in own.files and chat.template_file
            else None
        )
        special = None if own.special_tokens is None else tuple(sorted(own.special_tokens.items()))
        templates.add((template, special))
        tokens.add(bundle.tokenizer_of(name).read_bytes() if manifest.TOKENIZER in own.files else None)
    if len(tokens) > 1:
        raise UnsupportedError(
            "the adapters have different tokenizers, which cannot be merged", where=bundle.path, hint=_MERGE
        )
    tokenizer = tokens.pop()
    if len(templates) > 1:
        reporter.notice(
            "the adapters have different chat templates or special tokens: the sum gets the base's"
        )
        return AdapterText(chat_template=None, special_tokens=None, tokenizer_json=tokenizer)
    template, special = templates.pop()
    return AdapterText(
        chat_template=template,
        special_tokens=None if special is None else dict(special),
        tokenizer_json=tokenizer,
    )
