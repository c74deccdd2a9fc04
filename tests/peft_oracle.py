"""What PEFT computes from an adapter's folder, and what bedplate's reading of it amounts to."""

from __future__ import annotations

import copy
import shutil
import warnings
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

import bedplate
from bedplate.model.adapter import Adapter, read_adapter
from bedplate.model.checkpoint import open_checkpoint

TOKENS = torch.tensor([[5, 17, 300, 42, 42, 7, 111, 9, 260, 31, 8, 64]])
# Adapters of these tests move the logits by far more.
TOLERANCE = 1e-3


class Oracle:
    """The float32 toy in a folder, with and without adapters."""

    def __init__(self, model: Path) -> None:
        self._folder, self._work = model, Path(mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._work)
        self.spec = open_checkpoint(model).spec
        self.model = LlamaForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.base = self._logits(self.model)

    def save(self, folder: Path, config: LoraConfig) -> Path:
        """An adapter as PEFT saves it, with random numbers in what would start at zero."""
        torch.manual_seed(len(str(folder)))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(self.model), config)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.1)
            model.save_pretrained(folder)
        return folder

    def peft(self, folder: Path) -> Tensor:
        """Logits float32 [T, vocab] of PEFT's own reading. Raises whatever PEFT raises."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
            return self._logits(model)

    def sum_of(self, folders: Mapping[str, Path], weights: Mapping[str, float]) -> Tensor:
        """Logits float32 [T, vocab] of PEFT's weighted sum of adapters, by concatenated ranks."""
        first, *others = folders
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(self.model), folders[first], adapter_name=first)
            for name in others:
                model.load_adapter(folders[name], adapter_name=name)
            ordered = [weights[name] for name in folders]
            model.add_weighted_adapter(list(folders), ordered, "sum", combination_type="cat")
            model.set_adapter("sum")
            return self._logits(model.eval())

    def merged_sum(self, folders: Mapping[str, Path], weights: Mapping[str, float]) -> Tensor:
        """The same of a float bundle's `merge`."""
        added = []
        try:
            for name, folder in folders.items():
                self._bundle.add(folder, name=name, programs=False, allow_noop=True)
                added.append(name)
            self._bundle.merge(weights, name="sum", programs=False, allow_noop=True)
            added.append("sum")
            return self._with("sum")
        finally:
            for name in added:
                self._bundle.remove(name)

    def read(self, folder: Path) -> Adapter:
        return read_adapter(folder, self.spec)

    def applied(self, adapter: Adapter) -> Tensor:
        """Logits float32 [T, vocab] of an adapter in a float bundle, whose sessions add branches as PEFT does."""
        self._bundle.add(adapter.path, name="a", programs=False, allow_noop=True)
        try:
            return self._with("a")
        finally:
            self._bundle.remove("a")

    def _with(self, adapter: str) -> Tensor:
        with bedplate.Engine(self._bundle, kv="float32") as engine:
            return torch.from_numpy(engine.session(adapter).logits(TOKENS[0].tolist()))

    @cached_property
    def _bundle(self) -> bedplate.Bundle:
        return bedplate.build(self._folder, self._work / "toy.bundle", quantize="none", programs=False)

    def assert_equal(self, folder: Path, *, has_effect: bool = True) -> Adapter:
        """bedplate reads from `folder` what PEFT computes."""
        adapter = self.read(folder)
        expected = self.peft(folder)
        torch.testing.assert_close(self.applied(adapter), expected, rtol=0, atol=TOLERANCE)
        assert (float((expected - self.base).abs().max()) > 10 * TOLERANCE) == has_effect
        return adapter

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        return model(TOKENS).logits[0]  # type: ignore[no-any-return]
