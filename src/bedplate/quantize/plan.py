"""A recipe and a model → the scheme of each of its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import nn

from bedplate.errors import RecipeError
from bedplate.model.decoder import Correction
from bedplate.model.lora import is_lora_base, is_lora_branch
from bedplate.quantize.recipe import EIGHT_BIT, WEIGHT_ONLY, Recipe, Scheme


def plan(model: nn.Module, recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of every linear and embedding of `model`, by module path.

    A LoRALinear's base goes by the path of the LoRALinear itself (`….q_proj`, not `….q_proj.linear`), so a rule
    means the same module with and without an adapter. What is a LoRA branch is decided by structure, never by
    name. Raises RecipeError for a width that the group size does not divide, and for a rule that matches no linear.
    """
    modules = dict(model.named_modules())
    schemes: dict[str, Scheme] = {}
    foundation: dict[str, Scheme] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Embedding):
            schemes[path] = _checked(path, recipe.embedding, module.embedding_dim)
        elif isinstance(module, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            if is_lora_branch(path, modules):
                schemes[path] = recipe.adapter_scheme()
            elif isinstance(modules.get(parent), Correction):
                schemes[path] = correction_scheme(leaf, module.in_features)
            else:
                logical = path.removesuffix(".linear") if is_lora_base(path, modules) else path
                scheme = recipe.head_scheme() if logical == "lm_head" else recipe.scheme_of(logical)
                scheme = _checked(logical, scheme, module.in_features)
                schemes[path] = foundation[logical] = scheme
    _check_rules(recipe, foundation)
    return schemes


def correction_scheme(leaf: str, width: int) -> Scheme:
    """Directions are stored as the weights beside them, and so take the same quantized input.

    What comes out of them is narrow: to quantize it would cost more time than 8-bit products save.
    """
    if leaf != "directions":
        return WEIGHT_ONLY
    return Scheme(bits=4, group_size=32) if width % 32 == 0 else EIGHT_BIT


def _check_rules(recipe: Recipe, paths: Collection[str]) -> None:
    for rule in recipe.rules:
        if not any(fnmatchcase(path, rule.pattern) for path in paths):
            raise RecipeError(
                "the rule matches no linear of the model",
                where=rule.pattern,
                hint="linears are named as in layers.*.self_attn.q_proj, layers.*.mlp.down_proj, lm_head",
            )


def layer_difference(schemes: Mapping[str, Scheme]) -> str | None:
    """How the schemes tell layers apart, in words; None: all layers are stored alike."""
    first: dict[str, str] = {}
    for path, scheme in schemes.items():
        other = first.setdefault(re.sub(r"^layers\.\d+\.", "layers.*.", path), path)
        if scheme != schemes[other]:
            return f"{path} is stored as {scheme}, but {other} as {schemes[other]}"
    return None


def _checked(path: str, scheme: Scheme, width: int) -> Scheme:
    if scheme.group_size is not None and width % scheme.group_size:
        raise RecipeError(
            f"group size {scheme.group_size} does not divide the width {width}",
            where=path,
            hint="choose a group size that divides it (a multiple of 32), or 0 for one scale a row",
        )
    if scheme.bits == 4 and width % 2:
        raise RecipeError(
            f"4 bits need an even width, but the width is {width}", where=path, hint="use 8da8w for it"
        )
    return scheme
