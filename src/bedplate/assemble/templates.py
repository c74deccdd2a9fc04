"""The templates of a structure's programs, from the cache or compiled now."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Literal

from bedplate import _native
from bedplate.assemble.report import Reporter, load_exporter
from bedplate.compile.cache import UnitCache
from bedplate.compile.units import StaticShapes, Structure
from bedplate.link.linker import Metadata, Template
from bedplate.link.static import is_static_compiled, load_static_template, make_static_template
from bedplate.link.template import is_compiled, load_template, make_template
from bedplate.spec import mask_windows

# The program that takes any number of tokens a call, and the one of fixed shapes.
ProgramKind = Literal["program", "static"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which programs there are to be. program: the one that takes any number of tokens. static: of fixed shapes."""

    program: bool
    static: StaticShapes | None

    def __bool__(self) -> bool:
        return self.program or self.static is not None


class Templates:
    """Templates of programs whose text begins and ends with certain tokens (bos_id None: it begins with none)."""

    def __init__(
        self,
        wanted: Wanted,
        *,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        cache: UnitCache,
        reporter: Reporter,
    ) -> None:
        self.wanted = wanted
        self._bos_id, self._eos_ids, self._cache, self._reporter = bos_id, eos_ids, cache, reporter

    def are_compiled(self, structure: Structure) -> bool:
        """Whether there are units for all programs of this structure, so that they cost no compilation."""
        shapes = self.wanted.static
        program = not self.wanted.program or is_compiled(structure, self._metadata(structure), self._cache)
        return program and (
            shapes is None
            or is_static_compiled(structure, shapes, self._static_metadata(structure, shapes), self._cache)
        )

    def get(self, structure: Structure) -> dict[ProgramKind, Template]:
        """The templates of a structure. Raises LoweringError, UnsupportedError."""
        made: dict[ProgramKind, Template] = {}
        if self.wanted.program:
            made["program"] = self._program(structure)
        if self.wanted.static is not None:
            made["static"] = self._static(structure, self.wanted.static)
        return made

    def _program(self, structure: Structure) -> Template:
        metadata = self._metadata(structure)
        template = load_template(structure, metadata, self._cache)
        if template is None:
            load_exporter(self._reporter)
            self._reporter.progress("compile", 0, None)
            template = make_template(structure, metadata, self._cache, self._reporter.notice)
            _free_memory()
            self._reporter.progress("compile", 1, 1)
        return template

    def _static(self, structure: Structure, shapes: StaticShapes) -> Template:
        metadata = self._static_metadata(structure, shapes)
        template = load_static_template(structure, shapes, metadata, self._cache)
        if template is None:
            load_exporter(self._reporter)
            self._reporter.progress("compile fixed shapes", 0, None)
            template = make_static_template(structure, shapes, metadata, self._cache)
            _free_memory()
            self._reporter.progress("compile fixed shapes", 1, 1)
        return template

    def _metadata(self, structure: Structure) -> Metadata:
        return {
            **self._of_text(structure),
            "get_max_seq_len": structure.max_chunk,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
        }

    def _static_metadata(self, structure: Structure, shapes: StaticShapes) -> Metadata:
        windows = mask_windows(structure.spec, structure.max_context)
        return {
            **self._of_text(structure),
            "get_prefill_len": shapes.prefill,
            "get_decode_len": shapes.decode,
            "get_windows": [window or 0 for window in windows],  # of the masks, in their order; 0: sees all
            "enable_dynamic_shape": False,
        }

    def _of_text(self, structure: Structure) -> dict[str, int | bool | list[int]]:
        return {
            # ExecuTorch's runners want an id; one that no text has (the first past the vocabulary) says there is none.
            "get_bos_id": structure.spec.vocab_size if self._bos_id is None else self._bos_id,
            "get_eos_ids": list(self._eos_ids),
            "get_max_context_len": structure.max_context,
            "get_n_layers": structure.spec.n_layers,
            "get_vocab_size": structure.spec.vocab_size,
            "use_kv_cache": True,
        }


def _free_memory() -> None:
    """Give the system back what a compilation took: its graphs refer to each other in circles."""
    gc.collect()
    _native.return_memory()
