"""The families of models that bedplate knows, a file each. To add one: docs/families.md."""

from __future__ import annotations

from bedplate.errors import UnsupportedError
from bedplate.model.families.arcee import ARCEE
from bedplate.model.families.cohere2 import COHERE2
from bedplate.model.families.common import Family, read_family
from bedplate.model.families.ernie4_5 import ERNIE4_5
from bedplate.model.families.exaone4 import EXAONE4
from bedplate.model.families.gemma import GEMMA
from bedplate.model.families.gemma2 import GEMMA2
from bedplate.model.families.gemma3_text import GEMMA3_TEXT
from bedplate.model.families.glm4 import GLM4
from bedplate.model.families.granite import GRANITE
from bedplate.model.families.granitemoehybrid import GRANITEMOEHYBRID
from bedplate.model.families.helium import HELIUM
from bedplate.model.families.llama import LLAMA
from bedplate.model.families.ministral import MINISTRAL
from bedplate.model.families.ministral3 import MINISTRAL3
from bedplate.model.families.mistral import MISTRAL
from bedplate.model.families.nemotron import NEMOTRON
from bedplate.model.families.olmo2 import OLMO2
from bedplate.model.families.olmo3 import OLMO3
from bedplate.model.families.phi3 import PHI3
from bedplate.model.families.qwen2 import QWEN2
from bedplate.model.families.qwen3 import QWEN3
from bedplate.model.families.seed_oss import SEED_OSS
from bedplate.model.families.smollm3 import SMOLLM3
from bedplate.model.families.stablelm import STABLELM
from bedplate.spec import ModelSpec

FAMILIES = {
    family.model_type: family
    for family in (
        ARCEE,
        COHERE2,
        ERNIE4_5,
        EXAONE4,
        GEMMA,
        GEMMA2,
        GEMMA3_TEXT,
        GLM4,
        GRANITE,
        GRANITEMOEHYBRID,
        HELIUM,
        LLAMA,
        MINISTRAL,
        MINISTRAL3,
        MISTRAL,
        NEMOTRON,
        OLMO2,
        OLMO3,
        PHI3,
        QWEN2,
        QWEN3,
        SEED_OSS,
        SMOLLM3,
        STABLELM,
    )
}


def family_of(spec: ModelSpec) -> Family:
    """UnsupportedError: the description is of a family that this version of bedplate does not have."""
    if spec.model_type not in FAMILIES:
        raise UnsupportedError(
            f"model_type {spec.model_type!r} is not supported", hint=f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[spec.model_type]


__all__ = ["FAMILIES", "Family", "family_of", "read_family"]
