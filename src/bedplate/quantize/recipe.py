"""A recipe says how each weight is stored: ordered rules for module paths. The first rule that matches counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from bedplate.errors import RecipeError
from bedplate.quantize.options import METHOD, RECOVERY_RANK, AdapterScheme, Method
from bedplate.spec import ModelSpec, correction_places, linear_shapes


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one weight is stored.

    bits: 4 or 8, or None for float32. group_size: how many columns share a scale. None: the whole row.
    method: how 4-bit scales are chosen. `plain`: from the range. `hqq`: by half-quadratic quantization. `offset`: the
        codes cover a group's own range from end to end, and its middle goes into a correction.
    weight_only: only for 8 bits. If True, activations stay float32. Otherwise each row is quantized to 8 bits.
    """

    bits: Literal[4, 8] | None
    group_size: int | None = None
    method: Method = "plain"
    weight_only: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise RecipeError(
                f"unknown method {self.method!r}", hint=f"choose one of: {', '.join(get_args(Method))}"
            )
        if self.group_size is not None and (self.group_size <= 0 or self.group_size % 32):
            raise RecipeError(
                f"group size {self.group_size} is not supported",
                hint="choose a multiple of 32, or 0 for one scale a row",
            )

    def __str__(self) -> str:
        if self.bits is None:
            return "float32"
        scales = "a row" if self.group_size is None else f"group {self.group_size}"
        return f"{self.bits} bit, {scales}{', weight only' if self.weight_only else ''}"


FLOAT = Scheme(bits=None)
EIGHT_BIT = Scheme(bits=8)
WEIGHT_ONLY = Scheme(bits=8, weight_only=True)
_MOST_RECOVERY_RANK = 256
_ADAPTER_SCHEMES: dict[AdapterScheme, Scheme] = {"none": FLOAT, "8w": WEIGHT_ONLY}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`pattern`: a shell-style pattern for module paths (`layers.*.mlp.down_proj`)."""

    pattern: str
    scheme: Scheme


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Linears and the embedding of the foundation by rules; both halves of every LoRA branch by `adapter`.

    rules: those of the user, and those that were chosen by measurement. defaults: rules that come after them.
    recovery_rank: how many directions of the error of each 4-bit linear of a layer are corrected. 0: none.
    """

    name: str
    rules: tuple[Rule, ...]
    defaults: tuple[Rule, ...]
    embedding: Scheme
    adapter: AdapterScheme
    recovery_rank: int = 0

    def __post_init__(self) -> None:
        if self.adapter not in _ADAPTER_SCHEMES:
            raise RecipeError(
                f"unknown quantization of adapters {self.adapter!r}",
                hint=f"choose one of: {', '.join(_ADAPTER_SCHEMES)}",
            )
        if not 0 <= self.recovery_rank <= _MOST_RECOVERY_RANK:
            raise RecipeError(
                f"recovery rank {self.recovery_rank} is not supported",
                hint=f"choose 0 (none) to {_MOST_RECOVERY_RANK}",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def scheme_of(self, path: str) -> Scheme:
        """The scheme of the foundation's linear at `path`. Raises RecipeError if no rule matches."""
        for rule in (*self.rules, *self.defaults):
            if fnmatchcase(path, rule.pattern):
                return rule.scheme
        raise RecipeError(
            "no rule of the recipe matches", where=path, hint="end the defaults with the pattern '*'"
        )

    def head_scheme(self) -> Scheme:
        """The head's: it has no correction that offsets could go into."""
        scheme = self.scheme_of("lm_head")
        return replace(scheme, method="hqq") if scheme.method == "offset" else scheme

    def corrections(self, spec: ModelSpec) -> dict[str, int]:
        """The rank of the correction of each linear that has one, by its name in the layer.

        There is one direction for the offset of each group (method `offset`), and `recovery_rank` more.
        """
        ranks: dict[str, int] = {}
        shapes = linear_shapes(spec)
        for names in correction_places(spec).values():
            schemes = {
                name: {self.scheme_of(f"layers.{layer}.{name}") for layer in range(spec.n_layers)}
                for name in names
            }
            corrected = [name for name in names if any(scheme.bits == 4 for scheme in schemes[name])]
            used = {scheme for name in corrected for scheme in schemes[name] if scheme.bits == 4}
            rank = self.correction_rank(used, shapes[names[0]][1])
            ranks |= dict.fromkeys(corrected if rank else (), rank)
        return ranks

    def correction_rank(self, schemes: Iterable[Scheme], columns: int) -> int:
        """Rank of the correction that linears of 4 bits and of one input share; 0: they have none."""
        schemes = list(schemes)
        offsets = [
            columns // (scheme.group_size or columns) for scheme in schemes if scheme.method == "offset"
        ]
        return max(offsets, default=0) + self.recovery_rank if schemes else 0

    def is_default_of(self, path: str) -> bool:
        """Whether a default rule decides for the linear at `path`."""
        return not any(fnmatchcase(path, rule.pattern) for rule in self.rules)

    def with_head_as_rest(self) -> Recipe:
        """The same recipe without the default rule for the head: a choice by measurement decides about it too."""
        return replace(self, defaults=tuple(rule for rule in self.defaults if rule.pattern != "lm_head"))

    def with_eight_bits(self, patterns: Iterable[str]) -> Recipe:
        """The same recipe with 8 bits for linears that match a pattern, if no earlier rule decides about them."""
        chosen = tuple(Rule(pattern=pattern, scheme=EIGHT_BIT) for pattern in patterns)
        return replace(self, rules=(*self.rules, *chosen))

    def adapter_scheme(self) -> Scheme:
        return _ADAPTER_SCHEMES[self.adapter]

    def for_adapter(self, adapter: AdapterScheme) -> Recipe:
        return replace(self, adapter=adapter)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal of a choice between 4 and 8 bits. One of the two is given.

    bytes_per_weight: at most this many bytes for each weight of a linear, with scales and corrections.
    target_kl: at most this mean divergence from the float model, nats.
    """

    bytes_per_weight: float | None = None
    target_kl: float | None = None

    def __post_init__(self) -> None:
        if (self.bytes_per_weight is None) == (self.target_kl is None):
            raise RecipeError(
                "bytes per weight and target KL cannot be goals at the same time",
                hint="give one of them; `bedplate eval` shows the KL that a budget leads to",
            )
        if (self.target_kl or self.bytes_per_weight or 0) <= 0:
            raise RecipeError(
                "a goal must be a positive number", hint="e.g. 0.7 bytes a weight, or a KL of 0.05"
            )


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

    head: `8da4w`, `8da8w` or `none` for the head. None: `8da8w` if the rest is `8da4w`, otherwise as the rest.
    overrides: pattern → `8da4w` | `8da8w` | `none`. They are tried first, in order.
    group_size, method: of 4-bit weights. Group size 0 means one scale a row. recovery_rank: see Recipe.
    Raises RecipeError.
    """
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
    rules = [Rule(pattern=pattern, scheme=scheme(key)) for pattern, key in (overrides or {}).items()]
    if head is not None:
        rules.append(Rule(pattern="lm_head", scheme=scheme(head)))
    of_head = EIGHT_BIT if name == "8da4w" else rest
    defaults = (Rule(pattern="lm_head", scheme=of_head), Rule(pattern="*", scheme=rest))
    embeddings = {"4": Scheme(bits=4, group_size=32), "8": EIGHT_BIT, "float": FLOAT}
    if embedding not in embeddings:
        raise RecipeError(
            f"unknown bits of the embedding {embedding!r}", hint=f"choose one of: {', '.join(embeddings)}"
        )
    return Recipe(
        name=name,
        rules=tuple(rules),
        defaults=defaults,
        embedding=FLOAT if name == "none" else embeddings[embedding],
        adapter=adapter,
        recovery_rank=recovery_rank,
    )


def default_adapter_scheme(recipe: Recipe) -> AdapterScheme:
    """How adapters are stored by default: in float32 if the foundation is float32, otherwise in 8 bits."""
    return "none" if recipe.name == "none" else "8w"
