"""Runs the stock files of a bundle in ExecuTorch's own runtime, as a phone does. This checks what bedplate computes.

It needs the extra `build`: the extension `_oracle` is built only if ExecuTorch is installed, and ExecuTorch's kernels
for attention come with torch. ExecuTorch logs to stderr. A program is code: run only programs that you trust.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bedplate.bundle.fit import program_keys
from bedplate.bundle.ptd import read_ptd
from bedplate.bundle.store import Bundle
from bedplate.bundle.usage import BASE
from bedplate.errors import BundleError, NotFoundError, RunError, UnsupportedError
from bedplate.quiet import import_modules

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bedplate import _oracle

_HINT = "bedplate verify BUNDLE checks every file, and that programs and data files fit each other"
# Loading it registers `llama::update_cache` and `llama::custom_sdpa`, which every program of ours names.
_OPERATORS = "executorch.extension.llm.custom_ops.custom_ops"

# Finite, for kernels that cannot take infinity; its exponential is 0.
_UNSEEN = -1e9


@dataclass(frozen=True, kw_only=True)
class Limits:
    """max_seq_len: how many tokens one call takes.  max_logits_len: how many tokens one call takes if it returns the
    logits of all.  max_context: how many positions a program holds.  vocab: how many token ids it knows.
    """

    max_seq_len: int
    max_logits_len: int
    max_context: int
    vocab: int


class _Program:
    """A `.pte` with its data files, loaded by ExecuTorch. It holds the keys and values of one text.

    weight_cache: weights that several programs of the process use are packed once. They are found by their keys alone,
    so verify a bundle before you load it beside another one. If False, each program packs its own weights.

    UnsupportedError: the installation has no oracle.  NotFoundError: a file is missing.  BundleError: a data file is
    damaged, or two data files hold the same key.  RunError: the program is damaged, or it names a constant that no
    file holds.
    """

    # What tells of the program, and what computes.
    _constants: tuple[str, ...]
    _methods: tuple[str, str]

    def __init__(self, program: Path, data: Sequence[Path] = (), *, weight_cache: bool = True) -> None:
        self.path = program
        self._filled = 0  # positions whose keys and values it holds
        native = _native()
        named, held = _named_keys(program), _held_keys(data)
        with _errors(program):
            self._program: _oracle.Program = native.Program(
                str(program), [str(file) for file in data], weight_cache
            )
            self._check_keys(named - held - set(self._program.keys()), data)
            if missing := {*self._constants, *self._methods} - set(self._program.method_names()):
                raise RunError(f"the program has no method {min(missing)}", where=self.path, hint=_HINT)
            self.limits = self._read_limits()
            for method in self._methods:
                self._program.load(method)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of a text, float32 [T, vocab]. RunError: the program cannot take the text."""
        import numpy as np

        self._check(token_ids, 0)
        chunks = _chunks(token_ids, 0, self.limits.max_logits_len)
        return np.concatenate([self._run(self._methods[1], chunk, at) for chunk, at in chunks])

    def step(self, token_ids: Sequence[int], position: int) -> NDArray[np.float32]:
        """Run tokens after `position` other tokens of the text. Returns the logits of the last one, float32 [vocab].

        Position 0 starts a new text and forgets the old one. RunError: the program cannot take the tokens.
        """
        self._check(token_ids, position)
        for chunk, at in _chunks(token_ids, position, self.limits.max_seq_len):
            rows = self._run(self._method_of(len(chunk)), chunk, at)
        last: NDArray[np.float32] = rows[-1]
        return last

    def _method_of(self, count: int) -> str:
        """The one that gives the logits of the last of so many tokens, if not of all."""
        return self._methods[0]

    def _read_limits(self) -> Limits:
        raise NotImplementedError

    def _run(self, method: str, token_ids: Sequence[int], position: int) -> NDArray[np.float32]:
        """Logits of all these tokens, or of the last one."""
        raise NotImplementedError

    def _check_keys(self, missing: frozenset[str], data: Sequence[Path]) -> None:
        """Checks that every constant is there before XNNPACK packs any. If XNNPACK fails half way, its weight cache
        never frees what the program shares with others.
        """
        if missing:
            what = f"no data file holds {len(missing)} of its constants, for example {min(missing)}"
            hint = f"{_HINT}; the data files were: {', '.join(map(str, data)) or 'none'}"
            raise RunError(what, where=self.path, hint=hint)

    def _check(self, token_ids: Sequence[int], position: int) -> None:
        limits = self.limits
        if not token_ids:
            raise RunError("there are no tokens", where=self.path, hint="give at least one token")
        if not 0 <= position <= limits.max_context - len(token_ids):
            what = f"{len(token_ids)} tokens at position {position} do not fit the context of {limits.max_context}"
            raise RunError(what, where=self.path, hint="give fewer tokens")
        if position > self._filled:
            what = f"the tokens are at position {position}, but only {self._filled} tokens were run before"
            raise RunError(what, where=self.path, hint="run a text from position 0")
        # ExecuTorch would read outside of its table for an unknown token.
        if wrong := [token for token in token_ids if not 0 <= token < limits.vocab]:
            what = f"token {wrong[0]} is not in the vocabulary of {limits.vocab} tokens"
            raise RunError(what, where=self.path, hint="tokenize with the tokenizer of the bundle")


class StockProgram(_Program):
    """A program whose calls take any number of tokens. See _Program."""

    _constants = ("get_max_seq_len", "get_max_logits_len", "get_max_context_len")
    _methods = ("forward", "logits")

    def _read_limits(self) -> Limits:
        chunk, logits, context = (self._program.constant(name) for name in self._constants)
        vocab = self._program.columns("logits")
        return Limits(max_seq_len=chunk, max_logits_len=logits, max_context=context, vocab=vocab)

    def _run(self, method: str, token_ids: Sequence[int], position: int) -> NDArray[np.float32]:
        self._filled = position
        with _errors(self.path):
            logits = self._program.run(method, token_ids, position)
        self._filled += len(token_ids)
        return logits


class StaticProgram(_Program):
    """A program of fixed shapes (docs/static.md). See _Program."""

    _constants = ("get_prefill_len", "get_decode_len", "get_max_context_len", "get_windows")
    _methods = ("prefill", "decode")

    def _method_of(self, count: int) -> str:
        return "decode" if count <= self.limits.max_logits_len else "prefill"

    def _read_limits(self) -> Limits:
        prefill, decode, context = (self._program.constant(name) for name in self._constants[:3])
        windows = [window or None for window in self._program.constants("get_windows")]
        self._host = StaticHost(
            self._program.call,
            lengths={"prefill": prefill, "decode": decode},
            windows=windows,
            caches=self._program.input_shapes("decode")[2 + len(windows) :],
            max_context=context,
        )
        vocab, longest = self._program.columns("decode"), max(prefill, decode)
        return Limits(max_seq_len=longest, max_logits_len=decode, max_context=context, vocab=vocab)

    def _run(self, method: str, token_ids: Sequence[int], position: int) -> NDArray[np.float32]:
        self._filled = position
        with _errors(self.path):
            logits = self._host.run(method, token_ids, position)
        self._filled += len(token_ids)
        return logits


class StaticHost:
    """The host's part of a program of fixed shapes: keys and values of one text, masks, and what fills up a step.

    call: runs a method. lengths: how many tokens its methods take. windows: of its masks. caches: their shapes.
    """

    def __init__(
        self,
        call: Callable[[str, list[NDArray[Any]]], Sequence[NDArray[np.float32]]],
        *,
        lengths: Mapping[str, int],
        windows: Sequence[int | None],
        caches: Sequence[Sequence[int]],
        max_context: int,
    ) -> None:
        import numpy as np

        self._call, self._lengths, self._windows, self._context = call, lengths, windows, max_context
        self._caches = [np.zeros(shape, np.float32) for shape in caches]

    def run(self, method: str, token_ids: Sequence[int], position: int) -> NDArray[np.float32]:
        """Logits of the last of some tokens, [1, vocab] (`prefill`), or of each of them, [T, vocab] (`decode`)."""
        import numpy as np

        count, length = len(token_ids), self._lengths[method]
        # What fills up a step is no text: nobody sees it, and its keys and values are not kept.
        tokens = np.zeros((1, length), np.int64)
        tokens[0, :count] = token_ids
        positions = np.minimum(np.arange(position, position + length), self._context - 1)
        masks = [static_mask(window, position, length, self._context) for window in self._windows]
        row = [np.array([count - 1])] if method == "prefill" else []
        logits, *given = self._call(method, [tokens, positions, *masks, *self._caches, *row])
        for index, (cache, part) in enumerate(zip(self._caches, given, strict=True)):
            if index % 2:
                cache[..., position : position + count, :] = part[..., :count, :]
            else:  # keys stand in columns
                cache[..., position : position + count] = part[..., :count]
        found: NDArray[np.float32] = logits[0, :count]
        return found


def static_mask(window: int | None, position: int, length: int, max_context: int) -> NDArray[np.float32]:
    """What is added to scores, float32 [1, length, max_context + length]: 0 where a query sees a key.

    Keys: the slots of a cache, of which the first `position` are filled; then the tokens of the step.
    """
    import numpy as np

    at = np.arange(position, position + length)
    slots = np.arange(max_context)
    keys = np.concatenate([np.where(slots < position, slots, position + length), at])  # empty: as if to come
    seen = keys <= at[:, None]
    if window is not None:
        seen &= keys > at[:, None] - window
    return np.where(seen, 0, _UNSEEN).astype(np.float32)[None]


def static_program(bundle: Bundle, name: str = BASE, *, weight_cache: bool = True) -> StaticProgram:
    """As `stock_program`, of fixed shapes."""
    program = bundle.program(None if name == BASE else name, static=True)
    return StaticProgram(program, _data(bundle, name), weight_cache=weight_cache)


def stock_program(bundle: Bundle, name: str = BASE, *, weight_cache: bool = True) -> StockProgram:
    """Load the program of the base or of an adapter, with its data files. See StockProgram.

    NotFoundError: there is no such adapter, or it has no program.
    """
    program = bundle.program(None if name == BASE else name)
    return StockProgram(program, _data(bundle, name), weight_cache=weight_cache)


def _data(bundle: Bundle, name: str) -> list[Path]:
    return [bundle.foundation, *([] if name == BASE else [bundle.adapters[name].weights])]


def stock_programs(bundle: Bundle) -> dict[str, StockProgram]:
    """Load all programs of a bundle together: `base`, and each adapter by its name. See StockProgram."""
    return {name: stock_program(bundle, name) for name in (BASE, *bundle.adapters)}


def _native() -> ModuleType:
    try:
        import_modules([_OPERATORS])
        import bedplate._oracle as native
    except ImportError as error:
        raise UnsupportedError(
            f"running stock programs needs ExecuTorch and bedplate's extension for it: {error}",
            hint="pip install 'bedplate[build]', and then bedplate again with --no-build-isolation, so that its "
            "extension finds ExecuTorch",
        ) from error
    return native


def _named_keys(program: Path) -> frozenset[str]:
    with _errors(program):
        return program_keys(program)


def _held_keys(data: Sequence[Path]) -> set[str]:
    holders: dict[str, Path] = {}
    for file in data:
        with _errors(file):
            entries = read_ptd(file).entries
        if shared := entries.keys() & holders.keys():
            what = f"it holds {len(shared)} keys that are also in {holders[min(shared)]}, for example {min(shared)}"
            raise BundleError(what, where=file, hint=_HINT)
        holders |= dict.fromkeys(entries, file)
    return set(holders)


def _chunks(token_ids: Sequence[int], position: int, length: int) -> Iterator[tuple[Sequence[int], int]]:
    for start in range(0, len(token_ids), length):
        yield token_ids[start : start + length], position + start


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    """Turns errors of the system and of ExecuTorch into ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError("no such file", where=file, hint=_HINT) from error
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise RunError(
            what, where=error.filename or file, hint="check that the file exists and that you can read it"
        ) from error
    except RuntimeError as error:  # OracleError
        raise RunError(str(error), where=file, hint=_HINT) from error
