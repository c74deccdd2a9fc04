"""A checkpoint → a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
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
from bedplate.model.spec import check_exists, corrected_together
from bedplate.quantize.recipe import Recipe, Scheme

if TYPE_CHECKING:
    from bedplate.model.checkpoint import Checkpoint
    from bedplate.model.tokenizer_files import TokenizerFiles
    from bedplate.quantize.calibration import Statistics

# The longest run of tokens that one call takes. Longer prompts go in several; more than this gains no speed and
# makes the activation arena larger.
MAX_CHUNK = 256


def build_bundle(
    model: Path,
    out: Path,
    *,
    recipe: Recipe,
    calibration: Path | None,
    max_context: int,
    cache: UnitCache,
    reporter: Reporter,
    force: bool,
) -> Bundle:
    """Quantize and pack a checkpoint, compile its program, and publish both as a bundle.

    calibration: a text for the recipe's recovery; None: the one that comes with bedplate.
    Raises CheckpointError, UnsupportedError, RecipeError, CalibrationError, LoweringError, NameTakenError,
    NotFoundError; whatever is raised, nothing is left at `out`.
    """
    check_free(out, replace=force)
    check_exists(model)
    load_torch(reporter)
    from bedplate.model.checkpoint import expected_model, fingerprint, open_checkpoint
    from bedplate.model.gguf_file import GgufFile
    from bedplate.model.tokenizer_files import read_tokenizer
    from bedplate.quantize.calibration import input_statistics
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
    tokens = _calibration_tokens(tokenizer, structure, calibration, reporter)
    templates = Templates(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, cache=cache, reporter=reporter)

    def write(folder: Path) -> BundleFacts:
        template = templates.get(structure)
        statistics: Statistics = {}
        if tokens and structure.corrections:
            statistics = input_statistics(checkpoint, tokens, partial(reporter.progress, "calibrate"))
        packed = _foundation(checkpoint, structure, schemes, statistics, template, reporter)
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
    checkpoint: Checkpoint,
    structure: Structure,
    schemes: Mapping[str, Scheme],
    statistics: Statistics,
    template: Template,
    reporter: Reporter,
) -> Iterator[Constant]:
    from bedplate.model.checkpoint import checked_tensor, tied_names
    from bedplate.quantize.correction import quantize_corrected
    from bedplate.quantize.foundation import pack_corrected, pack_tensor

    corrections = structure.corrections
    together = corrected_together(structure.spec.n_layers, corrections)
    names, done = list(checkpoint.shapes()), 0
    in_groups = {
        f"{path}.weight" for paths in together.values() for path in paths if schemes[path].bits is not None
    }
    for name in names:
        if name in in_groups:
            continue
        reporter.progress("quantize and pack", done, len(names))
        tensor = checked_tensor(checkpoint, name)
        yield from pack_tensor(tied_names(name, checkpoint.spec), tensor, schemes)
        done += 1
    for place, paths in together.items():
        reporter.progress("quantize and pack", done, len(names))
        corrected = quantize_corrected(
            {path: checked_tensor(checkpoint, f"{path}.weight") for path in paths},
            {path: schemes[path] for path in paths},
            rank=corrections[paths[0].split(".", 2)[2]],
            rms=statistics.get(place),
        )
        yield from pack_corrected(place, corrected)
        done += len(paths)
    reporter.progress("quantize and pack", done, len(names))
    yield from template.fixed_constants()


def _calibration_tokens(
    tokenizer: TokenizerFiles, structure: Structure, calibration: Path | None, reporter: Reporter
) -> list[int]:
    """The tokens that the corrections are to learn from; none if there is nothing for them to learn."""
    from bedplate.quantize.calibration import calibration_tokens

    if calibration is None and not (structure.recipe.recovery_rank and structure.corrections):
        return []
    return calibration_tokens(calibration, tokenizer.tokenizer_json, reporter.notice)
