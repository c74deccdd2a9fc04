"""Activated LoRA: the base up to the last invocation, the adapter from there, on one KV. As PEFT computes it, and with
the bits of the base and of a LoRA that is always on.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_toy, save_toy, save_trained, theirs_of
from forged_adapter import forge_adapter
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from toy import save_toy_tokenizer

import bedplate
from bedplate.api import Bundle
from bedplate.assemble.verify import verify_bundle
from bedplate.errors import AdapterError, BundleError, RunError, UnsupportedError
from bedplate.runtime.bench import measure_speed
from bedplate.runtime.engine import Engine
from bedplate.runtime.prefix_cache import POSITIONS
from bedplate.runtime.session import Session
from bedplate.runtime.weights import last_place

VOCABULARY = 320
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 4 for i in range(8)],
    "long_factor": [3.0 + i for i in range(8)],
    "original_max_position_embeddings": 120,
}
# Tied; windows, norms of 1 + w and a scaled embedding; plain, with a head of its own; long texts above 120 tokens.
TOYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", "first", {}),
    "llama": ("llama", "biases, untied", {}),
    "longrope": ("llama", "first", {"rope_parameters": LONGROPE}),
}
CALL, OTHER = [7, 130, 42], [9]  # the invocations
NAMES = [None, "a", "other", "plain"]
TEXT = [int(t) for t in np.random.default_rng(3).integers(50, 120, 400)]  # without invocations
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}


def text(count: int, *calls: int, call: list[int] = CALL) -> list[int]:
    """So many tokens, with the invocation at these places."""
    found = list(TEXT[:count])
    for at in calls:
        found[at : at + len(call)] = call
    return found


# Absent, once, at the beginning, at the end, twice, of which the last counts, where blocks and steps end, cut short.
TEXTS = {
    "absent": text(150),
    "once": text(150, 40),
    "at the beginning": text(150, 0),
    "at the end": text(150, 147),
    "twice": text(150, 20, 100),
    "across blocks": text(150, 62),
    "at a block": text(150, 5, 64),
    "across steps": text(300, 254),
    "cut off": [*text(100, 30), *CALL[:2]],
    "nothing else": list(CALL),
    "a part of it": [*TEXT[:60], *CALL[:2], 51, 130, 42],
}


class Toy:
    def __init__(self, folder: Path, name: str) -> None:
        family, variant, more = TOYS[name]
        self.folder, self.model = folder, folder / "model"
        save_toy(
            self.model, make_toy(family, variant, vocab_size=VOCABULARY, max_position_embeddings=512, **more)
        )
        save_toy_tokenizer(self.model, VOCABULARY)
        targets = [
            "q_proj",
            "v_proj",
            "o_proj",
            "down_proj",
            *([] if family == "gemma3_text" else ["lm_head"]),
        ]
        few = ["q_proj", "k_proj", "up_proj"]
        self.adapters = {
            "a": self.save("a", target_modules=targets, lora_bias=True, alora_invocation_tokens=CALL),
            "other": self.save("other", target_modules=few, alora_invocation_tokens=OTHER),
        }
        self.adapters["plain"] = self.edited("a", "plain", alora_invocation_tokens=None)
        self.exact, self.eight = (
            bedplate.build(self.model, folder / f"{name}.bundle", programs=False, quantize=name)
            for name in ("none", "8da8w")
        )
        self.exact.add_all(self.adapters, quantize="none", programs=False)
        self.eight.add_all(self.adapters, quantize="8w", programs=False)
        self.base = theirs_of(self.model)

    def save(self, name: str, **fields: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return save_trained(self.folder / name, self.model, LoraConfig(**{**FIELDS, **fields}))

    def edited(self, origin: str, name: str, **fields: Any) -> Path:
        """The same tensors with another config."""
        folder = Path(shutil.copytree(self.adapters[origin], self.folder / name))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        return folder

    def peft(self, name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(theirs_of(self.model), self.adapters[name]).eval()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Toy]:
    return {name: Toy(tmp_path_factory.mktemp(name), name) for name in TOYS}


@pytest.fixture(scope="module")
def toy(toys: dict[str, Toy]) -> Toy:
    return toys["llama"]


@pytest.fixture(scope="module")
def without(toy: Toy) -> Iterator[Engine]:
    """Its sessions compute everything themselves."""
    with Engine(toy.eight, cache_bytes=0) as engine:
        yield engine


@pytest.fixture
def engine(toy: Toy) -> Iterator[Engine]:
    with Engine(toy.eight) as engine:
        yield engine


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return found


def tokens(session: Session, prompt: list[int], count: int = 12, **options: Any) -> list[int]:
    """What is generated after a prompt."""
    events = session.events(prompt, max_tokens=count, ignore_eos=True, **options)
    return [token for event in events for token in event.tokens]


def reused(session: Session) -> int:
    assert session.last is not None
    return session.last.reused_tokens


class TestAsPeft:
    @pytest.mark.parametrize("name", TOYS)
    def test_logits_at_every_position(self, toys: dict[str, Toy], name: str) -> None:
        toy, model = toys[name], toys[name].peft("a")
        with Engine(toy.exact, kv="float32") as exact, Engine(toy.eight, kv="float32") as eight:
            for ids in TEXTS.values():
                expected, base = logits(model, ids), logits(toy.base, ids)
                start = last_place(tuple(CALL), ids)
                np.testing.assert_allclose(exact.session("a").logits(ids), expected, rtol=0, atol=2e-4)
                found = eight.session("a").logits(ids)
                assert rms(found - expected) < 0.1 * rms(expected)
                if start is None:
                    np.testing.assert_array_equal(expected, base)
                else:
                    assert rms(expected[start:] - base[start:]) > 0.05

    @pytest.mark.parametrize("name", TOYS)
    def test_what_is_generated(self, toys: dict[str, Toy], name: str) -> None:
        toy, answers = toys[name], set()
        with Engine(toy.exact, kv="float32") as engine:
            for adapter in ("a", "other"):
                model = toy.peft(adapter)
                for ids in (text(100), text(100, 90), text(70, 3, 66), [*text(90, 20), *OTHER, 55]):
                    found = tokens(engine.session(adapter), ids, repetition_penalty=1.5)
                    assert found == generated(model, ids, 12, repetition_penalty=1.5)
                    answers.add(tuple(found))
        assert len(answers) >= 6

    def test_what_is_generated_does_not_turn_it_on_again(self, toys: dict[str, Toy], tmp_path: Path) -> None:
        """The invocation counts that the prompt has, wherever else it is generated."""
        toy = toys["gemma3"]
        bundle = Bundle.open(shutil.copytree(toy.exact.path, tmp_path / "bundle"))
        with Engine(bundle, kv="float32") as engine:
            often = {token for name in NAMES for token in tokens(engine.session(name), text(60, 20), 30)}
        met = 0
        for token in sorted(often):
            toy.adapters["one"] = toy.edited("a", f"one{token}", alora_invocation_tokens=[token])
            bundle.add(toy.adapters["one"], name="one", quantize="none", programs=False)
            prompt = text(60, 20, call=[token])
            with Engine(bundle, kv="float32") as engine:
                session = engine.session("one")
                found = tokens(session, prompt, 30)
                if token in found[:-2] and set(found) != {token}:
                    assert found == generated(toy.peft("one"), prompt, 30)
                    # A step is of the whole text, in which it stands later.
                    last = session.step([51])
                    expected = logits(toy.peft("one"), list(session.tokens))[-1]
                    np.testing.assert_allclose(last, expected, rtol=0, atol=2e-4)
                    met += 1
            bundle.remove("one")
        assert met

    @pytest.mark.parametrize("scale", [0.6, -1.3, 0.0])
    def test_a_scale(self, toy: Toy, scale: float) -> None:
        model = toy.peft("other")
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)
        ids = [*text(100, 20), *OTHER, *TEXT[:30]]
        with Engine(toy.exact, kv="float32") as engine:
            session = engine.session()
            session.use("other", scale=scale)
            np.testing.assert_allclose(session.logits(ids), logits(model, ids), rtol=0, atol=2e-4)
            with pytest.raises(UnsupportedError, match="the adapter has biases"):
                session.use("a", scale=scale)


def generated(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """What PEFT generates."""
    found = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        **options,
    )
    return found[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(x).mean()))


class TestToTheBit:
    @pytest.mark.parametrize("case", TEXTS)
    def test_it_is_the_base_and_then_the_adapter(self, without: Engine, case: str) -> None:
        ids = TEXTS[case]
        start = last_place(tuple(CALL), ids)
        found, base = (without.session(name).logits(ids) for name in ("a", None))
        np.testing.assert_array_equal(found[:start], base[:start])
        if start is not None:
            assert not np.array_equal(found[start], base[start])
        # From the beginning on, it is a LoRA that is always on.
        always = without.session("a").logits([*CALL, *TEXT[:80]])
        np.testing.assert_array_equal(always, without.session("plain").logits([*CALL, *TEXT[:80]]))

    @pytest.mark.parametrize("case", TEXTS)
    def test_in_any_pieces(self, engine: Engine, without: Engine, case: str) -> None:
        """In steps, where an invocation may turn up later; forked, found in the cache, beside others."""
        ids = TEXTS[case]
        cold = without.session("a")
        expected = cold.step(ids)
        np.testing.assert_array_equal(without.session("a").logits(ids)[-1], expected)
        for at in sorted({1, 41, 63, 64, 65, 101, 128, len(ids) - 1} & set(range(1, len(ids)))):
            for one in (engine, without):
                session = one.session("a")
                session.step(ids[:at])
                fork = session.fork()
                np.testing.assert_array_equal(session.step(ids[at:]), expected)
                np.testing.assert_array_equal(fork.step(ids[at:]), expected)
                assert session.tokens == fork.tokens == tuple(ids)
        slow = without.session("a")
        for token in ids:
            found = slow.step([token])
        np.testing.assert_array_equal(found, expected)
        for name in NAMES:
            others = [engine.session(name), engine.session("a"), engine.session("other")]
            rows = engine.step([(session, ids) for session in others])
            np.testing.assert_array_equal(rows[1], expected)
            np.testing.assert_array_equal(rows[0], without.session(name).step(ids))

    def test_a_later_invocation(self, without: Engine) -> None:
        """What the adapter computed is computed again by the base, up to the last place."""
        session = without.session("a")
        session.step(text(100, 30))
        before = session.tokens
        with pytest.raises(RunError, match="do not fit the context"):
            session.step([*CALL, *TEXT, *TEXT])
        assert session.tokens == before
        np.testing.assert_array_equal(session.step([51]), without.session("a").step([*text(100, 30), 51]))
        whole = [*text(100, 30), 51, *CALL, *TEXT[:70]]
        np.testing.assert_array_equal(session.step(whole[101:]), without.session("a").step(whole))

    def test_a_step_that_fails_leaves_what_computed_the_text(self, toy: Toy) -> None:
        with Engine(toy.eight, cache_bytes=0) as engine:
            session = engine.session("a")
            session.step(text(60, 30))
            state = session._held.state
            session._held.extend(session._held.weights_for(engine.load("a"), CALL), CALL, 63)
            assert session._held.of_base == 30
            session._held.restore(state)
            expected = engine.session("a").step([*text(60, 30), 60])
            np.testing.assert_array_equal(session.step([60]), expected)


class TestAConversation:
    def test_with_the_base_is_not_computed_again(self, engine: Engine, without: Engine) -> None:
        session = engine.session()
        said = text(200)
        said += tokens(session, said, 11)
        held = len(session.tokens)
        question = [*said, 60, 61, *CALL, 62]
        expected = tokens(without.session("a"), question)
        other = engine.session("a")
        assert tokens(other, question) == expected
        assert reused(other) == held // POSITIONS * POSITIONS == 192
        session.use("a")
        assert (session.adapter, len(session.tokens)) == ("a", held)
        assert tokens(session, question) == expected
        assert reused(session) == held
        # A second call: up to the first one, all is the base's.
        more = [*said, 60, 61, *CALL, 62, *expected, *TEXT[:30], *CALL]
        assert tokens(session, more) == tokens(without.session("a"), more)
        assert reused(session) == len(said) + 2
        # It was the base that computed this up to the last call, and the base can go on with it.
        back = engine.session()
        assert tokens(back, more) == tokens(without.session(), more)
        assert reused(back) == (len(more) - 3) // POSITIONS * POSITIONS
        # So can another activated LoRA.
        third = engine.session("other")
        assert tokens(third, [*more, *OTHER]) == tokens(without.session("other"), [*more, *OTHER])
        assert reused(third) == len(more) // POSITIONS * POSITIONS

    def test_without_an_invocation_is_the_bases(self, engine: Engine, without: Engine) -> None:
        first, second = engine.session("a"), engine.session()
        assert (
            tokens(first, TEXT[:150]) == tokens(second, TEXT[:150]) == tokens(without.session(), TEXT[:150])
        )
        assert (reused(first), reused(second)) == (0, 128)

    def test_changes_hands(self, without: Engine) -> None:
        session = without.session()
        session.step(TEXT[:100])
        ids = TEXT[:100]
        for name in ("a", "other", None):
            session.use(name)
            assert session.tokens == tuple(ids)
            ids.append(60)
            np.testing.assert_array_equal(session.step([60]), without.session().step(ids))
        session.use("a")
        session.step([*CALL, 60])
        session.use(None)
        assert session.tokens == tuple(ids)  # the adapter computed the rest
        session.use("plain")
        assert session.tokens == ()
        np.testing.assert_array_equal(session.step(ids), without.session("plain").step(ids))
        session.use("a")
        assert session.tokens == ()

    def test_a_generation_ends_when_hands_change(self, without: Engine) -> None:
        session = without.session()
        events = session.events(TEXT[:100], max_tokens=50, ignore_eos=True)
        session.use("a")
        assert [event.finish_reason for event in events][-1] == "cancelled"

    def test_in_turns(self, toy: Toy, engine: Engine, without: Engine) -> None:
        """A/B/A/B over one prompt, in one session and in several."""
        prompt = [*text(140, 100), *OTHER, 60]
        ways = [*((name, 1.0) for name in NAMES), ("other", 0.5), ("other", -1.0)]

        def used(session: Session, name: str | None, scale: float) -> Session:
            session.use(name, scale=scale)
            return session

        expected = {way: tokens(used(without.session(), *way), prompt) for way in ways}
        assert len(set(map(tuple, expected.values()))) >= 4
        first = {
            None: 0,
            "a": 100 // POSITIONS * POSITIONS,
            "other": 140 // POSITIONS * POSITIONS,
            "plain": 0,
        }
        one = engine.session()
        for turn, way in itertools.product(range(3), ways):
            assert tokens(used(one, *way), prompt) == expected[way]
            other = used(engine.session(), *way)
            assert tokens(other, prompt) == expected[way]
            assert reused(other) == 128
            assert turn or reused(one) >= first[way[0]]

    def test_of_another_salt_meets_nothing(self, engine: Engine) -> None:
        tokens(engine.session(), TEXT[:150])
        for salt, known in (("", 128), ("b", 0), ("", 128)):
            session = engine.session("a", cache_salt=salt)
            tokens(session, text(150, 140), 1)
            assert reused(session) == known

    def test_an_invocation_at_another_place_meets_only_what_is_before(self, engine: Engine) -> None:
        """The tokens may be the same, and the adapter."""
        prompt = text(200, 10, 100)
        session = engine.session("a")
        session.step(prompt)
        other = engine.session("a")
        # A text whose last invocation is the first, and which goes on with what the other one has.
        assert other._held.begin(engine.load("a").turned_on(10), prompt, len(prompt)) == 0
        assert other._held.begin(engine.load("a").turned_on(70), prompt, len(prompt)) == 64
        assert other._held.begin(engine.load("a").turned_on(100), prompt, len(prompt)) == 192


class TestAFile:
    @pytest.mark.parametrize("case", TEXTS)
    def test_goes_on_where_the_session_was(
        self, toy: Toy, without: Engine, tmp_path: Path, case: str
    ) -> None:
        session = without.session("a")
        session.step(TEXTS[case])
        session.save(tmp_path / "saved")
        expected, held = session.step([60]), tuple(TEXTS[case])
        with Engine(toy.eight) as engine:
            for _ in range(2):
                loaded = engine.load_session(tmp_path / "saved")
                assert (loaded.adapter, loaded.tokens) == ("a", held) and loaded.kv_bytes > 0
                np.testing.assert_array_equal(loaded.step([60]), expected)
                np.testing.assert_array_equal(
                    loaded.step([*CALL, 61]), without.session("a").step([*held, 60, *CALL, 61])
                )

    def test_of_a_generation(self, without: Engine, tmp_path: Path) -> None:
        """Where it is on is in the file: the tokens do not tell."""
        session = without.session("other")
        events = session.events(text(100, 70, call=OTHER), max_tokens=8, logit_bias={OTHER[0]: 100.0})
        assert list(events) and session.tokens[100:] == (*OTHER * 7,)
        held = list(session.tokens)
        session.save(tmp_path / "saved")
        loaded = without.load_session(tmp_path / "saved")
        assert loaded._held.computed_by == session._held.computed_by
        assert loaded._held.of_base == 70
        np.testing.assert_array_equal(loaded.step([60]), without.session("other").step([*held, 60]))

    def test_of_the_base_after_an_activated_lora(self, without: Engine, tmp_path: Path) -> None:
        session = without.session("a")
        session.step(text(100, 70))
        session.use(None)
        session.save(tmp_path / "saved")
        loaded = without.load_session(tmp_path / "saved")
        assert (loaded.adapter, loaded.tokens) == (None, tuple(TEXT[:70])) and loaded.kv_bytes > 0
        np.testing.assert_array_equal(loaded.step([60]), without.session().step([*TEXT[:70], 60]))


class TestInABundle:
    def test_what_it_says(self, toy: Toy) -> None:
        infos = {name: entry.info for name, entry in toy.eight.adapters.items()}
        found = {name: info.invocation for name, info in infos.items()}
        assert found == {"a": tuple(CALL), "other": tuple(OTHER), "plain": None}

    def test_verify_turns_it_on(self, toy: Toy) -> None:
        verdict = verify_bundle(toy.eight, programs=False, threads=1)
        assert verdict.without_effect == []
        assert all(effect.mean_kl > 0.01 for effect in verdict.effects)

    def test_one_that_changes_nothing(self, toy: Toy, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(toy.adapters["other"], tmp_path / "idle"))
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({name: 0 * value if "lora_B" in name else value for name, value in tensors.items()}, file)
        with pytest.raises(AdapterError, match="it changes nothing"):
            toy.exact.add(folder, name="idle", programs=False)

    def test_eval_turns_it_on(self, toy: Toy, tmp_path: Path) -> None:
        prose = tmp_path / "text.txt"
        prose.write_text("the quick brown fox jumps over the lazy dog. " * 60)
        base, *found = bedplate.evaluate(toy.exact, toy.model, prose, kv="float32")
        assert [one.name for one in found] == ["a", "other", "plain"]
        for one in found:
            assert abs(one.mean_kl) < 1e-6 and one.positions > 400
            assert abs(one.float_nll - base.float_nll) > 0.01

    def test_eval_of_a_text_that_holds_nothing_but_invocations(self, toy: Toy, tmp_path: Path) -> None:
        prose = tmp_path / "text.txt"
        prose.write_text("the quick brown fox")
        bundle = Bundle.open(shutil.copytree(toy.exact.path, tmp_path / "bundle"))
        token = Engine(bundle).tokenizer.encode("the quick brown fox")[3]
        folder = tmp_path / "adapter"
        shutil.copytree(toy.adapters["other"], folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "alora_invocation_tokens": [token]})
        )
        bundle.add(folder, name="often", programs=False)
        with pytest.raises(RunError, match="no piece of the text is without the invocation of often"):
            bedplate.evaluate(bundle, toy.model, prose, adapters=["often"])

    def test_speed_is_measured_with_it_on(self, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[list[int]] = []
        monkeypatch.setattr(Session, "step", lambda self, ids: steps.append(list(ids)))
        with Engine(toy.eight) as engine:
            sizes: dict[str, Any] = {
                "prompts": [20],
                "answers": 1,
                "batches": [1],
                "positions": [9],
                "runs": 1,
            }
            assert len(list(measure_speed(engine, adapter="a", **sizes))) == 2
        (prompt,) = steps
        assert prompt[:3] == CALL and CALL[0] not in prompt[3:] and len(prompt) == 20

    @pytest.mark.parametrize("table", ["lm_head", "embed_tokens"])
    def test_a_table_of_its_own(self, toy: Toy, tmp_path: Path, table: str) -> None:
        """PEFT writes the base's own beside a LoRA on the head. If it is another one, it is always on."""
        folder = Path(shutil.copytree(toy.adapters["a"], tmp_path / "other"))
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = (
            f"base_model.model.{'lm_head.base_layer' if table == 'lm_head' else 'model.embed_tokens'}.weight"
        )
        tensors[name] = tensors.get(name, toy.base.get_input_embeddings().weight.detach()) * 1.5
        save_file(tensors, file)
        before = sorted(toy.exact.adapters)
        with pytest.raises(
            UnsupportedError, match=rf"\(aLoRA\) with {table}\.weight of its own is not supported"
        ):
            toy.exact.add(folder, name="b", programs=False)
        assert sorted(toy.exact.adapters) == before

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"invocation": []}, "is not of tokens of the model"),
            ({"invocation": [VOCABULARY]}, "is not of tokens of the model"),
            ({"invocation": [-1]}, "is not of tokens of the model"),
            ({"invocation": [3], "layers": [0, 1, 2]}, "other tokens or layers than the base"),
            ({"invocation": [3], "vocab": VOCABULARY + 1}, "other tokens or layers than the base"),
        ],
        ids=str,
    )
    def test_a_forged_one(self, toy: Toy, tmp_path: Path, fields: dict[str, Any], says: str) -> None:
        bundle = Bundle.open(shutil.copytree(toy.exact.path, tmp_path / "bundle"))
        a, b = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
        path = "layers.0.self_attn.q_proj"
        tensors = {f"{path}.lora_a.weight": a, f"{path}.lora_b.weight": b}
        forge_adapter(bundle, "forged", tensors, **{"vocab": VOCABULARY, **fields})
        with Engine(bundle) as engine, pytest.raises(BundleError, match=says):
            engine.session("forged").step([5])


OPERATIONS = ("step", "step", "step", "generate", "again", "fork", "use", "reset", "save")


@pytest.mark.parametrize("seed", range(6))
def test_any_operations(toy: Toy, without: Engine, tmp_path: Path, seed: int) -> None:
    """Each answer is as of a session that computes its whole text at once."""
    draw = random.Random(seed)
    with Engine(toy.eight, threads=2, cache_bytes=[1 << 30, 300_000][seed % 2]) as engine:
        sessions = [engine.session(), engine.session("a")]
        for number in range(40):
            at = draw.randrange(len(sessions))
            session, operation = sessions[at], draw.choice(OPERATIONS)
            cold = without.session()
            cold.use(session.adapter, scale=session.scale)
            held = list(session.tokens)
            if operation == "step":
                first = len(held)
                ids = draw.choice(
                    [TEXT[first : first + 70], TEXT[first : first + 9], CALL, OTHER, [*CALL, 60]]
                )
                if not ids or first > 400:
                    session.reset()
                    continue
                np.testing.assert_array_equal(session.step(ids), cold.step([*held, *ids]))
                assert list(session.tokens) == [*held, *ids]
            elif operation in ("generate", "again"):
                prompt = [*(held if operation == "again" else []), *draw.choice(list(TEXTS.values()))][:420]
                hot = {"max_tokens": 8, "temperature": 30.0, "seed": number, "ignore_eos": True}
                found, expected = (
                    [token for event in one.events(prompt, **hot) for token in event.tokens]
                    for one in (session, cold)
                )
                assert found == expected and session.tokens == cold.tokens
            elif operation == "fork" and len(sessions) < 5:
                sessions.append(session.fork())
            elif operation == "use":
                name = draw.choice(NAMES)
                session.use(name, scale=draw.choice([1.0, 0.5]) if name == "other" else 1.0)
            elif operation == "reset":
                session.reset()
            elif operation == "save":
                session.save(tmp_path / "saved")
                sessions[at] = engine.load_session(tmp_path / "saved")
                assert list(sessions[at].tokens) == held
