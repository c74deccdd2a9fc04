"""What quantization costs: compares the programs of a bundle with the float model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bedplate.assemble.report import Reporter, load_torch
from bedplate.bundle.manifest import ConstantInfo
from bedplate.bundle.ptd import read_ptd
from bedplate.bundle.store import AdapterEntry, Bundle
from bedplate.errors import CheckpointError, NotFoundError, RunError
from bedplate.model.spec import linear_shapes
from bedplate.quantize.joined import parts_of
from bedplate.runtime.effect import log_softmax
from bedplate.runtime.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.model.checkpoint import Checkpoint

SEQUENCE = 512  # tokens that are a text of their own, so that all is read with about as much context


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result for one program (`base`, or the name of an adapter) over the positions of a text.

    nll, float_nll: negative log-likelihood of the next token, nats, of the program and of the float model.
    mean_kl: KL divergence of the program's next-token distribution from the float model's, nats.
    top1: share of positions whose most likely token is that of the float model.
    """

    name: str
    positions: int
    nll: float
    float_nll: float
    mean_kl: float
    top1: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def float_perplexity(self) -> float:
        return math.exp(self.float_nll)


def evaluate_bundle(
    bundle: Bundle,
    model: Path,
    text_file: Path,
    *,
    adapters: Sequence[str] | None,
    threads: int | None,
    reporter: Reporter,
) -> list[Evaluation]:
    """Compare the base and the named adapters (None: all) with the float model.

    The float model gets each adapter as the bundle stores it.

    NotFoundError: there is no such file or adapter.  CheckpointError: the bundle was not built from this model.
    RunError: the text is empty or not UTF-8.
    """
    names = list(bundle.adapters) if adapters is None else list(adapters)
    with Engine(bundle, threads=threads) as engine:
        for name in names:
            engine.check_adapter(name)
        tokens = engine.tokenizer.encode(_read(text_file))
        if len(tokens) < 2:
            raise RunError("holds no text", where=text_file, hint="give some thousand words of prose")
        load_torch(reporter)
        from bedplate.model.checkpoint import fingerprint, open_checkpoint

        checkpoint = open_checkpoint(model)
        if fingerprint(checkpoint) != bundle.manifest.model["fingerprint"]:
            raise CheckpointError(
                f"is not what {bundle.path} was built from",
                where=model,
                hint="give the model that you gave to build",
            )
        return [_evaluate(engine, checkpoint, name, tokens, reporter) for name in (None, *names)]


def _evaluate(
    engine: Engine, checkpoint: Checkpoint, name: str | None, tokens: list[int], reporter: Reporter
) -> Evaluation:
    from bedplate.model.reference import head_weight, hidden_states, logits, sequences

    label = name or "base"
    length = min(SEQUENCE, engine.limits(name).max_context)
    # A last piece of one token has no next token to be asked for.
    texts = [text for text in sequences(tokens, length) if len(text) > 1]
    entry = None if name is None else engine.bundle.adapters[name]
    hidden = hidden_states(
        checkpoint,
        texts,
        updates=(lambda path: None) if entry is None else _updates(entry, linear_shapes(checkpoint.spec)),
        progress=partial(reporter.progress, f"{label}: float model"),
    )
    head, sums, session = head_weight(checkpoint), _Sums(), engine.session(name)
    for done, (text, states) in enumerate(zip(texts, hidden, strict=True)):
        reporter.progress(f"{label}: program", done, len(texts))
        ours = session.logits(text)
        at = 0
        for block in logits(states, head):
            rows = block.numpy()
            sums.add(rows, ours[at : at + len(rows)], text[at + 1 : at + 1 + len(rows)])
            at += len(rows)
    reporter.progress(f"{label}: program", len(texts), len(texts))
    return sums.result(label)


@dataclass(kw_only=True)
class _Sums:
    positions: int = 0
    predicted: int = 0
    nll: float = 0.0
    float_nll: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, theirs: NDArray[np.float32], ours: NDArray[np.float32], following: Sequence[int]) -> None:
        """Logits [rows, vocab] of both, and the tokens that do follow (one fewer at the end of a text)."""
        log_p, log_q = log_softmax(theirs), log_softmax(ours)
        self.positions += len(theirs)
        self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        self.same += int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
        rows = np.arange(len(following))
        self.predicted += len(following)
        self.float_nll -= float(log_p[rows, following].sum())
        self.nll -= float(log_q[rows, following].sum())

    def result(self, name: str) -> Evaluation:
        return Evaluation(
            name=name,
            positions=self.positions,
            nll=self.nll / self.predicted,
            float_nll=self.float_nll / self.predicted,
            mean_kl=self.kl / self.positions,
            top1=self.same / self.positions,
        )


def _updates(entry: AdapterEntry, shapes: Mapping[str, tuple[int, int]]) -> Callable[[str], Tensor | None]:
    """Module path → B A of the adapter's branch there, float32 [out, in], as it is stored; None: it has none.

    shapes: of the linears of a layer, by their names in it.
    """
    import torch

    infos: dict[str, list[ConstantInfo]] = {}
    for info in entry.info.constants:
        infos.setdefault(info.name.partition("#")[0], []).append(info)
    holder = {part: name for name in infos for part in parts_of(name)}
    data = read_ptd(entry.weights)

    def matrix(name: str) -> NDArray[np.float32]:
        parts = [data.data(info.key).view(info.dtype).reshape(info.shape) for info in infos[name]]
        # Of float32, or codes and the scales of their rows.
        return reduce(np.multiply, (part.astype(np.float32) for part in parts))

    def update(path: str) -> Tensor | None:
        a, b = (holder.get(f"{path}.{half}.weight") for half in ("lora_a", "lora_b"))
        if a is None or b is None:
            return None
        # Joined matrices are multiplied as they are: the linears' updates lie one below the other.
        together = [part.removesuffix(".lora_b.weight") for part in parts_of(b)]
        rows = [shapes[linear.split(".", 2)[2]][0] for linear in together]
        start = sum(rows[: together.index(path)])
        return torch.from_numpy((matrix(b) @ matrix(a))[start : start + rows[together.index(path)]])

    return update


def _read(path: Path) -> str:
    hint = "give a text file in UTF-8"
    if not path.is_file():
        raise NotFoundError("no such file", where=path, hint=hint)
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        raise RunError(f"is not text in UTF-8 (byte {error.start})", where=path, hint=hint) from None
