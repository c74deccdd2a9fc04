"""The whole way: a checkpoint → a bundle; a PEFT adapter → an adapter of a bundle.

Importing this module imports no torch; `build_bundle` does, and `pack_adapter` only for a structure that the unit
cache does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bedplate.bundle import manifest
from bedplate.bundle.files import replacing
from bedplate.bundle.ptd import read_ptd, write_ptd
from bedplate.bundle.store import Bundle, BundleFacts, create_bundle
from bedplate.bundle.usage import program_keys
from bedplate.compile.cache import UnitCache
from bedplate.compile.units import Structure, versions
from bedplate.constants import Constant
from bedplate.errors import NotFoundError, UnsupportedError
from bedplate.link.linker import Template, link
from bedplate.link.template import load_template, make_template
from bedplate.model.adapter import Adapter, read_adapter
from bedplate.model.spec import ModelSpec, spec_from_dict
from bedplate.quantize.recipe import AdapterScheme, Recipe, Scheme, recipe_from_dict
from bedplate.quantize.rows import pack_branch
from bedplate.quiet import import_exporter

# The longest run of tokens that one call takes. Longer prompts go in several; more than this gains no speed and
# makes the activation arena larger.
MAX_CHUNK = 256


class Progress(Protocol):
    """Told of each stage as it goes: `done` of `total` steps, or an unknown total (None)."""

    def __call__(self, stage: str, done: int, total: int | None) -> None: ...


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Tell nobody."""


def load_exporter(progress: Progress) -> None:
    """Import torch and its kin. UnsupportedError: they are not installed."""
    if "executorch.exir" in sys.modules:
        return
    progress("import torch", 0, None)
    try:
        import_exporter()
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this needs the Python package {error.name}", hint="pip install 'bedplate[build]'"
        ) from error
    progress("import torch", 1, 1)


def build_bundle(
    model: Path,
    out: Path,
    *,
    recipe: Recipe,
    max_context: int,
    cache: UnitCache,
    progress: Progress,
    force: bool,
) -> Bundle:
    """Quantize and pack a checkpoint, compile its program, and publish both as a bundle.

    Raises CheckpointError, UnsupportedError, RecipeError, LoweringError, NameTakenError, NotFoundError; whatever is
    raised, nothing is left at `out`.
    """
    load_exporter(progress)
    from bedplate.model.checkpoint import fingerprint, open_checkpoint
    from bedplate.model.tokenizer_files import read_tokenizer

    checkpoint = open_checkpoint(model)
    tokenizer = read_tokenizer(model)
    if not 1 <= max_context <= checkpoint.spec.max_positions:
        raise UnsupportedError(
            f"the model knows {checkpoint.spec.max_positions} positions, not a context of {max_context}",
            where=model,
            hint=f"choose --max-context between 1 and {checkpoint.spec.max_positions}",
        )
    structure = Structure(
        spec=checkpoint.spec,
        recipe=recipe.for_adapter("none"),
        max_context=max_context,
        max_chunk=min(MAX_CHUNK, max_context),
        ranks={},
    )
    schemes = _schemes(structure)

    def write(folder: Path) -> BundleFacts:
        template = _template(structure, tokenizer.bos_id, tokenizer.eos_ids, cache, progress)
        packed = _foundation(checkpoint, schemes, template, progress)
        constants = write_ptd(folder / manifest.FOUNDATION, packed)
        keys = {constant.name: constant.key for constant in constants}
        (folder / manifest.BASE_PROGRAM).write_bytes(link(template, keys))
        (folder / manifest.TOKENIZER).write_bytes(tokenizer.tokenizer_json)
        if tokenizer.chat_template is not None:
            (folder / manifest.CHAT_TEMPLATE).write_text(tokenizer.chat_template, "utf-8")
        return BundleFacts(
            model={
                **checkpoint.spec.to_dict(),
                "max_context": max_context,
                "max_chunk": structure.max_chunk,
                "fingerprint": fingerprint(checkpoint),
            },
            recipe=structure.recipe.to_dict(),
            bos_id=tokenizer.bos_id,
            eos_ids=tokenizer.eos_ids,
            special_tokens=tokenizer.special_tokens,
            constants=constants,
        )

    return create_bundle(out, write, replace=force)


def add_adapter(
    bundle: Bundle,
    source: Path,
    *,
    name: str,
    quantize: AdapterScheme,
    cache: UnitCache,
    progress: Progress,
) -> None:
    """Pack a PEFT adapter against the bundle's foundation and add it as `name`.

    Raises AdapterError, UnsupportedError, NameTakenError, NotFoundError, LoweringError; whatever is raised, the
    bundle is as it was.
    """
    bundle.check_name(name)
    spec = spec_from_dict(bundle.manifest.model)
    adapter = read_adapter(source, spec)
    structure = adapter_structure(bundle, spec, adapter.ranks, quantize)
    tokenizer = bundle.manifest.tokenizer

    def write(folder: Path) -> manifest.AdapterInfo:
        template = _template(structure, tokenizer.bos_id, tokenizer.eos_ids, cache, progress)
        keys = {constant.name: constant.key for constant in bundle.foundation_info.constants}
        in_foundation = frozenset(keys.values())
        packed = _noting(pack_adapter(adapter, quantize, template), keys)
        constants = write_ptd(folder / manifest.ADAPTER_WEIGHTS, packed, leave_out=in_foundation)
        (folder / manifest.ADAPTER_PROGRAM).write_bytes(link(template, keys))
        return manifest.AdapterInfo(
            name=name,
            foundation=bundle.foundation_sha256,
            rank=adapter.rank,
            alpha=adapter.alpha,
            targets=tuple(adapter.ranks),
            dtype="float32" if quantize == "none" else quantize,
            source=adapter.fingerprint,
            structure=structure.fingerprint(versions(), any_depth=False),
            constants=constants,
        )

    bundle.add_adapter(name, write)


def export_program(
    bundle: Bundle, out: Path, *, adapter: str | None, self_contained: bool, with_foundation: bool
) -> None:
    """Write a program of the bundle to `out`, with its own constants and the foundation's inside if asked for."""
    if adapter is not None and adapter not in bundle.adapters:
        known = ", ".join(sorted(bundle.adapters)) or "none"
        raise NotFoundError(f"no adapter {adapter!r}", where=bundle.path, hint=f"the bundle has: {known}")
    if not out.parent.is_dir():
        raise NotFoundError("no such folder", where=out.parent, hint="create it first")
    entry = None if adapter is None else bundle.adapters[adapter]
    program = (bundle.base_program if entry is None else entry.program).read_bytes()
    inside: dict[str, Constant] = {}
    if entry is not None and self_contained:
        inside |= _constants(entry.weights, entry.info.constants)
    if with_foundation:
        named = program_keys(bundle.base_program if entry is None else entry.program)
        foundation = _constants(bundle.foundation, bundle.foundation_info.constants)
        inside |= {key: constant for key, constant in foundation.items() if key in named}
    if inside:
        load_exporter(no_progress)
        from bedplate.link.embed import embed

        program = embed(program, inside)
    with replacing(out) as file:
        file.write(program)


def _constants(file: Path, infos: Iterable[manifest.ConstantInfo]) -> dict[str, Constant]:
    data = read_ptd(file)
    return {
        info.key: Constant(
            key=info.key,
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            is_tensor=data.entries[info.key].layout is not None,
            data=data.data(info.key),
        )
        for info in infos
    }


def adapter_structure(
    bundle: Bundle, spec: ModelSpec, ranks: Mapping[str, int], quantize: AdapterScheme
) -> Structure:
    """The structure of an adapter's program: the bundle's own, with branches."""
    model: dict[str, Any] = bundle.manifest.model
    return Structure(
        spec=spec,
        recipe=recipe_from_dict(bundle.manifest.recipe).for_adapter(quantize),
        max_context=model["max_context"],
        max_chunk=model["max_chunk"],
        ranks=ranks,
    )


def pack_adapter(adapter: Adapter, quantize: AdapterScheme, template: Template) -> Iterator[Constant]:
    """Constants of an adapter's branches, and those that its program's structure fixes."""
    for path, a, b in adapter.matrices():
        yield from pack_branch(f"{path}.lora_a.weight", a, quantize)
        yield from pack_branch(f"{path}.lora_b.weight", b, quantize)
    yield from _fixed(template)


def _schemes(structure: Structure) -> dict[str, Scheme]:
    """The scheme of each weight: known, and refused where need be, before anything is compiled."""
    import torch

    from bedplate.model.decoder import Decoder
    from bedplate.quantize.plan import plan

    with torch.device("meta"):
        return plan(Decoder(structure.spec, max_context=1), structure.recipe)


def _fixed(template: Template) -> list[Constant]:
    # By name: a template from the cache holds them in another order than one just made, and files must not differ.
    return [template.fixed[symbol] for symbol in sorted(template.fixed)]


def _foundation(
    checkpoint: Any, schemes: Mapping[str, Scheme], template: Template, progress: Progress
) -> Iterator[Constant]:
    from bedplate.model.checkpoint import checked_tensors, tied_names
    from bedplate.quantize.apply import pack_tensor

    total = len(checkpoint.shapes())
    for done, (name, tensor) in enumerate(checked_tensors(checkpoint)):
        progress("quantize and pack", done, total)
        for target in tied_names(name, checkpoint.spec):
            yield from pack_tensor(target, tensor, schemes)
    progress("quantize and pack", total, total)
    yield from _fixed(template)


def _noting(constants: Iterable[Constant], keys: dict[str, str]) -> Iterator[Constant]:
    for constant in constants:
        keys[constant.name] = constant.key
        yield constant


def _template(
    structure: Structure, bos_id: int | None, eos_ids: tuple[int, ...], cache: UnitCache, progress: Progress
) -> Template:
    metadata: dict[str, int | bool | Sequence[int]] = {
        # ExecuTorch's runners want an id; one that no text has (the first past the vocabulary) says there is none.
        "get_bos_id": structure.spec.vocab_size if bos_id is None else bos_id,
        "get_eos_ids": list(eos_ids),
        "get_max_seq_len": structure.max_chunk,
        "get_max_context_len": structure.max_context,
        "get_n_layers": structure.spec.n_layers,
        "get_vocab_size": structure.spec.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    template = load_template(structure, metadata, cache)
    if template is None:
        load_exporter(progress)
        progress("compile", 0, None)
        template = make_template(structure, metadata, cache)
        progress("compile", 1, 1)
    return template
