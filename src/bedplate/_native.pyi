"""The C++ extension (native/): weights as kernels read them, and steps of a decoder over them.

Constants are ranges of open files, and sizes, which are checked before they are used. A Decoder and an Adapter read
what they are made of. Whatever reads or computes gives up the GIL.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Source = tuple[int, int, int]
"""file descriptor, offset, size: bytes of a file. It stays open until the Decoder or Adapter is made."""
Part = tuple[int, int, int, int, Source, Source]
"""rows, columns, bits (4, 8, or 32 for floats), group (columns that share a scale; 0: a scale for each row), codes,
scales: as `bedplate.quantize.packing` lays them out.
"""
Offsets = tuple[int, int, float, Source, Source]
"""rank, group, unit, codes, scales: int8 [rows, rank] of which the first columns / group are divided by `unit`."""

class NativeError(ValueError):
    """What was given does not fit; the text says what."""

class Matrix:
    """Weights [rows, columns]. parts: their rows one below the other, all of one kind; of one part alone there may be
    offsets, and a bias float32 [rows].
    """

    def __init__(
        self, parts: Sequence[Part], offsets: Offsets | None = None, bias: Source | None = None
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

class BackMatrix:
    """The wide half of a branch: columns [column, column + rank) of a part of 8 bits or floats.

    It adds to the outputs of the place's linear number `linear`, and takes narrow values from number `narrow` on.
    """

    def __init__(self, part: Part, column: int, rank: int, linear: int, narrow: int) -> None: ...

class Branch:
    """y += B (A x): narrow is A [ranks, columns], backs are B of linears of the place."""

    def __init__(self, narrow: Matrix, backs: Sequence[BackMatrix]) -> None: ...

class Table:
    """Rows to look up, [rows, columns]; 4 bits lie as an embedding's do, the even column in the high half."""

    def __init__(self, part: Part) -> None: ...

Norm = tuple[Source | None, Source | None]
"""weight and bias, float32 [dim]. Without weight it changes nothing."""

class Layer:
    """norms: before and after attention, before and after the MLP. head_norms: of queries and of keys, float32
    [head_dim], or of all heads together; None: none. rope: number of the rotary embedding; -1: none. window: keys that
    a query sees; 0: all. places: (weights, correction) of what reads the attention's input, of its output, of what
    reads the MLP's input, and of its output.
    """

    def __init__(
        self,
        norms: Sequence[Norm],
        head_norms: Sequence[Source | None],
        rope: int,
        window: int,
        places: Sequence[tuple[Sequence[Matrix], Branch | None]],
    ) -> None: ...

class Rules:
    """What is computed around the linears: see `bedplate.spec.ModelSpec`. Caps and growth of 0: none."""

    def __init__(
        self,
        *,
        layer_norm: bool,
        norm_eps: float,
        parallel: bool,
        activation: str,
        gated: bool,
        embedding_scale: float,
        residual_scale: float,
        attention_scale: float,
        logit_scale: float,
        score_cap: float,
        logit_cap: float,
        query_growth: float,
        growth_positions: int,
    ) -> None: ...

Affine = tuple[Source | None, Source | None]
"""factor and shift of a linear's outputs, float32 [rows]: y becomes factor · y + shift. None: 1, 0."""
Change = tuple[Branch | None, Sequence[Affine]]
"""What an adapter changes at linears of one input: a branch, then factor and shift of each, or of none of them."""

class AdapterLayer:
    """base: the number of the model's layer whose weights it uses. norms, head_norms: as a Layer's, in place of the
    model's; None: the model's. places: what changes at each of its four.
    """

    def __init__(
        self,
        *,
        base: int,
        norms: Sequence[Norm],
        head_norms: Sequence[Source | None],
        places: Sequence[Change],
    ) -> None: ...

class AdapterEmbedding:
    """table: in place of the model's; of_head: the rows of the adapter's own head. narrow, back: A [vocab, rank] and
    B [dim, rank] of a branch. rows: of the tokens `ids`, int64, ascending, in place of the table's.
    """

    def __init__(
        self,
        *,
        table: Table | None = None,
        of_head: bool = False,
        narrow: Table | None = None,
        back: BackMatrix | None = None,
        ids: Source | None = None,
        rows: Table | None = None,
    ) -> None: ...

class AdapterHead:
    """matrix: in place of the model's. rows: float32, whose products are the logits of the tokens `ids`, int64,
    ascending.
    """

    def __init__(
        self,
        *,
        matrix: Matrix | None = None,
        change: Change = ...,
        ids: Source | None = None,
        rows: Matrix | None = None,
    ) -> None: ...

class Adapter:
    """What it does not have, it takes from the model. vocab: its tokens, those of the model and maybe more. readers:
    threads that read it. NativeError: a file ends too early, or what it has does not fit together.
    """

    def __init__(
        self,
        *,
        vocab: int,
        layers: Sequence[AdapterLayer],
        norm: Norm,
        embedding: AdapterEmbedding,
        head: AdapterHead,
        readers: int,
    ) -> None: ...
    @staticmethod
    def sum(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
        """What adapters add, each times its factor, in this order. It uses their weights, which live as long as it.
        NativeError: one has more than branches, or they have other layers or tokens.
        """
    @property
    def nbytes(self) -> int: ...

class Meter:
    """Counts the memory of keys and values of all decoders that were made with it."""

    def __init__(self) -> None: ...
    @property
    def nbytes(self) -> int: ...

class KvBlock:
    """Keys and values of 64 positions. They never change while Python holds the block."""

    @property
    def nbytes(self) -> int: ...
    @property
    def is_shared(self) -> bool:
        """Whether a Kv holds it too."""
    @property
    def data(self) -> bytes: ...

class Kv:
    """Keys and values of one session, in blocks that come as they are needed. It can share them: before it writes to a
    block that something else holds, it copies that. For one thread at a time, apart from `nbytes`.
    """

    @property
    def nbytes(self) -> int:
        """Memory of its blocks, shared ones too."""
    @property
    def block_nbytes(self) -> int: ...
    @property
    def positions(self) -> int:
        """How many have been written."""
    def growth(self, begin: int, end: int) -> int:
        """How many bytes `reserve` takes."""
    def reserve(self, begin: int, end: int) -> None:
        """Make room for positions that are to be written, as a step does otherwise."""
    def write(self, end: int, data: bytes) -> None:
        """Put what `KvBlock.data` was into the block that ends before position `end`, or holds it. NativeError: it has
        another size.
        """
    def fork(self, positions: int) -> Kv:
        """Another one that shares the first positions. NativeError: they are not written."""
    def block(self, index: int) -> KvBlock:
        """A block that never changes: of one that is not full, a copy. NativeError: nothing is written there."""

Row = tuple[int, int, Kv, Adapter | None, float, bool]
"""token, position, session, adapter (None: the base), the scale of its branches, whether its logits are wanted."""

class Logits:
    """What a step gives: float32 [wanted rows, width]. width: the most logits that one of them has, and no less than
    the model's; beyond those that a row has, they are -inf.
    """

    def log_probabilities(self, row: int, chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]:
        """Of the softmax of a row: of the token that was chosen, and of the `top` likeliest with their tokens."""
    @property
    def array(self) -> NDArray[np.float32]:
        """float32 [rows, width], not copied. Imports numpy."""

class Sampler:
    """Chooses the tokens of one generation. See `bedplate.runtime.sampling.Sampling`. ends: tokens that are banned as
    long as fewer than min_tokens were chosen. prompt: tokens that the repetition penalty counts too.
    """

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition: float,
        presence: float,
        frequency: float,
        bias: Sequence[tuple[int, float]],
        banned: Sequence[int],
        ends: Sequence[int],
        min_tokens: int,
        seed: int,
        prompt: Sequence[int],
    ) -> None: ...
    def choose(self, logits: Logits, row: int = 0, mask: object = None) -> int | None:
        """The next token. None: no token is allowed. mask: an array of int32, with a bit for each token that is
        allowed, from the lowest on. NativeError: logits are not numbers.
        """
    def chances(self, logits: Logits, row: int = 0, mask: object = None) -> list[float]:
        """The chance of each token to be chosen. It takes a pass over the row for each: for tests."""

def quantize_with_offsets(
    *,
    values: NDArray[np.float32],
    group: int,
    importance: NDArray[np.float32] | None = None,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
) -> None:
    """Writes 4-bit codes [rows, columns] of values [rows, columns], with scales and offsets [rows, columns / group] of
    the least squared error, weighted by importance [columns]. The same bits with every instruction set.
    NativeError: shapes do not fit.
    """

def squares(values: NDArray[np.float32], found: NDArray[np.float32]) -> None:
    """Writes Σ x² of each row of values [rows, columns], summed in float64, to found [rows].
    NativeError: shapes do not fit.
    """

class Decoder:
    """A model. ropes: of each rotary embedding, frequencies [head_dim / 2], those of long texts (empty: the same), and
    the scale. embedding None: its rows are the head's. threads compute its steps, readers read it. meter: of its
    sessions' keys and values.

    Raises NativeError if sizes do not fit each other, or a file ends too early.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        vocab: int,
        max_positions: int,
        rules: Rules,
        ropes: Sequence[tuple[Sequence[float], Sequence[float], float]],
        embedding: Table | None,
        head: Matrix,
        norm: Norm,
        layers: Sequence[Layer],
        threads: int,
        readers: int,
        meter: Meter | None = None,
    ) -> None: ...
    def kv(
        self,
        half: bool,
        adapter: Adapter | None = None,
        of_long: bool = False,
        blocks: Sequence[KvBlock] = (),
        positions: int = 0,
    ) -> Kv:
        """A session for the layers of an adapter; half: float16, else float32. of_long: its text is a long one, see
        `ropes`. blocks: what holds its first positions. NativeError: they do not fit.
        """
    def check(self, adapter: Adapter) -> None:
        """NativeError: it is of another model."""
    def step(self, rows: Sequence[Row]) -> Logits:
        """Compute rows of any sessions, which have the same layers one after the other. Keys and values of the
        positions before each are there, or are of this step.
        NativeError: a row is out of bounds, or has other layers; nothing has changed then.
        """
    @property
    def threads(self) -> int: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

def unit_of_groups(part: Part, groups: int) -> float | None:
    """The number that row g of a 4-bit matrix holds in the columns of group g, if it is one and all else is zero."""

def return_memory() -> None:
    """Give memory that is free back to the system, where the C library can."""

def instruction_sets() -> list[str]:
    """What kernels are compiled for and this CPU can run, the best first."""

def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None:
    """Of decoders that are made from here on. NativeError: the CPU lacks it."""
