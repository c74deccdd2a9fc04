"""Which linear a rule means, on a small model with LoRALinears."""

from __future__ import annotations

import pytest
import torch
from small_spec import LINEARS, SPEC
from torch import Tensor, nn

from bedplate.errors import RecipeError
from bedplate.model.decoder import Decoder
from bedplate.model.lora import LoRALinear
from bedplate.quantize.eager import quantize_decoder
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.plan import layer_difference, plan
from bedplate.quantize.recipe import EIGHT_BIT, FLOAT, WEIGHT_ONLY, Recipe, Rule, Scheme, make_recipe

FOUR_BIT = Scheme(bits=4, group_size=32, method="hqq")
RANKS = {"self_attn.q_proj": 2, "mlp.down_proj": 3}


class Block(nn.Module):
    def __init__(self, *, lora: bool) -> None:
        super().__init__()
        self.q_proj: nn.Module = LoRALinear(64, 32, rank=2) if lora else nn.Linear(64, 32, bias=False)
        self.floral_proj = nn.Linear(64, 32)
        self.lora_a_head = nn.Linear(64, 32)
        self.linear = nn.Linear(64, 32)


class Small(nn.Module):
    """A module with all the names that a search for "lora" or "linear" would take for something else."""

    def __init__(self, *, lora: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 64)
        self.layers = nn.ModuleList(Block(lora=lora) for _ in range(2))
        self.lora_a = nn.Linear(64, 32)
        self.lora_b = nn.ModuleDict({"linear": nn.Linear(64, 32)})
        self.lm_head = nn.Linear(64, 40)


def small(*, lora: bool) -> Small:
    with torch.device("meta"):
        return Small(lora=lora)


def decoder(ranks: dict[str, int], *, device: str | None = "meta") -> Decoder:
    return Decoder(SPEC, max_context=16, ranks=ranks, device=device)


def base_only(schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    return {
        path.removesuffix(".q_proj.linear") + ".q_proj" if path.endswith(".q_proj.linear") else path: scheme
        for path, scheme in schemes.items()
        if not path.endswith((".q_proj.lora_a", ".q_proj.lora_b"))
    }


@pytest.mark.parametrize("name", ["8da4w", "8da8w", "none"])
def test_a_rule_means_the_same_with_and_without_an_adapter(name: str) -> None:
    recipe = make_recipe(name, overrides={"layers.*.q_proj": "8da8w"})
    assert base_only(plan(small(lora=True), recipe)) == plan(small(lora=False), recipe)


def test_the_base_linear_is_quantized() -> None:
    schemes = plan(small(lora=True), make_recipe("8da4w", method="hqq"))
    assert schemes["layers.1.q_proj.linear"] == FOUR_BIT
    assert "layers.1.q_proj" not in schemes


@pytest.mark.parametrize(
    "pattern", ["*", "*lora*", "*.lora_a", "layers.*.q_proj.*", "layers.*.q_proj.lora_?"]
)
def test_branches_are_never_caught_by_a_rule_of_the_foundation(pattern: str) -> None:
    rules = (Rule(pattern=pattern, scheme=FOUR_BIT), Rule(pattern="*", scheme=FOUR_BIT))
    recipe = Recipe(name="x", rules=rules, defaults=(), embedding=FLOAT, adapter="none")
    if pattern not in ("*", "*lora*"):
        with pytest.raises(RecipeError, match="matches no linear"):  # it names branches alone
            plan(small(lora=True), recipe)
        return
    schemes = plan(small(lora=True), recipe)
    branches = {path: scheme for path, scheme in schemes.items() if ".q_proj.lora_" in path}
    assert len(branches) == 4 and set(branches.values()) == {FLOAT}
    adapted = plan(small(lora=True), recipe.for_adapter("8w"))
    assert {adapted[path] for path in branches} == {WEIGHT_ONLY}
    assert {path: scheme for path, scheme in adapted.items() if path not in branches} == {
        path: scheme for path, scheme in schemes.items() if path not in branches
    }


@pytest.mark.parametrize(
    "path", ["layers.0.floral_proj", "layers.0.lora_a_head", "layers.0.linear", "lora_a", "lora_b.linear"]
)
def test_a_linear_whose_name_merely_contains_lora_is_of_the_foundation(path: str) -> None:
    for adapter in ("none", "8w"):
        assert plan(small(lora=True), make_recipe("8da4w", method="hqq", adapter=adapter))[path] == FOUR_BIT


def test_a_group_size_that_does_not_divide_the_width_names_the_module() -> None:
    with pytest.raises(RecipeError, match="group size 64 does not divide the width 96") as caught:
        plan(decoder({}), make_recipe("8da4w", group_size=64))
    assert caught.value.where == "layers.0.mlp.down_proj"
    assert caught.value.hint is not None and "one scale a row" in caught.value.hint


def test_a_group_size_is_named_by_the_loralinear_it_does_not_divide() -> None:
    with pytest.raises(RecipeError) as caught:
        plan(decoder(RANKS), make_recipe("8da4w", group_size=64))
    assert caught.value.where == "layers.0.mlp.down_proj"


@pytest.mark.parametrize("way", ["another group size", "a row", "an override"])
def test_what_the_hint_says_helps(way: str) -> None:
    recipe = {
        "another group size": make_recipe("8da4w", group_size=32),
        "a row": make_recipe("8da4w", group_size=0),
        "an override": make_recipe("8da4w", group_size=64, overrides={"*.down_proj": "8da8w"}),
    }[way]
    assert plan(decoder({}), recipe)["layers.0.mlp.down_proj"].bits is not None


def test_an_embedding_that_the_group_size_does_not_divide() -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(8, 48), "lm_head": nn.Linear(48, 8)})
    with pytest.raises(RecipeError, match="width 48") as caught:
        plan(model, make_recipe("8da8w", embedding="4"))
    assert caught.value.where == "embed_tokens"


def test_4_bits_of_an_odd_width() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(33, 8)})
    with pytest.raises(RecipeError, match="even width") as caught:
        plan(model, make_recipe("8da4w", group_size=0, head="8da4w"))
    assert caught.value.where == "lm_head" and caught.value.hint


@pytest.mark.parametrize(
    "pattern", ["layers.*.mlp.dwon_proj", "model.layers.*", "embed_tokens", "lm_head.weight"]
)
def test_a_rule_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(RecipeError, match="matches no linear") as caught:
        plan(decoder({}), make_recipe("8da4w", overrides={pattern: "none"}))
    assert caught.value.where == pattern and caught.value.hint


@pytest.mark.parametrize("pattern", ["layers.0.*", "layers.[12].mlp.up_proj", "*.2.self_attn.q_proj"])
def test_how_a_rule_tells_layers_apart(pattern: str) -> None:
    difference = layer_difference(plan(decoder({}), make_recipe("8da4w", overrides={pattern: "8da8w"})))
    assert difference is not None and "is stored as" in difference and "layers.0." in difference


@pytest.mark.parametrize("pattern", ["layers.*.mlp.up_proj", "lm_head", "*"])
def test_a_rule_for_all_layers_tells_none_apart(pattern: str) -> None:
    recipe = make_recipe("8da4w", overrides={pattern: "8da8w"})
    assert layer_difference(plan(decoder(RANKS), recipe)) is None


def test_mixed_bits_by_module() -> None:
    overrides = {"*.down_proj": "8da8w", "*.self_attn.*": "none"}
    recipe = make_recipe("8da4w", method="hqq", overrides=overrides)
    schemes = plan(decoder(RANKS), recipe)
    for layer in range(SPEC.n_layers):
        for name in LINEARS:
            path = f"layers.{layer}.{name}" + (".linear" if name in RANKS else "")
            wanted = EIGHT_BIT if "down_proj" in name else FLOAT if "self_attn" in name else FOUR_BIT
            assert schemes[path] == wanted, path
    assert schemes["lm_head"] == EIGHT_BIT


@pytest.mark.parametrize("adapter", ["none", "8w"])
def test_the_modules_of_a_quantized_decoder(adapter: str) -> None:
    recipe = make_recipe("8da4w", method="hqq", adapter="8w" if adapter == "8w" else "none")
    quantized = quantize_decoder(decoder(RANKS, device=None), recipe)
    for layer in range(SPEC.n_layers):
        module = quantized.get_submodule(f"layers.{layer}.self_attn.q_proj")
        assert isinstance(module, LoRALinear)
        assert isinstance(module.linear, QuantizedLinear)
        branches = (module.lora_a, module.lora_b)
        assert all(isinstance(half, nn.Linear if adapter == "none" else QuantizedLinear) for half in branches)
    assert isinstance(quantized.embed_tokens, QuantizedEmbedding)
    left = [path for path, module in quantized.named_modules() if isinstance(module, nn.Linear)]
    assert all(".lora_" in path for path in left) and bool(left) == (adapter == "none")


def test_the_base_of_a_loralinear_is_quantized_to_the_same_codes_and_keeps_its_bias() -> None:
    torch.manual_seed(0)
    plain = decoder({}, device=None)
    adapted = decoder(RANKS, device=None)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    recipe = make_recipe("8da4w", method="hqq")
    quantize_decoder(plain, recipe)
    quantize_decoder(adapted, recipe)
    one = plain.get_submodule("layers.1.self_attn.q_proj")
    two = adapted.get_submodule("layers.1.self_attn.q_proj.linear")
    for name in ("codes", "scales", "bias"):
        first, second = getattr(one, name), getattr(two, name)
        assert isinstance(first, Tensor) and first.abs().max() > 0 and torch.equal(first, second), name
