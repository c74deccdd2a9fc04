"""The C++ extension (native/): programs, their memory, and attention. Everything here gives up the GIL while
it computes, and one call of the process computes at a time.
"""

import numpy as np
from numpy.typing import NDArray

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

class Program:
    """A .pte with its data files, mapped; methods load when first used. Raises NativeError throughout."""

    def __init__(
        self, path: str, data_files: list[str], activations: Activations, weight_cache: bool
    ) -> None: ...
    def method_names(self) -> list[str]: ...
    def constants(self) -> dict[str, list[bool | int | float]]:
        """What the methods without inputs return, by their names."""
    def load(self, method: str) -> None:
        """Resolve every constant and pack weights, unless that is done."""
    def kv_bytes(self, method: str) -> int:
        """Size of the KvCache that `step` wants."""
    def step(self, method: str, tokens: NDArray[np.int64], pos: int, kv: KvCache) -> NDArray[np.float32]:
        """Run tokens [S] at positions pos … pos + S - 1: logits [1, vocab], or [S, vocab] of `logits`."""

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
