"""LoRALinear: a plain linear to whoever looks, and checkpoints from before it was one load the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_spec import LINEARS
from torch import Tensor, nn

from bedplate.errors import CheckpointError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import Decoder
from bedplate.model.load import float_decoder
from bedplate.model.lora import LoRALinear
from bedplate.spec import ModelSpec

RANKS = dict.fromkeys(LINEARS, 2)
TOKENS = torch.tensor([[5, 1, 300, 7, 7, 42]])


class Nested(nn.Module):
    """A LoRALinear at the top, one below, and one three modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = LoRALinear(8, 6, rank=2, bias=True)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 8), nn.ModuleDict({"q": LoRALinear(8, 8, rank=1)}))]
        )

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.blocks[0]
        return rest["q"](first(self.proj(x)))  # type: ignore[no-any-return]


def old_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names from before `linear` was a submodule."""
    return {
        name.replace(".linear.", ".").removeprefix("linear."): value.clone() for name, value in state.items()
    }


def forward(decoder: Decoder) -> Tensor:
    decoder.reset_cache()
    with torch.no_grad():
        return decoder(TOKENS, torch.tensor([0]), torch.zeros(TOKENS.shape[1]))


@pytest.fixture(scope="module")
def spec(toy_model: Path) -> ModelSpec:
    return open_checkpoint(toy_model).spec


@pytest.fixture
def trained(toy_model: Path) -> Decoder:
    """A decoder with branches that do something."""
    decoder = float_decoder(open_checkpoint(toy_model), max_context=16, ranks=RANKS)
    torch.manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.1)
    return decoder


def test_forward_is_base_plus_branch() -> None:
    torch.manual_seed(0)
    module = LoRALinear(8, 6, rank=2, bias=True)
    nn.init.normal_(module.lora_b.weight)
    x = torch.randn(3, 8)
    expected = x @ (module.weight + module.lora_b.weight @ module.lora_a.weight).T + module.bias
    torch.testing.assert_close(module(x), expected)


def test_starts_as_its_base_linear() -> None:
    module = LoRALinear(8, 6, rank=2)
    x = torch.randn(3, 8)
    assert torch.equal(module(x), module.linear(x))
    assert module.lora_a.weight.abs().max() > 0


def test_weight_and_bias_are_the_base_linears() -> None:
    module = LoRALinear(8, 6, rank=2, bias=True)
    assert module.weight is module.linear.weight and module.bias is module.linear.bias
    assert LoRALinear(8, 6, rank=2).bias is None
    assert (module.in_features, module.out_features) == (8, 6)
    with torch.no_grad():
        module.weight.zero_()
    assert not module.linear.weight.any()
    assert sorted(module.state_dict()) == ["linear.bias", "linear.weight", "lora_a.weight", "lora_b.weight"]


def test_a_rank_below_one_is_our_bug() -> None:
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(8, 6, rank=0)


def test_an_old_checkpoint_loads_through_the_whole_model(trained: Decoder, spec: ModelSpec) -> None:
    state = old_form(trained.state_dict())
    assert "layers.2.self_attn.q_proj.weight" in state and not any(".linear." in name for name in state)
    loaded = Decoder(spec, max_context=16, ranks=RANKS)
    assert not torch.equal(forward(loaded), forward(trained))
    result = loaded.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(forward(loaded), forward(trained))


@pytest.mark.parametrize("assign", [False, True])
def test_an_old_checkpoint_loads_at_any_depth(assign: bool) -> None:
    torch.manual_seed(0)
    source, target = Nested(), Nested()
    state = old_form(source.state_dict())
    assert {"proj.weight", "proj.bias", "blocks.0.1.q.weight"} <= set(state)
    target.load_state_dict(state, assign=assign)
    x = torch.randn(2, 8)
    assert torch.equal(target(x), source(x))
    alone = LoRALinear(8, 6, rank=2, bias=True)
    alone.load_state_dict(old_form(source.proj.state_dict()))
    assert torch.equal(alone(x), source.proj(x))


def test_the_base_alone_loads_from_a_checkpoint_without_branches(trained: Decoder, spec: ModelSpec) -> None:
    state = {name: value for name, value in old_form(trained.state_dict()).items() if ".lora_" not in name}
    loaded = Decoder(spec, max_context=16, ranks=RANKS)
    result = loaded.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(".lora_" in name for name in result.missing_keys)
    plain = Decoder(spec, max_context=16)
    plain.load_state_dict(state)
    torch.testing.assert_close(forward(loaded), forward(plain))


def test_the_new_form_goes_there_and_back(trained: Decoder, spec: ModelSpec) -> None:
    loaded = Decoder(spec, max_context=16, ranks=RANKS)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(forward(loaded), forward(trained))
    assert list(loaded.state_dict()) == list(trained.state_dict())


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_both_forms_at_once_are_an_error(kind: str) -> None:
    module = Nested()
    state = module.state_dict()
    state[f"proj.{kind}"] = state[f"proj.linear.{kind}"] + 1
    with pytest.raises(CheckpointError, match=rf"both proj\.{kind} and proj\.linear\.{kind}") as caught:
        module.load_state_dict(state)
    assert caught.value.hint


def test_both_forms_in_the_deepest_layer_are_an_error(trained: Decoder) -> None:
    state = trained.state_dict()
    state["layers.2.mlp.down_proj.weight"] = state["layers.2.mlp.down_proj.linear.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight"):
        trained.load_state_dict(state)


@pytest.mark.parametrize("depth", ["top", "deep"])
def test_the_callers_state_dict_is_not_changed(depth: str) -> None:
    module: nn.Module = LoRALinear(8, 6, rank=2, bias=True) if depth == "top" else Nested()
    state = old_form(module.state_dict())
    before = {name: (id(value), value.clone()) for name, value in state.items()}
    module.load_state_dict(state)
    assert list(state) == list(before)
    assert all(
        id(state[name]) == number and torch.equal(state[name], copy)
        for name, (number, copy) in before.items()
    )


def test_an_unknown_name_is_still_unexpected() -> None:
    module = Nested()
    state = {**old_form(module.state_dict()), "proj.scale": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"proj\.scale"):
        module.load_state_dict(state)
