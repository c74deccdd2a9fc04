"""`evaluate`: a bundle against the float checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import TEXT, BuildToy, save_toy_model, toy_config

import bedplate
from bedplate.errors import BedplateError, CheckpointError, NotFoundError, RunError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def test_a_float_bundle_loses_nothing(float_bundle: bedplate.Bundle, toy_model: Path, text: Path) -> None:
    found = bedplate.evaluate(float_bundle, toy_model, text, kv="float32")
    assert [one.name for one in found] == ["base", "all", "qv"]
    assert len({one.float_nll for one in found}) == 3, "each adapter has a reference of its own"
    for one in found:
        assert one.positions > 100
        assert abs(one.mean_kl) < 1e-6 and abs(one.nll - one.float_nll) < 1e-4 and one.top1 > 0.99
        assert one.perplexity == pytest.approx(one.float_perplexity, rel=1e-3)


def test_keys_and_values_of_16_bits_cost_next_to_nothing(
    float_bundle: bedplate.Bundle, toy_model: Path, text: Path
) -> None:
    exact, rounded = (
        bedplate.evaluate(float_bundle, toy_model, text, adapters=[], kv=kv)[0]
        for kv in ("float32", "float16")
    )
    assert exact.mean_kl < rounded.mean_kl < 1e-5


@pytest.mark.parametrize("bundle", ["float_bundle", "toy_bundle"])
def test_programs_in_executorchs_own_runtime(
    bundle: str, toy_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    opened: bedplate.Bundle = request.getfixturevalue(bundle)
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:200])  # which fits the context of the programs
    ours, stock = (
        bedplate.evaluate(opened, toy_model, text, adapters=["all"], programs=programs)
        for programs in (False, True)
    )
    assert [one.name for one in stock] == ["base", "all"]
    for one, other in zip(ours, stock, strict=True):
        assert one.float_nll == pytest.approx(other.float_nll, abs=1e-6) and one.mean_kl != other.mean_kl
        if bundle == "float_bundle":
            assert abs(other.mean_kl) < 1e-6
        else:  # both have the same weights, and round activations otherwise
            assert one.mean_kl < 2 * other.mean_kl and other.mean_kl < 2 * one.mean_kl


def test_quantization_costs_something(toy_bundle: bedplate.Bundle, toy_model: Path, text: Path) -> None:
    base, eight = bedplate.evaluate(toy_bundle, toy_model, text, adapters=["all8"])
    assert (base.name, eight.name) == ("base", "all8")
    assert base.mean_kl > 1e-4 and eight.mean_kl > 1e-4 and base.top1 < 1


@pytest.mark.parametrize("recovery_rank", [0, 8])
def test_corrections_give_back_what_four_bits_lose(
    recovery_rank: int, build_toy: BuildToy, toy_model: Path, text: Path
) -> None:
    method = "offset" if recovery_rank == 0 else "plain"
    plain = build_toy(method="plain", programs=False)
    corrected = build_toy(method=method, recovery_rank=recovery_rank, programs=False)
    (loss,), (left,) = (bedplate.evaluate(one, toy_model, text) for one in (plain, corrected))
    assert left.mean_kl < 0.9 * loss.mean_kl


def test_another_model(toy_bundle: bedplate.Bundle, text: Path, tmp_path: Path) -> None:
    save_toy_model(tmp_path / "other", toy_config(), seed=9)
    with pytest.raises(CheckpointError, match=r"not what .* was built from"):
        bedplate.evaluate(toy_bundle, tmp_path / "other", text)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, NotFoundError, "no such file"),
        (b"", RunError, "holds no text"),
        (b"\xff\xfe", RunError, "UTF-8"),
    ],
    ids=["missing", "empty", "binary"],
)
def test_bad_texts(
    content: bytes | None,
    error: type[BedplateError],
    says: str,
    toy_bundle: bedplate.Bundle,
    toy_model: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error) as caught:
        bedplate.evaluate(toy_bundle, toy_model, file)
    assert says in str(caught.value) and caught.value.hint


def test_a_byte_order_mark_is_no_part_of_the_text(
    float_bundle: bedplate.Bundle, toy_model: Path, tmp_path: Path
) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("the quick brown fox")
    marked.write_text("the quick brown fox", encoding="utf-8-sig")
    found = [bedplate.evaluate(float_bundle, toy_model, file, adapters=[]) for file in (plain, marked)]
    assert found[0] == found[1]


def test_no_such_adapter(toy_bundle: bedplate.Bundle, toy_model: Path, text: Path) -> None:
    with pytest.raises(NotFoundError, match="no adapter 'nobody'"):
        bedplate.evaluate(toy_bundle, toy_model, text, adapters=["nobody"])
