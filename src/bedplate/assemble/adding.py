"""How adapters are added to a bundle: what is said once for adding, merging and publishing."""

from __future__ import annotations

from dataclasses import dataclass

from bedplate.assemble.report import Reporter
from bedplate.compile.cache import UnitCache


@dataclass(frozen=True, kw_only=True)
class Adding:
    """How adapters are added.

    exact_rank: compile for the adapter's own rank, even if there are units of a higher rank.
    allow_noop: also add an adapter that changes nothing. Without it, base and adapters run on a short text.
    programs: add the programs too that the base has. If False, nothing is compiled, and ExecuTorch is not needed.
    check_base: hash the files of the base meanwhile. A damaged one is an error.
    cache: of the units.
    """

    exact_rank: bool
    allow_noop: bool
    programs: bool
    check_base: bool
    cache: UnitCache
    reporter: Reporter
