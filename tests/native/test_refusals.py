"""What does not fit is refused in words, whatever its size, and nothing has changed then."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import formula
import numpy as np
import pytest
from formula_linears import stored
from random_models import EIGHT, FLOAT, FOUR, Kind, Random, run

from bedplate import _native
from bedplate._native import BackMatrix, Branch, Layer, Matrix, NativeError, Table

HUGE, LARGE = 2**63 - 1, 2**31


def zeros(size: int) -> _native.Source:
    return stored(bytes(size))


def part(rows: int, columns: int, bits: int, group: int, codes: int, scales: int) -> _native.Part:
    return (rows, columns, bits, group, zeros(codes), zeros(scales))


class TestSizesOfMatrices:
    @pytest.mark.parametrize(
        ("wrong", "complaint"),
        [
            (part(0, 32, 8, 0, 0, 0), "size out of bounds"),
            (part(1, 0, 8, 0, 0, 4), "size out of bounds"),
            (part(-1, -32, 8, 0, 32, 4), "size out of bounds"),
            (part(HUGE, HUGE, 8, 0, 1, 4), "size out of bounds"),
            (part(LARGE, LARGE, 32, 0, 0, 0), "size out of bounds"),
            (part(2**24, 2**24, 8, 0, 0, 2**26), "bytes of a matrix"),
            (part(2, 32, 16, 0, 128, 8), "4, 8 or 32 bits"),
            (part(2, 32, 0, 0, 0, 8), "4, 8 or 32 bits"),
            (part(2, 32, -8, 0, 64, 8), "4, 8 or 32 bits"),
            (part(2, 33, 4, 0, 33, 8), "even number of columns"),
            (part(2, 32, 8, 0, 63, 8), "bytes of a matrix"),
            (part(2, 32, 8, 0, 64, 4), "scales of a matrix"),
            (part(2, 32, 4, 32, 32, 6), "scales of a matrix"),
            (part(2, 32, 32, 0, 256, 8), "scales of a matrix"),
            (part(2, 64, 4, 16, 64, 16), "a group of columns"),
            (part(2, 64, 4, 48, 64, 8), "a group of columns"),
            (part(2, 64, 4, -32, 64, 8), "a group of columns"),
            (part(2, 64, 4, HUGE - 31, 64, 8), "a group of columns"),
            (part(2, 64, 8, 32, 128, 8), "a group of columns"),
            (part(2, 64, 32, 32, 512, 8), "a group of columns"),
        ],
    )
    @pytest.mark.parametrize(
        "make", [lambda p: Matrix([p]), lambda p: Matrix([FITS, p]), Table, lambda p: back(p)]
    )
    def test_of_one(self, make: Callable[[Any], Any], wrong: _native.Part, complaint: str) -> None:
        with pytest.raises(NativeError, match=f"{complaint}|of several kinds|8 or 32 bits"):
            make(wrong)

    def test_of_none(self) -> None:
        with pytest.raises(NativeError, match="no parts"):
            Matrix([])

    def test_of_several_kinds(self) -> None:
        for other in (part(2, 64, 8, 0, 128, 8), part(2, 32, 4, 0, 32, 8), part(2, 32, 32, 0, 256, 0)):
            with pytest.raises(NativeError, match="several kinds"):
                Matrix([FITS, other])

    def test_numbers_that_no_size_has(self) -> None:
        for wrong in (2**63, -(2**63) - 1, 1.5, "2", None):
            with pytest.raises(TypeError):
                Matrix([(wrong, 32, 8, 0, zeros(64), zeros(8))])  # type: ignore[list-item]

    @pytest.mark.parametrize(
        ("offsets", "complaint"),
        [
            ((1, 32, 1.0, zeros(2), zeros(8)), "fewer offsets than groups"),
            ((-2, 32, 1.0, zeros(4), zeros(8)), "fewer offsets than groups"),
            ((HUGE, 32, 1.0, zeros(4), zeros(8)), "fewer offsets than groups"),
            ((2, 0, 1.0, zeros(4), zeros(8)), "do not divide"),
            ((2, -32, 1.0, zeros(4), zeros(8)), "do not divide"),
            ((2, 48, 1.0, zeros(4), zeros(8)), "do not divide"),
            ((2, 32, 1.0, zeros(3), zeros(8)), "offsets do not fit"),
            ((2, 32, 1.0, zeros(4), zeros(4)), "offsets do not fit"),
        ],
    )
    def test_of_offsets(self, offsets: _native.Offsets, complaint: str) -> None:
        with pytest.raises(NativeError, match=complaint):
            Matrix([part(2, 64, 4, 32, 64, 8)], offsets)

    def test_offsets_beside_what_has_no_groups(self) -> None:
        with pytest.raises(NativeError, match="without groups"):
            Matrix([FITS], (1, 32, 1.0, zeros(2), zeros(8)))
        with pytest.raises(NativeError, match="matrix of one part"):
            Matrix([FITS, FITS], (1, 32, 1.0, zeros(2), zeros(8)))

    @pytest.mark.parametrize("count", [0, 4, 7, 12])
    def test_of_a_bias(self, count: int) -> None:
        with pytest.raises(NativeError, match="a bias does not fit"):
            Matrix([FITS], None, zeros(count))


FITS = part(2, 32, 8, 0, 64, 8)


WIDE = part(64, 2, 32, 0, 512, 0)


def numbers(*values: int) -> _native.Source:
    return stored(np.array(values, np.int64).tobytes())


def table(rows: int, columns: int) -> Table:
    return Random(0).linear(rows, columns).table()


def back(one: _native.Part, column: int = 0, rank: int = 1, linear: int = 0, narrow: int = 0) -> BackMatrix:
    return BackMatrix(one, column, rank, linear, narrow)


class TestBranches:
    @pytest.mark.parametrize(
        ("column", "rank", "narrow", "complaint"),
        [
            (0, 33, 0, "columns that are not there"),
            (1, 32, 0, "columns that are not there"),
            (-1, 4, 0, "columns that are not there"),
            (0, 0, 0, "columns that are not there"),
            (0, -1, 0, "columns that are not there"),
            (HUGE, HUGE, 0, "columns that are not there"),
            (1, HUGE, 0, "columns that are not there"),
            (0, 4, -1, "narrow values that are not there"),
        ],
    )
    def test_columns(self, column: int, rank: int, narrow: int, complaint: str) -> None:
        with pytest.raises(NativeError, match=complaint):
            back(FITS, column, rank, 0, narrow)

    def test_four_bits(self) -> None:
        with pytest.raises(NativeError, match="8 or 32 bits"):
            back(part(2, 32, 4, 0, 32, 8))

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"columns": 32}, "another input"),
            ({"rows": 8}, "other outputs"),
            ({"linear": 1}, "linear that is not there"),
            ({"linear": -1}, "linear that is not there"),
            ({"linear": HUGE}, "linear that is not there"),
            ({"narrow": 1}, "narrow values that are not there"),
            ({"narrow": HUGE}, "narrow values that are not there"),
            ({"ranks": 5000, "rank": 5}, "too wide"),
        ],
    )
    def test_of_an_adapter(self, change: dict[str, int], complaint: str) -> None:
        sizes = {"columns": 64, "rows": 64, "linear": 0, "narrow": 0, "rank": 4, "ranks": 4} | change
        wide = part(sizes["rows"], sizes["rank"], 32, 0, 4 * sizes["rows"] * sizes["rank"], 0)
        narrow = part(sizes["ranks"], sizes["columns"], 32, 0, 4 * sizes["ranks"] * sizes["columns"], 0)
        branch = Branch(Matrix([narrow]), [back(wide, 0, sizes["rank"], sizes["linear"], sizes["narrow"])])
        adapter = adapter_of(branch)
        decoder = Random(0).model().decoder()
        with pytest.raises(NativeError, match=complaint):
            decoder.check(adapter)
        kv = decoder.kv(half=True)
        with pytest.raises(NativeError, match=complaint):
            decoder.step([(1, 0, kv, None, 1.0, True), (1, 1, kv, adapter, 1.0, True)])
        assert kv.nbytes == 0

    def test_of_another_model(self) -> None:
        for places in ([], [(None, [])] * 3, [(None, [])] * 5):
            with pytest.raises(NativeError, match="four places"):
                adapter_layer(places=places)

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"base": 2}, "a layer that the model has not"),
            ({"base": -1}, "a layer that the model has not"),
            ({"base": HUGE}, "a layer that the model has not"),
            ({"norms": [(260, None), *[(None, None)] * 3]}, "a norm of an adapter"),
            ({"norms": [(None, 256), *[(None, None)] * 3]}, "a norm of an adapter"),
            ({"norms": [(None, None), (256, None), *[(None, None)] * 2]}, "a norm of an adapter"),
            ({"norms": [(None, None)] * 3}, "a layer has four norms"),
            ({"head_norms": [64, None]}, "a norm of an adapter"),
            ({"head_norms": [None]}, "a layer has four norms"),
            ({"affines": [[(256, None)]]}, "not of the linears that are there"),
            ({"affines": [[(260, None), (None, None), (None, None)]]}, "do not fit their linear"),
            ({"affines": [[(256, 252), (None, None), (None, None)]]}, "do not fit their linear"),
            ({"affines": [[(None, None), (None, None), (None, 124)]]}, "do not fit their linear"),
            ({"affines": [[], [(256, None)] * 2]}, "not of the linears that are there"),
        ],
        ids=str,
    )
    def test_layers_that_do_not_fit(self, fields: dict[str, Any], complaint: str) -> None:
        def sized(value: Any) -> Any:
            """Sizes in bytes become zeros."""
            if isinstance(value, (list, tuple)):
                return type(value)(map(sized, value))
            return None if value is None else zeros(value)

        if "base" not in fields:
            fields = {name: sized(value) for name, value in fields.items()}
        if "affines" in fields:
            affines = [*fields["affines"], *[[]] * 4][:4]
            fields = {"places": [(None, one) for one in affines]}
        decoder = Random(0).model().decoder()
        with pytest.raises(NativeError, match=complaint):
            decoder.check(adapter_of(layers=[adapter_layer(), adapter_layer(**fields)]))

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"layers": []}, "no layers"),
            ({"layers": [None]}, "incompatible|none"),
            ({"vocab": 49}, "fewer tokens"),
            ({"vocab": 51}, "a token has no row"),
            ({"vocab": 0}, "out of bounds"),
            ({"vocab": HUGE}, "out of bounds"),
            ({"norm": (260, None)}, "a norm of an adapter"),
            ({"norm": (255, None)}, "float32"),
            ({"norm": (256, 256)}, "a norm of an adapter"),
        ],
        ids=str,
    )
    def test_adapters_that_do_not_fit(self, fields: dict[str, Any], complaint: str) -> None:
        if "norm" in fields:
            fields = {"norm": tuple(size and zeros(size) for size in fields["norm"])}
        decoder = Random(0).model().decoder()
        with pytest.raises((NativeError, TypeError), match=complaint):
            decoder.check(adapter_of(**fields))

    @pytest.mark.parametrize(
        ("make", "complaint"),
        [
            (lambda: {"of_head": True}, "does not serve as embedding"),
            (lambda: {"table": table(49, 64)}, "embedding does not fit"),
            (lambda: {"table": table(50, 63)}, "embedding does not fit"),
            (lambda: {"narrow": table(50, 2)}, "lacks a half"),
            (lambda: {"back": back(FITS)}, "lacks a half"),
            (lambda: {"narrow": table(49, 2), "back": back(WIDE, 0, 2)}, "the branch at the embedding"),
            (lambda: {"narrow": table(50, 3), "back": back(WIDE, 0, 2)}, "the branch at the embedding"),
            (lambda: {"narrow": table(50, 1), "back": back(FITS)}, "the branch at the embedding"),
            (lambda: {"narrow": table(50, 5000), "back": back(WIDE, 0, 2)}, "the branch at the embedding"),
            (lambda: {"ids": zeros(8)}, "not as many rows"),
            (lambda: {"ids": zeros(7), "rows": table(1, 64)}, "int64"),
            (lambda: {"rows": table(1, 64)}, "not as many rows"),
            (lambda: {"ids": numbers(50), "rows": table(1, 64)}, "not in the vocabulary"),
            (lambda: {"ids": numbers(-HUGE - 1), "rows": table(1, 64)}, "not in the vocabulary"),
            (lambda: {"ids": numbers(2, 1), "rows": table(2, 64)}, "do not ascend"),
            (lambda: {"ids": numbers(1, 2), "rows": table(2, 63)}, "rows of the embedding do not fit"),
        ],
    )
    def test_embeddings_that_do_not_fit(self, make: Callable[[], Any], complaint: str) -> None:
        with pytest.raises(NativeError, match=complaint):
            made = adapter_of(embedding=_native.AdapterEmbedding(**make()))
            Random(0).model().decoder().check(made)

    @pytest.mark.parametrize(
        ("make", "complaint"),
        [
            (lambda: {"matrix": matrix(49, 64)}, "head does not fit"),
            (lambda: {"matrix": matrix(50, 63)}, "head does not fit"),
            (lambda: {"change": (None, [(zeros(196), None)])}, "do not fit their linear"),
            (lambda: {"change": (None, [(None, None)] * 2)}, "not of the linears that are there"),
            (lambda: {"change": (Branch(matrix(2, 63), []), [])}, "another input"),
            (lambda: {"change": (Branch(matrix(2, 64), [back(WIDE, 0, 2)]), [])}, "other outputs"),
            (lambda: {"ids": numbers(1)}, "not as many rows"),
            (lambda: {"ids": numbers(50), "rows": matrix(1, 64)}, "not in the vocabulary"),
            (lambda: {"ids": numbers(3, 3), "rows": matrix(2, 64)}, "do not ascend"),
            (lambda: {"ids": numbers(1, 2), "rows": matrix(2, 63)}, "rows of the head do not fit"),
            (lambda: {"ids": numbers(1, 2), "rows": Matrix([FITS])}, "no float32 numbers"),
        ],
    )
    def test_heads_that_do_not_fit(self, make: Callable[[], Any], complaint: str) -> None:
        with pytest.raises(NativeError, match=complaint):
            made = adapter_of(head=_native.AdapterHead(**make()))
            Random(0).model().decoder().check(made)

    def test_nothing_in_place_of_something(self) -> None:
        for make in (
            lambda: Branch(None, []),  # type: ignore[arg-type]
            lambda: Branch(Matrix([FITS]), [None]),  # type: ignore[list-item]
            lambda: Layer(zeros(0), zeros(0), [([None], None)] * 4),  # type: ignore[list-item]
        ):
            with pytest.raises((TypeError, NativeError)):
                assert adapter_of(make()).nbytes  # type: ignore[arg-type, no-untyped-call]


def adapter_layer(**fields: Any) -> _native.AdapterLayer:
    """That changes nothing but what `fields` say."""
    plain = {"base": 0, "norms": [(None, None)] * 4, "head_norms": [None, None], "places": [(None, [])] * 4}
    return _native.AdapterLayer(**(plain | fields))


def adapter_of(branch: Branch | None = None, **fields: Any) -> _native.Adapter:
    """Of two layers, with a branch at each output of attention, and what `fields` say."""
    places: list[_native.Change] = [(None, []), (branch, []), (None, []), (None, [])]
    plain = {
        "vocab": 50,
        "layers": [adapter_layer(base=base, places=places) for base in range(2)],
        "norm": (None, None),
        "embedding": _native.AdapterEmbedding(),
        "head": _native.AdapterHead(),
        "readers": 1,
    }
    return _native.Adapter(**(plain | fields))


def matrix(rows: int, columns: int) -> Matrix:
    return Random(0).linear(rows, columns).matrix()


class TestModels:
    @pytest.mark.parametrize(
        "change",
        [
            {name: value}
            for name in ("dim", "heads", "kv_heads", "head_dim", "hidden", "vocab")
            for value in (0, -1, 1, 3, 2**24, 2**24 + 1, HUGE, -HUGE)
        ]
        + [{"max_positions": value} for value in (0, -1, 2**24 + 1, HUGE)]
        + [{"norm_eps": value} for value in (0.0, -1e-5, np.nan, np.inf, -np.inf, 1e-50)]
        + [
            {name: value}
            for name in ("embedding_scale", "residual_scale", "attention_scale", "logit_scale")
            for value in (0.0, -1.0, np.nan, np.inf)
        ]
        + [{name: value} for name in ("score_cap", "logit_cap", "query_growth") for value in (-1.0, np.nan)]
        + [{"growth_positions": value} for value in (0, -HUGE)]
        + [{"ropes": [([1.0] * count, (), 1.0)]} for count in (0, 7, 9)]
        + [{"ropes": [([1.0] * 8, [1.0] * count, 1.0)]} for count in (1, 7, 9)]
        + [{"ropes": [([value] * 8, (), 1.0)]} for value in (np.nan, np.inf)]
        + [{"ropes": [([1.0] * 8, [value] * 8, 1.0)]} for value in (np.nan, np.inf)]
        + [{"ropes": [([1.0] * 8, (), value)]} for value in (0.0, np.nan)]
        + [{"ropes": []}]
        + [{"norm": count} for count in (3, 4 * 63, 4 * 64 + 1, 4 * 65)]
        + [{"threads": value} for value in (0, -1, 1025, 2**31 - 1)]
        + [{"layers": []}]
        + [{part: shape} for part in ("head", "embedding") for shape in ((49, 64), (50, 63))],
        ids=str,
    )
    def test_sizes_that_do_not_fit(self, change: dict[str, Any]) -> None:
        model, random = Random(0).model(), Random(0)
        made = {
            "head": lambda shape: matrix(*shape),
            "embedding": lambda shape: random.linear(*shape).table(),
            "norm": lambda size: (zeros(size), None),
        }
        change = {name: made[name](value) if name in made else value for name, value in change.items()}
        if set(change) <= set(vars(model.rules)):
            change = {"rules": dataclasses.replace(model.rules, **change).native(model.head_dim)}
        with pytest.raises(NativeError):
            model.decoder(**{"threads": 1, **change})

    def test_an_embedding_of_four_bits_in_the_head(self) -> None:
        with pytest.raises(NativeError, match="does not serve as embedding"):
            Random(0).model(kind=FOUR, tied=True).decoder()

    @pytest.mark.parametrize("place", range(4))
    def test_layers_of_other_sizes(self, place: int) -> None:
        """Each place with a linear too few, of other rows, of other columns."""
        model = Random(0).model(layers=1)
        layer = model.layers[0]
        fitting = [[linear.matrix() for linear in one.linears] for one in layer.places]
        first = layer.places[place].linears[0]
        for wrong in (
            fitting[place][1:],
            [*fitting[place], fitting[place][0]],
            [matrix(first.rows + 1, first.columns), *fitting[place][1:]],
            [matrix(first.rows, first.columns + 1), *fitting[place][1:]],
        ):
            places = [(wrong if at == place else weights, None) for at, weights in enumerate(fitting)]
            made = Layer(**{**parts_of(layer), "places": places})
            with pytest.raises(NativeError, match=r"a layer lacks a linear|another shape"):
                model.decoder(layers=[made])

    @pytest.mark.parametrize("size", [252, 260])
    @pytest.mark.parametrize("place", range(4))
    def test_norms_of_other_sizes(self, place: int, size: int) -> None:
        model = Random(0).model(layers=1)
        fitting = parts_of(model.layers[0])
        for wrong in (
            (zeros(size), None),
            (zeros(256), zeros(size)),
            (None, zeros(256)),
            (zeros(256), zeros(256)),
        ):
            norms = [*fitting["norms"][:place], wrong, *fitting["norms"][place + 1 :]]
            with pytest.raises(NativeError, match="a norm does not fit"):
                model.decoder(layers=[Layer(**{**fitting, "norms": norms})])
        with pytest.raises(NativeError, match="float32"):
            Layer(**{**fitting, "norms": [(zeros(255), None), *fitting["norms"][1:]]})

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"rope": 1}, "rotary embedding that is not there"),
            ({"rope": -2}, "rotary embedding that is not there"),
            ({"window": -1}, "a window of less than nothing"),
            ({"head_norms": (4 * 15, 4 * 16)}, "do not fit the heads"),
            ({"head_norms": (4 * 16, None)}, "do not fit the heads"),
            ({"head_norms": (4 * 64, 4 * 16)}, "do not fit the heads"),
            ({"norms": [(None, None)] * 3}, "a layer has four norms"),
        ],
        ids=str,
    )
    def test_layers_that_no_model_has(self, change: dict[str, Any], complaint: str) -> None:
        model = Random(0).model(layers=1)
        if "head_norms" in change:
            change = {"head_norms": [None if size is None else zeros(size) for size in change["head_norms"]]}
        with pytest.raises(NativeError, match=complaint):
            model.decoder(layers=[Layer(**{**parts_of(model.layers[0]), **change})])

    def test_an_activation_that_is_not_known(self) -> None:
        with pytest.raises(NativeError, match="an activation that is not known"):
            dataclasses.replace(Random(0).model().rules, activation="selu").native(16)


def parts_of(layer: formula.Layer) -> dict[str, Any]:
    """What the native layer is made of."""
    return {
        "norms": [(None, None) if norm is None else norm.native() for norm in layer.norms],
        "head_norms": [None, None],
        "rope": 0,
        "window": 0,
        "places": [([linear.matrix() for linear in one.linears], None) for one in layer.places],
    }


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"token": -1}, "not in the vocabulary"),
        ({"token": 50}, "not in the vocabulary"),
        ({"token": HUGE}, "not in the vocabulary"),
        ({"position": -1}, "beyond the model's"),
        ({"position": 512}, "beyond the model's"),
        ({"position": HUGE}, "beyond the model's"),
        ({"kv": None}, "no session"),
        ({"kv": {"layers": 1}}, "of another model"),
        ({"kv": {"head_dim": 32}}, "of another model"),
        ({"kv": {"kv_heads": 4}}, "of another model"),
    ],
    ids=str,
)
def test_a_row_out_of_bounds_changes_nothing(wrong: dict[str, Any], complaint: str) -> None:
    decoder = Random(0).model().decoder(2)
    kv, text = decoder.kv(half=True), [1, 2, 3]
    expected = run(decoder, [*text, 4], half=True)
    decoder.step([(token, at, kv, None, 1.0, False) for at, token in enumerate(text)])
    before = kv.nbytes
    if isinstance(wrong.get("kv"), dict):
        wrong = {"kv": Random(0).model(**wrong["kv"]).decoder().kv(half=True)}
    row = {"token": 1, "position": 3, "kv": kv, "adapter": None, "scale": 1.0, "wanted": True}
    with pytest.raises((NativeError, TypeError), match=f"{complaint}|incompatible"):
        decoder.step([(7, 200, kv, None, 1.0, True), tuple((row | wrong).values())])  # type: ignore[list-item]
    assert kv.nbytes == before
    np.testing.assert_array_equal(decoder.step([(4, 3, kv, None, 1.0, True)]).array[0], expected[3])


def test_a_step_of_no_rows() -> None:
    with pytest.raises(NativeError, match="no rows"):
        Random(0).model().decoder().step([])


def test_an_unknown_instruction_set() -> None:
    before = _native.instruction_set()
    with pytest.raises(NativeError, match="no instruction set mmx"):
        _native.use_instruction_set("mmx")
    assert _native.instruction_set() == before == _native.instruction_sets()[0]


class TestUnitOfGroups:
    """The directions that stand for offsets: row g is one number in the columns of group g, and zero elsewhere."""

    @staticmethod
    def directions(
        groups: int, columns: int, unit: int = 7, rows: int | None = None, changed: int | None = None
    ) -> _native.Part:
        """changed: a byte of the codes that has another bit."""
        codes = np.full((rows or groups, columns), 8, np.uint8)
        for g in range(groups):
            codes[g, g * columns // groups : (g + 1) * columns // groups] += np.uint8(unit)
        scales = np.full((rows or groups, columns // 32), 0x3E00, np.uint16)  # 0.125
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        if changed is not None:
            packed.reshape(-1)[changed] ^= np.uint8(1)
        return (rows or groups, columns, 4, 32, stored(packed.tobytes()), stored(scales.tobytes()))

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_is_found(self, groups: int) -> None:
        assert _native.unit_of_groups(self.directions(groups, 128), groups) == 0.875
        assert _native.unit_of_groups(self.directions(groups, 128, rows=9), groups) == 0.875

    def test_is_not_there(self) -> None:
        whole = self.directions(4, 128)
        for groups in (0, -1, 1, 2, 3, 5, 128, HUGE):
            assert _native.unit_of_groups(whole, groups) is None
        for at in (0, 20, 70, 255):
            assert _native.unit_of_groups(self.directions(4, 128, changed=at), 4) is None
        assert _native.unit_of_groups(part(4, 128, 8, 0, 512, 16), 4) is None

    def test_of_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(NativeError, match="do not fit its shape"):
            _native.unit_of_groups(part(4, 128, 4, 32, 256, 31), 4)


class TestFiles:
    """That hold less than was said."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[int]:
        (tmp_path / "short").write_bytes(bytes(1000))
        with (tmp_path / "short").open("rb") as file:
            yield file.fileno()

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize(
        ("kind", "short"),
        [(FLOAT, "codes"), (EIGHT, "codes"), (EIGHT, "scales"), (FOUR, "codes"), (FOUR, "scales")],
    )
    def test_end_too_early(self, file: int, kind: Kind, short: str, threads: int) -> None:
        *sizes, codes, scales = Random(0).linear(50, 64, kind).part()
        of = {"codes": codes, "scales": scales}
        size = of[short][2]
        of[short] = (file, 1001 - size, size) if size <= 1001 else (file, 0, size)
        head = Matrix([(*sizes, of["codes"], of["scales"])])  # type: ignore[list-item]
        with pytest.raises(NativeError, match="ends too early"):
            Random(0).model(kind=kind).decoder(threads, head=head)

    def test_of_an_adapter(self, file: int) -> None:
        wide = part(64, 16, 8, 0, 64 * 16, 64 * 4)
        narrow = (16, 64, 8, 0, (file, 0, 16 * 64), zeros(64))
        branch = Branch(Matrix([narrow]), [back(wide, 0, 16)])
        with pytest.raises(NativeError, match="ends too early"):
            adapter_of(branch)

    def test_that_are_none(self) -> None:
        closed = os.open(os.devnull, os.O_RDONLY)
        os.close(closed)
        with pytest.raises(NativeError, match="cannot be read"):
            Random(0).model().decoder(norm=((closed, 0, 256), None))
        for wrong in ((0, -1, 256), (0, 0, -256)):
            with pytest.raises(NativeError, match="out of bounds"):
                Random(0).model().decoder(norm=(wrong, None))


def test_weights_say_what_they_take() -> None:
    random = Random(0)
    for kind, at_least in ((FLOAT, 64 * 64 * 4), (EIGHT, 64 * 64), (FOUR, 64 * 64 // 2 + 64 * 2 * 2)):
        assert at_least <= random.linear(64, 64, kind).matrix().nbytes <= 1.1 * at_least
    model = random.model()
    adapter = random.adapter(model, 16)
    floats = sum(
        b.narrow.values.size + sum(back.whole.values[:, : back.rank].size for back in b.backs)
        for layer in adapter.layers
        for change in layer.places
        if (b := change.branch) is not None
    )
    assert adapter.native().nbytes == pytest.approx(4 * floats, rel=0.1)
    weights = sum(
        linear.values.size for layer in model.layers for place in layer.places for linear in place.linears
    )
    assert model.decoder().nbytes > 4 * (weights + 2 * 50 * 64)
