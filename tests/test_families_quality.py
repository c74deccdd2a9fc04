"""Calibration, recovery, chosen bits and `evaluate` of every family, beside transformers and PEFT on the same text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from eager import eager_logits
from families import make_toy, quiet, save_toy
from peft import LoraConfig, get_peft_model
from recorder import Recorder
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from toy import save_toy_tokenizer, save_with_random_b

import bedplate
from bedplate.model.checkpoint import Checkpoint, open_checkpoint
from bedplate.model.families import FAMILIES
from bedplate.model.load import float_decoder
from bedplate.model.stored import stored_linears
from bedplate.quantize.calibration import input_statistics
from bedplate.quantize.choice import Choice, choose_bits
from bedplate.quantize.eager import quantize_decoder
from bedplate.quantize.recipe import Goal, make_recipe

pytestmark = pytest.mark.slow

PROSE = (Path(__file__).parent / "data" / "prose.txt").read_text("utf-8")[:200]
VOCABULARY, POSITIONS, BOS = 320, 64, 0
OPTIONS: dict[str, Any] = {"recovery_rank": 4, "embedding": "float"}


class Toy:
    """A random model of a family, with a tokenizer that begins each text."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.prose = folder / "model", folder / "prose.txt"
        sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "shared_intermediate_size": 64}
        self.model = save_toy(self.folder, make_toy(family, **sizes))  # of transformers
        self.prose.write_text(PROSE)
        save_toy_tokenizer(self.folder, VOCABULARY)
        file = str(self.folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        ids, bos = tokenizer.encode(PROSE).ids, tokenizer.id_to_token(BOS)
        start = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
        tokenizer.post_processor = start
        tokenizer.save(file)
        step = POSITIONS - 1
        self.texts = [[BOS, *ids[at : at + step]] for at in range(0, len(ids), step)]
        self.expected = logits(self.model, self.texts)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        return input_statistics(self.checkpoint, self.texts, lambda done, total: None)

    @cached_property
    def four(self) -> Choice:
        """All in 4 bits, because every KL is enough."""
        recipe, goal = make_recipe("8da4w", **OPTIONS), Goal(target_kl=1e9)
        return choose_bits(
            self.checkpoint, recipe, goal, self.texts, self.statistics, lambda stage, done, total: None
        )


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bundle of chosen bits, with recovery. told: what `build` printed."""

    bundle: bedplate.Bundle
    target: float
    told: list[str]


@pytest.fixture(scope="module", params=FAMILIES)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def built(toy: Toy) -> Built:
    assert toy.four.mean_kl is not None
    recorder, target = Recorder(), 0.6 * toy.four.mean_kl
    bundle = bedplate.build(
        toy.folder,
        toy.folder.parent / "toy.bundle",
        programs=False,
        calibration=toy.prose,
        target_kl=target,
        reporter=recorder,
        **OPTIONS,
    )
    return Built(bundle=bundle, target=target, told=recorder.notices)


@torch.no_grad()
def logits(model: Any, texts: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([text])).logits[0].double() for text in texts]


def mean_kl(theirs: list[Tensor], ours: list[Tensor]) -> float:
    log_p, log_q = (torch.cat(some).double().log_softmax(-1) for some in (theirs, ours))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# What reads the input of a correction's place, by the names that modules have in transformers.
READERS = {
    "self_attn.input_correction": ("q_proj", "qkv_proj"),
    "self_attn.output_correction": ("o_proj",),
    "mlp.input_correction": ("up_proj", "gate_up_proj", "input_linear"),
    "mlp.output_correction": ("down_proj", "output_linear"),
}


def test_calibration_sees_what_the_linears_of_transformers_read(toy: Toy) -> None:
    squares: dict[str, list[Tensor]] = {}
    with reading(toy.model, squares):
        logits(toy.model, toy.texts)
    assert toy.statistics.keys() == squares.keys()
    assert len(squares) == 4 * toy.checkpoint.spec.n_layers
    for path, of_path in squares.items():
        expected = torch.cat(of_path).mean(0).sqrt().float()
        torch.testing.assert_close(
            toy.statistics[path], expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )


@contextmanager
def reading(model: nn.Module, squares: dict[str, list[Tensor]]) -> Iterator[None]:
    """Put the squares of what each linear reads into `squares`, [S, columns] of each text, by a correction's path."""
    handles = []
    for name, module in model.named_modules():
        places = [place for place, readers in READERS.items() if name.endswith(readers)]
        for place in places if isinstance(module, nn.Linear) else []:
            path = f"layers.{name.split('.')[2]}.{place}"

            def note(_: nn.Module, inputs: tuple[Tensor], path: str = path) -> None:
                squares.setdefault(path, []).append(inputs[0][0].double().square())

            handles.append(module.register_forward_pre_hook(note))
    yield
    for handle in handles:
        handle.remove()


def test_the_measure_of_a_choice_is_the_quantized_model_beside_transformers(toy: Toy) -> None:
    recipe, spec = toy.four.recipe, toy.checkpoint.spec
    decoder = float_decoder(toy.checkpoint, max_context=POSITIONS, corrections=recipe.corrections(spec))
    quantize_decoder(decoder, recipe, toy.statistics)
    eager = mean_kl(toy.expected, [eager_logits(decoder, text) for text in toy.texts])
    # Both round activations to 8 bits; one that lies between two codes may fall on either side.
    assert toy.four.mean_kl == pytest.approx(eager, rel=0.1)


def test_bits_are_chosen(toy: Toy, built: Built) -> None:
    pattern = r"8 bits: (.+); (\d+\.\d+) bytes a weight, mean KL (\d+\.\d+) on the calibration text"
    (found,) = (match for text in built.told if (match := re.match(pattern, text)))
    assert found[1] != "none" and float(found[3]) < built.target + 1e-4
    of_linears = [one for one in built.bundle.foundation_info.constants if is_of_linear(one.name)]
    weights = sum(
        module.weight.numel()
        for name, module in toy.model.named_modules()
        if isinstance(module, nn.Linear) and (".layers." in name or name == "lm_head")
    )
    nbytes = sum(one.nbytes for one in of_linears)
    assert float(found[2]) == pytest.approx(nbytes / weights, abs=6e-4)


def is_of_linear(constant: str) -> bool:
    is_weight = not constant.endswith((".bias", ".row_norms"))
    return is_weight and ("_proj" in constant or "correction" in constant or constant.startswith("lm_head"))


def test_evaluation_is_what_transformers_and_peft_measure(toy: Toy, built: Built, tmp_path: Path) -> None:
    linears = [name.rpartition(".")[2] for name in stored_linears(toy.checkpoint.spec)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    adapted = quiet(lambda: get_peft_model(toy.model, config).eval())
    adapter = save_with_random_b(tmp_path / "adapter", adapted, spread=0.3)
    expected = {None: toy.expected, "a": logits(adapted, toy.texts)}
    toy.model = adapted.unload()
    built.bundle.add(adapter, name="a", quantize="none", programs=False)
    found = bedplate.evaluate(built.bundle, toy.folder, toy.prose, kv="float32")
    with bedplate.Engine(built.bundle, kv="float32") as engine:
        for one, (name, theirs) in zip(found, expected.items(), strict=True):
            session = engine.session(name)
            ours = [torch.from_numpy(session.logits(text)) for text in toy.texts]
            assert one.name == (name or "base") and one.positions == sum(map(len, toy.texts))
            assert one.float_nll == pytest.approx(nll(theirs, toy.texts), abs=1e-4)
            assert one.nll == pytest.approx(nll(ours, toy.texts), abs=1e-6)
            assert one.mean_kl == pytest.approx(mean_kl(theirs, ours), rel=1e-3, abs=1e-6)
            same = torch.cat(theirs).argmax(-1) == torch.cat(ours).argmax(-1)
            assert one.top1 == pytest.approx(float(same.double().mean()), abs=0.01)
    # bedplate's own runtime rounds groups of activations, not rows: it is as near as was measured, or nearer.
    assert 0.1 * built.target < found[0].mean_kl < 1.3 * built.target
    assert found[0].top1 > 0.4 and found[1].mean_kl > 0


def nll(some: list[Tensor], texts: list[list[int]]) -> float:
    rows = torch.cat([x[:-1].double().log_softmax(-1) for x in some])
    following = torch.tensor([token for text in texts for token in text[1:]])
    return float(-rows[torch.arange(len(rows)), following].mean())
