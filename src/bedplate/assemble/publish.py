"""Adapters that fit a bundle's model → adapters of the bundle. With the units of their structure at hand, no torch is
imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bedplate.assemble.adapter_constants import no_program, pack_adapter
from bedplate.assemble.adding import Adding
from bedplate.assemble.bundle_structure import adapter_structure, static_shapes
from bedplate.assemble.templates import Templates, Wanted
from bedplate.background import Background
from bedplate.bundle import files, manifest
from bedplate.bundle.facts import AdapterFacts
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.ptd import describe, write_ptd
from bedplate.bundle.store import Bundle
from bedplate.bundle.values import Values
from bedplate.compile.units import Structure
from bedplate.constants import Constant
from bedplate.errors import AdapterError, BedplateError
from bedplate.link.linker import link
from bedplate.model.adapter import Adapter
from bedplate.model.adapter.text import AdapterText
from bedplate.quantize.joined import joined, joined_names
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.recipe import Rule, Scheme
from bedplate.runtime.cores import usable_cores
from bedplate.runtime.effect import without_effect
from bedplate.runtime.loading import load_foundation
from bedplate.runtime.weights import Weights
from bedplate.spec import ModelSpec, linear_shapes

# Zeros are computed with like any number: a rank is at most doubled for want of units, or raised to this.
SMALL_RANK = 16


class Publisher:
    """Adds adapters to one bundle. From the start, its base is checked, if that is wanted, and what measures their
    effect is loaded, unless they may have none.

    spec: of the bundle's model.
    """

    def __init__(self, bundle: Bundle, spec: ModelSpec, adding: Adding) -> None:
        self._bundle, self._spec, self._adding = bundle, spec, adding
        self._checking = Background(bundle.check_base) if adding.check_base else None
        self._loading = None if adding.allow_noop else Background(partial(_load, bundle, spec))
        tokenizer = bundle.manifest.tokenizer
        wanted = Wanted(
            program=adding.programs and bundle.base_program is not None,
            static=static_shapes(bundle) if adding.programs else None,
        )
        self._templates = Templates(
            wanted,
            bos_id=tokenizer.bos_id,
            eos_ids=tokenizer.eos_ids,
            cache=adding.cache,
            reporter=adding.reporter,
        )

    def publish(self, adapters: Mapping[str, tuple[Adapter, AdapterText]], scheme: AdapterScheme) -> None:
        """Pack adapters, and add them by their names: all or none.

        Raises AdapterError, UnsupportedError, NameTakenError, LoweringError; BundleError: the base is damaged. After
        an error, the bundle is as it was.
        """
        try:
            self._publish(adapters, scheme)
        except BedplateError:
            self._check_base()  # a damaged one is the reason of other errors
            raise

    def _check_base(self) -> None:
        if self._checking is not None:
            self._checking.result()

    def _publish(self, adapters: Mapping[str, tuple[Adapter, AdapterText]], scheme: AdapterScheme) -> None:
        packer = _Packer(self._bundle, self._spec, scheme, self._adding, self._templates)
        sources = {name: adapter.path for name, (adapter, _) in adapters.items()}
        self._bundle.add_adapters(
            {name: partial(packer.write, name, *ready) for name, ready in adapters.items()},
            check=partial(self._check, sources),
        )

    def _check(self, sources: Mapping[str, Path], drafts: Bundle) -> None:
        self._check_base()
        if self._loading is None:
            return
        if idle := without_effect(self._loading.result(), drafts, self._spec):
            raise AdapterError(
                f"it changes nothing: with it, the model computes the same logits as without ({', '.join(idle)})",
                where=sources[idle[0]],
                hint="was it saved before it was trained? To add it as it is: --allow-noop (Python: allow_noop=True)",
            )


def _load(bundle: Bundle, spec: ModelSpec) -> Weights:
    context = spec.max_positions
    return load_foundation(bundle, spec, threads=usable_cores(), max_context=context, precision="float16")


class _Packer:
    """Packs adapters for one bundle."""

    def __init__(
        self,
        bundle: Bundle,
        spec: ModelSpec,
        quantize: AdapterScheme,
        adding: Adding,
        templates: Templates,
    ) -> None:
        self._bundle, self._spec, self._quantize = bundle, spec, quantize
        self._adding, self._templates = adding, templates
        self._foundation = {constant.name: constant.key for constant in bundle.foundation_info.constants}

    def write(self, name: str, adapter: Adapter, text: AdapterText, folder: Path) -> AdapterFacts:
        """Write `weights.ptd`, and what it has of programs, a chat template and a tokenizer, into `folder`."""
        structure = adapter_structure(self._bundle, self._spec, adapter.ranks, self._quantize)
        if adapter.layers is not None:
            structure = _of_layers(structure, adapter.layers)
        has_program = self._templates.wanted and self._can_have_program(name, adapter)
        if has_program and not self._adding.exact_rank:
            structure = _at_unit_rank(structure, self._templates)
        made = self._templates.get(structure) if has_program else {}
        together = joined_names(_branch_schemes(structure, adapter.spec.n_layers))
        infos: list[manifest.ConstantInfo] = []
        base, in_foundation = self._base_keys(adapter), frozenset(self._foundation.values())
        with NamedConstants(self._bundle.foundation, self._bundle.foundation_info.constants) as constants:
            values = Values(constants, self._spec)
            packed = pack_adapter(adapter, structure.recipe, structure.ranks, values, base)
            own = write_ptd(
                folder / manifest.ADAPTER_WEIGHTS,
                _noting(joined(packed, together), infos),
                leave_out=in_foundation,
            )
        keys = base | {info.name: info.key for info in infos}
        for kind, template in made.items():
            assert template.joined() - base.keys() == together, "what is joined follows from the ranks"
            files.write(folder / manifest.ADAPTER_PROGRAMS[kind], link(template, keys))
        if text.chat_template is not None:
            (folder / manifest.CHAT_TEMPLATE).write_text(text.chat_template, "utf-8", newline="\n")
        if text.tokenizer_json is not None:
            files.write(folder / manifest.TOKENIZER, text.tokenizer_json)
        info = manifest.AdapterInfo(
            name=name,
            foundation=self._bundle.foundation_sha256,
            rank=adapter.rank,
            ranks=dict(structure.ranks),
            alpha=adapter.alpha,
            dtype="float32" if self._quantize == "none" else self._quantize,
            layers=adapter.layers,
            vocab=adapter.spec.vocab_size,
            invocation=adapter.invocation,
            source=adapter.fingerprint,
            constants=own,
            shared=tuple(sorted((i for i in infos if i.key in in_foundation), key=lambda info: info.name)),
        )
        return AdapterFacts(info=info, special_tokens=text.special_tokens)

    def _base_keys(self, adapter: Adapter) -> dict[str, str]:
        """The keys of the foundation's constants, by the names that they have in the adapter's model."""
        if adapter.layers is None:
            return self._foundation
        of_layer: dict[str, dict[str, str]] = {}
        keys: dict[str, str] = {}
        for name, key in self._foundation.items():
            layer, inner = _in_layer(name)
            (of_layer.setdefault(layer, {}) if layer else keys)[inner] = key
        for number, base in enumerate(adapter.layers):
            keys |= {f"layers.{number}.{inner}": key for inner, key in of_layer[str(base)].items()}
        return keys

    def _can_have_program(self, name: str, adapter: Adapter) -> bool:
        if what := no_program(adapter, self._spec):
            self._adding.reporter.notice(
                f"{name} has no program: ExecuTorch's program of a LoRA does not compute {what}"
            )
            return False
        return True


def _of_layers(structure: Structure, layers: Sequence[int]) -> Structure:
    """The structure of the model that has these layers of the structure's own."""
    spec, recipe = structure.spec, structure.recipe
    schemes = {
        f"layers.{number}.{linear}": recipe.scheme_of(f"layers.{layer}.{linear}")
        for number, layer in enumerate(layers)
        for linear in linear_shapes(spec)
    }
    rules = [
        Rule(pattern=path, scheme=scheme)
        for path, scheme in schemes.items()
        if recipe.scheme_of(path) != scheme
    ]
    recipe = replace(recipe, rules=(*rules, *recipe.rules))
    spec = replace(spec, layers=tuple(spec.layers[layer] for layer in layers))
    return replace(structure, spec=spec, recipe=recipe)


def _in_layer(name: str) -> tuple[str, str]:
    """The number of the layer that a constant is of ("": of none), and its name in it."""
    if not name.startswith("layers."):
        return "", name
    _, layer, inner = name.split(".", 2)
    return layer, inner


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
