"""Adapters of every family: what PEFT computes with them, also where one of its modules is several linears of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import LENGTH, make_toy, save_adapter, save_toy, with_peft
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from bedplate.errors import AdapterError
from bedplate.model.adapter import read_adapter
from bedplate.model.checkpoint import Checkpoint, open_checkpoint
from bedplate.model.families import FAMILIES
from bedplate.model.load import float_decoder, set_parameter
from bedplate.model.stored import stored_linears

TOKENS = torch.randint(0, 96, (1, LENGTH), generator=torch.Generator().manual_seed(2))
# One linear of theirs is several of ours, or has its rows in another order.
FUSED = {"phi3": "qkv_proj", "glm4": "gate_up_proj", "granitemoehybrid": "input_linear"}


@pytest.fixture(scope="module", params=FAMILIES)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_toy(folder / "model", make_toy(request.param))
    return folder / "model"


def adapter_of(folder: Path, model: Path, targets: list[str]) -> Path:
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=targets,
        rank_pattern={targets[0]: 3},
        alpha_pattern={targets[-1]: 2},
        task_type="CAUSAL_LM",
    )
    return save_adapter(folder, model, config)


def ours(checkpoint: Checkpoint, adapter: Path | None) -> Tensor:
    loaded = None if adapter is None else read_adapter(adapter, checkpoint.spec)
    decoder = float_decoder(checkpoint, max_context=LENGTH, ranks=loaded and loaded.ranks)
    for path, a, b in loaded.matrices() if loaded else ():
        set_parameter(decoder, f"{path}.lora_a.weight", torch.from_numpy(a))
        set_parameter(decoder, f"{path}.lora_b.weight", torch.from_numpy(b))
    with torch.no_grad():
        return decoder(TOKENS, torch.tensor([0]), torch.zeros(LENGTH))[0]  # type: ignore[no-any-return]


def modules(checkpoint: Checkpoint) -> list[str]:
    return [name.rpartition(".")[2] for name in stored_linears(checkpoint.spec)]


def test_on_all_linears(toy: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(toy)
    adapter = adapter_of(tmp_path, toy, modules(checkpoint))
    expected = with_peft(toy, adapter, TOKENS[0].tolist())
    found, base = ours(checkpoint, adapter), ours(checkpoint, None)
    assert float((expected - base).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("toy", FUSED, indirect=True)
def test_on_the_fused_linear_alone(toy: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(toy)
    fused = FUSED[checkpoint.spec.model_type]
    adapter = adapter_of(tmp_path, toy, [fused])
    parts = next(parts for name, parts in stored_linears(checkpoint.spec).items() if name.endswith(fused))
    assert list(read_adapter(adapter, checkpoint.spec).ranks) == [part.linear for part in parts]
    expected = with_peft(toy, adapter, TOKENS[0].tolist())
    torch.testing.assert_close(
        ours(checkpoint, adapter), expected, rtol=0, atol=5e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("toy", FUSED, indirect=True)
def test_a_fused_linear_of_other_rows_is_refused(toy: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(toy)
    adapter = adapter_of(tmp_path, toy, [FUSED[checkpoint.spec.model_type]])
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name: value[:-1] if "lora_B" in name and ".layers.1." in name else value
        for name, value in load_file(file).items()
    }
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=f"lora_B of layers.1.*{FUSED[checkpoint.spec.model_type]}"):
        read_adapter(adapter, checkpoint.spec)


def test_our_names_are_not_theirs(tmp_path: Path) -> None:
    """An adapter of another family, whose q and k are apart, does not fit one where they are together."""
    for family in ("llama", "phi3"):
        save_toy(tmp_path / family, make_toy(family))
    adapter = adapter_of(tmp_path / "adapter", tmp_path / "llama", ["q_proj", "k_proj"])
    with pytest.raises(AdapterError, match=r"self_attn\.[qk]_proj, which the model does not have") as caught:
        read_adapter(adapter, open_checkpoint(tmp_path / "phi3").spec)
    assert "self_attn.qkv_proj" in str(caught.value.hint)


@pytest.mark.parametrize("toy", ["granite"], indirect=True)
def test_parameters_alone_of_a_family_that_peft_has_no_targets_for(toy: Path, tmp_path: Path) -> None:
    """PEFT saves null for `target_modules` then."""
    config = LoraConfig(r=4, target_parameters=["q_proj.weight", "v_proj.weight"])
    adapter = save_adapter(tmp_path, toy, config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] is None
    expected = with_peft(toy, adapter, TOKENS[0].tolist())
    found = ours(open_checkpoint(toy), adapter)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))
