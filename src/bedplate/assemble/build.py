"""A checkpoint → a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.assemble.report import Reporter, load_torch, load_torchao
from bedplate.assemble.templates import Templates, Wanted
from bedplate.background import Background, ahead
from bedplate.bundle import files, manifest
from bedplate.bundle.facts import BundleFacts
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle, check_free, create_bundle
from bedplate.compile.cache import UnitCache
from bedplate.compile.units import StaticShapes, Structure
from bedplate.constants import Constant
from bedplate.errors import UnsupportedError
from bedplate.link.linker import link
from bedplate.model.config import check_exists
from bedplate.quantize.joined import joined, joined_names
from bedplate.quantize.recipe import Goal, Recipe, Scheme
from bedplate.quiet import rare_collections
from bedplate.runtime.loading import check_native
from bedplate.spec import ModelSpec, corrected_together

if TYPE_CHECKING:
    from torch import nn

    from bedplate.model.checkpoint import Checkpoint, StoredCheckpoint
    from bedplate.model.tokenizer_files import TokenizerFiles
    from bedplate.quantize.calibration import Statistics

# The longest run of tokens that one call takes. Longer prompts go in several; more than this gains no speed and
# makes the activation arena larger.
MAX_CHUNK = 256
# Positions of a session where none are asked for: enough for a conversation, and little memory.
DEFAULT_CONTEXT = 2048
# The table of rotations and the memory of keys and values of a longer one take gigabytes.
MAX_CONTEXT = 2**20


@rare_collections()
def build_bundle(
    model: Path,
    out: Path,
    *,
    recipe: Recipe,
    goal: Goal | None,
    calibration: Path | None,
    max_context: int | None,
    programs: bool,
    static: StaticShapes | None,
    cache: UnitCache,
    reporter: Reporter,
    force: bool,
) -> Bundle:
    """Quantize and pack a checkpoint, compile its program, and publish both as a bundle.

    programs: if False, no program is compiled, and ExecuTorch is not needed. All other files have the same bytes.
    static: the program of fixed shapes that is wanted beside, if any.
    goal: how to choose 8 bits where the recipe has 4 by default. None: the recipe is used as it is.
    calibration: a text for the choice and for the recovery. None: the text that comes with bedplate.
    max_context: of the program. None: `DEFAULT_CONTEXT`, or what the model has, if that is less.
    Raises CheckpointError, UnsupportedError, RecipeError, CalibrationError, LoweringError, NameTakenError,
    NotFoundError. After an error, `out` is as it was before.
    """
    check_free(out, replace=force)
    check_exists(model)
    if static is not None and not programs:
        raise UnsupportedError(
            "a program of fixed shapes is a program too",
            where=model,
            hint="leave out --no-programs, or --static-shapes",
        )
    load_torch(reporter)
    from bedplate.model.checkpoint import expected_model, fingerprint, open_checkpoint
    from bedplate.model.gguf_file import GgufFile
    from bedplate.model.tokenizer_files import check_ids, read_tokenizer
    from bedplate.quantize.plan import plan

    checkpoint = open_checkpoint(model)
    tokenizer = read_tokenizer(model, checkpoint.fields if isinstance(checkpoint, GgufFile) else None)
    check_ids(tokenizer, checkpoint.spec.vocab_size, where=model)
    check_native(checkpoint.spec, model)
    max_context = _context(max_context, checkpoint.spec.max_positions, model)
    _check_shapes(static, max_context, model)
    has_program = programs and _has_program(checkpoint.spec, max_context, static is not None, model, reporter)
    wanted = Wanted(program=has_program, static=static)
    # Known, and refused where need be, before anything is measured or compiled.
    named = expected_model(checkpoint.spec)
    if any(scheme.method == "hqq" for scheme in plan(named, recipe).values()):
        load_torchao(reporter)
    measured = _measure(checkpoint, tokenizer, recipe.for_adapter("none"), goal, calibration, reporter)
    structure = Structure(
        spec=checkpoint.spec,
        recipe=measured.recipe,
        max_context=max_context,
        max_chunk=min(MAX_CHUNK, max_context),
        ranks={},
    )
    schemes = plan(expected_model(checkpoint.spec, structure.corrections), structure.recipe)
    together = joined_names(schemes, _with_bias(named))
    templates = Templates(
        wanted, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, cache=cache, reporter=reporter
    )

    def write(folder: Path) -> BundleFacts:
        source = Background(partial(fingerprint, checkpoint))
        made = templates.get(structure)
        # What comes next is quantized while this is hashed and written.
        packed = ahead(_foundation(checkpoint, structure, schemes, measured.statistics, reporter))
        constants = write_ptd(folder / manifest.FOUNDATION, joined(chain.from_iterable(packed), together))
        keys = {constant.name: constant.key for constant in constants}
        for kind, template in made.items():
            assert template.joined() == together, "what is joined follows from the recipe"
            files.write(folder / manifest.BASE_PROGRAMS[kind], link(template, keys))
        files.write(folder / manifest.TOKENIZER, tokenizer.tokenizer_json)
        if tokenizer.chat_template is not None:
            files.write(folder / manifest.CHAT_TEMPLATE, tokenizer.chat_template.encode())
        return BundleFacts(
            model={
                **checkpoint.spec.to_dict(),
                "max_context": max_context,
                "max_chunk": structure.max_chunk,
                "fingerprint": source.result(),
                **({} if static is None else {"static_shapes": asdict(static)}),
            },
            recipe=structure.recipe.to_dict(),
            bos_id=tokenizer.bos_id,
            eos_ids=tokenizer.eos_ids,
            special_tokens=tokenizer.special_tokens,
            constants=constants,
        )

    return create_bundle(out, write, replace=force)


def _check_shapes(shapes: StaticShapes | None, max_context: int, model: Path) -> None:
    """UnsupportedError: no call can take so many tokens."""
    for length in () if shapes is None else (shapes.prefill, shapes.decode):
        if type(length) is not int or not 1 <= length <= max_context:
            raise UnsupportedError(
                f"a call of {length} tokens is not possible: programs hold {max_context} positions",
                where=model,
                hint=f"choose both numbers of --static-shapes between 1 and {max_context}",
            )


def _has_program(
    spec: ModelSpec, max_context: int, has_static: bool, model: Path, reporter: Reporter
) -> bool:
    """Whether there can be a program of this model that takes any number of tokens.

    UnsupportedError: one of fixed shapes is wanted, and it cannot compute the model.
    """
    from bedplate.compile.stock import no_stock_program, of_long_texts

    if has_static and (reason := of_long_texts(spec, max_context)):
        raise UnsupportedError(
            f"a program of fixed shapes cannot compute this model: {reason}",
            where=model,
            hint="choose a smaller --max-context",
        )
    if reason := no_stock_program(spec, max_context):
        which = f"no {manifest.BASE_PROGRAM}" if has_static else "no programs"
        reporter.notice(f"the bundle has {which}: ExecuTorch cannot compute this model ({reason})")
    return reason is None


def _context(wanted: int | None, max_positions: int, model: Path) -> int:
    """Positions of a session. UnsupportedError: no such number of positions can be had of this model."""
    most = min(max_positions, MAX_CONTEXT)
    if wanted is None:
        return min(DEFAULT_CONTEXT, most)
    if type(wanted) is not int or not 1 <= wanted <= most:
        raise UnsupportedError(
            f"the model has {max_positions} positions: a context of {wanted} is not possible",
            where=model,
            hint=f"choose --max-context between 1 and {most}",
        )
    return wanted


def _foundation(
    checkpoint: StoredCheckpoint,
    structure: Structure,
    schemes: Mapping[str, Scheme],
    statistics: Statistics,
    reporter: Reporter,
) -> Iterator[list[Constant]]:
    """The constants, those of one tensor or of linears of one input at a time."""
    from bedplate.model.checkpoint import checked_matrix, checked_tensor, tied_names
    from bedplate.quantize.correction import quantize_corrected
    from bedplate.quantize.foundation import fixed_constants, pack_corrected, pack_tensor, row_norms

    corrections = structure.corrections
    together = corrected_together(structure.spec, corrections)
    names, done = checkpoint.names(), 0
    in_groups = {
        f"{path}.weight" for paths in together.values() for path in paths if schemes[path].bits is not None
    }
    for name in names:
        if name in in_groups:
            continue
        reporter.progress("quantize and pack", done, len(names))
        value = checked_matrix(checkpoint, name)
        yield list(pack_tensor(tied_names(name, checkpoint.spec), value, schemes))
        done += 1
    for place, paths in together.items():
        reporter.progress("quantize and pack", done, len(names))
        weights = {path: checked_tensor(checkpoint, f"{path}.weight") for path in paths}
        corrected = quantize_corrected(
            weights,
            {path: schemes[path] for path in paths},
            rank=corrections[paths[0].split(".", 2)[2]],
            rms=statistics.get(place),
        )
        norms = [row_norms(path, weights[path]) for path in corrected.weights]
        yield [*pack_corrected(place, corrected), *norms]
        done += len(paths)
    reporter.progress("quantize and pack", done, len(names))
    yield list(fixed_constants(structure.spec, structure.max_context, structure.max_chunk).values())


def _with_bias(model: nn.Module) -> set[str]:
    """The modules that have a bias, by path."""
    return {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What a text told: the recipe with its choices made, and the statistics that its corrections learn from."""

    recipe: Recipe
    statistics: Statistics


def _measure(
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles,
    recipe: Recipe,
    goal: Goal | None,
    calibration: Path | None,
    reporter: Reporter,
) -> _Measured:
    from bedplate.quantize.calibration import calibration_texts, input_statistics
    from bedplate.quantize.choice import choose_bits

    corrected = bool(recipe.corrections(checkpoint.spec))
    learns = corrected and (calibration is not None or recipe.recovery_rank > 0)
    if not learns and goal is None:
        if calibration is not None:
            reporter.notice("the calibration text has no effect: nothing in this recipe uses it")
        return _Measured(recipe=recipe, statistics={})
    positions = checkpoint.spec.max_positions
    texts = calibration_texts(calibration, tokenizer.tokenizer_json, positions, reporter.notice)
    statistics: Statistics = {}
    if learns:
        statistics = input_statistics(checkpoint, texts, partial(reporter.progress, "calibrate"))
    if goal is None:
        return _Measured(recipe=recipe, statistics=statistics)
    choice = choose_bits(checkpoint, recipe, goal, texts, statistics, reporter.progress)
    reached = "" if choice.mean_kl is None else f", mean KL {choice.mean_kl:.4f} on the calibration text"
    eight = ", ".join(choice.eight) or "none"
    reporter.notice(f"8 bits: {eight}; {choice.bytes_per_weight:.3f} bytes a weight{reached}")
    return _Measured(recipe=choice.recipe, statistics=statistics)
