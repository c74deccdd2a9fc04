"""Which linears take 8 bits, and what that is measured by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eager import eager_logits
from recorder import Recorder
from toy import BuildToy

from bedplate.errors import RecipeError
from bedplate.model.checkpoint import Checkpoint, open_checkpoint
from bedplate.model.load import float_decoder
from bedplate.names import ROW_NORMS
from bedplate.quantize.activations import eight_bit_rows
from bedplate.quantize.choice import HEAD, candidates, choose_bits, linear_bytes
from bedplate.quantize.eager import quantize_decoder
from bedplate.quantize.modules import QuantizedLinear
from bedplate.quantize.recipe import EIGHT_BIT, Goal, Recipe, make_recipe
from bedplate.quantize.weights import quantize_weight

TOKENS = [int(token) for token in torch.randint(2, 320, (200,), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def checkpoint(toy_model: Path) -> Checkpoint:
    return open_checkpoint(toy_model)


def recipe_of(method: str = "hqq", **options: object) -> Recipe:
    return make_recipe("8da4w", method=method, **options).with_head_as_rest()  # type: ignore[arg-type]


def choose(checkpoint: Checkpoint, recipe: Recipe, **goal: float):  # type: ignore[no-untyped-def]
    return choose_bits(checkpoint, recipe, Goal(**goal), [TOKENS], {}, lambda stage, done, total: None)


def eager_kl(checkpoint: Checkpoint, recipe: Recipe) -> float:
    def logits(quantized: bool) -> torch.Tensor:
        corrections = recipe.corrections(checkpoint.spec) if quantized else {}
        decoder = float_decoder(checkpoint, max_context=256, corrections=corrections)
        return eager_logits(quantize_decoder(decoder, recipe) if quantized else decoder, TOKENS)

    log_p, log_q = (F.log_softmax(logits(quantized), dim=-1) for quantized in (False, True))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["hqq", "offset"])
def test_a_target_is_reached_with_the_fewest_of_the_order(checkpoint: Checkpoint, method: str) -> None:
    recipe = recipe_of(method)
    all_four = choose(checkpoint, recipe, target_kl=1e9)
    all_eight = choose(checkpoint, recipe, bytes_per_weight=9.0)
    assert all_four.eight == () and all_four.recipe == recipe
    assert set(all_eight.eight) == set(candidates(recipe, checkpoint.spec))
    assert all_four.mean_kl is not None
    half = choose(checkpoint, recipe, target_kl=all_four.mean_kl / 2)
    assert half.mean_kl is not None and half.mean_kl <= all_four.mean_kl / 2
    assert 0 < len(half.eight) < len(all_eight.eight)
    assert half.eight == all_eight.eight[: len(half.eight)]
    one_fewer = choose(checkpoint, recipe, target_kl=half.mean_kl * 1.0001)
    assert one_fewer.eight == half.eight


@pytest.mark.parametrize("method", ["hqq", "offset"])
def test_what_is_measured_is_the_eager_quantized_model(checkpoint: Checkpoint, method: str) -> None:
    recipe = recipe_of(method, embedding="float")
    chosen = choose(checkpoint, recipe, target_kl=1e9)
    assert chosen.mean_kl is not None
    # Both round activations to 8 bits; one that lies between two codes may fall on either side.
    assert chosen.mean_kl == pytest.approx(eager_kl(checkpoint, recipe), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "hqq"}, {"method": "offset"}, {"recovery_rank": 4}], ids=str)
def test_bytes_are_those_of_the_foundation(
    options: dict[str, object], build_toy: BuildToy, checkpoint: Checkpoint
) -> None:
    bundle = build_toy(overrides={"layers.*.self_attn.v_proj": "8da8w"}, **options)
    recipe = make_recipe("8da4w", overrides={"layers.*.self_attn.v_proj": "8da8w"}, **options)  # type: ignore[arg-type]
    # What a step reads.
    constants = [c for c in bundle.foundation_info.constants if not c.name.endswith(ROW_NORMS)]
    linears = [c for c in constants if "_proj" in c.name or "correction" in c.name]
    head = [c for c in constants if c.name.startswith("lm_head")]
    assert linear_bytes(recipe, checkpoint.spec) == sum(c.nbytes for c in linears + head)


def test_a_budget_is_kept_and_spent(checkpoint: Checkpoint) -> None:
    recipe = recipe_of()
    for budget in (0.6, 0.75, 0.9):
        chosen = choose(checkpoint, recipe, bytes_per_weight=budget)
        assert chosen.bytes_per_weight <= budget and chosen.mean_kl is None
        left = set(candidates(recipe, checkpoint.spec)) - set(chosen.eight)
        assert left
        for name in left:
            pattern = name if name == HEAD else f"layers.*.{name}"
            more = chosen.recipe.with_eight_bits([pattern])
            ratio = linear_bytes(more, checkpoint.spec) / linear_bytes(chosen.recipe, checkpoint.spec)
            assert ratio * chosen.bytes_per_weight > budget


def test_a_rule_of_the_users_own_stands(checkpoint: Checkpoint) -> None:
    overrides = {"layers.*.mlp.down_proj": "8da4w", "layers.1.mlp.up_proj": "8da8w"}
    recipe = recipe_of(overrides=overrides)
    assert not {"mlp.down_proj", "mlp.up_proj"} & set(candidates(recipe, checkpoint.spec))
    assert HEAD in candidates(recipe, checkpoint.spec)
    assert HEAD not in candidates(recipe_of(head="8da4w"), checkpoint.spec)
    chosen = choose(checkpoint, recipe, bytes_per_weight=9.0).recipe
    assert chosen.scheme_of("layers.0.mlp.down_proj").bits == 4
    assert chosen.scheme_of("layers.0.self_attn.q_proj") == EIGHT_BIT


def test_goals_that_make_no_sense_are_refused(checkpoint: Checkpoint) -> None:
    for goal in ({}, {"bytes_per_weight": 0.7, "target_kl": 0.1}):
        with pytest.raises(RecipeError, match="cannot be goals at the same time"):
            Goal(**goal)
    for goal in ({"bytes_per_weight": 0.0}, {"target_kl": -0.1}):
        with pytest.raises(RecipeError, match="positive"):
            Goal(**goal)
    with pytest.raises(
        RecipeError, match="no choice of 4 and 8 bits has a mean KL of at most 1e-09: the smallest is"
    ):
        choose(checkpoint, recipe_of(), target_kl=1e-9)
    with pytest.raises(RecipeError, match=r"4 bits already take 0\.5625 bytes a weight"):
        choose(checkpoint, recipe_of(), bytes_per_weight=0.5)
    with pytest.raises(RecipeError, match="there is no linear whose bits can be chosen"):
        choose(checkpoint, make_recipe("8da8w"), target_kl=0.1)


@pytest.mark.slow
def test_a_choice_is_told_and_the_same_built_twice(build_toy: BuildToy) -> None:
    told = [Recorder(), Recorder()]
    one, other = (build_toy(method="hqq", bytes_per_weight=0.7, reporter=recorder) for recorder in told)
    assert one.manifest == other.manifest
    chosen = [rule["scheme"]["bits"] for rule in one.manifest.recipe["rules"]]
    assert chosen and set(chosen) == {8}
    assert one.manifest.recipe["defaults"][-1]["scheme"]["bits"] == 4
    for recorder in told:
        assert any(text.startswith("8 bits: ") and "bytes a weight" in text for text in recorder.notices)


def test_eight_bit_rows_are_what_a_quantized_linear_sees() -> None:
    torch.manual_seed(0)
    linear = QuantizedLinear(quantize_weight(torch.eye(64), EIGHT_BIT))
    x = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None] + torch.linspace(-2, 5, 50)[:, None]
    exact = eight_bit_rows(x) @ linear.dequantized_weight().T
    torch.testing.assert_close(linear(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_calibration_text_that_a_build_ignores_is_told(build_toy: BuildToy, tmp_path: Path) -> None:
    ignored = Recorder()
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    build_toy(method="plain", calibration=text, reporter=ignored)
    assert any("the calibration text has no effect" in text for text in ignored.notices)
