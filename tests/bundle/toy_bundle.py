"""Tiny bundles: real data files, and programs that are nothing but the keys that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from bedplate.bundle.facts import AdapterFacts, BundleFacts
from bedplate.bundle.manifest import AdapterInfo
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle
from bedplate.constants import Constant

MODEL = {
    "architecture": "LlamaForCausalLM",
    "fingerprint": "f" * 64,
    "dim": 8,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 4,
    "hidden_dim": 16,
    "vocab_size": 32,
    "max_context": 64,
}


def constant(name: str, value: int) -> Constant:
    """uint8 [8], all `value`."""
    return Constant.of(name, "uint8", (8,), "test", np.full(8, value, np.uint8))


NORM, Q_PROJ, ZEROS = constant("norm.weight", 1), constant("q_proj.weight", 2), constant("q_proj.bias", 0)
FOUNDATION = (NORM, Q_PROJ, ZEROS)


def program(constants: Iterable[Constant]) -> bytes:
    """Bytes that name keys as a program does: flatbuffer strings among other things."""
    return b"ET12" + b"".join(b"\x40\0\0\0" + c.key.encode() + b"\0\0\0\0" for c in constants)


def write_base(folder: Path) -> BundleFacts:
    infos = write_ptd(folder / "foundation.ptd", FOUNDATION)
    (folder / "base.pte").write_bytes(program(FOUNDATION))
    (folder / "tokenizer.json").write_text("{}\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return BundleFacts(
        model=MODEL,
        recipe={"weights": "8da4w", "group_size": 32},
        bos_id=1,
        eos_ids=(2,),
        special_tokens={"bos_token": "<s>"},
        constants=infos,
    )


def adapter_writer(
    bundle: Bundle,
    name: str,
    value: int,
    own: tuple[Constant, ...] = (),
    foundation: str | None = None,
    special_tokens: dict[str, str] | None = None,
    shared: Sequence[Constant] = FOUNDATION,
) -> Callable[[Path], AdapterFacts]:
    def write(folder: Path) -> AdapterFacts:
        constants = own or (constant("q_proj.lora_a", value), constant("q_proj.lora_b", value + 100))
        infos = write_ptd(folder / "weights.ptd", constants)
        (folder / "program.pte").write_bytes(program((*shared, *constants)))
        info = AdapterInfo(
            name=name,
            foundation=foundation or bundle.foundation_sha256,
            rank=4,
            ranks={"q_proj": 4},
            alpha=8.0,
            dtype="float32",
            layers=None,
            vocab=32,
            invocation=None,
            source="a" * 64,
            constants=infos,
            shared=(),
        )
        return AdapterFacts(info=info, special_tokens=special_tokens)

    return write
