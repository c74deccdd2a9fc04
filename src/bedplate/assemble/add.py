"""LoRA adapters → adapters of a bundle. With the units of their structure at hand, no torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from bedplate.assemble.adapter_constants import no_program, pack_adapter
from bedplate.assemble.bundle_structure import adapter_structure, read_recipe, static_shapes
from bedplate.assemble.report import Reporter
from bedplate.assemble.templates import Templates, Wanted
from bedplate.background import Background
from bedplate.bundle import files, manifest
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.ptd import describe, write_ptd
from bedplate.bundle.store import AdapterFacts, Bundle
from bedplate.bundle.values import Values
from bedplate.compile.cache import UnitCache
from bedplate.compile.units import Structure
from bedplate.constants import Constant
from bedplate.errors import AdapterError, RunError
from bedplate.link.linker import link
from bedplate.model.adapter import Adapter, read_adapter
from bedplate.model.adapter.text import AdapterText, read_text
from bedplate.model.adapter.tokenizer import BaseTokenizer
from bedplate.model.folder_template import TEMPLATE
from bedplate.model.tokenizer_settings import SETTINGS
from bedplate.quantize.joined import joined, joined_names
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.recipe import Scheme, default_adapter_scheme
from bedplate.runtime.cores import physical_cores
from bedplate.runtime.effect import without_effect
from bedplate.runtime.model_spec import read_spec
from bedplate.runtime.weights import Weights, load_foundation
from bedplate.spec import ModelSpec, linear_shapes

# Zeros are computed with like any number: a rank is at most doubled for want of units, or raised to this.
SMALL_RANK = 16


def add_adapters(
    bundle: Bundle,
    sources: Mapping[str, Path],
    *,
    quantize: AdapterScheme | None,
    exact_rank: bool,
    allow_noop: bool,
    programs: bool,
    cache: UnitCache,
    reporter: Reporter,
) -> None:
    """Pack LoRA adapters against the bundle's foundation and add them under the names in `sources`: all or none.

    quantize: None: the default for the bundle's recipe.
    exact_rank: compile for the adapter's own rank, even if there are units of a higher rank.
    allow_noop: also add an adapter that changes nothing. Without it, base and adapters run on a short text.
    programs: add the programs too that the base has. If False, nothing is compiled, and ExecuTorch is not needed.
    Raises AdapterError, UnsupportedError, NameTakenError, NotFoundError, LoweringError. After an error, the
    bundle is as it was before.
    """
    for name in sources:
        bundle.check_name(name)
    spec = read_spec(bundle)
    # The effect of the adapters is measured at the end. What it takes is loaded meanwhile.
    loading = None if allow_noop else Background(partial(_load, bundle, spec))
    adapters = {name: read_adapter(source, spec) for name, source in sources.items()}
    tokenizer = bundle.manifest.tokenizer
    base = BaseTokenizer(bundle.tokenizer_file, tokenizer.special_tokens)
    texts = {name: _read_text(source, base) for name, source in sources.items()}
    for name, source in sources.items():
        for warning in (*adapters[name].warnings, *_other_end(source, texts[name], base, tokenizer.eos_ids)):
            reporter.notice(warning)
    wanted = Wanted(
        program=programs and bundle.base_program is not None,
        static=static_shapes(bundle) if programs else None,
    )
    templates = Templates(
        wanted, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, cache=cache, reporter=reporter
    )
    scheme = quantize or default_adapter_scheme(read_recipe(bundle))
    packer = _Packer(bundle, spec, scheme, exact_rank, templates, reporter)
    bundle.add_adapters(
        {name: partial(packer.write, name, adapters[name], texts[name]) for name in sources},
        check=_check_nothing if loading is None else partial(_check_effect, loading, spec, sources),
    )


def _read_text(source: Path, base: BaseTokenizer) -> AdapterText:
    text = read_text(source, base)
    if text.chat_template is not None:
        from bedplate.runtime.chat_template import ChatTemplate  # which imports jinja2

        try:
            ChatTemplate(text.chat_template)
        except RunError as error:
            hint = f"correct or remove it in {TEMPLATE} or {SETTINGS}; without it, the base model's template is used"
            raise AdapterError(error.what, where=source, hint=hint) from error
    return text


def _other_end(
    source: Path, text: AdapterText, base: BaseTokenizer, eos_ids: Collection[int]
) -> Iterator[str]:
    """A warning where text ends otherwise than answers do: as in transformers, the base model says when they end."""
    end = (text.special_tokens or {}).get("eos_token")
    if end is not None and base.token_id(end) not in eos_ids:
        yield f"{source}: its tokenizer ends a text with {end}; answers go on, as that does not end the base model's"


def _check_nothing(drafts: Bundle) -> None:
    pass


def _load(bundle: Bundle, spec: ModelSpec) -> Weights:
    context = spec.max_positions
    return load_foundation(bundle, spec, threads=physical_cores(), max_context=context, precision="float16")


def _check_effect(
    loading: Background[Weights], spec: ModelSpec, sources: Mapping[str, Path], drafts: Bundle
) -> None:
    if idle := without_effect(loading.result(), drafts, spec):
        raise AdapterError(
            f"it changes nothing: with it, the model computes the same logits as without ({', '.join(idle)})",
            where=sources[idle[0]],
            hint="was it saved before it was trained? To add it as it is: --allow-noop (Python: allow_noop=True)",
        )


class _Packer:
    """Packs adapters for one bundle."""

    def __init__(
        self,
        bundle: Bundle,
        spec: ModelSpec,
        quantize: AdapterScheme,
        exact_rank: bool,
        templates: Templates,
        reporter: Reporter,
    ) -> None:
        self._bundle, self._spec, self._quantize = bundle, spec, quantize
        self._templates, self._exact_rank, self._reporter = templates, exact_rank, reporter
        self._foundation = {constant.name: constant.key for constant in bundle.foundation_info.constants}

    def write(self, name: str, adapter: Adapter, text: AdapterText, folder: Path) -> AdapterFacts:
        """Write `weights.ptd`, its programs and its `chat_template.jinja`, if it has them, into `folder`."""
        structure = adapter_structure(self._bundle, self._spec, adapter.ranks, self._quantize)
        has_program = self._templates.wanted and self._can_have_program(name, adapter)
        if has_program and not self._exact_rank:
            structure = _at_unit_rank(structure, self._templates)
        made = self._templates.get(structure) if has_program else {}
        together = joined_names(_branch_schemes(structure, adapter.spec.n_layers))
        infos: list[manifest.ConstantInfo] = []
        in_foundation = frozenset(self._foundation.values())
        with NamedConstants(self._bundle.foundation, self._bundle.foundation_info.constants) as constants:
            values = Values(constants, self._spec)
            packed = pack_adapter(adapter, structure.recipe, structure.ranks, values, self._foundation)
            own = write_ptd(
                folder / manifest.ADAPTER_WEIGHTS,
                _noting(joined(packed, together), infos),
                leave_out=in_foundation,
            )
        keys = self._foundation | {info.name: info.key for info in infos}
        for kind, template in made.items():
            assert template.joined() - self._foundation.keys() == together, (
                "what is joined follows from the ranks"
            )
            files.write(folder / manifest.ADAPTER_PROGRAMS[kind], link(template, keys))
        if text.chat_template is not None:
            (folder / manifest.CHAT_TEMPLATE).write_text(text.chat_template, "utf-8", newline="\n")
        info = manifest.AdapterInfo(
            name=name,
            foundation=self._bundle.foundation_sha256,
            rank=adapter.rank,
            ranks=dict(structure.ranks),
            alpha=adapter.alpha,
            dtype="float32" if self._quantize == "none" else self._quantize,
            layers=adapter.layers,
            vocab=adapter.spec.vocab_size,
            source=adapter.fingerprint,
            constants=own,
            shared=tuple(sorted((i for i in infos if i.key in in_foundation), key=lambda info: info.name)),
        )
        return AdapterFacts(info=info, special_tokens=text.special_tokens)

    def _can_have_program(self, name: str, adapter: Adapter) -> bool:
        if what := no_program(adapter, self._spec):
            self._reporter.notice(
                f"{name} has no program: ExecuTorch's program of a LoRA does not compute {what}"
            )
            return False
        return True


def _at_unit_rank(structure: Structure, templates: Templates) -> Structure:
    """The structure itself or, if it has no units, the same at the next rank that has some, within reason."""
    rank = max(structure.ranks.values(), default=0)
    for unit_rank in range(rank, max(2 * rank, SMALL_RANK) + 1):
        rounded = replace(structure, ranks=dict.fromkeys(structure.ranks, unit_rank))
        if templates.are_compiled(rounded):
            return rounded
    return structure


def _branch_schemes(structure: Structure, n_layers: int) -> dict[str, Scheme]:
    """The scheme of each half of each branch, by module path. n_layers: of the adapter."""
    scheme = structure.recipe.adapter_scheme()
    linears = [name for name in linear_shapes(structure.spec) if name in structure.ranks]
    return {
        f"layers.{layer}.{name}.{half}": scheme
        for layer in range(n_layers)
        for name in linears
        for half in ("lora_a", "lora_b")
    }


def _noting(constants: Iterable[Constant], infos: list[manifest.ConstantInfo]) -> Iterator[Constant]:
    for constant in constants:
        infos.append(describe(constant))
        yield constant
