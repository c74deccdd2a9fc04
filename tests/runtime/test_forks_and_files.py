"""A session that is forked or saved goes on, to the bit, where it was. A file that is not one of ours is refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import BuildToy

from bedplate import _native
from bedplate.api import Bundle
from bedplate.errors import BedplateError, NotFoundError, RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.session_file import MAGIC

TEXT = [int(token) for token in np.random.default_rng(4).integers(2, 320, 150)]
HOT = {"max_tokens": 20, "temperature": 50.0, "seed": 2}


@pytest.fixture(scope="module")
def engine(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle, cache_bytes=0) as engine:
        yield engine


class TestAFork:
    @pytest.mark.parametrize("name", [None, "all8"])
    def test_and_its_origin_go_on_alone(self, engine: Engine, name: str | None) -> None:
        session = engine.session(name)
        session.step(TEXT)
        forks = [session.fork() for _ in range(3)]
        ends = [[5], [6, 7], [8]]
        for fork, end in zip(forks, ends, strict=True):
            assert (fork.tokens, fork.adapter, fork.last) == (tuple(TEXT), name, None)
            np.testing.assert_array_equal(fork.step(end), engine.session(name).step([*TEXT, *end]))
        np.testing.assert_array_equal(session.step([9]), engine.session(name).step([*TEXT, 9]))
        for fork, end in zip(forks, ends, strict=True):
            np.testing.assert_array_equal(fork.step([4]), engine.session(name).step([*TEXT, *end, 4]))

    def test_takes_memory_only_for_what_differs(self, engine: Engine) -> None:
        session = engine.session()
        session.step(TEXT)
        before, block = engine.memory().kv, session.kv_bytes // 3
        forks = [session.fork() for _ in range(10)]
        assert engine.memory().kv == before
        for fork in forks:
            fork.step([1])
        assert engine.memory().kv == before + 10 * block
        forks[0].step([1] * 64)
        assert engine.memory().kv == before + 11 * block
        del forks, fork
        assert engine.memory().kv == before

    def test_of_a_session_that_generates(self, engine: Engine) -> None:
        expected = engine.session().generate("ab", **HOT)
        session = engine.session()
        pieces = session.generate("ab", **HOT, stream=True)
        text = next(pieces)
        fork = session.fork()
        held = fork.tokens
        assert text + "".join(pieces) == expected
        assert fork.tokens == held
        np.testing.assert_array_equal(fork.step([3]), engine.session().step([*held, 3]))

    def test_of_an_empty_session_and_of_one_that_was_reset(self, engine: Engine) -> None:
        session = engine.session("all")
        assert session.fork().tokens == ()
        session.step(TEXT)
        session.reset()
        fork = session.fork()
        np.testing.assert_array_equal(fork.step(TEXT), engine.session("all").step(TEXT))

    def test_belongs_to_the_engine(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            session.step(TEXT)
            fork = session.fork()
            engine.step([(session, [1]), (fork, [2])])
            engine.close()
            assert (fork.tokens, fork.kv_bytes) == ((), 0)

    def test_uses_another_adapter_and_leaves_its_origin_alone(self, engine: Engine) -> None:
        session = engine.session("all")
        session.step(TEXT)
        fork = session.fork()
        fork.use("all2")
        np.testing.assert_array_equal(fork.step(TEXT), engine.session("all2").step(TEXT))
        assert (session.adapter, session.tokens) == ("all", tuple(TEXT))

    def test_has_the_salt(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            fork = engine.session(cache_salt="a").fork()
            fork.step(TEXT)
            for salt, known in (("b", 0), ("a", 128)):
                other = engine.session(cache_salt=salt)
                assert other._held.begin(engine.load(), TEXT, len(TEXT)) == known


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    session = engine.session("all8")
    session.step(TEXT)
    session.save(tmp_path / "saved")
    return tmp_path / "saved"


class TestAFile:
    @pytest.mark.parametrize("kv", ["float16", "float32"])
    @pytest.mark.parametrize("name", [None, "all8"])
    def test_goes_on_where_the_session_was(
        self, toy_bundle: Bundle, tmp_path: Path, name: str | None, kv: Any
    ) -> None:
        with Engine(toy_bundle, kv=kv) as engine:
            session = engine.session(name)
            session.step(TEXT)
            session.save(tmp_path / "saved")
            expected = session.step([3])
        with Engine(toy_bundle, kv=kv, threads=1) as engine:
            loaded = engine.load_session(tmp_path / "saved")
            assert (loaded.adapter, loaded.scale, loaded.tokens) == (name, 1.0, tuple(TEXT))
            assert loaded.kv_bytes == engine.memory().kv > 0
            np.testing.assert_array_equal(loaded.step([3]), expected)
            again = engine.load_session(str(tmp_path / "saved"))
            again.generate(engine.tokenizer.decode(TEXT), max_tokens=1)

    def test_has_the_same_bytes_each_time_and_nothing_of_what_was_taken_back(
        self, engine: Engine, tmp_path: Path, saved: Path
    ) -> None:
        session = engine.session("all8")
        session.step([*TEXT, *range(2, 40)])
        session._held.begin(engine.load("all8"), [*TEXT, 1], 151)
        session.save(tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == saved.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "saved"]

    def test_with_a_scale(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.session()
        session.use("all", scale=0.6)
        expected = session.step(TEXT)
        session.save(tmp_path / "saved")
        loaded = engine.load_session(tmp_path / "saved")
        assert loaded.scale == 0.6
        np.testing.assert_array_equal(loaded.step([3]), session.step([3]))
        assert not np.array_equal(expected, engine.session("all").step(TEXT))

    def test_of_an_empty_session(self, engine: Engine, tmp_path: Path) -> None:
        engine.session().save(tmp_path / "saved")
        loaded = engine.load_session(tmp_path / "saved")
        np.testing.assert_array_equal(loaded.step(TEXT), engine.session().step(TEXT))

    def test_of_another_adapter_meets_nothing_in_the_cache(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        """What two loaded sessions compute of one text stays apart."""
        names = ("all", "all2", None)
        with Engine(toy_bundle) as engine:
            for name in names:
                session = engine.session(name)
                session.step(TEXT[:70])
                session.save(tmp_path / str(name))
            engine.unload()
            for name in names:
                got = engine.load_session(tmp_path / str(name)).step(TEXT[70:])
                alone = engine.session(name, cache_salt=str(name))
                np.testing.assert_array_equal(got, alone.step(TEXT))

    def test_of_other_kernels_is_computed_again(self, toy_bundle: Bundle, saved: Path) -> None:
        before = _native.instruction_set()
        other = next((one for one in _native.instruction_sets() if one != before), None)
        if other is None:
            pytest.skip("this processor has one instruction set")
        _native.use_instruction_set(other)
        try:
            with Engine(toy_bundle) as engine:
                loaded = engine.load_session(saved)
                assert (loaded.tokens, loaded.kv_bytes) == (tuple(TEXT), 0)
                np.testing.assert_array_equal(loaded.step([3]), engine.session("all8").step([*TEXT, 3]))
                switched = engine.load_session(saved)
                switched.use(None)
                np.testing.assert_array_equal(switched.step([3]), engine.session().step([3]))
        finally:
            _native.use_instruction_set(before)

    def test_never_gets_into_the_cache(self, toy_bundle: Bundle, saved: Path) -> None:
        """Its keys and values are not true here, and its hash is right."""
        forged = forge(saved.read_bytes(), block_byte=True)
        saved.write_bytes(forged)
        with Engine(toy_bundle) as engine:
            expected = engine.session("all8").step([*TEXT, *TEXT[:60]])
            engine.unload()
            loaded = engine.load_session(saved)
            assert not np.array_equal(loaded.step(TEXT[:60]), expected)
            loaded.fork().step([1])
            loaded.reset()
            loaded.step([*TEXT, *TEXT[:60]])
            session = engine.session("all8")
            np.testing.assert_array_equal(session.step([*TEXT, *TEXT[:60]]), expected)

    def test_of_another_adapter_under_the_name(
        self, toy_bundle: Bundle, toy_adapters: dict[str, Path], saved: Path, tmp_path: Path
    ) -> None:
        bundle = Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
        bundle.remove("all8")
        with Engine(bundle) as engine:
            with pytest.raises(NotFoundError, match="no adapter 'all8'"):
                engine.load_session(saved)
            bundle.add(toy_adapters["all2"], name="all8", quantize="8w", programs=False)
            with pytest.raises(RunError, match=r"another adapter of the name 'all8' computed this.*\nhint: "):
                engine.load_session(saved)

    def test_of_another_foundation(
        self, build_toy: BuildToy, toy_model: Path, engine: Engine, tmp_path: Path
    ) -> None:
        session = engine.session()
        session.step(TEXT)
        session.save(tmp_path / "saved")
        bundle = build_toy(toy_model, out=tmp_path / "other", method="hqq", programs=False)
        with Engine(bundle) as other, pytest.raises(RunError, match=r"another foundation computed.*\nhint: "):
            other.load_session(tmp_path / "saved")

    def test_of_another_engine(self, toy_bundle: Bundle, saved: Path) -> None:
        with (
            Engine(toy_bundle, kv="float32") as engine,
            pytest.raises(
                RunError, match=r"kv='float16' computed this session\nhint: make the engine with kv="
            ),
        ):
            engine.load_session(saved)
        with (
            Engine(toy_bundle, max_context=100) as engine,
            pytest.raises(RunError, match=r"150 tokens do not fit the context of 100\nhint: "),
        ):
            engine.load_session(saved)

    def test_that_cannot_be_read_or_written(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.session()
        with pytest.raises(NotFoundError, match=r"there is no such file\nhint: "):
            engine.load_session(tmp_path / "nothing")
        with pytest.raises(RunError, match=r"cannot be read: .*\nhint: "):
            engine.load_session(tmp_path)
        with pytest.raises(RunError, match=r"cannot be saved: .*\nhint: "):
            session.save(tmp_path / "nothing" / "saved")
        with pytest.raises(RunError, match=r"cannot be saved: .*\nhint: "):
            session.save(tmp_path)
        for call in (session.save, engine.load_session):
            with pytest.raises(RunError, match=r"path is 5\nhint: "):
                call(5)  # type: ignore[operator]
            for path in ("a\0b", "/tmp/\ud800"):
                with pytest.raises(RunError, match=r"no file can have the path .*\nhint: "):
                    call(path)

    def test_is_whole_or_the_one_before(
        self, engine: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = saved.read_bytes()
        session = engine.session()
        session.step(TEXT)

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(RunError, match="cannot be saved: No space left on device"):
            session.save(saved)
        assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def forge(data: bytes, *, block_byte: bool = False, **changes: Any) -> bytes:
    """The file with other fields in its header, and a hash that is right."""
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    fields = json.loads(data[start : start + length]) | changes
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in sorted(fields.items())
    )
    said = f"{{\n{lines}\n}}\n".encode()
    body = bytearray(MAGIC + len(said).to_bytes(4, "little") + said + data[start + length : -32])
    if block_byte:
        for at in range(len(said) + start + 4 * 150, len(body), 64):
            body[at] ^= 0x40
    return sealed(bytes(body))


def sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


class TestAHostileFile:
    def test_of_which_any_byte_differs(self, engine: Engine, saved: Path) -> None:
        data, drawn = saved.read_bytes(), random.Random(0)
        for at in [
            *range(0, 700, 7),
            *drawn.sample(range(len(data)), 100),
            *range(len(data) - 40, len(data)),
        ]:
            saved.write_bytes(data[:at] + bytes([data[at] ^ 1 << drawn.randrange(8)]) + data[at + 1 :])
            with pytest.raises(RunError, match=r"(is damaged|not a session).*\nhint: "):
                engine.load_session(saved)

    def test_that_is_cut_short_or_goes_on(self, engine: Engine, saved: Path) -> None:
        data = saved.read_bytes()
        for count in (0, 1, 15, 16, 20, 40, 300, len(data) - 33, len(data) - 1):
            for content in (data[:count], sealed(data[:count])):
                saved.write_bytes(content)
                with pytest.raises(RunError, match=r"(is damaged|not a session).*\nhint: "):
                    engine.load_session(saved)
        saved.write_bytes(sealed(data[:-32] + b"more"))
        with pytest.raises(RunError, match="is damaged"):
            engine.load_session(saved)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"version": 3}, "format version 3; this bedplate reads version 2"),
            ({"tokens": 149}, "counts tokens wrongly"),
            ({"tokens": 2**62, "positions": 2**62}, "longer or shorter"),
            ({"tokens": 2**70, "positions": 0, "block_bytes": 0}, "longer or shorter"),
            ({"tokens": -1, "positions": -1}, "counts tokens wrongly"),
            ({"positions": 0}, "longer or shorter"),
            ({"positions": 128}, "counts tokens wrongly"),
            ({"block_bytes": 0}, "longer or shorter"),
            ({"block_bytes": -49152}, "counts tokens wrongly"),
            ({"block_bytes": 1.5}, "expected int"),
            ({"adapters": "all"}, "expected dict"),
            ({"adapters": {"../../etc": 1.0}}, "no adapter"),
            ({"adapters": {"all": 1.0, "../../etc": 1.0}}, "no adapter"),
            ({"adapters": {}}, "other adapters, or none"),
            ({"adapters": {"all": 1.0, "all2": 1.0}}, "another adapter of the name 'all' or 'all2'"),
            ({"adapters": {"all": "1"}}, "expected float"),
            ({"adapters": {"all8": 0.5}}, None),
            ({"precision": "float8"}, "expected one of"),
            ({"precision": "float32"}, "kv='float32' computed"),
            ({"foundation": "0" * 64}, "another foundation"),
            ({"adapter": "base"}, "another adapter"),
            ({"instruction_set": "mmx"}, None),
            ({"is_long": True}, None),
            ({"start": 5}, "is no activated LoRA"),
            ({"start": -1}, "counts tokens wrongly"),
            ({"start": 1.5}, "expected int"),
            ({"more": 1}, "unknown field 'more'"),
        ],
        ids=str,
    )
    def test_that_says_something_else(
        self, engine: Engine, saved: Path, changes: dict[str, Any], complaint: str | None
    ) -> None:
        """Its hash is right, so it is read as far as it makes sense."""
        saved.write_bytes(forge(saved.read_bytes(), **changes))
        if complaint is None:
            loaded = engine.load_session(saved)
            assert len(loaded.step([1])) == engine.limits.vocab
        else:
            with pytest.raises(BedplateError, match=rf"(?s){complaint}.*\nhint: "):
                engine.load_session(saved)

    @pytest.mark.parametrize("scale", ["NaN", "Infinity", "1e300"])
    def test_that_has_a_scale_which_is_none(self, engine: Engine, saved: Path, scale: str) -> None:
        data = saved.read_bytes()
        start = data.index(b'"all8": 1.0')
        header = len(scale) - 3
        length = int.from_bytes(data[16:20], "little") + header
        body = data[:16] + length.to_bytes(4, "little") + data[20:start] + f'"all8": {scale}'.encode()
        saved.write_bytes(sealed(body + data[start + 11 : -32]))
        with pytest.raises(RunError, match=r"\nhint: "):
            engine.load_session(saved)

    def test_of_tokens_and_numbers_that_no_model_has(self, engine: Engine, saved: Path) -> None:
        data = saved.read_bytes()
        start = 20 + int.from_bytes(data[16:20], "little")
        body = bytearray(data[:-32])
        body[start : start + 4] = (320).to_bytes(4, "little")
        saved.write_bytes(sealed(bytes(body)))
        with pytest.raises(RunError, match="a token is not in the vocabulary"):
            engine.load_session(saved)
        body[start : start + 4] = (5).to_bytes(4, "little")
        body[start + 600 :] = b"\xff" * (len(body) - start - 600)
        saved.write_bytes(sealed(bytes(body)))
        assert np.isnan(engine.load_session(saved).step([1])).all()

    def test_at_random(self, engine: Engine, saved: Path) -> None:
        """Whatever stands before a hash that is right: it is loaded or refused."""
        data, drawn = saved.read_bytes()[:-32], random.Random(1)
        header = 20 + int.from_bytes(data[16:20], "little")
        for _ in range(300):
            body = bytearray(data)
            for _ in range(drawn.randint(1, 4)):
                at = drawn.randrange(16, header if drawn.random() < 0.7 else len(body))
                body[at] = drawn.choice([0, 255, ord("9"), ord("-"), drawn.randrange(256)])
            if drawn.random() < 0.2:
                del body[drawn.randrange(16, len(body)) :]
            saved.write_bytes(sealed(bytes(body)))
            try:
                session = engine.load_session(saved)
            except BedplateError as error:
                assert error.hint
            else:
                session.step([1])
