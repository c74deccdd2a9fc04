"""A checkpoint → a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.assemble.report import Reporter, load_torch
from bedplate.assemble.templates import Templates
from bedplate.bundle import manifest
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle, BundleFacts, check_free, create_bundle
from bedplate.compile.cache import UnitCache
from bedplate.compile.units import Structure
from bedplate.constants import Constant
from bedplate.errors import UnsupportedError
from bedplate.link.linker import Template, link
from bedplate.model.spec import check_exists
from bedplate.quantize.recipe import Recipe, Scheme

if TYPE_CHECKING:
    from bedplate.model.checkpoint import Checkpoint

# The longest run of tokens that one call takes. Longer prompts go in several; more than this gains no speed and
# makes the activation arena larger.
MAX_CHUNK = 256


def build_bundle(
    model: Path,
    out: Path,
    *,
    recipe: Recipe,
    max_context: int,
    cache: UnitCache,
    reporter: Reporter,
    force: bool,
) -> Bundle:
    """Quantize and pack a checkpoint, compile its program, and publish both as a bundle.

    Raises CheckpointError, UnsupportedError, RecipeError, LoweringError, NameTakenError, NotFoundError; whatever is
    raised, nothing is left at `out`.
    """
    check_free(out, replace=force)
    check_exists(model)
    load_torch(reporter)
    from bedplate.model.checkpoint import expected_model, fingerprint, open_checkpoint
    from bedplate.model.gguf_file import GgufFile
    from bedplate.model.tokenizer_files import read_tokenizer
    from bedplate.quantize.plan import plan

    checkpoint = open_checkpoint(model)
    tokenizer = read_tokenizer(model, checkpoint.reader if isinstance(checkpoint, GgufFile) else None)
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
    # Known, and refused where need be, before anything is compiled.
    schemes = plan(expected_model(checkpoint.spec), structure.recipe)
    templates = Templates(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, cache=cache, reporter=reporter)

    def write(folder: Path) -> BundleFacts:
        template = templates.get(structure)
        packed = _foundation(checkpoint, schemes, template, reporter)
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


def _foundation(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], template: Template, reporter: Reporter
) -> Iterator[Constant]:
    from bedplate.model.checkpoint import checked_tensors, tied_names
    from bedplate.quantize.foundation import pack_tensor

    total = len(checkpoint.shapes())
    for done, (name, tensor) in enumerate(checked_tensors(checkpoint)):
        reporter.progress("quantize and pack", done, total)
        yield from pack_tensor(tied_names(name, checkpoint.spec), tensor, schemes)
    reporter.progress("quantize and pack", total, total)
    yield from template.fixed_constants()
