"""The C++ extension (native/): programs, their memory, and attention. Everything here gives up the GIL while
it computes, and one call of the process computes at a time.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EXECUTORCH_VERSION: str
"""What this was built against."""

class NativeError(Exception):
    """ExecuTorch failed. args: the name of its error code; what was being done, and what it logged."""

class Activations:
    """Buffer for intermediate values, shared by the programs of an engine. Untouched pages cost nothing."""

    def __init__(self) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def resident(self) -> int:
        """Bytes of it in memory."""

class KvCache:
    """Keys and values of one conversation. Untouched pages cost nothing."""

    def __init__(self, nbytes: int) -> None: ...
    def release(self) -> None:
        """Give the memory back; what it held is zero from now on."""
    @property
    def nbytes(self) -> int: ...
    @property
    def resident(self) -> int:
        """Bytes of it in memory."""

class Logits:
    """What a step gives. values: float32 [rows, vocab], at least one row; copied."""

    def __init__(self, values: NDArray[np.float32]) -> None: ...
    def likeliest(self) -> int | None:
        """The column of the highest value of the last row, the first of equal ones; None: one is NaN."""
    @property
    def array(self) -> NDArray[np.float32]:
        """float32 [rows, vocab], not copied. Imports numpy."""

class Program:
    """A .pte with its data files, mapped; methods load when first used. Raises NativeError throughout."""

    def __init__(
        self,
        path: str,
        data_files: list[str],
        activations: Activations,
        weight_cache: bool,
        packed_cache: str = "",
    ) -> None:
        """weight_cache: weights that programs share are packed once. packed_cache: file of those that were packed, for
        all programs that name it; ExecuTorch writes it where none is, and it only then grows.
        """
    def method_names(self) -> list[str]: ...
    def constants(self) -> dict[str, list[bool | int | float]]:
        """What the methods without inputs return, by their names."""
    def load(self, method: str) -> None:
        """Resolve every constant and pack weights, unless that is done."""
    def kv_bytes(self, method: str) -> int:
        """Size of the KvCache that `step` wants."""
    def step(self, method: str, tokens: Sequence[int], pos: int, kv: KvCache) -> Logits:
        """Run tokens at positions pos … pos + S - 1: logits of the last one, or of every one of method `logits`."""

def attention(
    q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32], start_pos: int
) -> NDArray[np.float32]:
    """llama::custom_sdpa.out as programs call it: q and the result [1, S, H, D], k and v [1, C, K, D]."""

def instruction_sets() -> list[str]:
    """What attention is compiled for and this CPU can run, best first."""

def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None:
    """Threads of the whole process's pool, XNNPACK's included. The first call decides how many there can be: one for
    each core or `count`, whichever is more. NativeError: there are fewer than `count`.
    """
