"""One generation: what is to be computed next, how tokens become events, and how it ends.

A generation has no locks and no threads. The scheduler calls it, one thread at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from bedplate.errors import RunError
from bedplate.runtime.held import Held
from bedplate.runtime.lookup import Lookup
from bedplate.runtime.request import Event, FinishReason, Statistics, TokenLogprobs, Wish
from bedplate.runtime.steps import Part
from bedplate.runtime.text import StopFilter, TextStream

if TYPE_CHECKING:
    from bedplate import _native
    from bedplate.runtime.sampling import Sampler
    from bedplate.runtime.tokenizer import Tokenizer
    from bedplate.runtime.weights import Weights


class Progress(NamedTuple):
    """How much of the prompt has been read, for `on_prefill`."""

    done: int
    total: int


class Request(NamedTuple):
    """What a generation is to do. Weights and tokenizer are of one adapter, as it was when the generation began.

    prompt: its tokens.  room: how many tokens can follow.  lookup: proposes tokens. None: nothing does.
    """

    prompt: list[int]
    weights: Weights
    tokenizer: Tokenizer
    wish: Wish
    sampler: Sampler
    room: int
    lookup: Lookup | None


class Generation:
    """The session's `held` has the beginning of the prompt that was known.

    outbox: what the caller has not taken yet. The last is an event with the finish reason, or an error.
    """

    def __init__(self, request: Request, held: Held, stats: Statistics) -> None:
        self.held, self.stats = held, stats
        self.key, self.deadline = request.wish.key, request.wish.deadline
        self.outbox: deque[Event | Progress | BaseException] = deque()
        self.first_chosen: float | None = None  # the time when
        self.served, self.last_step = 0, 0  # rows of steps, and the last of them
        self.cancelled = False  # it will end, and chooses nothing more
        self._request: Request | None = request  # None: it has ended. So it holds no weights.
        self._todo = request.prompt[stats.reused_tokens :]
        self._drafts: Sequence[int] = ()
        self._guessed = False  # whether lookup proposed them
        self._text = TextStream(request.tokenizer.decode, request.tokenizer.special_ids)
        self._stops = StopFilter(request.wish.stop)
        self._waiting: list[tuple[int, TokenLogprobs | None]] = []  # for their text

    @property
    def ended(self) -> bool:
        return self._request is None

    @property
    def wanted(self) -> int:
        """How many rows of a step it can use."""
        return len(self._todo) + len(self._drafts)

    @property
    def is_reading(self) -> bool:
        """Whether more than one token is to be computed before the next one can be chosen."""
        return len(self._todo) > 1

    @property
    def position(self) -> int:
        """How many tokens it has computed."""
        return len(self.held.tokens)

    @property
    def block(self) -> str | None:
        """The digest of the block of its prompt that it reads. None: no other generation could use it."""
        request = self._request
        if request is None or not self._reads_prompt:
            return None
        return self.held.next_block(request.weights, request.prompt)

    @property
    def _reads_prompt(self) -> bool:
        """Not so while it computes a text again that has become a long one."""
        return self.is_reading and not self.stats.generated_tokens

    def find_more(self) -> None:
        """Have what others have read of its prompt since it began."""
        request = self._request
        if request is None or not self._reads_prompt:
            return
        before, prompt = len(self.held.tokens), request.prompt
        found = self.held.find(request.weights, prompt, len(prompt))
        if found > before:
            self.stats.reused_tokens += found - before
            self._todo = prompt[found:]

    def propose(self, most: int) -> None:
        """Have up to `most` tokens ready that may follow, to be checked in the step that computes the next one.

        Any error of the caller's mask.
        """
        self._drafts, self._guessed = (), False
        request = self._request
        if request is None or self.is_reading:
            return
        wish, length = request.wish, len(self.held.tokens) + 1
        # The last token that is chosen is never computed.
        most = min(most, min(wish.max_tokens, request.room) - self.stats.generated_tokens - 1)
        drafts = request.sampler.forced(most)
        _check_known(drafts, request.weights)
        if not drafts and request.lookup is not None and most > 0:
            drafts, self._guessed = request.lookup.propose(most), True
        if request.weights.is_long(length) == request.weights.is_long(length + len(drafts)):
            self._drafts = drafts

    def part(self, rows: int) -> Part | None:
        """The tokens that the next step computes, at most `rows`. None: it has ended."""
        request = self._request
        if request is None:
            return None
        tokens = [*self._todo, *self._drafts][:rows]
        self._drafts = tokens[len(self._todo) :]
        wanted = len(tokens) - len(self._todo) + 1
        return Part(self.held, request.weights, tokens, max(wanted, 0))

    def sure_of(self, part: Part) -> Part:
        """What it asked for, without tokens that were only proposed."""
        self._drafts = ()
        tokens = part.tokens[: len(self._todo)]
        return part._replace(tokens=tokens, wanted=int(len(tokens) == len(self._todo)))

    def computed(self, part: Part, logits: _native.Logits, row: int) -> None:
        """A step computed the part. Its logits are those from row `row` on.

        RunError: no token can be chosen.  Any error of the caller's mask.
        """
        request = self._request
        if request is None or self.cancelled:
            return
        read = part.tokens[: len(self._todo)]
        self._todo = self._todo[len(read) :]
        if self._todo or not self.stats.generated_tokens:
            self.held.append(request.weights, read)
            if request.wish.on_prefill is not None and not self.stats.generated_tokens:
                done = min(len(self.held.tokens), len(request.prompt))
                self.outbox.append(Progress(done, len(request.prompt)))
            read = []
        if not self._todo:
            self._choose(request, logits, row, list(read))

    def _choose(self, request: Request, logits: _native.Logits, row: int, read: list[int]) -> None:
        """Choose tokens as long as they are those that were proposed. read: computed tokens, not yet held."""
        held, drafts, self._drafts = self.held, self._drafts, ()
        right = 0
        while True:
            token = request.sampler.choose(logits, row + right)
            if self.cancelled:  # by the caller's mask
                break
            if self.first_chosen is None:
                self.first_chosen = time.perf_counter()
            logprobs = _logprobs(logits, row + right, token, request.wish.logprobs)
            self._accept(request, token, logprobs)
            if request.lookup is not None:
                request.lookup.append(token)
            if self.ended or right == len(drafts) or token != drafts[right]:
                break
            read.append(token)
            right += 1
        if request.lookup is not None and (self._guessed or not drafts):
            request.lookup.checked(len(drafts), right)
        self.stats.drafted_tokens += len(drafts)
        self.stats.accepted_tokens += right
        if read:
            held.append(request.weights, read)
        if not self.ended and not self.cancelled:
            self._todo = held.extend(request.weights, [token], len(held.tokens) + 1)

    def _accept(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        wish, stats = request.wish, self.stats
        if token in request.tokenizer.end_ids and not wish.sampling.ignore_eos:
            stats.stopped_by, stats.end_logprobs = token, logprobs
            self.end("stop")
            return
        stats.generated_tokens += 1
        self._waiting.append((token, logprobs))
        piece = self._stops.push(self._text.push(token))
        if self._stops.stopped:
            self.end("stop", piece)
            return
        if piece:
            self._tell(request, piece)
        if stats.generated_tokens == min(wish.max_tokens, request.room):
            self.end("length")

    def end(self, reason: FinishReason, piece: str = "") -> None:
        """End with a last event, unless it has ended."""
        request = self._request
        if request is None:
            return
        piece += self._stops.push(self._text.finish()) + self._stops.finish()
        if self._stops.stopped_by is not None:
            self.stats.stopped_by, reason = self._stops.stopped_by, "stop"
        self.stats.finish_reason = reason
        self._tell(request, piece)
        self._let_go()

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it has ended."""
        if self._request is not None:
            self.stats.finish_reason = "cancelled"
            self.outbox.append(error)
            self._let_go()

    def _let_go(self) -> None:
        """Hold neither weights nor keys and values any more, however long the caller keeps its events."""
        self._request = None
        self.held = Held(self.held.salt)

    def _tell(self, request: Request, text: str) -> None:
        logprobs = tuple(said for _, said in self._waiting if said is not None)
        self.outbox.append(
            Event(
                text=text,
                tokens=tuple(token for token, _ in self._waiting),
                logprobs=None if request.wish.logprobs is None else logprobs,
                finish_reason=self.stats.finish_reason,
            )
        )
        self._waiting = []


def _check_known(drafts: Sequence[int], weights: Weights) -> None:
    if drafts and max(drafts) >= weights.vocab:
        hint = f"token ids are 0 … {weights.vocab - 1}"
        raise RunError(f"the mask forces token {max(drafts)}, which is not in the vocabulary", hint=hint)


def _logprobs(logits: _native.Logits, row: int, token: int, top: int | None) -> TokenLogprobs | None:
    if top is None:
        return None
    chosen, likeliest = logits.log_probabilities(row, token, top)
    return TokenLogprobs(token, chosen, tuple(likeliest))


def texts(events: Iterator[Event]) -> Iterator[str]:
    """The texts of events."""
    for event in events:
        if event.text:
            yield event.text
