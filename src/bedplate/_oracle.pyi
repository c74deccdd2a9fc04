"""The optional C++ extension (native/oracle/): a program in ExecuTorch's own runtime. Whatever computes here gives up
the GIL, and one call of the process computes at a time.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class OracleError(RuntimeError):
    """ExecuTorch failed: what was being done, and the name of its error code. Its log says more, on stderr."""

class Program:
    """A `.pte` with its data files, none of its methods loaded. OracleError, here and below: ExecuTorch failed."""

    def __init__(self, path: str, data_files: Sequence[str], weight_cache: bool) -> None: ...
    def keys(self) -> list[str]:
        """Of the constants that lie inside of the program."""
    def method_names(self) -> list[str]: ...
    def constant(self, method: str) -> int:
        """What a method without inputs returns."""
    def constants(self, method: str) -> list[int]:
        """What a method without inputs returns, if it returns several numbers."""
    def load(self, method: str) -> None:
        """Find each constant in the data files, and pack weights."""
    def columns(self, method: str) -> int:
        """Width of the logits that a method returns."""
    def run(self, method: str, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        """Logits [rows, vocab] of tokens at `position` and those that follow."""
    def input_shapes(self, method: str) -> list[list[int]]:
        """Shapes of the tensors that a method takes, at their upper bounds."""
    def call(
        self, method: str, inputs: Sequence[NDArray[np.float32] | NDArray[np.int64]]
    ) -> list[NDArray[np.float32]]:
        """What a method of fixed shapes returns. Inputs have the types and shapes that it wants, or OracleError."""
