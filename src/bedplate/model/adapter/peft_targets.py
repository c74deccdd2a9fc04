"""Which modules a PEFT config adapts, and with what rank and scale: matched as PEFT matches them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.config_fields import layers_form, pattern_form, saved_form
from bedplate.model.adapter.peft_config import CONFIG, PeftConfig
from bedplate.model.adapter.types import AGAIN, EMBEDDING, HEAD

# The first number behind two names or more, as in `model.layers.0.`.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
# From so many target modules on, PEFT takes the shortest names that tell them from others.
_MANY = 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the config says of one adapted linear.

    rank_from: the field that gives the rank.
    blocks_of: the half, `A` or `B`, that holds only the diagonal blocks (BD-LoRA); None for neither.
    """

    rank: int
    rank_from: str
    scale: float
    blocks_of: str | None


class Targets:
    """Asks a config about modules by their paths in transformers' model (`model.layers.0.mlp.up_proj`)."""

    def __init__(self, config: PeftConfig, folder: Path, *, tied_head: bool) -> None:
        self._config, self._where = config, folder / CONFIG
        self._keeps_tied = (
            config.keeps_tied and tied_head and not saves_tables(config) and self._names_tables()
        )
        # Once: a config may hold a pattern for every linear of the model.
        self._ranks, self._alphas = (_compile(of) for of in (config.rank_of, config.alpha_of))

    def find(self, path: str) -> Target | None:
        """None: the config does not adapt it. Raises AdapterError where PEFT refuses the config."""
        as_parameter = _ends_with(f"{path}.weight", self._config.parameters)
        as_module = self._names(path)
        if as_parameter and as_module:
            raise AdapterError(
                f"target_modules and target_parameters both name {path}",
                where=self._where,
                hint="name it in one of the two",
            )
        if not as_parameter and not as_module:
            return None
        # PEFT matches patterns with the path of what is adapted, here of the parameter.
        key = f"{path}.weight" if as_parameter else path
        own_rank, own_alpha = _first(self._ranks, key), _first(self._alphas, key)
        rank = self._config.rank if own_rank is None else int(own_rank)
        alpha = self._config.alpha if own_alpha is None else own_alpha
        return Target(
            rank=rank,
            rank_from="r" if own_rank is None else "rank_pattern",
            scale=alpha / (math.sqrt(rank) if self._config.by_square_root else rank),
            blocks_of=self._blocks_of(key),
        )

    def _names(self, path: str) -> bool:
        targets = self._config.targets
        if self._keeps_tied and path == HEAD:
            return True
        if self._is_excluded(path):
            return False
        # With a head that goes with it, PEFT adds the embedding to the names or to the pattern.
        is_added = self._keeps_tied and path == f"model.{EMBEDDING}"
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return is_added or ".layers." in path
            return is_added or re.fullmatch(targets, path) is not None
        if is_added or path in targets:  # a whole path counts in any layer
            if "." in path and len({*targets, path}) >= _MANY and not self._in_layers(path):
                raise UnsupportedError(
                    f"target_modules holds {len({*targets, path})} names, {path} among them, and "
                    "layers_to_transform is set: PEFT shortens so many names, and then takes other layers",
                    where=self._where,
                    hint="leave layers_to_transform out, if target_modules holds whole paths",
                )
            return True
        return _ends_with(path, targets) and self._in_layers(path)

    def _names_tables(self) -> bool:
        """Whether PEFT sees by the names alone that the embedding or the head is adapted."""
        targets = self._config.targets
        if isinstance(targets, str):
            return any(re.fullmatch(targets, name) for name in (EMBEDDING, HEAD))
        return any(name.rpartition(".")[2] in (EMBEDDING, HEAD) for name in targets)

    def _is_excluded(self, path: str) -> bool:
        """By a name or a pattern; or because it is trained in full, for which PEFT takes any name as a pattern."""
        excluded = self._config.excluded
        if any(re.match(saved_form(name), path) for name in self._config.saved):
            return True
        if isinstance(excluded, str):
            return excluded != "" and re.fullmatch(excluded, path) is not None
        return _ends_with(path, excluded)

    def _in_layers(self, path: str) -> bool:
        if self._config.layers is None:
            return True
        forms = [layers_form(pattern) for pattern in self._config.layers_pattern] or [_ANY_LAYER]
        found = next((match for form in forms if (match := re.match(form, path))), None)
        return found is not None and int(found["idx"]) in self._config.layers

    def _blocks_of(self, path: str) -> str | None:
        blocks = self._config.block_diagonal
        if blocks is None:
            return None
        in_a, in_b = (any(part in path for part in parts) for parts in (blocks.a, blocks.b))
        if in_a and in_b:
            what = f"use_bdlora names {path} for both A and B"
        elif blocks.strict and not in_a and not in_b:
            what = f"use_bdlora names {path} neither for A nor for B, and match_strict is true"
        else:
            return "A" if in_a else "B" if in_b else None
        raise AdapterError(what, where=self._where, hint=AGAIN)


def saves_tables(config: PeftConfig) -> bool:
    """Whether PEFT sees by the names alone that the embedding or the head is trained in full."""
    return any(name.rpartition(".")[2] in (EMBEDDING, HEAD) for name in config.saved)


def _ends_with(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _compile(values: Mapping[str, float]) -> list[tuple[re.Pattern[str], float]]:
    return [(re.compile(pattern_form(pattern)), value) for pattern, value in values.items()]


def _first(values: list[tuple[re.Pattern[str], float]], path: str) -> float | None:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in values if pattern.match(path)), None)
