"""Several adapters at once, each with its own scale: as PEFT adds them, or refused by what is in the way."""

from __future__ import annotations

import gc
import shutil
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_toy, save_toy, save_trained, theirs_of
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from toy import BuildToy, save_toy_tokenizer

import bedplate
from bedplate.bundle.store import Bundle
from bedplate.errors import NotFoundError, RunError, UnsupportedError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.stored import stored_linears
from bedplate.runtime.engine import Engine
from bedplate.runtime.sums import Sums

VOCABULARY = 320
TEXT = [int(token) for token in np.random.default_rng(5).integers(2, VOCABULARY, 150)]
IDS = TEXT[:24]
BOTH = {"all": 0.7, "all2": 0.3}


# --- As PEFT computes them

# Of these, Gemma is tied and GLM-4 is not; GLM-4 has joined linears and biases.
FAMILIES = ["gemma3_text", "glm4"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "target_modules": "all", "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    "b": {"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "alpha_pattern": {"lm_head": 2}},
    "c": {"r": 20, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}
SUMS: list[dict[str, float]] = [
    {"a": 0.7, "b": 0.3},
    {"c": -1.3, "a": 0.4},
    {"a": 0.5, "b": 0.0, "c": 1.0},
    {"b": 1.0, "c": 0.6, "a": -0.4},
]


class Family:
    """Bundles of a toy by how the foundation and the adapters are stored, and PEFT's own model."""

    def __init__(self, folder: Path, name: str) -> None:
        model = folder / "model"
        save_toy(model, make_toy(name, "first", vocab_size=VOCABULARY))
        save_toy_tokenizer(model, VOCABULARY)
        linears = [name.rpartition(".")[2] for name in stored_linears(open_checkpoint(model).spec)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.folders = {}
            for one, fields in ADAPTERS.items():
                targets = linears if fields["target_modules"] == "all" else fields["target_modules"]
                config = LoraConfig(**{**fields, "lora_alpha": 6, "target_modules": targets})
                self.folders[one] = save_trained(folder / one, model, config)
            first, *others = self.folders
            self.peft = PeftModel.from_pretrained(theirs_of(model), self.folders[first], adapter_name=first)
            for other in others:
                self.peft.load_adapter(self.folders[other], adapter_name=other)
        self.peft.eval()
        self.bundles = {
            (foundation, adapter): bedplate.build(
                model, folder / f"{foundation}-{adapter}.bundle", programs=False, quantize=foundation
            )
            for foundation in ("none", "8da8w")
            for adapter in ("none", "8w")
        }
        for (_, adapter), bundle in self.bundles.items():
            bundle.add_all(self.folders, programs=False, quantize=adapter)

    @torch.no_grad()
    def expected(self, scales: Mapping[str, float]) -> torch.Tensor:
        if not scales:
            with self.peft.disable_adapter():
                return self.peft(torch.tensor([IDS])).logits[0]  # type: ignore[no-any-return]
        self.peft.base_model.set_adapter(list(scales))
        for module in self.peft.modules():
            for name, scale in scales.items() if isinstance(module, LoraLayer) else ():
                module.set_scale(name, scale)
        return self.peft(torch.tensor([IDS])).logits[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("family", FAMILIES, indirect=True, scope="module")
@pytest.mark.parametrize("scales", SUMS, ids=str)
def test_as_peft_adds_them(family: Family, scales: dict[str, float]) -> None:
    expected = family.expected(scales)
    for fewer in (*({name: scale} for name, scale in scales.items()), {}):
        assert rms(family.expected(fewer) - expected) > 0.05
    found = logits(family.bundles["none", "none"], scales)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES, indirect=True, scope="module")
@pytest.mark.parametrize("stored", [("none", "8w"), ("8da8w", "none"), ("8da8w", "8w")], ids="-".join)
def test_in_8_bits(family: Family, stored: tuple[str, str]) -> None:
    """What was rounded is off by as little as a single adapter is. Products of codes: tests/native/test_sums.py."""
    scales, bundle = SUMS[0], family.bundles[stored]
    expected = family.expected(scales)
    off = rms(logits(bundle, scales) - expected)
    effect = rms(expected - family.expected({}))
    assert 0 < off < 0.1 * rms(expected) and off < 0.2 * effect
    # Of the same numbers as one adapter: what the ranks of both come to, side by side.
    bundle.merge(scales, name="sum", programs=False)
    try:
        merged = logits(bundle, {"sum": 1.0})
    finally:
        bundle.remove("sum")
    # It has floats, and adapters in 8 bits round their inputs.
    assert rms(logits(bundle, scales) - merged) < (0.05 if stored[1] == "8w" else 0.02) * rms(merged)


def logits(bundle: Bundle, adapters: Mapping[str, float]) -> torch.Tensor:
    with Engine(bundle, kv="float32") as engine:
        return torch.from_numpy(engine.session(adapters).logits(IDS))


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


# --- One row, one result


@pytest.fixture
def engine(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle) as engine:
        yield engine


def test_the_order_of_names_and_what_is_zero_change_nothing(engine: Engine) -> None:
    session = engine.session(BOTH)
    expected = session.logits(IDS)
    for same in (
        {"all2": 0.3, "all": 0.7},
        {"all": np.float32(0.7), "all2": 0.3, "all8": 0},
        {"all8": -0.0, "all": 0.7, "all2": 0.3},
    ):
        session.use(same)
        np.testing.assert_array_equal(session.logits(IDS), expected)
    for name, scale in (("all", 1.0), ("all2", -0.5)):
        alone = engine.session()
        alone.use(name, scale=scale)
        expected = alone.logits(IDS)
        for same in ({name: scale}, {name: scale, "all8": 0.0}):
            np.testing.assert_array_equal(engine.session(same).logits(IDS), expected)
    np.testing.assert_array_equal(
        engine.session({"all": 0, "all2": 0}).logits(IDS), engine.session().logits(IDS)
    )


def test_in_one_step_with_others(engine: Engine) -> None:
    """In any pieces, beside the base, its parts and other sums."""
    chosen: list[Mapping[str, float] | str | None] = [
        BOTH, {"all": 0.3, "all2": 0.7}, BOTH, None, "all", "all2", {"all8": 2.0, "all": 1, "all2": 1}
    ]  # fmt: skip
    sessions = [engine.session(one) for one in chosen]
    for first, end in ((0, 5), (5, 6), (6, 100)):
        got = engine.step([(session, TEXT[first:end]) for session in sessions])
    for row, one in zip(got, chosen, strict=True):
        alone = engine.session(one, cache_salt="alone")
        for token in TEXT[:100]:
            last = alone.step([token])
        np.testing.assert_array_equal(row, last)
    assert len({row.tobytes() for row in got}) == len(chosen) - 1


@pytest.mark.parametrize("threads", [1, 3])
def test_on_any_threads(toy_bundle: Bundle, engine: Engine, threads: int) -> None:
    with Engine(toy_bundle, threads=threads) as other:
        np.testing.assert_array_equal(other.session(BOTH).logits(IDS), engine.session(BOTH).logits(IDS))


# --- What a sum is known by


def test_keys_and_values_are_those_of_the_same_sum(toy_bundle: Bundle, engine: Engine) -> None:
    choices: list[Any] = [None, "all", BOTH, {"all": 0.3, "all2": 0.7}, {**BOTH, "all8": 1.0}, {"all": 0.7}]
    prompt = TEXT[:100]
    with Engine(toy_bundle, cache_bytes=0) as without:
        answers = [without.session(one).generate(prompt, max_tokens=6) for one in choices]
    for turn in range(2):
        for one, answer in zip(choices, answers, strict=True):
            session = engine.session(one)
            assert session.generate(prompt, max_tokens=6) == answer
            assert session.last is not None and session.last.reused_tokens == 64 * turn
    other = engine.session({"all2": 0.3, "all": 0.7, "all8": 0.0})
    other.generate(prompt, max_tokens=1)
    assert other.last is not None and other.last.reused_tokens == 64
    other = engine.session(BOTH, cache_salt="other")
    other.generate(prompt, max_tokens=1)
    assert other.last is not None and other.last.reused_tokens == 0


def test_the_digest_covers_each_part(engine: Engine) -> None:
    base = engine.load()
    a, b, c = (engine.load(name) for name in ("all", "all2", "all8"))

    def root(*parts: tuple[Any, float]) -> str:
        return Sums().of(base, {str(at): part for at, part in enumerate(parts)}).root("", is_long=False)

    roots = [
        root((a, 1.0)),
        root((a, 0.5)),
        root((a, 1.0), (b, 1.0)),
        root((a, 0.5), (b, 1.0)),
        root((a, 1.0), (b, 0.5)),
        root((a, 1.0), (b, 1.0), (c, 1.0)),
        root((a, 1.0), (c, 1.0)),
        root((a, 1.0), (a, 1.0)),
        root((a, 1.0), (a, 0.5)),
        base.root("", is_long=False),
    ]
    assert len(set(roots)) == len(roots)
    assert root((b, 0.5), (a, 1.0)) == root((a, 1.0), (b, 0.5)) == root((c, 0.0), (a, 1.0), (b, 0.5))
    assert root((a, 1.0), (b, 0.0)) == a.root("", is_long=False)
    assert root((a, 0.0), (b, 0.0)) == base.root("", is_long=False)


def test_what_a_session_says_that_it_uses(engine: Engine) -> None:
    session = engine.session(BOTH)
    assert (session.adapters, session.adapter, session.scale) == (BOTH, None, 1.0)
    session.step(IDS)
    session.use({"all2": 0.3, "all": 0.7})
    assert session.tokens == tuple(IDS)
    session.adapters["all"] = 5.0
    assert session.adapters == BOTH
    fork = session.fork()
    assert fork.adapters == BOTH
    np.testing.assert_array_equal(fork.step([3]), engine.session(BOTH).step([*IDS, 3]))
    session.use("all", scale=0.6)
    assert (session.adapters, session.adapter, session.scale) == ({"all": 0.6}, "all", 0.6)
    assert session.tokens == ()
    session.use({"all": 1})
    assert (session.adapters, session.adapter, session.scale) == ({"all": 1.0}, "all", 1.0)
    session.use({})
    assert (session.adapters, session.adapter, session.scale) == ({}, None, 1.0)
    session.use(fork.adapters)
    assert session.adapters == BOTH


def test_a_file(engine: Engine, toy_bundle: Bundle, tmp_path: Path) -> None:
    path, session = tmp_path / "saved", engine.session({**BOTH, "all8": 0.0})
    session.step(TEXT)
    session.save(path)
    loaded = engine.load_session(path)
    assert (loaded.adapters, loaded.tokens) == ({**BOTH, "all8": 0.0}, tuple(TEXT))
    np.testing.assert_array_equal(loaded.step([3]), session.step([3]))
    again = tmp_path / "again"
    engine.load_session(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    changed = bedplate.Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "bundle"))
    changed.remove("all2")
    with Engine(changed) as other, pytest.raises(NotFoundError, match="no adapter 'all2'"):
        other.load_session(path)


# --- Adapters that come and go


@pytest.fixture
def changing(toy_bundle: Bundle, tmp_path: Path) -> bedplate.Bundle:
    return bedplate.Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "bundle"))


def test_the_same_weights_under_other_names(
    changing: bedplate.Bundle, toy_adapters: dict[str, Path], engine: Engine
) -> None:
    names = ["a", "b", "y", "z"]
    for name in names:
        changing.add(toy_adapters["all2"], name=name, quantize="none", programs=False)
    with Engine(changing) as other:
        for name in names:
            np.testing.assert_array_equal(
                other.session({"all": 0.7, name: 0.3}).logits(IDS), engine.session(BOTH).logits(IDS)
            )
        one, two = (
            other.session(dict(zip("az", scales, strict=True))) for scales in ((0.7, 0.2), (0.2, 0.7))
        )
        np.testing.assert_array_equal(one.logits(IDS), two.logits(IDS))


def test_a_part_is_replaced(
    changing: bedplate.Bundle, toy_adapters: dict[str, Path], engine: Engine, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 2.0, "seed": 2}
    before, after = ({"all": 0.7, other: 0.3} for other in ("all2", "all8"))
    texts = [engine.session(one).generate("ab", **settings) for one in (before, after)]
    assert texts[0] != texts[1]
    expected = engine.session(after).step([*IDS, 3])
    with Engine(changing) as other:
        session, path = other.session(before), tmp_path / "saved"
        session.step(IDS)
        session.save(path)
        pieces = other.session(before).generate("ab", **settings, stream=True)
        text = next(pieces)
        changing.remove("all2")
        changing.add(toy_adapters["all"], name="all2", quantize="8w", programs=False)
        assert other.session(before).generate("ab", **settings) == texts[1]
        assert text + "".join(pieces) == texts[0]
        np.testing.assert_array_equal(session.step([3]), expected)
        with pytest.raises(
            RunError, match="another adapter of the name 'all' or 'all2' computed this session"
        ):
            other.load_session(path)


def test_a_part_is_removed(changing: bedplate.Bundle) -> None:
    with Engine(changing) as engine:
        session = engine.session(BOTH)
        session.step(IDS)
        changing.remove("all2")
        with pytest.raises(NotFoundError, match="no adapter 'all2'"):
            session.step([3])
        assert session.tokens == tuple(IDS)


def test_memory_is_free_when_the_last_user_ends(engine: Engine) -> None:
    session = engine.session(BOTH)
    expected = session.generate("ab", max_tokens=20, temperature=50.0, seed=2)
    watched = [weakref.ref(engine.load(name).adapter) for name in BOTH]  # type: ignore[type-var]
    sizes = {name: engine.load(name).nbytes for name in BOTH}
    assert engine.memory().adapters == sizes
    pieces = session.generate("ab", max_tokens=20, temperature=50.0, seed=2, stream=True)
    text = next(pieces)
    for name in BOTH:
        engine.unload(name)
    gc.collect()
    assert all(one() is not None for one in watched)
    assert engine._loaded._taken() >= sum(sizes.values()), "what only a generation holds counts too"
    assert text + "".join(pieces) == expected
    gc.collect()
    assert all(one() is None for one in watched) and session.kv_bytes > 0


def test_sessions_of_the_same_sum_share_it(engine: Engine) -> None:
    names = {"max_tokens": 20, "temperature": 50.0, "seed": 2}
    pieces = [engine.session(BOTH).generate("ab", stream=True, **names) for _ in range(2)]  # type: ignore[arg-type]
    texts = [next(one) for one in pieces]
    parts = [engine.load(name).adapter for name in BOTH]
    (known,) = engine._loaded._sums._known.values()
    assert all(part is not None for part in parts) and sys.getrefcount(known) - 2 >= 2
    del known
    assert len({text + "".join(one) for text, one in zip(texts, pieces, strict=True)}) == 1
    gc.collect()
    assert not engine._loaded._sums._known


def test_a_budget_counts_parts_once_and_drops_none_for_another(toy_bundle: Bundle, engine: Engine) -> None:
    sizes = [engine.load(name).nbytes for name in BOTH]
    block = engine.load().new_kv(False).block_nbytes
    with Engine(toy_bundle, memory_bytes=sum(sizes) + 2 * block) as small:
        sessions = [small.session(BOTH), small.session({"all": 0.1, "all2": 2.0})]
        for session, other in zip(sessions, (BOTH, {"all": 0.1, "all2": 2.0}), strict=True):
            np.testing.assert_array_equal(session.step(IDS), engine.session(other).step(IDS))
        with pytest.raises(RunError, match="the engine's memory is full"):
            small.session("all8").step(IDS)
    with Engine(toy_bundle, memory_bytes=sum(sizes) - 1) as small:
        for _ in range(2):
            with pytest.raises(RunError, match="the engine's memory is full"):
                small.session(BOTH)
        np.testing.assert_array_equal(small.session("all").step(IDS), engine.session("all").step(IDS))


# --- What is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "norms": ({"modules_to_save": ["norm"]}, "norms of its own"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "trained tokens"),
    "biases": ({"lora_bias": True}, "trained biases"),
    "twice": ({"layer_replication": [(0, 3), (1, 3)]}, "layers that are used more than once"),
    "head": ({"modules_to_save": ["lm_head"]}, "a head of its own"),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, "an embedding of its own"),
}


@pytest.fixture(scope="module")
def refusing(
    build_toy: BuildToy,
    toy_model: Path,
    toy_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("refused")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = {
            name: save_trained(folder / name, toy_model, LoraConfig(r=2, target_modules=["q_proj"], **fields))
            for name, (fields, _) in REFUSED.items()
        }
    for name in ("template", "same", "special"):
        folders[name] = Path(shutil.copytree(toy_adapters["qv"], folder / name))
    (folder / "template" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name in ("same", "special"):
        shutil.copy(toy_model / "tokenizer.json", folder / name)
        shutil.copy(toy_model / "tokenizer_config.json", folder / name)
    settings = (toy_model / "tokenizer_config.json").read_text()
    (folder / "special" / "tokenizer_config.json").write_text(
        settings.replace('<|im_end|>"', '<|im_start|>"', 1)
    )
    bundle = build_toy(quantize="none", programs=False)
    bundle.add_all({"plain": toy_adapters["all"], "other": toy_adapters["all2"], **folders}, programs=False)
    with Engine(bundle) as engine:
        yield engine


TEXTS = {"template": "a chat template of its own", "special": "special tokens of its own"}


@pytest.mark.parametrize("name", [*REFUSED, *TEXTS])
@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_what_goes_with_no_other(refusing: Engine, name: str, scale: float) -> None:
    """Whatever its scale is."""
    what = TEXTS[name] if name in TEXTS else REFUSED[name][1]
    complaint = (
        rf"the adapter {name} has {what}, so it cannot be used together with others\nhint: use it alone"
    )
    session = refusing.session({"plain": 0.5, "other": 0.5})
    session.step(IDS)
    for scales in ({"plain": 1.0, name: scale}, {name: scale, "plain": 1.0, "other": 0.0}):
        with pytest.raises(UnsupportedError, match=complaint):
            session.use(scales)
        with pytest.raises(UnsupportedError, match=complaint):
            refusing.session(scales)
    assert (session.adapters, session.tokens) == ({"plain": 0.5, "other": 0.5}, tuple(IDS))
    session.use({name: 1.0})
    assert session.adapter == name


def test_what_has_the_same_text_as_the_base(refusing: Engine) -> None:
    messages: Any = [{"role": "user", "content": "ab"}]
    session = refusing.session({"plain": 1.0, "same": 0.5})
    answer = session.generate(messages, max_tokens=5)
    assert session.last is not None
    assert session.last.prompt_tokens == len(refusing.tokenizer.encode_chat(messages))
    assert answer == refusing.session({"same": 0.5, "plain": 1.0}).generate(messages, max_tokens=5)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"all": 1.0, "nobody": 1.0}, "no adapter 'nobody'"),
        ({"all": 1.0, "nobody": 0.0}, "no adapter 'nobody'"),
        ({"all": 1.0, "all2": "much"}, "the scale of all2 is 'much'"),
        ({"all": 1.0, "all2": None}, "the scale of all2 is None"),
        ({"all": True, "all2": 1.0}, "the scale of all is True"),
        ({"all": float("nan"), "all2": 1.0}, "the scale of all is nan"),
        ({"all": 1e39}, r"the scale of all is 1e\+39"),
        ({"all": 1.0, 5: 1.0}, "the adapter's name is 5"),
        ({None: 1.0}, "the adapter's name is None"),
        ([("all", 1.0)], r"the adapter's name is \[\('all', 1.0\)\]"),
        (["all", "all2"], r"the adapter's name is \['all', 'all2'\]"),
    ],
    ids=str,
)
def test_what_names_no_adapters(engine: Engine, wrong: Any, complaint: str) -> None:
    session = engine.session(BOTH)
    session.step(IDS)
    for call in (session.use, engine.session):
        with pytest.raises((RunError, NotFoundError), match=rf"(?s){complaint}.*\nhint: "):
            call(wrong)
    for several in (BOTH, {"all": 1.0}, {}):
        with pytest.raises(
            RunError, match=r"scale is 0.5, and each adapter has its own\nhint: name one adapter"
        ):
            session.use(several, scale=0.5)
    assert (session.adapters, session.tokens) == (BOTH, tuple(IDS))
