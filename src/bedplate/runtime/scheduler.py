"""Steps all generations of an engine together.

There is no thread for it: who waits for an event drives. That thread computes steps for all generations until its own
has something to say, while the others wait. So a generation that is alone pays nothing, and none runs for a caller who
does not ask, but for a few events ahead. Tasks of asyncio must not wait: a thread drives for them.

Two locks: `turn` is held while sessions change: for one step of generations, or of a call of `step` or `logits`.
`_state` is held for moments: it guards the list of generations, and what they have to say. Who has it never waits
for `turn`. Python can run a signal's handler, or forget an iterator, in the midst of anything: what then cancels a
generation only leaves a note (`_dropped`) for who has `_state`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime.generation import Generation, Progress
from bedplate.runtime.process import Process
from bedplate.runtime.request import Event
from bedplate.runtime.shares import Shares
from bedplate.runtime.steps import Part, compute, groups, packed

if TYPE_CHECKING:
    import asyncio

AHEAD = 8  # events that a generation may be ahead of its caller
_DRAFT_ROWS = 32  # a step of more rows has none for tokens that may be wrong
_PATIENCE = 0.2  # seconds after which the thread for tasks looks whether the interpreter ends

Reserve = Callable[[Sequence[tuple[_native.Kv, int, int]]], None]


class Scheduler:
    """most: rows of a step.  reserve: takes memory for positions of keys and values. RunError: there is none."""

    def __init__(self, most: int, reserve: Reserve) -> None:
        self._most, self._reserve = most, reserve
        self.process = Process()
        self._state = threading.RLock()
        self._active: list[Generation] = []
        self._dropped: deque[Generation] = deque()  # to be cancelled
        self._shares = Shares()
        self.steps, self.rows = 0, 0  # that have been computed for generations
        self._wakes: dict[Generation, Callable[[], None]] = {}  # of those whose callers wait
        self._driver: int | None = None  # the thread
        # Threads that are in a call of this. None gets into a second one, which would wait for the first.
        self._within: set[int] = set()
        # Who drives gives way at the gate: all others pass it before they wait for the turn.
        self._gate, self._turn = threading.Lock(), threading.Lock()
        self._tasks: set[Generation] = set()  # that tasks wait for
        self._wanted = threading.Condition(self._state)  # the thread
        self._drives = 0  # steps of who drove
        self._gives_way = threading.Condition(self._state)  # who waits for the next of them
        self._thread: threading.Thread | None = None

    @contextmanager
    def turn(self, *, again: bool = False) -> Iterator[None]:
        """While it is held, no session changes but by who holds it. RunError: this thread is in another call.

        again: the caller has just had it, so who drives comes first.
        """
        me = threading.get_ident()
        self.check_outside()
        try:
            self._within.add(me)
            if again:
                self._give_way()
            with self._gate, self._turn:
                yield
        finally:
            self._within.discard(me)

    def _give_way(self) -> None:
        """Return when who drives has computed a step, or nobody drives."""
        with self._state:
            before = self._drives
            while self._driver is not None and self._drives == before:
                self._gives_way.wait()

    def check_outside(self) -> None:
        """RunError: a mask function calls, or the handler of a signal that came while this thread computes or waits.
        Or the process was forked.
        """
        self.process.check()  # before anything waits for a lock that nobody may give up
        if threading.get_ident() in self._within:
            hint = "a mask function, or a signal's handler, can only cancel: do this before the call, or after it"
            raise RunError("a session is used within a step", hint=hint)

    @property
    def running(self) -> int:
        """How many generations it has."""
        return len(self._active)

    def in_turns(self, parts: Sequence[Part], most: int) -> Iterator[tuple[list[Part], _native.Logits]]:
        """Compute parts, and hold their tokens: cut into pieces of at most `most` rows, each in a turn. While
        generations run, pieces are no larger than their steps, and who drives has a step between two.

        Yields the pieces with the logits that are wanted. RunError: there is no memory.
        """
        again = False
        for group in groups(parts, lambda part: part):
            for piece in packed(group, lambda: min(most, self._most) if self._active else most):
                with self.turn(again=again):
                    for held, _, tokens, _ in piece:
                        count = len(held.tokens)
                        self._reserve([(held.computing, count, count + len(tokens))])
                    logits = compute(piece)
                    for held, weights, tokens, _ in piece:
                        held.append(weights, tokens)
                again = True
                yield piece, logits

    def begin(self, generation: Generation) -> None:
        """From now on steps compute it."""
        with self._state:
            self._shares.enter(generation.key)
            self._active.append(generation)

    def end(self, generation: Generation) -> None:
        """Cancel a generation, unless it has ended. Nothing comes of what a running step computes for it."""
        self.drop(generation)
        if self.process.is_current and not self._is_inside():
            with self._state:
                self._sweep()

    def drop(self, generation: Generation) -> None:
        """As `end`, but it waits for nothing: at the latest, the next step ends the generation."""
        generation.cancelled = True
        if not self.process.is_current:
            return  # it may be forgotten in a process that was forked
        self._dropped.append(generation)
        if not self._is_inside() and self._state.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._state.release()

    def close_generation(self, generation: Generation) -> None:
        """Cancel it, and forget what it has said."""
        self.end(generation)
        if self.process.is_current:  # elsewhere nobody may give the lock up
            with self._state:
                generation.outbox.clear()

    def _is_inside(self) -> bool:
        """Whether this thread is in the midst of a change."""
        return bool(self._state._is_owned())  # type: ignore[attr-defined]  # as threading.Condition asks it

    def take(self, generation: Generation) -> Event | Progress | None:
        """The next of what a generation has to say, and None after the last. Drives if nobody else does.

        Any error that ended the generation.
        """
        me = threading.get_ident()
        self.check_outside()
        try:
            self._within.add(me)
            while not self._advance(generation, me):
                pass
            with self._state:
                return _first(generation)
        finally:
            self._within.discard(me)

    def _advance(self, generation: Generation, me: int) -> bool:
        """Drive, or wait for who does, until a generation may have something to say. True: it has, or has ended."""
        woken = None
        try:
            with self._state:
                self._sweep()
                if generation.outbox or generation.ended:
                    return True
                if self._driver is None:
                    self._driver = me
                else:
                    woken = threading.Lock()
                    woken.acquire()
                    self._wakes[generation] = woken.release
            if woken is None:
                self._drive(generation)
            else:
                woken.acquire()
        finally:
            with self._state:
                self._wakes.pop(generation, None)
                # Also where it was woken to drive, and does not: then another one must be.
                if self._driver is None or self._driver == me:
                    self._leave()
        return False

    async def take_async(self, generation: Generation) -> Event | Progress | None:
        """As `take`, for a task: it never drives."""
        import asyncio  # who has no tasks does without it: it takes as long as a small model to load

        self.process.check()
        loop = asyncio.get_running_loop()
        while True:
            said = asyncio.Event()
            with self._state:
                if generation.outbox or generation.ended:
                    self._wanted.notify_all()
                    return _first(generation)
                self._wakes[generation] = lambda: _call_in(loop, said.set)  # noqa: B023
                self._tasks.add(generation)
                if self._thread is None:
                    thread = _Driver(target=self._drive_for_tasks, name="bedplate")
                    thread.start()
                    self._thread = thread
                self._wanted.notify_all()
            await said.wait()

    def close(self) -> None:
        """End all generations, and the thread that drives for tasks."""
        with self._state:
            self._end_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _end_all(self) -> None:
        for one in list(self._active):
            one.end("cancelled")
        self._sweep()

    def _drive_for_tasks(self) -> None:
        """Drive as long as tasks have generations, also a few events ahead of them. It ends when they have none, or
        when the interpreter is about to end.
        """
        me = threading.get_ident()
        self._within.add(me)
        while self._has_task():
            try:
                self._drive(None)
            except BaseException as error:  # of no generation: all of them would wait for ever
                with self._state:
                    for one in list(self._active):
                        one.fail(error)
                    self._sweep()
            finally:
                with self._state:
                    if self._driver == me:
                        self._leave()
        self._within.discard(me)

    def _has_task(self) -> bool:
        """Wait until tasks want steps, and nobody drives: then this thread does. False: it is to end."""
        with self._state:
            while True:
                self._sweep()
                if _nobody_else_runs():
                    self._end_all()  # the interpreter waits for this thread, and nobody for them
                if not self._tasks:
                    self._thread = None
                    return False
                if self._driver is None and self._tasks_want():
                    self._driver = threading.get_ident()
                    return True
                self._wanted.wait(_PATIENCE)

    def _tasks_want(self) -> bool:
        return any(len(one.outbox) < AHEAD for one in self._tasks)

    def _drive(self, generation: Generation | None) -> None:
        """Compute steps until a generation has something to say; None: as long as generations of tasks want any."""
        while True:
            with self._state:
                if generation is None:
                    if not self._tasks_want() or _nobody_else_runs():
                        return
                elif generation.outbox or generation.ended:
                    return
            with self._gate:
                pass
            with self._turn:
                self._step()
            with self._state:
                self._drives += 1
                self._gives_way.notify_all()

    def _leave(self) -> None:
        """Who drove does no longer: another one who waits has to. The caller holds `_state`."""
        self._driver = None
        self._wanted.notify_all()
        self._gives_way.notify_all()
        if not self._tasks_want():
            for generation in self._wakes:
                if generation not in self._tasks:
                    self._wake(generation)
                    return

    def _step(self) -> None:
        """Compute one step, and what follows from it."""
        with self._state:
            self._end_late()
            wanting = [one for one in self._active if len(one.outbox) < AHEAD]
            for one in wanting:
                self._find_more(one)
            wanting = [one for one in wanting if not one.ended]
            room = min(_DRAFT_ROWS, self._most) - len(wanting)
            for one in wanting:
                self._propose(one, room // len(wanting))
            wanting = [one for one in wanting if not one.ended]
            given = self._shares.give(wanting, self._most) if wanting else {}
            parts = {one: part for one, rows in given.items() if (part := one.part(rows)) is not None}
        reserved = [(one, part) for one in parts if (part := self._reserved(one, parts[one])) is not None]
        for group in groups(reserved, lambda pair: pair[1]):
            self._compute(group)

    def _reserved(self, one: Generation, part: Part) -> Part | None:
        """A part for which there is memory: without tokens that may be wrong, if it is not enough for them. None: not
        even then, and the generation has failed.
        """
        while True:
            # No name outlives the error: it holds what the step held, and would be held by what it holds.
            try:
                count = len(part.held.tokens)
                self._reserve([(part.held.computing, count, count + len(part.tokens))])
                return part
            except Exception as error:
                sure = one.sure_of(part)
                if len(sure.tokens) == len(part.tokens):
                    self._fail(one, error)
                    return None
            part = sure

    def _find_more(self, one: Generation) -> None:
        """The caller holds `_state`."""
        try:
            one.find_more()
        except Exception as error:
            self._fail(one, error)

    def _propose(self, one: Generation, most: int) -> None:
        """The caller holds `_state`."""
        try:
            one.propose(most)
        except KeyboardInterrupt:
            self.end(one)
            raise
        except BaseException as error:  # of the caller's mask, as in `_settle`
            self._fail(one, error)

    def _compute(self, parts: Sequence[tuple[Generation, Part]]) -> None:
        """Compute parts that fit together in one step."""
        try:
            logits = compute([part for _, part in parts])
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0][0], error)
            else:  # it is the fault of one of them
                for alone in parts:
                    self._compute([alone])
            return
        self.steps, self.rows = self.steps + 1, self.rows + sum(len(part.tokens) for _, part in parts)
        row = 0
        for one, part in parts:
            self._settle(one, part, logits, row)
            row += part.wanted

    def _settle(self, one: Generation, part: Part, logits: _native.Logits, row: int) -> None:
        held, before = part.held, part.held.state
        try:
            with self._state:
                one.computed(part, logits, row)
                self._told(one)
        except KeyboardInterrupt:  # Ctrl-C in the midst of it
            held.restore(before)
            self.end(one)
            raise
        except BaseException as error:  # of the caller's mask: it is for its caller, whoever drives
            held.restore(before)
            self._fail(one, error)

    def _fail(self, one: Generation, error: BaseException) -> None:
        with self._state:
            one.fail(error)
            self._told(one)

    def _told(self, one: Generation) -> None:
        """A generation may have something to say. The caller holds `_state`."""
        if one.outbox:
            self._wake(one)
        self._sweep()

    def _end_late(self) -> None:
        now = time.perf_counter()
        for one in list(self._active):
            if one.deadline is not None and now >= one.deadline:
                one.end("deadline")
        self._sweep()

    def _sweep(self) -> None:
        """Let go of generations that have ended, or are to. The caller holds `_state`."""
        while self._dropped:
            self._dropped.popleft().end("cancelled")
        ended = [one for one in self._active if one.ended]
        if not ended:
            return
        self._active = [one for one in self._active if not one.ended]
        for one in ended:
            self._tasks.discard(one)
            self._wake(one)
        self._shares.keep(one.key for one in self._active)
        self._wanted.notify_all()

    def _wake(self, generation: Generation) -> None:
        wake = self._wakes.pop(generation, None)
        if wake is not None:
            wake()


class _Driver(threading.Thread):
    """A thread of an engine. When no others are left, nobody waits for what it computes."""


def _nobody_else_runs() -> bool:
    """Whether the interpreter is about to end: all threads that it waits for are those of engines."""
    if threading.main_thread().is_alive():
        return False
    return all(one.daemon or isinstance(one, _Driver) or not one.is_alive() for one in threading.enumerate())


def _first(generation: Generation) -> Event | Progress | None:
    if not generation.outbox:
        return None
    first = generation.outbox.popleft()
    if isinstance(first, BaseException):
        try:
            raise first
        finally:
            del first  # else it and this frame hold each other, and the keys and values of its step
    return first


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Call a function in a loop, which may be closed by now."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
