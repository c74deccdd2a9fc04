"""SmolLM2-135M-Instruct, the example adapters, and bundles of both, once a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from package_model import smollm2_gguf
from shared import Shared
from tokenizers import Tokenizer

import bedplate
from bedplate.model.tokenizer_files import read_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return smollm2_gguf()


@pytest.fixture(scope="session")
def adapters() -> dict[str, Path]:
    return {name: EXAMPLES / "adapters" / name for name in ("extract", "sentiment")}


@pytest.fixture(scope="session")
def quantized_bundle(smollm2: Path, adapters: dict[str, Path], shared: Shared) -> bedplate.Bundle:
    """8da4w with its defaults; the adapters in float32, and `extract` in 8 bits too. Not to be changed."""

    def make(out: Path) -> None:
        bundle = bedplate.build(smollm2, out, unit_cache=shared.units)
        bundle.add_all(adapters, quantize="none", unit_cache=shared.units)
        bundle.add(adapters["extract"], name="extract8", quantize="8w", unit_cache=shared.units)

    return bedplate.Bundle.open(shared.made("smollm2.quantized.bundle", make))


@pytest.fixture(scope="session")
def float_bundle(smollm2: Path, adapters: dict[str, Path], shared: Shared) -> bedplate.Bundle:
    """Unquantized, with both adapters. Not to be changed."""

    def make(out: Path) -> None:
        bundle = bedplate.build(smollm2, out, quantize="none", unit_cache=shared.units)
        bundle.add_all(adapters, quantize="none", unit_cache=shared.units)

    return bedplate.Bundle.open(shared.made("smollm2.float.bundle", make))


@pytest.fixture(scope="session")
def prose(smollm2: Path) -> list[int]:
    """Token ids of some 640 tokens of prose. Of no bundle: who needs them may need another one than is made."""
    text = (Path(__file__).parents[1] / "data" / "prose.txt").read_text("utf-8")
    tokenizer = Tokenizer.from_buffer(read_tokenizer(smollm2).tokenizer_json)
    return tokenizer.encode(text, add_special_tokens=False).ids
