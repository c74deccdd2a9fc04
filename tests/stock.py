"""ExecuTorch's own Python runtime and exporter, as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers the embedding kernels
import torch
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers update_cache, custom_sdpa
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from torch import Tensor
from torch.export import Dim

from bedplate.executorch_1_5 import partitioner
from bedplate.model.decoder import Decoder
from bedplate.quiet import rare_collections


class StockProgram:
    """A `.pte` (and at most one `.ptd`) in ExecuTorch's own runtime, with its own attention kernels."""

    def __init__(self, program: Path, data: Path | None = None) -> None:
        self._module: Any = _load_for_executorch(str(program), None if data is None else str(data))

    def run(self, method: str, *inputs: Tensor) -> Tensor:
        return self._module.run_method(method, inputs)[0].clone()  # type: ignore[no-any-return]

    def run_all(self, method: str, *inputs: Tensor) -> list[Tensor]:
        return [output.clone() for output in self._module.run_method(method, inputs)]

    def constant(self, method: str) -> Any:
        return self._module.run_method(method, ())

    def logits(self, tokens: list[int], prefill: int) -> Tensor:
        """Logits [T - prefill + 1, vocab]: of the last prefilled token, then one token at a time."""
        rows = [self.run("forward", torch.tensor([tokens[:prefill]]), torch.tensor([0]))]
        for position in range(prefill, len(tokens)):
            rows.append(self.run("forward", torch.tensor([[tokens[position]]]), torch.tensor([position])))
        return torch.cat([row.reshape(1, -1) for row in rows])


def export_whole(decoder: Decoder, path: Path, *, max_chunk: int) -> None:
    """The usual way: export the whole graph with its weights, lower it, and save one `.pte` of ExecuTorch's keys.

    Nothing of bedplate takes part but the decoder and the choice of XNNPACK passes. It returns all positions.
    """

    class AllRows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
            return self.decoder(tokens, input_pos, tokens[0])  # type: ignore[no-any-return]

    inputs = (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    length = Dim("length", min=1, max=max_chunk)
    with torch.no_grad(), rare_collections():
        exported = torch.export.export(AllRows(), inputs, dynamic_shapes=({1: length}, None), strict=False)
        # As `to_edge_transform_and_lower`, which decomposes the graph three times.
        chosen = partitioner()
        whole, _ = chosen.ops_to_not_decompose(exported)
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=whole)
        to_edge(exported, compile_config=config).to_backend(chosen).to_executorch().save(str(path))
