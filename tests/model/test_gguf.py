"""GGUF files: written by the gguf package, they hold the model that was put in, and what is not read is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_edit import edited, finish, replaced
from numpy.typing import NDArray
from torch import Tensor
from toy import save_toy_model, toy_config
from transformers import LlamaConfig, LlamaForCausalLM

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.checkpoint import checked_tensors, fingerprint, open_checkpoint
from bedplate.model.load import float_decoder

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = torch.tensor([[int(token) for token in np.random.default_rng(0).integers(0, 320, 24)]])


def gguf_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, layer, module = path.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{leaf}"
    return f"{NAMES[path]}.{leaf}"


def permute(weight: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """As llama.cpp's converter stores q and k: the halves of a head interleaved."""
    shape = (n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
    leave_out: str = "",
) -> Path:
    config: LlamaConfig = model.config
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    for name, value in fields.items():
        if name != leave_out:
            getattr(writer, f"add_{name}")(value)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = parameter.float().numpy()
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if projection in name:
                value = permute(value, heads)
        if gguf_name(name) != leave_out:
            stored = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name(name), gguf.quantize(value, stored), raw_dtype=stored)
    edit(writer)
    finish(writer)
    return path


def read(path: Path) -> dict[str, Tensor]:
    return dict(checked_tensors(open_checkpoint(path)))


def refused(path: Path, kind: type[BedplateError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        read(path)
    assert caught.value.where == str(path) and caught.value.hint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return save_toy_model(tmp_path_factory.mktemp("model"), toy_config())


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"num_key_value_heads": 4}],
    ids=["tied", "untied", "attention bias", "multi-head"],
)
def test_float32_gives_every_parameter_back(changes: dict[str, Any], tmp_path: Path) -> None:
    original = save_toy_model(tmp_path / "model", toy_config(**changes))
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", original))
    found = dict(checked_tensors(checkpoint))
    expected = dict(checked_tensors(open_checkpoint(tmp_path / "model")))
    assert set(found) == set(expected)
    assert [tuple(value.shape) for value in found.values()] == [*checkpoint.found().values()]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(checkpoint.rows("embed_tokens.weight", 3, 4), expected["embed_tokens.weight"][3:7])
    assert len(checkpoint.rows("embed_tokens.weight", 3, 1 << 20)) == len(expected["embed_tokens.weight"]) - 3
    ours, theirs = checkpoint.spec.to_dict(), open_checkpoint(tmp_path / "model").spec.to_dict()
    # The format holds numbers as float32.
    assert ours.pop("norm_eps") == pytest.approx(theirs.pop("norm_eps"), rel=1e-7)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_logits_are_those_of_transformers_with_the_same_file(
    kind: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, kind=gguf.GGMLQuantizationType[kind])
    decoder = float_decoder(open_checkpoint(path), max_context=32)
    stored = float_state(path)
    twin = LlamaForCausalLM(model.config).eval()
    twin.load_state_dict(stored)
    with torch.no_grad():
        expected = twin(TOKENS).logits
        found = decoder(TOKENS, torch.tensor([0]), torch.zeros(TOKENS.shape[1]))
        original = model(TOKENS).logits
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)  # sums in another order
    assert float((expected - original).abs().max()) > 1e-5 * scale  # the file does hold rounded weights


def float_state(path: Path) -> dict[str, Tensor]:
    """What transformers loads from the file, by its own reader."""
    loaded = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return dict(loaded.state_dict())


def test_without_a_permutation_logits_would_differ(model: LlamaForCausalLM, tmp_path: Path) -> None:
    found = read(write_gguf(tmp_path / "model.gguf", model))
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for kind in "qk":
        raw = torch.from_numpy(stored[f"blk.0.attn_{kind}.weight"].copy())
        assert not torch.equal(found[f"layers.0.self_attn.{kind}_proj.weight"], raw)


@pytest.mark.parametrize("field", ["key_length", "value_length", "rope_dimension_count", "head_count_kv"])
def test_fields_that_may_be_missing(field: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, leave_out=field)
    if field == "head_count_kv":
        refused(
            path, CheckpointError, "attn_k.weight has shape"
        )  # then as many as query heads, which it has not
    else:
        assert open_checkpoint(path).spec.head_dim == model.config.head_dim


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("embedding_length", "embedding_length"),
        ("block_count", "block_count"),
        ("head_count", "attention.head_count"),
        ("feed_forward_length", "feed_forward_length"),
        ("context_length", "context_length"),
        ("layer_norm_rms_eps", "attention.layer_norm_rms_epsilon"),
        ("vocab_size", "vocab_size"),
    ],
)
def test_a_missing_field_is_named(field: str, named: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, leave_out=field)
    refused(path, CheckpointError, f"llama.{named} is missing")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope.scaling.type = 'longrope'",
        ),
        (lambda writer: writer.add_expert_count(8), "expert_count = 8"),
        (lambda writer: writer.add_sliding_window(128), "attention.sliding_window = 128"),
        (lambda writer: writer.add_logit_scale(0.5), "logit_scale = 0.5"),
        (lambda writer: writer.add_float32("llama.something.new", 2.0), "llama.something.new = 2.0"),
        (
            lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones(16, np.float32)),
            "ffn_gate_inp",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(
    edit: Callable[[gguf.GGUFWriter], None], says: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    refused(write_gguf(tmp_path / "model.gguf", model, edit=edit), UnsupportedError, says)


def test_partial_rotation_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        leave_out="rope_dimension_count",
        edit=lambda writer: writer.add_rope_dimension_count(16),
    )
    refused(path, UnsupportedError, r"rope\.dimension_count = 16 is not supported with heads of 32")


COUNTS = [
    "llama.embedding_length",
    "llama.block_count",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.feed_forward_length",
    "llama.context_length",
    "llama.vocab_size",
    "llama.attention.key_length",
    "llama.rope.dimension_count",
]


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [-1, 1.5, True, "64", [64], 2**40], ids=str)
def test_a_number_that_is_none_is_named(
    field: str, value: Any, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, edit=replaced(field, value))
    refused(path, CheckpointError, f"{field} must be")


@pytest.mark.parametrize("field", ["llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf"), True, "1", [1.0]], ids=str)
def test_a_float_that_is_none_is_named(
    field: str, value: Any, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, edit=replaced(field, value))
    refused(path, CheckpointError, f"{field} must be a positive number")


@pytest.mark.parametrize("value", [[1, 2], "yes", 0.5])
def test_a_field_without_effect_has_to_have_its_value(
    value: Any, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, edit=replaced("llama.attention.causal", value))
    refused(path, UnsupportedError, r"llama\.attention\.causal = ")


def test_another_architecture_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, architecture="falcon")
    refused(path, UnsupportedError, "architecture 'falcon'")


def test_a_missing_tensor_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, leave_out="blk.1.ffn_up.weight")
    refused(path, CheckpointError, r"1 tensors are missing, the first blk\.1\.ffn_up\.weight")


def test_a_truncated_file_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model)
    data = path.read_bytes()
    for keep in [0, 1, 4, 12, 24, 40, 100, 300, 1000, 2000, 5000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:keep])
        refused(path, CheckpointError, "not a whole GGUF file")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("not a model, however long it is " * 20)
    refused(path, CheckpointError, "not a whole GGUF file")


def test_nan_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model)
    data = path.read_bytes()
    bits = np.float32(model.state_dict()["model.norm.weight"][5].item()).tobytes()
    assert data.count(bits) == 1
    path.write_bytes(data.replace(bits, np.float32("nan").tobytes()))
    refused(path, CheckpointError, r"norm\.weight holds NaN")


def test_the_fingerprint_is_of_the_content(model: LlamaForCausalLM, tmp_path: Path) -> None:
    one = write_gguf(tmp_path / "model.gguf", model)
    before = fingerprint(open_checkpoint(one))
    assert fingerprint(open_checkpoint(one)) == before
    write_gguf(one, model, kind=gguf.GGMLQuantizationType.F16)
    assert fingerprint(open_checkpoint(one)) != before


QUANTIZED = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_type_is_read_as_the_package_reads_it(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes, whose scales are numbers; q and k, whose rows are put in another order, among them."""
    changes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
    original = save_toy_model(tmp_path / "model", toy_config(**changes, head_dim=64))
    plain = write_gguf(tmp_path / "plain.gguf", original)
    stored = gguf.GGMLQuantizationType[kind]
    random, blocks = np.random.default_rng(0), {}

    def requantize(writer: gguf.GGUFWriter) -> None:
        for tensor in gguf.GGUFReader(plain).tensors:
            if len(tensor.shape) == 2:
                blocks[tensor.name] = random_blocks(stored, tensor.data.shape, random)
                writer.add_tensor(tensor.name, blocks[tensor.name], raw_dtype=stored)

    path = edited(plain, tmp_path / "a.gguf", requantize, without=r"token_embd|attn_[qkvo]|ffn_[gud]")
    found = read(path)
    expected = {name: gguf.dequantize(data, stored) for name, data in blocks.items()}
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.0.mlp.down_proj", "blk.0.ffn_down")):
        assert torch.equal(found[f"{ours}.weight"], torch.from_numpy(expected[f"{theirs}.weight"].copy()))
    turned = found["layers.0.self_attn.k_proj.weight"].numpy()
    assert np.array_equal(permute(turned, turned.shape[0] // 64), expected["blk.0.attn_k.weight"])


def random_blocks(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[Any]:
    if kind.name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return gguf.quantize(random.standard_normal(shape).astype(np.float32), kind)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (shape[0] * shape[1] // size, block_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    at = {"Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,)}[kind.name]
    for first in at:  # random bytes may be NaN as a scale
        data[:, [first, first + 1]] = scale
    return data.reshape(shape[0], -1)


def test_a_type_that_the_package_cannot_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weight", np.ones((320, 64), np.int32))

    plain = write_gguf(tmp_path / "plain.gguf", model)
    path = edited(plain, tmp_path / "a.gguf", edit, without="token_embd")
    refused(path, UnsupportedError, r"tensor token_embd\.weight of the type I32 cannot be read")
