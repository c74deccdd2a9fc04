"""A folder or file of any known adapter format → an adapter that fits the model."""

from __future__ import annotations

from pathlib import Path

from bedplate.errors import AdapterError, NotFoundError
from bedplate.model.adapter.peft_config import CONFIG
from bedplate.model.adapter.peft_weights import WEIGHTS, read_peft
from bedplate.model.adapter.types import Adapter, RawAdapter
from bedplate.model.spec import ModelSpec, linear_shapes


def read_adapter(path: Path, spec: ModelSpec) -> Adapter:
    """Read an adapter and check it against the model.

    Raises NotFoundError, AdapterError or UnsupportedError.
    """
    return _fit(_read_raw(path, spec), spec)


def _read_raw(path: Path, spec: ModelSpec) -> RawAdapter:
    if not path.is_dir():
        raise NotFoundError("no such folder", where=path, hint=f"give a folder with {CONFIG} and {WEIGHTS}")
    return read_peft(path, spec)


def _fit(raw: RawAdapter, spec: ModelSpec) -> Adapter:
    shapes = linear_shapes(spec)
    for (layer, linear), pair in raw.pairs.items():
        if linear not in shapes or layer >= spec.n_layers:
            raise AdapterError(
                f"it adapts layers.{layer}.{linear}, which the model does not have",
                where=raw.weights,
                hint=f"the model has {spec.n_layers} layers with {', '.join(shapes)}",
            )
        rows, columns = shapes[linear]
        rank = pair.a.shape[0]
        for half, value, wanted in (("A", pair.a, (rank, columns)), ("B", pair.b, (rows, rank))):
            if value.shape != wanted:
                raise AdapterError(
                    f"lora_{half} of layers.{layer}.{linear} has shape {value.shape}, "
                    f"the model and rank {rank} want {wanted}",
                    where=raw.weights,
                    hint="the adapter was trained on another model",
                )
    adapted = [linear for linear in shapes if any(linear == name for _, name in raw.pairs)]
    adapter = Adapter(
        path=raw.path,
        format=raw.format,
        alpha=raw.alpha,
        ranks={
            linear: max(len(pair.a) for (_, name), pair in raw.pairs.items() if name == linear)
            for linear in adapted
        },
        shapes={linear: shapes[linear] for linear in adapted},
        n_layers=spec.n_layers,
        fingerprint=raw.fingerprint,
        warnings=raw.warnings,
        _pairs=raw.pairs,
    )
    adapter.check_range(raw.weights)
    return adapter
