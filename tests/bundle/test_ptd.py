"""The data file: ExecuTorch reads what we write, and we refuse whatever is not a whole data file."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bedplate.bundle import flat_tensor
from bedplate.bundle.flat_tensor import Layout
from bedplate.bundle.ptd import ALIGNMENT, read_ptd, write_ptd
from bedplate.constants import TENSOR, Constant
from bedplate.errors import BundleError, NotFoundError

GOLDEN = Path(__file__).parent.parent / "golden" / "three_keys.ptd"


def plain(name: str, data: bytes, dtype: str = "int4", shape: tuple[int, ...] = (4, 2)) -> Constant:
    return Constant.of(name, dtype, shape, f"test {name}", np.frombuffer(data, np.uint8))


def tensor(name: str, values: np.ndarray) -> Constant:
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return Constant.of(name, str(values.dtype), values.shape, TENSOR, data)


THREE = [
    tensor("norm.weight", np.arange(3, dtype=np.float32)),
    plain("q_proj.weight", b"\x12\x34\x56\x78"),
    plain("k_proj.weight", b"\x12\x34\x56\x78"),  # the same codes with other scales: another key
]


def test_golden_bytes(tmp_path: Path) -> None:
    write_ptd(tmp_path / "a.ptd", THREE)
    data = (tmp_path / "a.ptd").read_bytes()
    assert data == GOLDEN.read_bytes()
    assert data[4:16] == b"FT01" + b"FH01" + struct.pack("<I", 40)
    index, start, segments = struct.unpack_from("<QQQ", data, 24)
    assert (index, start, segments) == (433, 512, 132)
    assert data[512:] == np.arange(3, dtype="<f4").tobytes().ljust(ALIGNMENT, b"\0") + b"\x12\x34\x56\x78"


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    infos = write_ptd(tmp_path / "a.ptd", THREE)
    ptd = read_ptd(tmp_path / "a.ptd")
    assert [info.name for info in infos] == ["k_proj.weight", "norm.weight", "q_proj.weight"]
    assert list(ptd.entries) == sorted(constant.key for constant in THREE)
    for constant in THREE:
        assert ptd.data(constant.key).tobytes() == constant.data.tobytes()
        assert ptd.entries[constant.key].offset % ALIGNMENT == 0
    assert ptd.entries[THREE[0].key].layout == Layout(dtype="float32", shape=(3,))
    assert ptd.entries[THREE[1].key].layout is None


def test_equal_bytes_under_two_keys_are_stored_once(tmp_path: Path) -> None:
    write_ptd(tmp_path / "a.ptd", THREE)
    entries = read_ptd(tmp_path / "a.ptd").entries
    assert THREE[1].key != THREE[2].key
    assert entries[THREE[1].key].offset == entries[THREE[2].key].offset


def test_equal_constants_under_two_names_are_one_entry_and_two_names(tmp_path: Path) -> None:
    twins = [tensor(f"layers.{i}.norm.weight", np.ones(4, np.float32)) for i in range(2)]
    infos = write_ptd(tmp_path / "a.ptd", [*twins, *twins])
    assert [info.name for info in infos] == ["layers.0.norm.weight", "layers.1.norm.weight"]
    assert len(read_ptd(tmp_path / "a.ptd").entries) == 1


def test_one_key_for_two_contents_is_our_bug(tmp_path: Path) -> None:
    other = Constant(**{**vars(THREE[1]), "data": np.zeros(4, np.uint8)})
    with pytest.raises(AssertionError, match=r"q_proj\.weight: the key .* names something else already"):
        write_ptd(tmp_path / "a.ptd", [THREE[1], other])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_whose_layout_does_not_fit_its_bytes_is_our_bug(tmp_path: Path) -> None:
    wrong = Constant(**{**vars(THREE[0]), "shape": (4,)})
    with pytest.raises(AssertionError, match=r"norm\.weight: 12 bytes"):
        write_ptd(tmp_path / "a.ptd", [wrong])


def test_leaves_out_what_the_foundation_holds(tmp_path: Path) -> None:
    infos = write_ptd(tmp_path / "a.ptd", THREE, leave_out={THREE[0].key})
    assert (
        {info.key for info in infos}
        == read_ptd(tmp_path / "a.ptd").entries.keys()
        == {c.key for c in THREE[1:]}
    )


def test_an_empty_file_and_an_empty_constant(tmp_path: Path) -> None:
    write_ptd(tmp_path / "none.ptd", [])
    assert read_ptd(tmp_path / "none.ptd").entries == {}
    empty = tensor("empty", np.zeros((0, 3), np.float32))
    write_ptd(tmp_path / "a.ptd", [empty, THREE[1]])
    assert read_ptd(tmp_path / "a.ptd").data(empty.key).size == 0


def test_no_such_key_or_file(tmp_path: Path) -> None:
    write_ptd(tmp_path / "a.ptd", THREE)
    with pytest.raises(NotFoundError, match="no constant has the key"):
        read_ptd(tmp_path / "a.ptd").data("0" * 64)
    with pytest.raises(NotFoundError, match=r"b\.ptd"):
        read_ptd(tmp_path / "b.ptd")


def test_packs_in_the_memory_of_the_largest_constant(tmp_path: Path) -> None:
    size = 1 << 20

    def stream() -> Iterator[Constant]:
        for i in range(32):
            yield plain(f"w{i}", bytes([i]) * size, "uint8", (size,))

    tracemalloc.start()
    try:
        write_ptd(tmp_path / "a.ptd", stream())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.ptd").stat().st_size > 32 * size
    assert peak < 6 * size


def test_a_failing_stream_leaves_the_old_file(tmp_path: Path) -> None:
    write_ptd(tmp_path / "a.ptd", THREE)
    before = (tmp_path / "a.ptd").read_bytes()

    def stream() -> Iterator[Constant]:
        yield THREE[0]
        raise RuntimeError("the checkpoint ended")

    with pytest.raises(RuntimeError, match="ended"):
        write_ptd(tmp_path / "a.ptd", stream())
    assert [path.name for path in tmp_path.iterdir()] == ["a.ptd"]
    assert (tmp_path / "a.ptd").read_bytes() == before


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ptd"
    whole = GOLDEN.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"a\.ptd: not a whole data file"):
            read_ptd(path)


def test_a_damaged_index_never_raises_anything_else(tmp_path: Path) -> None:
    """A reader that trusts the index would die of it, or read beyond the file."""
    path = tmp_path / "a.ptd"
    whole = GOLDEN.read_bytes()
    rng = random.Random(7)
    refused = 0
    for trial in range(1500):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(480)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            ptd = read_ptd(path)
        except BundleError:
            refused += 1
            continue
        for key in ptd.entries:
            assert len(ptd.data(key)) == ptd.entries[key].nbytes, trial
    assert refused > 500


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (4, b"FT02", "does not begin with FT01"),
        (8, b"FH02", "does not begin with FT01"),
        (32, struct.pack("<Q", 1 << 63), "its header tells of"),
        (24, struct.pack("<Q", (1 << 64) - 1), "its header tells of"),
        (0, struct.pack("<I", (1 << 32) - 1), "refers to a byte"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, offset: int, value: bytes, says: str) -> None:
    damaged = bytearray(GOLDEN.read_bytes())
    damaged[offset : offset + len(value)] = value
    (tmp_path / "a.ptd").write_bytes(damaged)
    with pytest.raises(BundleError, match=says):
        read_ptd(tmp_path / "a.ptd")


# ExecuTorch's Python code uses functions of Python and torch that are deprecated.
executorch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SCALAR_NAMES = {"float32": "FLOAT", "int8": "CHAR", "uint8": "BYTE", "int64": "LONG", "float16": "HALF"}


@executorch_warns
@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"k" * 1025: (0, None)}, "a vector of 1025 items, where no more than 1024 are known"),
        ({"k": (0, Layout("int8", (1,) * 17))}, "a vector of 17 items, where no more than 16 are known"),
    ],
)
def test_what_many_references_could_share_is_short(
    entries: dict[str, tuple[int, Layout | None]], says: str
) -> None:
    """A thousand references to a million bytes would take a thousand million."""
    index = flat_tensor.encode([flat_tensor.Segment(0, 1)], entries)
    with pytest.raises(flat_tensor.MalformedError, match=says):
        flat_tensor.decode(index, *struct.unpack_from("<I", index))


def test_an_index_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ptd"
    head = bytearray(GOLDEN.read_bytes())
    struct.pack_into("<QQ", head, 24, 1 << 40, 1 << 41)
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(1 << 42)  # of which nothing is on disk
    with pytest.raises(BundleError, match="its index ends at byte"):
        read_ptd(path)


def test_executorch_reads_the_same(tmp_path: Path) -> None:
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    rng = random.Random(3)
    constants = []
    for i in range(150):  # shapes () to 4-D, empty ones too; few values, so that bytes and keys repeat
        shape = [rng.randrange(5) for _ in range(rng.randrange(5))]
        held = tensor(f"c{i}", np.full(shape, rng.randrange(3), rng.choice(list(SCALAR_NAMES))))
        layout = TENSOR if rng.random() < 0.5 else "dense"
        constants.append(Constant.of(held.name, held.dtype, held.shape, layout, held.data))
    layouts = {c.key: c for c in constants if c.is_tensor}
    write_ptd(tmp_path / "a.ptd", constants)

    read = FlatTensorSerializer().deserialize(Cord((tmp_path / "a.ptd").read_bytes()))
    assert read.named_data.keys() == {c.key for c in constants}
    assert len(read.buffers) == len({c.data.tobytes() for c in constants}) < len(read.named_data)
    for constant in constants:
        entry = read.named_data[constant.key]
        assert read.buffers[entry.buffer_index] == constant.data.tobytes()
        if constant.key not in layouts:
            assert entry.tensor_layout is None
            continue
        assert tuple(entry.tensor_layout.sizes) == constant.shape
        assert entry.tensor_layout.dim_order == list(range(len(constant.shape)))
        assert entry.tensor_layout.scalar_type.name == SCALAR_NAMES[constant.dtype]


@executorch_warns
def test_we_read_what_executorch_writes(tmp_path: Path) -> None:
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    layout = TensorLayout(ScalarType.FLOAT, [1, 2], [0, 1])
    payload = DataPayload(
        buffers=[b"12345678", b"xyz"],
        named_data={
            "a": DataEntry(buffer_index=0, alignment=16, tensor_layout=layout),
            "b": DataEntry(buffer_index=1, alignment=16, tensor_layout=None),
        },
    )
    (tmp_path / "a.ptd").write_bytes(bytes(FlatTensorSerializer().serialize(payload)))
    ptd = read_ptd(tmp_path / "a.ptd")
    assert (ptd.data("a").tobytes(), ptd.data("b").tobytes()) == (b"12345678", b"xyz")
    assert ptd.entries["a"].layout == Layout(dtype="float32", shape=(1, 2))


@executorch_warns
def test_the_runtime_loads_it(tmp_path: Path) -> None:
    """ExecuTorch's own loader takes our file in place of the one that its exporter wrote."""
    import torch
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.extension.pybindings import portable_lib

    linear, inputs = torch.nn.Linear(3, 2), torch.arange(3.0).reshape(1, 3)
    edge = to_edge(torch.export.export(linear, (inputs,)))
    program = edge.to_executorch(ExecutorchBackendConfig(external_constants=True))
    constants = []
    for name, parameter in linear.named_parameters():
        constant = tensor(name, parameter.detach().numpy())
        constants.append(Constant(**{**vars(constant), "key": name}))
    write_ptd(tmp_path / "a.ptd", [THREE[1], *constants])
    data = (tmp_path / "a.ptd").read_bytes()
    module = portable_lib._load_for_executorch_from_buffer(program.buffer, data)
    (output,) = module.forward((inputs,))
    torch.testing.assert_close(output, linear(inputs))
