"""Proves that a bundle is whole and that each adapter has an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.bundle import proof, usage
from bedplate.bundle.ptd import read_ptd
from bedplate.bundle.store import Bundle
from bedplate.bundle.usage import BASE, Sharing
from bedplate.runtime.effect import Effect, compare, texts_of_effects
from bedplate.runtime.engine import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class StockEffect:
    """A program of `base` or of an adapter, in ExecuTorch's own runtime. name: see `usage.ProgramUse`.

    effect: what it changes beside the base's program of the same kind; None: it is the base's.
    from_ours: how it differs from what bedplate computes of the same constants.
    """

    name: str
    effect: Effect | None
    from_ours: Effect


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """own: bytes of the constants of each adapter. effects: of each adapter. programs: None if they were not run."""

    sharing: Sharing
    own: dict[str, int]
    effects: list[Effect]
    programs: list[StockEffect] | None

    @property
    def without_effect(self) -> list[str]:
        """The adapters that change nothing, in bedplate's runtime or in their programs."""
        programs = [one.effect for one in self.programs or () if one.effect is not None]
        return list(dict.fromkeys(one.name for one in [*self.effects, *programs] if not one.took_effect))


def verify_bundle(bundle: Bundle, *, programs: bool, threads: int | None) -> Verdict:
    """Compute every key again, find the keys that programs name, and run the base and each adapter on a text.

    programs: run the stock files, too, in ExecuTorch's own runtime.
    BundleError: a constant is not what its key says, or a program does not find one.  NotFoundError: `programs`, and
    one is missing.  UnsupportedError: `programs`, and this installation has no oracle.
    """
    kinds = _program_kinds(bundle) if programs else []
    for static in kinds:
        for name in (None, *bundle.adapters):
            bundle.program(name, static=static)
    proof.check_keys(bundle)
    sharing = usage.sharing(bundle)
    with Engine(bundle, threads=threads, cache_bytes=0) as engine:
        texts = texts_of_effects(engine)
        bases = {text: engine.session().logits(text) for text in set(texts.values())}
        ours = {name: engine.session(name).logits(text) for name, text in texts.items()}
    # What has a program has the text of the base.
    found = [effect for static in kinds for effect in _run_programs(bundle, texts[None], ours, static=static)]
    return Verdict(
        sharing=sharing,
        own={name: _nbytes(entry.weights) for name, entry in bundle.adapters.items()},
        effects=[compare(name, bases[texts[name]], ours[name]) for name in bundle.adapters],
        programs=found if programs else None,
    )


def _program_kinds(bundle: Bundle) -> list[bool]:
    """Of which kinds the bundle should have programs: False for the usual ones, True for those of fixed shapes."""
    has_static = bundle.static_program is not None
    usual = [False] if bundle.base_program is not None or not has_static else []
    return [*usual, *([True] if has_static else [])]


def _run_programs(
    bundle: Bundle, ids: Sequence[int], ours: Mapping[str | None, NDArray[np.float32]], *, static: bool
) -> Iterator[StockEffect]:
    from bedplate.oracle import static_program, stock_program

    load, label = (static_program, usage.static_name) if static else (stock_program, str)
    loaded = {name: load(bundle, name or BASE) for name in ours}
    room = min(program.limits.max_context for program in loaded.values())
    stock = {name: program.logits(ids[:room]) for name, program in loaded.items()}
    for name, logits in stock.items():
        called = label(name or BASE)
        yield StockEffect(
            name=called,
            effect=None if name is None else compare(called, stock[None], logits),
            from_ours=compare(called, ours[name][:room], logits),
        )


def _nbytes(file: Path) -> int:
    """Bytes of the constants of a data file. Equal constants are stored once."""
    return sum({entry.offset: entry.nbytes for entry in read_ptd(file).entries.values()}.values())
