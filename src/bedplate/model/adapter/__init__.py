"""LoRA adapters as they come → A and B of each linear. Needs no torch."""

from bedplate.model.adapter.read import read_adapter
from bedplate.model.adapter.types import Adapter

__all__ = ["Adapter", "read_adapter"]
