"""Chooses which linears get 8 bits instead of 4: those whose 4 bits cost most, measured on a text.

There is one choice for each linear of a layer, the same in all layers (a layer is compiled once), and one for the
head. The measure is the divergence of the next-token distribution from the float model's, with weights and activations
rounded as the program rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor

from bedplate.errors import RecipeError
from bedplate.model.checkpoint import Checkpoint
from bedplate.model.reference import HiddenStates, head_weight, layer_weights, logits
from bedplate.quantize.activations import eight_bit_rows
from bedplate.quantize.calibration import Statistics
from bedplate.quantize.correction import quantize_corrected
from bedplate.quantize.plan import correction_scheme
from bedplate.quantize.recipe import EIGHT_BIT, WEIGHT_ONLY, Goal, Recipe, Scheme
from bedplate.quantize.weights import quantize_weight
from bedplate.spec import ModelSpec, correction_places, linear_shapes

HEAD = "lm_head"
_TOKENS = 2048  # of the texts: a mean over so many positions tells linears apart, and more takes long


@dataclass(frozen=True, kw_only=True)
class Choice:
    """recipe: with 8 bits for the chosen linears. eight: these linears. bytes_per_weight: what the recipe takes.
    mean_kl: on the text, nats. None: it was not the goal, so it was not measured.
    """

    recipe: Recipe
    eight: tuple[str, ...]
    bytes_per_weight: float
    mean_kl: float | None


def choose_bits(
    checkpoint: Checkpoint,
    recipe: Recipe,
    goal: Goal,
    texts: Sequence[Sequence[int]],
    statistics: Statistics,
    progress: Callable[[str, int, int], None],
) -> Choice:
    """Give linears of `recipe` 8 bits instead of 4, first those whose 4 bits cost most for the bytes that they save.

    The user's own rules are kept. progress(stage, done, total) counts layers. RecipeError: no choice reaches the goal,
    or the recipe leaves nothing to choose.
    """
    recipe = recipe.with_head_as_rest()
    names = candidates(recipe, checkpoint.spec)
    if not names:
        raise RecipeError(
            "there is no linear whose bits can be chosen", hint="use --quantize 8da4w and fewer overrides"
        )
    measure = partial(_divergences, checkpoint, recipe, _beginning(texts), statistics)
    *alone, none = measure([*({name} for name in names), ()], partial(progress, "measure each linear"))
    least = linear_bytes(recipe, checkpoint.spec)
    more = [linear_bytes(_with_eight(recipe, [name]), checkpoint.spec) - least for name in names]
    gain = {name: (kl - none) / nbytes for name, kl, nbytes in zip(names, alone, more, strict=True)}
    worst = sorted(names, key=lambda name: -gain[name])
    if goal.bytes_per_weight is not None:
        return _within(recipe, checkpoint.spec, worst, goal.bytes_per_weight)
    assert goal.target_kl is not None
    fewer = [set(worst[count:]) for count in range(len(worst) + 1)]
    reached = measure(fewer, partial(progress, "measure choices"))
    for count, mean_kl in enumerate(reached):
        if mean_kl <= goal.target_kl:
            return _choice(recipe, checkpoint.spec, worst[:count], mean_kl)
    raise RecipeError(
        f"no choice of 4 and 8 bits has a mean KL of at most {goal.target_kl:g}: the smallest is {min(reached):.4f}",
        hint="raise the target, or build with --quantize none",
    )


def _beginning(texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Their first tokens, as many as are measured."""
    before = accumulate(map(len, texts), initial=0)
    cut = [text[: max(0, _TOKENS - count)] for text, count in zip(texts, before, strict=False)]
    return [text for text in cut if text]


def candidates(recipe: Recipe, spec: ModelSpec) -> list[str]:
    """The linears of a layer, by their names in it, and the head, that have 4 bits in all layers by default."""
    paths = {
        name: [f"layers.{layer}.{name}" for layer in range(spec.n_layers)] for name in linear_shapes(spec)
    }
    paths[HEAD] = [HEAD]
    return [
        name
        for name, of_name in paths.items()
        if all(recipe.is_default_of(path) and recipe.scheme_of(path).bits == 4 for path in of_name)
    ]


def linear_bytes(recipe: Recipe, spec: ModelSpec) -> float:
    """How many bytes all linears and the head take, with their scales and corrections."""
    shapes, ranks = linear_shapes(spec), recipe.corrections(spec)
    total = _scheme_bytes(recipe.scheme_of(HEAD), spec.vocab_size, spec.dim)
    for layer in range(spec.n_layers):
        for name, (rows, columns) in shapes.items():
            total += _scheme_bytes(recipe.scheme_of(f"layers.{layer}.{name}"), rows, columns)
            if name in ranks:
                total += _scheme_bytes(WEIGHT_ONLY, rows, ranks[name])
        for names in correction_places(spec).values():
            for name in [name for name in names if name in ranks][:1]:
                columns = shapes[name][1]
                total += _scheme_bytes(correction_scheme("directions", columns), ranks[name], columns)
    return total


def _scheme_bytes(scheme: Scheme, rows: int, columns: int) -> float:
    if scheme.bits is None:
        return 4.0 * rows * columns
    scales = 4 * rows if scheme.group_size is None else 2 * rows * columns / scheme.group_size
    return rows * columns * scheme.bits / 8 + scales


def _bytes_per_weight(recipe: Recipe, spec: ModelSpec) -> float:
    of_layer = sum(rows * columns for rows, columns in linear_shapes(spec).values())
    return linear_bytes(recipe, spec) / (spec.vocab_size * spec.dim + spec.n_layers * of_layer)


def _with_eight(recipe: Recipe, names: Iterable[str]) -> Recipe:
    return recipe.with_eight_bits(name if name == HEAD else f"layers.*.{name}" for name in names)


def _within(recipe: Recipe, spec: ModelSpec, worst: Sequence[str], budget: float) -> Choice:
    if (least := _bytes_per_weight(recipe, spec)) > budget:
        raise RecipeError(
            f"4 bits already take {least:.4f} bytes a weight, which is more than {budget:g}",
            hint="raise the budget, or choose a larger --group-size",
        )
    eight: list[str] = []
    for name in worst:
        if _bytes_per_weight(_with_eight(recipe, [*eight, name]), spec) <= budget:
            eight.append(name)
    return _choice(recipe, spec, eight, None)


def _choice(recipe: Recipe, spec: ModelSpec, eight: Sequence[str], mean_kl: float | None) -> Choice:
    chosen = _with_eight(recipe, eight)
    return Choice(
        recipe=chosen,
        eight=tuple(eight),
        bytes_per_weight=_bytes_per_weight(chosen, spec),
        mean_kl=mean_kl,
    )


def _divergences(
    checkpoint: Checkpoint,
    recipe: Recipe,
    texts: Sequence[Sequence[int]],
    statistics: Statistics,
    fours: Sequence[Collection[str]],
    progress: Callable[[int, int], None],
) -> list[float]:
    """Mean KL divergence from the float model for each set of `fours`, whose linears have 4 bits, the others 8.

    All go through a layer together, so its weights are read and quantized once.
    """
    exact = HiddenStates(checkpoint, texts)
    rounded = [HiddenStates(checkpoint, texts, activations=eight_bit_rows) for _ in fours]
    for layer in range(checkpoint.spec.n_layers):
        progress(layer, checkpoint.spec.n_layers)
        weights = layer_weights(checkpoint, layer)
        four, eight = _quantized_layer(recipe, checkpoint.spec, weights, layer, statistics)
        exact.advance(layer, weights)
        for names, states in zip(fours, rounded, strict=True):
            mixed = {f"{name}.weight": four[name] if name in names else eight[name] for name in eight}
            states.advance(layer, weights | mixed)
    progress(checkpoint.spec.n_layers, checkpoint.spec.n_layers)
    return _mean_kls(checkpoint, recipe, exact, list(zip(fours, rounded, strict=True)))


def _quantized_layer(
    recipe: Recipe, spec: ModelSpec, weights: Mapping[str, Tensor], layer: int, statistics: Statistics
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each linear of a layer computes with, float32: by the recipe, and with 8 bits where that has 4."""
    ours: dict[str, Tensor] = {}
    eight: dict[str, Tensor] = {}
    for place, together in correction_places(spec).items():
        schemes = {name: recipe.scheme_of(f"layers.{layer}.{name}") for name in together}
        values = {name: weights[f"{name}.weight"] for name in together}
        for name, scheme in schemes.items():
            fixed = scheme if scheme.bits != 4 else EIGHT_BIT
            eight[name] = (
                values[name] if fixed.bits is None else quantize_weight(values[name], fixed).dequantize()
            )
        in_four = {name: scheme for name, scheme in schemes.items() if scheme.bits == 4}
        rank = recipe.correction_rank(in_four.values(), values[together[0]].shape[1])
        if rank:
            rms = statistics.get(f"layers.{layer}.{place}")
            ours |= quantize_corrected(
                {n: values[n] for n in in_four}, in_four, rank=rank, rms=rms
            ).dequantize()
        else:
            ours |= {n: quantize_weight(values[n], scheme).dequantize() for n, scheme in in_four.items()}
    return eight | ours, eight


def _mean_kls(
    checkpoint: Checkpoint,
    recipe: Recipe,
    exact: HiddenStates,
    rounded: Sequence[tuple[Collection[str], HiddenStates]],
) -> list[float]:
    head, scheme = head_weight(checkpoint), recipe.head_scheme()
    fixed = scheme if scheme.bits != 4 else EIGHT_BIT
    heads = {
        False: head if fixed.bits is None else quantize_weight(head, fixed).dequantize(),
        True: head if scheme.bits is None else quantize_weight(head, scheme).dequantize(),
    }
    theirs, ours = exact.normed(), [states.normed() for _, states in rounded]
    of_set = [heads[HEAD in names] for names, _ in rounded]
    sums = [0.0] * len(rounded)
    for text, states in enumerate(theirs):
        mine = [
            logits(eight_bit_rows(one[text]), weight, checkpoint.spec)
            for one, weight in zip(ours, of_set, strict=True)
        ]
        for block in zip(logits(states, head, checkpoint.spec), *mine, strict=True):
            log_p, *others = (F.log_softmax(rows, dim=-1) for rows in block)
            for index, log_q in enumerate(others):
                sums[index] += float((log_p.exp() * (log_p - log_q)).sum())
    return [total / sum(map(len, theirs)) for total in sums]
