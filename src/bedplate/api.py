"""The Python API: what the command line does, as functions. Defaults live here.

Functions that build bundles import what they need when they are called. So a process that only runs a bundle starts
sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from bedplate.assemble.report import SILENT, Reporter
from bedplate.bundle import store
from bedplate.errors import RecipeError
from bedplate.quantize.options import METHOD, RECOVERY_RANK, AdapterScheme, Method

if TYPE_CHECKING:
    from bedplate.assemble.adding import Adding
    from bedplate.assemble.evaluate import Evaluation
    from bedplate.compile.cache import UnitCache
    from bedplate.compile.units import StaticShapes
    from bedplate.runtime.weights import Precision


class AddOptions(TypedDict, total=False):
    """How adapters are added.

    exact_rank: compile for the adapter's own rank, even if there are compiled units of a higher rank. Default: False.
    allow_noop: add an adapter even if it changes nothing. Without it, the adapter is compared with the base on a short
        text. Default: False.
    programs: if False, the adapter gets no program for ExecuTorch. It never gets one if the base has none. Default:
        True.
    check_base: hash the files of the base meanwhile, and refuse if one is damaged. Of use if the bundle was opened
        with `check=False`. Default: False.
    unit_cache: folder of compiled units. None, the default: the user's cache folder.
    reporter: gets reports of the progress. Default: nobody does.
    """

    exact_rank: bool
    allow_noop: bool
    programs: bool
    check_base: bool
    unit_cache: str | Path | None
    reporter: Reporter


def _adding(
    *,
    exact_rank: bool = False,
    allow_noop: bool = False,
    programs: bool = True,
    check_base: bool = False,
    unit_cache: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> Adding:
    from bedplate.assemble.adding import Adding

    cache = open_cache(unit_cache, reporter)
    return Adding(
        exact_rank=exact_rank,
        allow_noop=allow_noop,
        programs=programs,
        check_base=check_base,
        cache=cache,
        reporter=reporter,
    )


class Bundle(store.Bundle):
    """An open bundle. You can add adapters to it."""

    def add(
        self,
        adapter: str | Path,
        *,
        name: str,
        quantize: AdapterScheme | None = None,
        **options: Unpack[AddOptions],
    ) -> store.AdapterEntry:
        """Pack a LoRA adapter against this bundle's foundation and add it as `name`.

        adapter: a folder of PEFT, torchtune or MLX-LM, or a `.gguf` file of llama.cpp.

        quantize: `8w` stores A and B in 8 bits, `none` in float32. None: in float32 if the foundation is float32,
            otherwise in 8 bits.
        options: see `AddOptions`.
        Raises a BedplateError if something does not fit. The bundle is then as it was before.
        """
        (entry,) = self.add_all({name: adapter}, quantize=quantize, **options)
        return entry

    def add_all(
        self,
        adapters: Mapping[str, str | Path],
        *,
        quantize: AdapterScheme | None = None,
        **options: Unpack[AddOptions],
    ) -> list[store.AdapterEntry]:
        """Add several adapters, by their names. If one does not fit, none is added. The options are those of `add`."""
        from bedplate.assemble.add import add_adapters

        sources = {name: Path(adapter) for name, adapter in adapters.items()}
        add_adapters(self, sources, quantize=quantize, adding=_adding(**options))
        return [self.adapters[name] for name in sources]

    def merge(
        self,
        weights: Mapping[str, float],
        *,
        name: str,
        quantize: AdapterScheme = "none",
        **options: Unpack[AddOptions],
    ) -> store.AdapterEntry:
        """Add the sum of adapters of this bundle, each by its weight, as `name`. They stay as they are.

        The sum is exact: the ranks add up. An adapter that is more than a LoRA (DoRA, norms of its own …) is refused.

        quantize: `none` stores the sum in float32, `8w` in 8 bits, which rounds it.
        The other options are those of `add`. Raises a BedplateError if something does not fit.
        """
        from bedplate.assemble.merge import merge_adapters

        merge_adapters(self, weights, name=name, quantize=quantize, adding=_adding(**options))
        return self.adapters[name]

    def export(
        self,
        out: str | Path,
        *,
        adapter: str | None = None,
        static: bool = False,
        self_contained: bool = False,
        with_foundation: bool = False,
    ) -> None:
        """Write the program of `adapter` (None: of the base) as one stock ExecuTorch file.

        static: the program of fixed shapes.
        self_contained: put the adapter's constants into the file. It then needs only `foundation.ptd`.
        with_foundation: put the foundation's constants into the file. It then does not need `foundation.ptd`.
        NotFoundError: there is no such adapter, it has no program, or the folder of `out` does not exist.
        """
        from bedplate.assemble.export import export_program

        export_program(
            self,
            Path(out),
            adapter=adapter,
            static=static,
            self_contained=self_contained,
            with_foundation=with_foundation,
        )

    def remove(self, name: str) -> None:
        """Remove an adapter. NotFoundError: there is no adapter of this name."""
        self.remove_adapter(name)


def build(
    model: str | Path,
    out: str | Path,
    *,
    quantize: str = "8da4w",
    group_size: int = 32,
    method: Method = METHOD,
    embedding: Literal["4", "8", "float"] = "8",
    head: str | None = None,
    overrides: Mapping[str, str] | None = None,
    recovery_rank: int = RECOVERY_RANK,
    bytes_per_weight: float | None = None,
    target_kl: float | None = None,
    calibration: str | Path | None = None,
    max_context: int | None = None,
    programs: bool = True,
    static_shapes: tuple[int, int] | None = None,
    split_heads: bool = False,
    unit_cache: str | Path | None = None,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> Bundle:
    """Build a bundle at `out` from a Hugging Face folder or a `.gguf` file.

    quantize: `8da4w`, `8da8w` or `none`. group_size, method, embedding, head and overrides refine it, see
        `quantize.recipe.make_recipe`.
    recovery_rank: how many directions of the error of 4-bit weights are corrected. 0: none.
    bytes_per_weight, target_kl: give at most one of them. 8 bits then replace 4 bits for some linears and the head,
        first where 4 bits cost most on the calibration text. The weights take at most this many bytes each on average,
        or the mean KL to the float model is at most this.
    calibration: a text file on which choices and recovery are measured. None: bedplate's own text.
    max_context: how many positions the programs can hold. None: 2,048, or what the model has, if that is less.
        bedplate's own runtime has no such limit.
    programs: if False, the bundle has no programs for ExecuTorch. ExecuTorch is then not needed, and nothing is
        compiled. `foundation.ptd` is the same. The bundle runs here, but `export` does not work.
    static_shapes: also make a program of fixed shapes for the base, and for each adapter that is added later. Its
        method `prefill` takes the first number of tokens, `decode` the second. split_heads: its products are of one
        head each, as some accelerators want them.
    unit_cache: folder of compiled units. None: the user's cache folder.
    force: replace a bundle at `out`. Its adapters are lost.
    Raises a BedplateError if something is wrong. `out` is then as it was before.
    """
    from bedplate.assemble.build import build_bundle
    from bedplate.quantize.recipe import Goal, make_recipe

    goal = None
    if bytes_per_weight is not None or target_kl is not None:
        goal = Goal(bytes_per_weight=bytes_per_weight, target_kl=target_kl)
    recipe = make_recipe(
        quantize,
        group_size=group_size,
        method=method,
        embedding=embedding,
        head=head,
        overrides=overrides,
        recovery_rank=recovery_rank,
    )
    build_bundle(
        Path(model),
        Path(out),
        recipe=recipe,
        goal=goal,
        calibration=None if calibration is None else Path(calibration),
        max_context=max_context,
        programs=programs,
        static=_shapes(static_shapes, split_heads),
        cache=open_cache(unit_cache, reporter),
        reporter=reporter,
        force=force,
    )
    return Bundle.open(out, check=False)


def _shapes(lengths: tuple[int, int] | None, split_heads: bool) -> StaticShapes | None:
    from bedplate.compile.units import StaticShapes

    if lengths is None:
        if split_heads:
            raise RecipeError(
                "heads are split in programs of fixed shapes only",
                hint="give --static-shapes, too (Python: static_shapes=(64, 1))",
            )
        return None
    prefill, decode = lengths
    return StaticShapes(prefill=prefill, decode=decode, split_heads=split_heads)


def evaluate(
    bundle: store.Bundle,
    model: str | Path,
    text: str | Path,
    *,
    adapters: Sequence[str] | None = None,
    programs: bool = False,
    kv: Precision = "float16",
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Evaluation]:
    """Measure what quantization costs. This compares the bundle with the float model on a text file.

    model: the model that the bundle was built from. adapters: names of adapters to measure beside the base. None: all
    of them. programs: if True, measure the programs in ExecuTorch's own runtime instead of bedplate's runtime.
    kv: how bedplate's runtime stores keys and values, see Engine. Raises a BedplateError if something is wrong.
    """
    from bedplate.assemble.evaluate import evaluate_bundle

    return evaluate_bundle(
        bundle,
        Path(model),
        Path(text),
        adapters=adapters,
        programs=programs,
        kv=kv,
        threads=threads,
        reporter=reporter,
    )


def open_cache(folder: str | Path | None, reporter: Reporter = SILENT) -> UnitCache:
    """The compiled units in a folder. None: in the user's cache folder.

    If no units can be kept there, the reporter gets a notice.
    """
    from bedplate.compile.cache import UnitCache

    if folder is None:
        return UnitCache.default(notice=reporter.notice)
    return UnitCache(Path(folder), notice=reporter.notice)
