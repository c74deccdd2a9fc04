"""An adapter by more or less: as PEFT's `set_scale`, or refused by the name of what no scale fits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft_oracle import TOKENS, TOLERANCE, Oracle

import bedplate
from bedplate.bundle.store import Bundle
from bedplate.errors import RunError, UnsupportedError
from bedplate.runtime.engine import Engine

IDS = TOKENS[0].tolist()
SCALES = [0.6, 0.0, -1.3, 2.0]
LINEARS = ["q_proj", "v_proj", "down_proj"]
# What an adapter has in place of the base's weights has no scale, there and here.
FITTING: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEARS},
    "patterns": {
        "target_modules": LINEARS,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"down_proj": 3},
    },
    "tables": {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
    "norms": {"target_modules": LINEARS, "modules_to_save": ["input_layernorm", "norm"]},
    "tokens": {"target_modules": LINEARS, "trainable_token_indices": [5, 42]},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"magnitudes \(DoRA\)"),
    "bias": ({"lora_bias": True}, "biases"),
}


@pytest.fixture(scope="module")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


@pytest.fixture(scope="module")
def folders(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scaled")
    fields = FITTING | {name: {"target_modules": LINEARS} | more for name, (more, _) in REFUSED.items()}
    return {
        name: oracle.save(folder / name, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **more))
        for name, more in fields.items()
    }


@pytest.fixture(scope="module")
def engine(
    toy_model: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    out = tmp_path_factory.mktemp("scaled") / "bundle"
    bundle = bedplate.build(toy_model, out, quantize="none", programs=False)
    bundle.add_all(folders, programs=False)
    with Engine(bundle, kv="float32") as engine:
        yield engine


@pytest.mark.parametrize("name", FITTING)
def test_as_peft_scales(engine: Engine, oracle: Oracle, folders: dict[str, Path], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(oracle.model), folders[name]).eval()
    different = []
    for scale in [1.0, *SCALES]:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)
        with torch.no_grad():
            expected = model(TOKENS).logits[0]
        session = engine.session()
        session.use(name, scale=scale)
        got = torch.from_numpy(session.logits(IDS))
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
        different.append(expected)
    assert all((one - different[0]).abs().max() > 10 * TOLERANCE for one in different[1:])


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_scale_fits(engine: Engine, name: str) -> None:
    session = engine.session("plain")
    session.step(IDS)
    complaint = REFUSED[name][1]
    with pytest.raises(
        UnsupportedError, match=rf"the adapter has {complaint}.*\nhint: use it without a scale"
    ):
        session.use(name, scale=0.5)
    assert (session.adapter, session.scale, session.tokens) == ("plain", 1.0, tuple(IDS))
    session.use(name)
    session.use(name, scale=1)
    assert (session.adapter, session.scale) == (name, 1.0)


def test_a_scale_of_nothing_is_the_base(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        session = engine.session()
        expected = session.step(IDS)
        for scale in (0, -0.0, np.float32(0)):
            session.use("all", scale=scale)
            np.testing.assert_array_equal(session.logits(IDS)[-1], expected)


def test_another_scale_is_computed_anew_and_found_again(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine, Engine(toy_bundle, cache_bytes=0) as without:
        prompt = "the quick brown fox jumps over the lazy dog; " * 20
        prompt = engine.tokenizer.decode(engine.tokenizer.encode(prompt)[:100])
        session, answers = engine.session(), {}
        for turn in range(2):
            for scale in (1.0, 0.6, -1.0):
                session.use("all", scale=scale)
                assert (session.scale, session.tokens) == (scale, ())
                answers[scale] = session.generate(prompt, max_tokens=6)
                assert session.last is not None and session.last.reused_tokens == 64 * turn
                alone = without.session()
                alone.use("all", scale=scale)
                assert answers[scale] == alone.generate(prompt, max_tokens=6)
        assert len(set(answers.values())) == 3
        held = session.tokens
        session.use("all", scale=-1.0)
        assert session.tokens == held


def test_rows_of_several_scales_in_one_step(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        sessions = [engine.session() for _ in range(3)]
        for session, scale in zip(sessions, (1.0, 0.6, -1.0), strict=True):
            session.use("all", scale=scale)
        got = engine.step([(session, IDS) for session in sessions])
        for row, session in zip(got, sessions, strict=True):
            alone = engine.session()
            alone.use("all", scale=session.scale)
            np.testing.assert_array_equal(row, alone.step(IDS))


@pytest.mark.parametrize("scale", [None, "1", True, float("nan"), float("inf"), 1e39, -1e300, 10**400])
def test_a_scale_that_is_none(toy_bundle: Bundle, scale: Any) -> None:
    with Engine(toy_bundle) as engine:
        session = engine.session("all")
        session.step(IDS)
        with pytest.raises(RunError, match=r"scale is .*\nhint: give a finite number"):
            session.use("all", scale=scale)
        with pytest.raises(RunError, match=r"scale is 0.5, and the base has nothing to scale\nhint: "):
            session.use(None, scale=0.5)
        assert (session.adapter, session.tokens) == ("all", tuple(IDS))


def test_an_adapter_that_is_replaced_by_one_that_no_scale_fits(
    toy_model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    bundle = bedplate.build(toy_model, tmp_path / "bundle", quantize="none", programs=False)
    bundle.add(folders["plain"], name="a", programs=False)
    with Engine(bundle) as engine:
        session = engine.session()
        session.use("a", scale=0.5)
        session.step(IDS)
        bundle.remove("a")
        bundle.add(folders["dora"], name="a", programs=False)
        with pytest.raises(UnsupportedError, match="magnitudes"):
            session.step([1])
        assert session.tokens == tuple(IDS)
