"""The fields of a GGUF, as llama.cpp reads those that several architectures have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bedplate.errors import UnsupportedError
from bedplate.model.families.common import FULL, SLIDING, check_divides
from bedplate.model.fields import Fields, shown
from bedplate.model.rope_config import MOST_POSITIONS

Config = dict[str, Any]
USE_FOLDER = "use the model's Hugging Face folder"


class Asked(dict[str, Any]):
    """Fields that know which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.names = set[str]()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


@dataclass(frozen=True)
class GgufFields:
    """The fields of one architecture, by their names without its own.

    tensors: their names.  factors: the values of those that scale frequencies.
    """

    fields: Fields
    architecture: str
    tensors: Collection[str]
    factors: Mapping[str, Sequence[float]]

    def at(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        return self.fields.get(self.at(name))

    def count_of_all_layers(self, name: str, **options: Any) -> int:
        """As `count`, of a field that may have a value for each layer, where all are the same."""
        value = self.get(name)
        if isinstance(value, list) and len(value) == self.layers and all(one == value[0] for one in value):
            return Fields({self.at(name): value[0]}, self.fields.where).count(self.at(name))
        return self.count(name, **options)

    def count(self, name: str, **options: Any) -> int:
        return self.fields.count(self.at(name), **options)

    def number(self, name: str, *, default: float | None = None) -> float:
        return self.fields.number(self.at(name), default=default)

    def refused(self, name: str, value: Any) -> UnsupportedError:
        what = f"{self.at(name)} = {shown(value)} is not supported"
        return UnsupportedError(what, where=self.fields.where, hint=USE_FOLDER)

    @property
    def layers(self) -> int:
        return self.count("block_count")

    @property
    def head_dim(self) -> int:
        dim, heads = self.count("embedding_length"), self.count("attention.head_count")
        widths = {
            self.count(name)
            for name in ("attention.key_length", "attention.value_length")
            if self.get(name) is not None
        }
        if len(widths) > 1:
            names = f"{self.at('attention.key_length')} and {self.at('attention.value_length')}"
            raise UnsupportedError(
                f"{names} differ: {sorted(widths)}", where=self.fields.where, hint=USE_FOLDER
            )
        if not widths:
            check_divides(
                self.fields, self.at("embedding_length"), dim, self.at("attention.head_count"), heads
            )
        return next(iter(widths), dim // heads)


def read_rope(fields: GgufFields, *, yarn: bool) -> Config:
    """Without a type, a factor is one of linear scaling. Without a factor, nothing is scaled."""
    kind = fields.get("rope.scaling.type")
    factor = fields.get("rope.scaling.factor")
    factor = fields.get("rope.scale_linear") if factor is None else factor
    fields.get("rope.scaling.original_context_length")
    betas = [fields.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")]
    rope = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", default=10000.0)}
    if kind == "yarn" and yarn:
        original = fields.count(
            "rope.scaling.original_context_length",
            default=fields.count("context_length"),
            most=MOST_POSITIONS,
        )
        # llama.cpp has these numbers in its source, and reads them of few architectures.
        for end, beta, usual in zip(("fast", "slow"), betas, (32.0, 1.0), strict=True):
            if beta is not None and beta != usual:
                raise fields.refused(f"rope.scaling.yarn_beta_{end}", beta)
        return rope | {
            "rope_type": "yarn",
            "factor": fields.number("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }
    if kind not in (None, "none", "linear"):
        raise fields.refused("rope.scaling.type", kind)
    if kind == "none" or factor in (None, 0, 1):
        return rope
    return rope | {"rope_type": "linear", "factor": factor}


def read_windows(fields: GgufFields, every: int) -> list[str]:
    """The kind of each layer: as a field says it of each, or else all but every so many have a window."""
    name = "attention.sliding_window_pattern"
    pattern, layers = fields.get(name), fields.layers
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(type(slides) in (bool, int) for slides in pattern):
            raise fields.fields.wrong(fields.at(name), f"a list of {layers} flags")
        return [SLIDING if slides else FULL for slides in pattern]
    every = fields.count(name, default=every)
    return [FULL if (index + 1) % every == 0 else SLIDING for index in range(layers)]


def check_one_base(fields: GgufFields) -> None:
    """UnsupportedError: layers with windows turn by other frequencies than the rest, and no config can say so."""
    base = fields.number("rope.freq_base", default=10000.0)
    if fields.number("rope.freq_base_swa", default=base) != base:
        raise fields.refused("rope.freq_base_swa", fields.get("rope.freq_base_swa"))
