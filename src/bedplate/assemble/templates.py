"""The template of a structure, from the cache or compiled now."""

from __future__ import annotations

from bedplate.assemble.report import Reporter, load_exporter
from bedplate.compile.cache import UnitCache
from bedplate.compile.units import Structure
from bedplate.link.linker import Metadata, Template
from bedplate.link.template import is_compiled, load_template, make_template


class Templates:
    """Templates of programs whose text begins and ends with certain tokens (bos_id None: it begins with none)."""

    def __init__(
        self, *, bos_id: int | None, eos_ids: tuple[int, ...], cache: UnitCache, reporter: Reporter
    ) -> None:
        self._bos_id, self._eos_ids, self._cache, self._reporter = bos_id, eos_ids, cache, reporter

    def is_compiled(self, structure: Structure) -> bool:
        """Whether there are units of this structure, so that its template costs no compilation."""
        return is_compiled(structure, self._metadata(structure), self._cache)

    def get(self, structure: Structure) -> Template:
        """The template of a structure. Raises LoweringError, UnsupportedError."""
        metadata = self._metadata(structure)
        template = load_template(structure, metadata, self._cache)
        if template is None:
            load_exporter(self._reporter)
            self._reporter.progress("compile", 0, None)
            template = make_template(structure, metadata, self._cache, self._reporter.notice)
            self._reporter.progress("compile", 1, 1)
        return template

    def _metadata(self, structure: Structure) -> Metadata:
        return {
            # ExecuTorch's runners want an id; one that no text has (the first past the vocabulary) says there is none.
            "get_bos_id": structure.spec.vocab_size if self._bos_id is None else self._bos_id,
            "get_eos_ids": list(self._eos_ids),
            "get_max_seq_len": structure.max_chunk,
            "get_max_context_len": structure.max_context,
            "get_n_layers": structure.spec.n_layers,
            "get_vocab_size": structure.spec.vocab_size,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
        }
