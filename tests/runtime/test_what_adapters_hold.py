"""What an adapter may hold, read from a bundle: beside transformers' own model, changed in the same way."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from families import make_toy, save_toy, theirs_of
from forged_adapter import Drawn, Tensors, forge_adapter
from toy import save_toy_tokenizer

import bedplate
from bedplate.errors import BundleError, RunError
from bedplate.quantize.options import AdapterScheme
from bedplate.runtime.engine import Engine
from bedplate.runtime.model_spec import read_spec
from bedplate.spec import linear_shapes

VOCAB, MORE = 320, 23
TOYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"use_sliding_window": True},
    "stablelm": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
}
TEXT = [int(token) for token in np.random.default_rng(2).integers(0, VOCAB, 24)]
NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


class Adapter(NamedTuple):
    tensors: Tensors
    vocab: int = VOCAB
    layers: tuple[int, ...] | None = None

    def text(self) -> list[int]:
        """Tokens of all that it knows, those among them that TEXT has not."""
        return [(token + 11 * at) % self.vocab for at, token in enumerate(TEXT)]


def adapters(spec: Any) -> dict[str, Adapter]:
    drawn = Drawn(linear_shapes(spec), spec.dim, VOCAB)
    norms = {
        f"{name}.weight": drawn.floats(spec.dim, middle=1.0)
        for name in ["norm", *(f"layers.{i}.{norm}" for i in range(spec.n_layers) for norm in spec.norms)]
    }
    if spec.norm_bias:
        norms |= {name.replace("weight", "bias"): drawn.floats(spec.dim) for name in list(norms)[::2]}
    if spec.qk_norm:
        norms |= {"layers.1.self_attn.q_norm.weight": drawn.floats(spec.head_dim, middle=1.0)}
        norms |= {"layers.2.self_attn.k_norm.weight": drawn.floats(spec.head_dim, middle=1.0)}
    head, table = "lm_head", "embed_tokens"
    own = {name: {f"{name}.weight": drawn.floats(VOCAB + MORE, spec.dim)} for name in (head, table)}
    outer = drawn.branch(head, VOCAB, spec.dim) | drawn.affine(head, VOCAB)
    narrow = {
        f"{table}.lora_a.weight": drawn.floats(VOCAB, 3),
        f"{table}.lora_b.weight": drawn.floats(spec.dim, 3),
    }
    few, added = [2, 3, 17, 31, 160], list(range(VOCAB, VOCAB + MORE))
    grown = drawn.rows(head, [0, *added]) | drawn.rows(table, [*few, *added])
    layers = (0, 1, 1, 3, 2, 0)
    return {
        "dora": Adapter(drawn.layers(spec.n_layers, branches=True, affines=True)),
        "biases": Adapter(
            {k: v for k, v in drawn.layers(4, branches=False, affines=True).items() if "shift" in k}
        ),
        "norms": Adapter(norms),
        "outer": Adapter(outer | narrow),
        "rows": Adapter(drawn.rows(head, few) | drawn.rows(table, few)),
        "grown": Adapter(
            grown | drawn.branch(head, VOCAB + MORE, spec.dim) | drawn.affine(head, VOCAB + MORE),
            VOCAB + MORE,
        ),
        "saved": Adapter(own[head] | own[table] | norms, VOCAB + MORE),
        "tied": Adapter(own[head] | {f"{table}.weight": own[head]["lm_head.weight"]}, VOCAB + MORE),
        "layers": Adapter(drawn.layers(len(layers), branches=True, affines=False), layers=layers),
        "everything": Adapter(
            drawn.layers(len(layers), branches=True, affines=True)
            | {name: value for name, value in norms.items() if not name.startswith("layers.3")}
            | own[head]
            | own[table]
            | drawn.rows(head, few)
            | drawn.rows(table, few)
            | drawn.branch(head, VOCAB + MORE, spec.dim),
            VOCAB + MORE,
            layers,
        ),
    }


def changed(folder: Path, adapter: Adapter) -> torch.nn.Module:
    """transformers' model of a folder with what an adapter holds in place."""
    model = theirs_of(folder)
    given = {name: torch.from_numpy(value) for name, value in adapter.tensors.items()}
    if adapter.layers is not None:
        model.model.layers = torch.nn.ModuleList(
            copy.deepcopy(model.model.layers[base]) for base in adapter.layers
        )
        model.config.num_hidden_layers = len(adapter.layers)
        kinds = getattr(model.config, "layer_types", None)
        if kinds is not None:
            model.config.layer_types = [kinds[base] for base in adapter.layers]
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
    for number, layer in enumerate(model.model.layers):
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                path = f"layers.{number}.{'mlp' if part is layer.mlp else 'self_attn'}.{name}"
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, linear(module, path, given))
                elif f"{path}.weight" in given:
                    module.weight.data = given[f"{path}.weight"]
        for ours, name in NAMES.items():
            replace(getattr(layer, name, None), f"layers.{number}.{ours}", given)
    replace(model.model.norm, "norm", given)

    table, head = model.model.embed_tokens.weight.data.clone(), copy.deepcopy(model.lm_head)
    more = adapter.vocab - VOCAB
    table = given.get("embed_tokens.weight", torch.nn.functional.pad(table, (0, 0, 0, more)))
    if "embed_tokens.rows.ids" in given:
        table[given["embed_tokens.rows.ids"]] = given["embed_tokens.rows.weight"]
    if "embed_tokens.lora_a.weight" in given:
        table = table + given["embed_tokens.lora_a.weight"] @ given["embed_tokens.lora_b.weight"].T
    rows = torch.nn.functional.pad(head.weight.data, (0, 0, 0, more))
    head.weight = torch.nn.Parameter(given.get("lm_head.weight", rows))
    model.lm_head = linear(head, "lm_head", given)
    if "lm_head.rows.ids" in given:
        ids = given["lm_head.rows.ids"]
        model.lm_head.weight.data[ids] = given["lm_head.rows.weight"]
        model.lm_head.bias.data[ids] = 0
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(table, padding_idx=None)
    return model


def linear(module: torch.nn.Linear, path: str, given: Mapping[str, torch.Tensor]) -> torch.nn.Linear:
    weight, rows = module.weight.data.clone(), len(module.weight)
    bias = torch.zeros(rows) if module.bias is None else module.bias.data
    if f"{path}.lora_a.weight" in given:
        weight = weight + given[f"{path}.lora_b.weight"] @ given[f"{path}.lora_a.weight"]
    factor = given.get(f"{path}.factor", torch.ones(rows))
    made = torch.nn.Linear(weight.shape[1], rows)
    made.weight.data = factor[:, None] * weight
    made.bias.data = factor * bias + given.get(f"{path}.shift", torch.zeros(rows))
    return made


def replace(norm: torch.nn.Module | None, path: str, given: Mapping[str, torch.Tensor]) -> None:
    for leaf in ("weight", "bias"):
        if f"{path}.{leaf}" in given:
            assert norm is not None
            getattr(norm, leaf).data = given[f"{path}.{leaf}"]


class Made(NamedTuple):
    model: Path
    adapters: dict[str, Adapter]
    bundle: bedplate.Bundle


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """The bundle of a family with all adapters, as this module has built it once."""

    @functools.cache
    def make(family: str, quantize: str) -> Made:
        folder = tmp_path_factory.mktemp("own")
        save_toy(folder / "model", make_toy(family, vocab_size=VOCAB, intermediate_size=64, **TOYS[family]))
        save_toy_tokenizer(folder / "model", VOCAB)
        bundle = bedplate.build(
            folder / "model", folder / "toy.bundle", programs=False, quantize=cast(Any, quantize)
        )
        with Engine(bundle) as engine:
            every = adapters(read_spec(engine.bundle))
        for name, one in every.items():
            scheme: AdapterScheme = "none" if quantize == "none" else "8w"
            forge_adapter(bundle, name, one.tensors, vocab=one.vocab, layers=one.layers, scheme=scheme)
        return Made(folder / "model", every, bundle)

    return make


@pytest.fixture(params=TOYS)
def exact(request: pytest.FixtureRequest, build: Callable[[str, str], Made]) -> Made:
    """Of floats."""
    return build(request.param, "none")


@pytest.fixture(params=["none", "8da4w"])
def made(request: pytest.FixtureRequest, build: Callable[[str, str], Made]) -> Made:
    return build("qwen3", request.param)


@pytest.fixture
def llama(build: Callable[[str, str], Made]) -> Made:
    return build("llama", "none")


def expected_of(model: Path, adapter: Adapter) -> np.ndarray:
    """Logits of transformers' model, changed."""
    with torch.no_grad():
        ids = torch.tensor([adapter.text()])
        return np.asarray(changed(model, adapter)(ids, use_cache=False).logits[0].numpy())


def test_each_computes_what_transformers_does(exact: Made) -> None:
    with Engine(exact.bundle, kv="float32", threads=2) as engine:
        base = engine.session().logits(TEXT)
        for name, adapter in exact.adapters.items():
            session = engine.session(name)
            got = session.logits(adapter.text())
            expected = expected_of(exact.model, adapter)
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4, err_msg=name)
            assert np.abs(session.logits(TEXT)[:, :VOCAB] - base).max() > 0.05, name


def test_in_few_bits(build: Callable[[str, str], Made]) -> None:
    """Foundation and branches in 8 bits: as near as such codes allow. What is float32 stays exact."""
    eight = build("qwen3", "8da8w")
    with Engine(eight.bundle, kv="float32") as engine:
        for name, adapter in eight.adapters.items():
            got, expected = engine.session(name).logits(adapter.text()), expected_of(eight.model, adapter)
            assert np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()) < 0.08, name


def test_all_of_them_in_one_step(made: Made) -> None:
    """The same bits as alone, and -inf for tokens that another one has."""
    texts = {None: TEXT} | {name: one.text() for name, one in made.adapters.items()}
    with Engine(made.bundle, threads=1) as engine:
        alone = {name: engine.session(name).logits(text) for name, text in texts.items()}
    with Engine(made.bundle, threads=2) as engine:
        order = [*texts, "saved", "layers", None, "dora"]
        sessions = [engine.session(name) for name in order]
        for begin, end in ((0, 7), (7, 8), (8, 24)):
            parts = [(s, texts[name][begin:end]) for s, name in zip(sessions, order, strict=True)]
            logits = engine.step(parts)
            assert logits.shape == (len(order), VOCAB + MORE)
            for row, name in zip(logits, order, strict=True):
                expected = alone[name][end - 1]
                np.testing.assert_array_equal(row[: len(expected)], expected)
                assert (row[len(expected) :] == -np.inf).all()
        assert engine.step([(engine.session(), [1])]).shape == (1, VOCAB)


def test_tokens_are_those_of_the_session(made: Made) -> None:
    with Engine(made.bundle) as engine:
        for name, most in ((None, VOCAB), ("dora", VOCAB), ("saved", VOCAB + MORE)):
            session = engine.session(name)
            assert session.step([most - 1]).shape == (most,)
            for call in (session.step, session.logits):
                with pytest.raises(
                    RunError, match=rf"token {most} is not.*\nhint: token ids are 0 … {most - 1}"
                ):
                    call([most])
        session = engine.session("saved")
        session.step([VOCAB + 1])
        session.use("dora")
        with pytest.raises(RunError, match=f"token {VOCAB + 1} is not in the vocabulary"):
            session.step([VOCAB + 1])


def test_a_generation_takes_what_its_adapter_has(made: Made) -> None:
    """Tokens beside the base's are chosen where there are some, and nowhere else."""
    with Engine(made.bundle) as engine:
        for name in (None, "saved", "everything"):
            session = engine.session(name)
            session.generate("the fox", max_tokens=40, temperature=80.0, seed=1)
            beyond = [token for token in session.tokens if token >= VOCAB]
            assert bool(beyond) == (name is not None)


def test_memory_is_counted_and_freed(made: Made) -> None:
    with Engine(made.bundle) as engine:
        for name in made.bundle.adapters:
            engine.session(name).step([1])
        used = engine.memory().adapters
        for name, adapter in made.adapters.items():
            bytes_ = sum(value.nbytes for key, value in adapter.tensors.items() if "lora" not in key)
            own = 1 if name != "tied" else 0.5
            assert used[name] >= own * bytes_, name
        longer, plain = engine.session("layers"), engine.session("dora")
        longer.step([1])
        plain.step([1])
        assert longer.kv_bytes == plain.kv_bytes * 6 // 4
        engine.unload("saved")
        assert "saved" not in engine.memory().adapters


# --- What does not fit


def broken(made: Made, tmp_path: Path, tensors: Tensors, **fields: Any) -> str:
    """What loading an adapter that holds these ends in."""
    bundle = bedplate.Bundle.open(shutil.copytree(made.bundle.path, tmp_path / "copy.bundle"))
    forge_adapter(bundle, "broken", tensors, **{"vocab": VOCAB, **fields})
    with Engine(bundle) as engine:
        expected = engine.session("dora").step(TEXT)
        with pytest.raises(BundleError) as caught:
            engine.session("broken").step([1])
        np.testing.assert_array_equal(engine.session("dora").step(TEXT), expected)
    assert "weights.ptd" in str(caught.value) and caught.value.hint
    return str(caught.value)


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


LINEAR = "layers.0.self_attn.o_proj"
WRONG: list[tuple[str, Tensors, dict[str, Any]]] = [
    ("float32 numbers", {f"{LINEAR}.factor": floats(63)}, {}),
    ("float32 numbers", {f"{LINEAR}.shift": ids(*range(64))}, {}),
    ("float32 numbers", {"norm.weight": floats(65)}, {}),
    ("does not compute", {"norm.bias": floats(64)}, {}),
    ("does not compute", {f"{LINEAR}.fact": floats(64)}, {}),
    ("does not compute", {"layers.4.mlp.down_proj.factor": floats(64)}, {}),
    ("does not compute", {"layers.0.self_attn.q_norm.weight": floats(16)}, {}),
    ("does not compute", {"lm_head.lora_b.weight": floats(320, 2)}, {}),
    ("does not compute", {"lm_head.rows.weight": floats(2, 64)}, {}),
    ("fewer tokens", {}, {"vocab": VOCAB - 1}),
    ("tokens; the model has", {}, {"vocab": 10**30}),
    ("uses layer 4 of a model of 4", {}, {"layers": (0, 4)}),
    ("uses layer -1", {}, {"layers": (0, -1)}),
    ("has 0 layers", {}, {"layers": ()}),
    ("has 5000 layers", {}, {"layers": (0,) * 5000}),
    ("the adapter's head does not fit", {"lm_head.weight": floats(319, 64)}, {}),
    ("the adapter's head does not fit", {"lm_head.weight": floats(320, 63)}, {}),
    ("embedding does not fit", {"embed_tokens.weight": floats(321, 64)}, {}),
    ("a token has no row in the embedding", {"lm_head.weight": floats(321, 64)}, {"vocab": 321}),
    ("a token has no row in the head", {"embed_tokens.weight": floats(321, 64)}, {"vocab": 321}),
    *(
        (what, {f"{place}.rows.ids": numbers, f"{place}.rows.weight": values}, {})
        for place in ("lm_head", "embed_tokens")
        for what, numbers, values in (
            ("do not ascend", ids(2, 2), floats(2, 64)),
            ("do not ascend", ids(3, 2), floats(2, 64)),
            ("do not ascend", ids(-1, 2), floats(2, 64)),
            ("not in the vocabulary", ids(2, 320), floats(2, 64)),
            ("not in the vocabulary", ids(2, 2**62), floats(2, 64)),
            ("not as many rows", ids(2), floats(2, 64)),
            ("do not fit the model", ids(2, 3), floats(2, 65)),
            ("not int64", floats(2), floats(2, 64)),
            ("no matrix of weights", ids(2, 3), floats(128)),
        )
    ),
    ("there is no constant", {"lm_head.rows.ids": ids(1)}, {}),
    (
        "lora_b.weight",
        {"lm_head.lora_a.weight": floats(2, 64), "lm_head.lora_b.weight": floats(319, 2)},
        {},
    ),
    (
        "lora_b.weight",
        {"lm_head.lora_a.weight": floats(2, 64), "lm_head.lora_b.weight": floats(320, 3)},
        {},
    ),
    (
        "the branch at the embedding",
        {"embed_tokens.lora_a.weight": floats(320, 2), "embed_tokens.lora_b.weight": floats(64, 3)},
        {},
    ),
    (
        "the branch at the embedding",
        {"embed_tokens.lora_a.weight": floats(319, 2), "embed_tokens.lora_b.weight": floats(64, 2)},
        {},
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit_is_refused(number: int, llama: Made, tmp_path: Path) -> None:
    what, tensors, fields = WRONG[number]
    assert what.replace("fewer tokens", "tokens; the model has") in broken(llama, tmp_path, tensors, **fields)
