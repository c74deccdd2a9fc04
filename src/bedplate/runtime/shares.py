"""Who gets the rows of a step: one token for each that generates, the rest to prompts, fair by tokens served."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bedplate.runtime.generation import Generation

QUANTUM = 16  # rows of a prompt that are given at once: as many as kernels take side by side
EVERY = 4  # steps, in one of which the oldest prompt gets some rows, however many short ones come after it


class Shares:
    """Counts the tokens served of each key, as the virtual token counter of arXiv:2401.00588 does: who has been served
    least comes first, and who comes back after a time has no more claim than the others.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}  # of keys that have generations
        self._wanting: set[str] = set()  # keys of the last step
        self._steps = 0

    def enter(self, key: str) -> None:
        """A generation of this key begins."""
        if key not in self._served:
            self._served[key] = min(self._served.values(), default=0)

    def keep(self, keys: Iterable[str]) -> None:
        """Forget all other keys."""
        kept = set(keys)
        self._served = {key: served for key, served in self._served.items() if key in kept}

    def give(self, generations: Sequence[Generation], most: int) -> dict[Generation, int]:
        """How many of `most` rows each gets in the next step; none: it is not there. All of them want some.

        Prompts get a quantum at least, so that those that generate cannot keep them waiting. A prompt that is read to
        its end is the last in its step. Of those that would read the same block, one does: the others have it from
        the cache in a later step.
        """
        self._steps += 1
        self._lift({one.key for one in generations})
        reading = _readers(one for one in generations if one.is_reading)
        kept = (min(QUANTUM, most // 2) or self._steps % 2) if reading else 0
        given: dict[Generation, int] = {}
        # Of one key, who was served longest ago comes first: an old one is not kept waiting by those that come later.
        others = sorted(
            (one for one in generations if not one.is_reading),
            key=lambda one: (self._served[one.key], one.last_step),
        )
        for one in others:
            if rows := min(one.wanted, most - kept - sum(given.values())):
                self._count(given, one, rows)
        quantum = max(1, min(QUANTUM, most // (len(reading) or 1)))
        oldest_first = self._steps % EVERY == 0
        while reading and (room := most - sum(given.values())) > 0:
            one = (
                reading[0]
                if oldest_first
                else min(reading, key=lambda one: (self._served[one.key], one.served))
            )
            self._count(given, one, min(quantum, one.wanted - given.get(one, 0), room))
            if given[one] == one.wanted:
                break  # its first token is next: no rows of others that make it wait
            oldest_first = False
        return given

    def _lift(self, wanting: set[str]) -> None:
        """A key that wanted nothing in the last step has no more claim than those that did."""
        stayed = [self._served[key] for key in wanting & self._wanting]
        for key in wanting - self._wanting:
            self._served[key] = max(self._served[key], min(stayed, default=0))
        self._wanting = wanting

    def _count(self, given: dict[Generation, int], one: Generation, rows: int) -> None:
        given[one] = given.get(one, 0) + rows
        self._served[one.key] += rows
        one.served += rows
        one.last_step = self._steps


def _readers(reading: Iterable[Generation]) -> list[Generation]:
    """Of those that would read the same block, the one that has come furthest in it."""
    readers: dict[object, Generation] = {}
    for one in reading:
        block = one.block or one
        if readers.setdefault(block, one).position < one.position:
            readers[block] = one
    return list(readers.values())
