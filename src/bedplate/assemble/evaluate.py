"""What quantization costs: compares a bundle with the float model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bedplate.assemble.report import Reporter, load_torch
from bedplate.bundle.store import Bundle
from bedplate.bundle.usage import BASE
from bedplate.errors import CheckpointError, NotFoundError, RunError
from bedplate.model.texts import texts_of
from bedplate.oracle import stock_program
from bedplate.runtime.effect import log_softmax
from bedplate.runtime.engine import Engine
from bedplate.runtime.tokenizer import open_backend
from bedplate.runtime.weights import Precision, last_place

if TYPE_CHECKING:
    from bedplate.model.checkpoint import Checkpoint

SEQUENCE = 512  # tokens that are a text of their own, so that all is read with about as much context


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result for `base` or for one adapter, over the positions of a text.

    nll, float_nll: negative log-likelihood of the next token, nats, of the bundle and of the float model.
    mean_kl: KL divergence of the bundle's next-token distribution from the float model's, nats.
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
    programs: bool,
    kv: Precision,
    threads: int | None,
    reporter: Reporter,
) -> list[Evaluation]:
    """Compare the base and the named adapters (None: all) with the float model.

    The float model gets each adapter as the bundle stores it. For an activated LoRA, its invocation stands before each
    piece of the text, so that it is on. Pieces that hold it again are left out.

    programs: if True, run the programs in ExecuTorch's own runtime instead of bedplate's runtime. Its keys
    and values are float32.
    NotFoundError: there is no such file or adapter, or it has no program.  CheckpointError: the bundle was not built
    from this model.  UnsupportedError: the installation lacks a package.
    RunError: the text is empty or not UTF-8.
    """
    names = list(bundle.adapters) if adapters is None else list(adapters)
    with Engine(bundle, threads=threads, kv=kv, cache_bytes=0) as engine:
        for name in (None, *names):
            engine.check_adapter(name)
            if programs:
                bundle.program(name)
        text = _read(text_file)
        tokenizers = {name: open_backend(bundle.tokenizer_of(name)) for name in (None, *names)}
        if not all(texts_of(tokenizer, text, SEQUENCE) for tokenizer in tokenizers.values()):
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
        found = []
        for name in (None, *names):
            length, logits = engine.limits.max_context, engine.session(name).logits
            if programs:
                program = stock_program(bundle, name or BASE)
                length, logits = program.limits.max_context, program.logits
            invocation = () if name is None else bundle.adapters[name].info.invocation or ()
            texts = texts_of(tokenizers[name], text, max(1, min(SEQUENCE, length) - len(invocation)))
            if invocation:
                begun = [[*invocation, *text] for text in texts]
                texts = [text for text in begun if last_place(invocation, text) == 0]
            if not texts:
                raise RunError(
                    f"no piece of the text is without the invocation of {name}",
                    where=text_file,
                    hint="give another text",
                )
            found.append(_evaluate(bundle, checkpoint, name, texts, logits, reporter))
        return found


def _evaluate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    name: str | None,
    texts: Sequence[list[int]],
    ours_of: Callable[[list[int]], NDArray[np.float32]],
    reporter: Reporter,
) -> Evaluation:
    """ours_of: logits float32 [T, vocab] of a text of its own."""
    from bedplate.assemble.adapted import Adapted
    from bedplate.model.reference import head_bias, head_weight, hidden_states, logits

    label = name or "base"
    progress = partial(reporter.progress, f"{label}: float model")
    with ExitStack() as stack:
        model = checkpoint
        if name is not None:
            model = stack.enter_context(Adapted(checkpoint, bundle.adapters[name], bundle.foundation))
        hidden = hidden_states(model, texts, progress=progress)
        head, bias = head_weight(model), head_bias(model)
    sums = _Sums()
    for done, (text, states) in enumerate(zip(texts, hidden, strict=True)):
        reporter.progress(f"{label}: bundle", done, len(texts))
        ours = ours_of(text)
        at = 0
        for block in logits(states, head, model.spec, bias=bias):
            rows = block.numpy()
            sums.add(rows, ours[at : at + len(rows)], text[at + 1 : at + 1 + len(rows)])
            at += len(rows)
    reporter.progress(f"{label}: bundle", len(texts), len(texts))
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


def _read(path: Path) -> str:
    hint = "give a text file in UTF-8"
    if not path.is_file():
        raise NotFoundError("no such file", where=path, hint=hint)
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        raise RunError(f"is not text in UTF-8 (byte {error.start})", where=path, hint=hint) from None
