"""How tokens are chosen from logits: the settings, checked, over the native sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime import arguments

# The tokens that were generated so far → packed bits of the tokens that are allowed next. None: all are.
MaskFunction = Callable[[tuple[int, ...]], Any]


@runtime_checkable
class ForcingMask(Protocol):
    """A mask function that knows some tokens before they are chosen. Then one step computes several.

    It changes no text: each token is still chosen under the mask, and what follows another token is dropped.
    """

    def __call__(self, chosen: tuple[int, ...], /) -> Any: ...

    def forced(self, chosen: tuple[int, ...], most: int, /) -> Sequence[int]:
        """Up to `most` tokens that the mask leaves no choice about, next first. Empty: it leaves one."""
        ...


_SEEDS = 2**64


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of a generation are chosen. The settings take effect in this order, as in vLLM and transformers.

    banned_tokens: tokens that are never chosen.  min_tokens: end tokens are not chosen before so many others.
    ignore_eos: an end token is a token like others, which does not end the text.
    logit_bias: what is added to the logits of tokens, by id.
    repetition_penalty: divides the logits above 0 of all tokens of the prompt and the answer, multiplies those below.
    frequency_penalty: subtracted for each time that the answer has the token.  presence_penalty: subtracted once.
    temperature: divides logits. 0: the token with the highest logit is chosen.
    top_k: keeps the k likeliest tokens; 0 keeps all.
    top_p: of those, keeps the fewest that together have this probability.
    min_p: of those, keeps what has at least this part of the probability of the likeliest.
    seed: the token at each place follows from this number and the place. None: a random number.

    Of tokens with equal logits, the one with the lower id comes first.
    RunError: a setting has a wrong type, or is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        hint = "give 0 for the most likely token, or a larger number; 0.7 is usual"
        self._check("temperature", hint, lambda value: value >= 0)
        arguments.integer("top_k", self.top_k, least=0)
        hint = "give a number above 0 and at most 1; 1 keeps every token"
        self._check("top_p", hint, lambda value: 0 < value <= 1)
        self._check("min_p", "give a number from 0 to 1; 0 keeps every token", lambda value: 0 <= value <= 1)
        hint = "give a number above 0; 1 changes nothing, 1.1 is usual"
        self._check("repetition_penalty", hint, lambda value: value > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, "give a number from -2 to 2; 0 changes nothing", lambda value: abs(value) <= 2)
        self._check_bias()
        arguments.token_ids(self.banned_tokens, "banned_tokens")
        arguments.integer("min_tokens", self.min_tokens, least=0)
        arguments.flag("ignore_eos", self.ignore_eos)
        if self.seed is not None and arguments.integer("seed", self.seed, least=0) >= _SEEDS:
            raise RunError(f"seed is {self.seed}", hint="give a number below 2^64, or None for a random one")

    def _check(self, name: str, hint: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if not fits(arguments.real(name, value, hint)):
            raise RunError(f"{name} is {value}", hint=hint)

    def _check_bias(self) -> None:
        hint = "give a mapping from token ids to numbers from -100 to 100; banned_tokens are never chosen"
        bias = arguments.instance("logit_bias", self.logit_bias, Mapping, hint)
        for token, more in zip(arguments.token_ids(list(bias), "logit_bias"), bias.values(), strict=True):
            if abs(arguments.real(f"logit_bias[{token}]", more, hint)) > 100:
                raise RunError(f"logit_bias[{token}] is {more}", hint=hint)


class Sampler:
    """Chooses the tokens of one generation. It keeps what was chosen, for the penalties and the random numbers.

    prompt: its tokens.  ends: end tokens.  seed: see Sampling; a random number if that has none.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt: Sequence[int],
        ends: Sequence[int],
        mask: MaskFunction | None = None,
    ) -> None:
        self.seed = int.from_bytes(os.urandom(8)) if sampling.seed is None else int(sampling.seed)
        self._mask = mask
        self._forcing = mask if isinstance(mask, ForcingMask) else None
        self._chosen: list[int] = []
        penalty = float(sampling.repetition_penalty)
        self._native = _native.Sampler(
            temperature=float(sampling.temperature),
            top_k=min(int(sampling.top_k), 2**32),
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            repetition=penalty,
            presence=float(sampling.presence_penalty),
            frequency=float(sampling.frequency_penalty),
            bias=[(int(token), float(more)) for token, more in sampling.logit_bias.items()],
            banned=[int(token) for token in sampling.banned_tokens],
            ends=list(ends),
            min_tokens=min(int(sampling.min_tokens), 2**32),
            seed=self.seed,
            prompt=() if penalty == 1 else prompt,
        )

    def forced(self, most: int) -> list[int]:
        """Up to `most` tokens that the mask will allow alone. RunError: it gives no tokens."""
        if self._forcing is None or most < 1:
            return []
        return arguments.token_ids(self._forcing.forced(tuple(self._chosen), most), "forced tokens")[:most]

    def choose(self, logits: _native.Logits, row: int = 0) -> int:
        """The next token. RunError: the logits are not numbers, no token is allowed, or the mask is not one."""
        mask = None if self._mask is None else _words(self._mask(tuple(self._chosen)))
        try:
            token = self._native.choose(logits, row, mask)
        except _native.NativeError as error:
            raise RunError(str(error), hint="bedplate verify BUNDLE finds damaged files") from error
        except TypeError:
            raise _no_mask(mask) from None
        if token is None:
            raise RunError("no token is allowed", hint="leave one by mask, banned_tokens and min_tokens")
        self._chosen.append(token)
        return token


def _words(mask: Any) -> Any:
    if not isinstance(mask, bytes | bytearray | memoryview):
        return mask
    try:
        return memoryview(mask).cast("B").cast("i")
    except TypeError:
        raise _no_mask(mask) from None


def _no_mask(value: Any) -> RunError:
    hint = "give a row of int32 with a bit for each token (an array, or bytes), or None for all tokens"
    return RunError(f"the mask is {arguments.shown(value)}", hint=hint)
