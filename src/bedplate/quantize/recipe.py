"""A recipe: which weight is stored how. Ordered rules by module path; the first that matches decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from bedplate.errors import RecipeError
from bedplate.model.spec import CORRECTED_TOGETHER, ModelSpec, linear_shapes

Method = Literal["plain", "hqq", "offset"]
AdapterScheme = Literal["none", "8da8w"]

# What a user gets who names neither. Measured: docs/recipes.md has the table.
METHOD: Method = "offset"
RECOVERY_RANK = 0


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one weight is stored.

    bits: 4 or 8, or None for float32. group_size: columns that share a scale, or None for one scale a row.
    method: how scales of 4 bits are chosen: from the range (`plain`), by half-quadratic quantization (`hqq`), or so
        that the codes cover a group's own range from end to end (`offset`), whose middle then goes into a correction.
    """

    bits: Literal[4, 8] | None
    group_size: int | None = None
    method: Method = "plain"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise RecipeError(
                f"unknown method {self.method!r}", hint=f"choose one of: {', '.join(get_args(Method))}"
            )

    def __str__(self) -> str:
        if self.bits is None:
            return "float32"
        return f"{self.bits} bit, {'a row' if self.group_size is None else f'group {self.group_size}'}"


FLOAT = Scheme(bits=None)
EIGHT_BIT = Scheme(bits=8)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`pattern`: a shell-style pattern over module paths (`layers.*.mlp.down_proj`)."""

    pattern: str
    scheme: Scheme


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Linears and the embedding of the foundation by `rules`; both halves of every LoRA branch by `adapter`.

    recovery_rank: directions in which each 4-bit linear of a layer gets its quantization error back; 0: none.
    """

    name: str
    rules: tuple[Rule, ...]
    embedding: Scheme
    adapter: AdapterScheme
    recovery_rank: int = 0

    def __post_init__(self) -> None:
        if self.adapter not in get_args(AdapterScheme):
            raise RecipeError(
                f"unknown quantization of adapters {self.adapter!r}",
                hint=f"choose one of: {', '.join(get_args(AdapterScheme))}",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def scheme_of(self, path: str) -> Scheme:
        """The scheme of the foundation's linear at `path`. Raises RecipeError if no rule matches."""
        for rule in self.rules:
            if fnmatchcase(path, rule.pattern):
                return rule.scheme
        raise RecipeError(
            "no rule of the recipe matches", where=path, hint="end the rules with the pattern '*'"
        )

    def corrections(self, spec: ModelSpec) -> dict[str, int]:
        """Rank of the correction of each linear of a layer that has one, by its name in the layer.

        A direction for each group's offset (method `offset`), and `recovery_rank` more.
        """
        ranks: dict[str, int] = {}
        shapes = linear_shapes(spec)
        for names in CORRECTED_TOGETHER.values():
            schemes = {
                name: {self.scheme_of(f"layers.{layer}.{name}") for layer in range(spec.n_layers)}
                for name in names
            }
            corrected = [name for name in names if any(scheme.bits == 4 for scheme in schemes[name])]
            offsets = {
                shapes[name][1] // (scheme.group_size or shapes[name][1])
                for name in corrected
                for scheme in schemes[name]
                if scheme.bits == 4 and scheme.method == "offset"
            }
            rank = max(offsets, default=0) + self.recovery_rank
            ranks |= dict.fromkeys(corrected if rank else (), rank)
        return ranks

    def adapter_scheme(self) -> Scheme:
        return FLOAT if self.adapter == "none" else EIGHT_BIT

    def for_adapter(self, adapter: AdapterScheme) -> Recipe:
        return replace(self, adapter=adapter)


def make_recipe(
    name: str,
    *,
    group_size: int = 32,
    method: Method = METHOD,
    embedding: Literal["4", "8", "float"] = "8",
    head: str | None = None,
    overrides: Mapping[str, str] | None = None,
    adapter: AdapterScheme = "none",
    recovery_rank: int = RECOVERY_RANK,
) -> Recipe:
    """The recipe that a user names: `8da4w`, `8da8w` (both quantize activations to 8 bits a row) or `none`.

    head: `8da4w`, `8da8w` or `none` for the head; None takes 8 bits beside 4 (docs/recipes.md has the table).
    overrides: pattern → `8da4w` | `8da8w` | `none`, tried before everything else, in order.
    group_size, method: of 4-bit weights; group size 0 means one scale a row. recovery_rank: see Recipe.
    Raises RecipeError.
    """
    if not 0 <= recovery_rank <= 256:
        raise RecipeError(f"recovery rank {recovery_rank} is not supported", hint="choose 0 (none) to 256")
    if group_size < 0 or group_size % 32:
        raise RecipeError(
            f"group size {group_size} is not supported",
            hint="XNNPACK takes multiples of 32, or 0: one scale a row",
        )
    schemes = {
        "8da4w": Scheme(bits=4, group_size=group_size or None, method=method),
        "8da8w": EIGHT_BIT,
        "none": FLOAT,
    }

    def scheme(key: str) -> Scheme:
        if key not in schemes:
            raise RecipeError(f"unknown quantization {key!r}", hint=f"choose one of: {', '.join(schemes)}")
        return schemes[key]

    rest = scheme(name)
    head_scheme = scheme(head or ("8da8w" if name == "8da4w" else name))
    rules = [Rule(pattern=pattern, scheme=scheme(key)) for pattern, key in (overrides or {}).items()]
    rules += [Rule(pattern="lm_head", scheme=head_scheme), Rule(pattern="*", scheme=rest)]
    embeddings = {"4": Scheme(bits=4, group_size=32), "8": EIGHT_BIT, "float": FLOAT}
    if embedding not in embeddings:
        raise RecipeError(
            f"unknown bits of the embedding {embedding!r}", hint=f"choose one of: {', '.join(embeddings)}"
        )
    return Recipe(
        name=name,
        rules=tuple(rules),
        embedding=FLOAT if name == "none" else embeddings[embedding],
        adapter=adapter,
        recovery_rank=recovery_rank,
    )


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`."""
    return Recipe(
        name=data["name"],
        rules=tuple(Rule(pattern=rule["pattern"], scheme=Scheme(**rule["scheme"])) for rule in data["rules"]),
        embedding=Scheme(**data["embedding"]),
        adapter=data["adapter"],
        recovery_rank=data["recovery_rank"],
    )
