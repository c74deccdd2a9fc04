"""The manifest: the same value is the same bytes, and whatever is not a manifest is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from toy_bundle import MODEL

from bedplate.bundle import manifest, strict_json
from bedplate.bundle.manifest import (
    AdapterInfo,
    AdapterRecord,
    ConstantInfo,
    FileInfo,
    FoundationInfo,
    Manifest,
    TokenizerInfo,
)
from bedplate.errors import BundleError

GOLDEN = Path(__file__).parent.parent / "golden" / "bundle.json"
FILE = FileInfo(size=7, sha256="1" * 64)
BUNDLE = Manifest(
    written_by="0.1.0",
    model=MODEL,
    recipe={"weights": "8da4w", "rules": [["lm_head", "8da8w"]], "damping": 0.01},
    tokenizer=TokenizerInfo(
        sha256="2" * 64, bos_id=None, eos_ids=(2, 0), special_tokens={"eos_token": "</é>"}
    ),
    files=dict.fromkeys(("foundation.ptd", "foundation.json", "base.pte", "tokenizer.json"), FILE),
    adapters={
        "one": AdapterRecord(
            foundation="3" * 64,
            files=dict.fromkeys(("program.pte", "weights.ptd", "adapter.json"), FILE),
            special_tokens={"bos_token": "<s>"},
        )
    },
)
CONSTANT = ConstantInfo(
    name="q_proj.lora_a#codes",
    key="4" * 64,
    dtype="int8",
    shape=(4, 8),
    layout="row",
    scales="7" * 64,
    nbytes=32,
)
ADAPTER = AdapterInfo(
    name="one",
    foundation="3" * 64,
    rank=4,
    ranks={"mlp.up_proj": 4, "self_attn.q_proj": 2},
    alpha=8.0,
    dtype="8da8w",
    layers=None,
    vocab=32,
    invocation=(5, 6),
    source="5" * 64,
    constants=(CONSTANT,),
    shared=(CONSTANT,),
)
DOCUMENTS = [BUNDLE, ADAPTER, FoundationInfo(constants=(CONSTANT, CONSTANT))]


def edited(document: Any, edit: Any) -> bytes:
    """The document's file after `edit` of its fields, with a digest that fits."""
    fields = json.loads(manifest.dump(document))
    edit(fields)
    if "digest" in fields:
        del fields["digest"]
        fields["digest"] = hashlib.sha256(strict_json.dump(fields)).hexdigest()
    return strict_json.dump(fields)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: type(d).__name__)
def test_reads_back_what_was_written(document: Any) -> None:
    assert manifest.load(type(document), manifest.dump(document), "x.json") == document


def test_golden_bytes() -> None:
    assert manifest.dump(BUNDLE).decode() == GOLDEN.read_text()


def test_the_order_of_fields_does_not_show() -> None:
    backwards = dataclasses.replace(BUNDLE, model=dict(reversed(MODEL.items())))
    assert manifest.dump(backwards) == manifest.dump(BUNDLE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: type(d).__name__)
def test_another_version_is_refused_with_a_hint(document: Any) -> None:
    data = edited(document, lambda fields: fields.update(version=1, shiny="old"))
    with pytest.raises(BundleError, match="format version 1; this bedplate reads version 5") as caught:
        manifest.load(type(document), data, "x.json")
    assert "build the bundle again" in str(caught.value.hint)


def test_another_format_is_refused() -> None:
    with pytest.raises(BundleError, match="not a bedplate bundle"):
        manifest.load(Manifest, manifest.dump(ADAPTER), "x.json")


def test_an_edited_file_is_refused_by_its_digest() -> None:
    fields = json.loads(manifest.dump(BUNDLE))
    fields["model"]["dim"] = 16
    with pytest.raises(BundleError, match="digest does not fit"):
        manifest.load(Manifest, strict_json.dump(fields), "x.json")


def test_a_reformatted_file_is_refused() -> None:
    with pytest.raises(BundleError, match="not as bedplate wrote it"):
        manifest.load(Manifest, json.dumps(json.loads(manifest.dump(BUNDLE))).encode(), "x.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]\n", b'{"a": NaN}', b"[" * 100_000])
def test_what_is_not_a_document_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^x\.json: not "):
        manifest.load(Manifest, data, "x.json")


@pytest.mark.parametrize(
    ("document", "edit", "says"),
    [
        (BUNDLE, lambda f: f.update(extra=1), "x.json: unknown field 'extra'"),
        (BUNDLE, lambda f: f.pop("recipe"), "x.json: the field 'recipe' is missing"),
        (BUNDLE, lambda f: f["model"].pop("head_dim"), "x.json.model: the field 'head_dim' is None"),
        (BUNDLE, lambda f: f["model"].update(dim=1.5), "x.json.model: the field 'dim' is 1.5"),
        (BUNDLE, lambda f: f["files"].pop("foundation.ptd"), "x.json.files: it does not list foundation.ptd"),
        (
            BUNDLE,
            lambda f: f["files"]["base.pte"].update(mode=1),
            "x.json.files.base.pte: unknown field 'mode'",
        ),
        (BUNDLE, lambda f: f["files"].update({"../x": f["files"]["base.pte"]}), "'../x' is not the path"),
        (BUNDLE, lambda f: f["files"].update({"/x": f["files"]["base.pte"]}), "'/x' is not the path"),
        (BUNDLE, lambda f: f["adapters"].update({"../x": f["adapters"]["one"]}), "not a name for an adapter"),
        (BUNDLE, lambda f: f["adapters"]["one"]["files"].pop("weights.ptd"), "does not list weights.ptd"),
        (
            BUNDLE,
            lambda f: f["tokenizer"].update(bos_id="1"),
            "x.json.tokenizer.bos_id: expected int, found '1'",
        ),
        (
            BUNDLE,
            lambda f: f["tokenizer"].update(eos_ids=2),
            "x.json.tokenizer.eos_ids: expected list, found 2",
        ),
        (ADAPTER, lambda f: f.update(rank=True), "x.json.rank: expected int, found True"),
        (ADAPTER, lambda f: f.update(alpha="8"), "x.json.alpha: expected float, found '8'"),
        (
            ADAPTER,
            lambda f: f["constants"][0].pop(),
            "x.json.constants[0]: expected name, key, dtype, shape, layout, scales, nbytes, found 6 values",
        ),
        (ADAPTER, lambda f: f["constants"].append({}), "x.json.constants[1]: expected list, found {}"),
        (
            ADAPTER,
            lambda f: f["constants"][0].__setitem__(1, None),
            "x.json.constants[0].key: expected str, found None",
        ),
        (
            ADAPTER,
            lambda f: f["constants"][0][3].append(2.5),
            "x.json.constants[0].shape[2]: expected int, found 2.5",
        ),
        (
            ADAPTER,
            lambda f: f["constants"].append([*f["constants"][0][:5], 7, 32]),
            "x.json.constants[1].scales: expected str, found 7",
        ),
        (ADAPTER, lambda f: f.update(constants={}), "x.json.constants: expected list, found {}"),
        (ADAPTER, lambda f: f["ranks"].update(x=None), "x.json.ranks.x: expected int, found None"),
    ],
)
def test_a_field_that_does_not_fit_is_named(document: Any, edit: Any, says: str) -> None:
    with pytest.raises(BundleError) as caught:
        manifest.load(type(document), edited(document, edit), "x.json")
    assert says in str(caught.value)
    assert caught.value.hint


def test_rows_decode_together_as_each_does_alone() -> None:
    other = CONSTANT._replace(name="norm", shape=(), scales=None, nbytes=1)
    rows = json.loads(strict_json.dump({"rows": [CONSTANT, other, CONSTANT]}))["rows"]
    found = strict_json.decode(tuple[ConstantInfo, ...], rows, "rows")
    assert found == tuple(strict_json.decode(ConstantInfo, row, "row") for row in rows)
    assert {type(row) for row in found} == {ConstantInfo} and {type(row.shape) for row in found} == {tuple}
    assert strict_json.decode(tuple[ConstantInfo, ...], [], "rows") == ()


@pytest.mark.parametrize("whose", ["the base's", "an adapter's"])
def test_programs_may_be_there_or_not(whose: str) -> None:
    def edit(fields: Any) -> None:
        files = fields["files"] if whose == "the base's" else fields["adapters"]["one"]["files"]
        del files["base.pte" if whose == "the base's" else "program.pte"]

    assert manifest.load(Manifest, edited(BUNDLE, edit), "x.json") != BUNDLE


def test_a_whole_number_is_a_float_too() -> None:
    data = edited(ADAPTER, lambda fields: fields.update(alpha=8))
    assert manifest.load(AdapterInfo, data, "x.json") == ADAPTER
