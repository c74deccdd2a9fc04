"""Adapters that PEFT saved, to be put into the forms of other tools."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from peft_oracle import Oracle
from toy import ALL_LINEARS
from transformers import LlamaConfig


@pytest.fixture(scope="session")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


@pytest.fixture(scope="session")
def config(oracle: Oracle) -> LlamaConfig:
    return oracle.model.config  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def peft(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All linears, rank 4, and a factor that is neither 1 nor what a default would give."""
    folder = tmp_path_factory.mktemp("formats") / "peft"
    return oracle.save(folder, LoraConfig(r=4, lora_alpha=6, target_modules=ALL_LINEARS))


@pytest.fixture(scope="session")
def peft_q(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 3 on the last two layers' q and k: what is permuted, and is not everywhere."""
    folder = tmp_path_factory.mktemp("formats") / "q"
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj"], layers_to_transform=[1, 2])
    return oracle.save(folder, lora)
