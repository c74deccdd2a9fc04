"""What a manifest says of its recipe and its programs → the recipe, and the structure of an adapter's program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bedplate.bundle import strict_json
from bedplate.bundle.manifest import MANIFEST
from bedplate.bundle.store import Bundle
from bedplate.compile.units import StaticShapes, Structure
from bedplate.errors import BundleError, RecipeError
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.recipe import Recipe
from bedplate.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    max_context: int
    max_chunk: int


def read_recipe(bundle: Bundle) -> Recipe:
    """The recipe that the bundle was built by. BundleError: a field is missing, or no recipe has such a value."""
    where = f"{bundle.path / MANIFEST}.recipe"
    try:
        return strict_json.decode(Recipe, bundle.manifest.recipe, where)
    except RecipeError as error:
        raise BundleError(error.what, where=where, hint=strict_json.DAMAGED) from error


def static_shapes(bundle: Bundle) -> StaticShapes | None:
    """The shapes of the base's program of fixed shapes. None: there is none.  BundleError: as `read_recipe`."""
    if bundle.static_program is None:
        return None
    where, model = f"{bundle.path / MANIFEST}.model", bundle.manifest.model
    shapes = strict_json.decode(StaticShapes, model.get("static_shapes"), f"{where}.static_shapes")
    if not all(1 <= length <= model["max_context"] for length in (shapes.prefill, shapes.decode)):
        raise BundleError(f"no program has {shapes}", where=where, hint=strict_json.DAMAGED)
    return shapes


def adapter_structure(
    bundle: Bundle, spec: ModelSpec, ranks: Mapping[str, int], quantize: AdapterScheme
) -> Structure:
    """The structure of an adapter's program: the bundle's own, with branches. spec: of the bundle's model.

    BundleError: as `read_recipe`.
    """
    where, model = f"{bundle.path / MANIFEST}.model", bundle.manifest.model
    known = {name: model[name] for name in _Sizes.__dataclass_fields__ if name in model}
    sizes = strict_json.decode(_Sizes, known, where)
    if not 1 <= sizes.max_chunk <= sizes.max_context <= spec.max_positions:
        raise BundleError(f"no program has {sizes}", where=where, hint=strict_json.DAMAGED)
    return Structure(
        spec=spec,
        recipe=read_recipe(bundle).for_adapter(quantize),
        max_context=sizes.max_context,
        max_chunk=sizes.max_chunk,
        ranks=ranks,
    )
