"""Adapters that are loaded and unloaded while the server answers, by OpenAI's own client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from live import serving
from test_process import started

import bedplate
from bedplate.bundle.overlay import Overlay
from bedplate.serve.answers import Choice
from bedplate.serve.settings import Settings

PROMPT = "the quick brown fox"
TOKENS = 12


class Client:
    """What these tests ask of a server."""

    def __init__(self, address: str) -> None:
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        self._http = httpx.Client(base_url=address, timeout=60)

    def close(self) -> None:
        self.openai.close()
        self._http.close()

    def say(self, model: str, prompt: str = PROMPT, **options: Any) -> str:
        given = {"max_tokens": TOKENS, "temperature": 0, **options}
        said: openai.types.Completion = self.openai.completions.create(model=model, prompt=prompt, **given)
        return said.choices[0].text

    def load(self, name: str, path: Path | str, **fields: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(path), **fields}
        return self._http.post("/v1/load_lora_adapter", json=body)

    def unload(self, name: str, **fields: Any) -> httpx.Response:
        return self._http.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields})

    def models(self) -> dict[str, Any]:
        return {model.id: model for model in self.openai.models.list()}


@contextmanager
def served(
    bundles: Mapping[str, bedplate.Bundle], settings: Settings | None = None, **engine: Any
) -> Iterator[Client]:
    with serving(bundles, settings, **engine) as address, closing(Client(address)) as client:
        yield client


@pytest.fixture(scope="module")
def sources(toy_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, good and bad ones."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("all", "all2", "qv"):
        shutil.copytree(toy_adapters[name], folder / name)
    shutil.copytree(toy_adapters["all"], folder / "malformed")
    (folder / "malformed/adapter_config.json").write_text('{"peft_type": "LORA", ')
    shutil.copytree(toy_adapters["all"], folder / "other_rank")
    config = json.loads((folder / "other_rank/adapter_config.json").read_text())
    (folder / "other_rank/adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    shutil.copytree(toy_adapters["all"], folder / "cut")
    weights = folder / "cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def expected(
    toy_bundle: bedplate.Bundle,
    toy_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[..., str]:
    """What the engine says alone with an adapter that was packed as the server does it. None: with the base."""
    copy = shutil.copytree(toy_bundle.path, tmp_path_factory.mktemp("bundle") / "toy.bundle")
    bundle = bedplate.Bundle.open(copy, check=False)
    for name, folder in toy_adapters.items():
        bundle.add(folder, name=f"live-{name}", programs=False)
    engine = bedplate.Engine(bundle, threads=1, cache_bytes=0)
    request.addfinalizer(engine.close)

    def say(adapter: str | None, prompt: str = PROMPT, **options: Any) -> str:
        name = adapter if adapter is None else f"live-{adapter}"
        text: str = engine.session(name).generate(prompt, **{"max_tokens": TOKENS, **options})
        return text

    answers = {say(name) for name in (None, *toy_adapters)}
    assert len(answers) == 1 + len(toy_adapters), "they can be told apart"
    return say


@pytest.fixture(scope="module")
def client(toy_bundle: bedplate.Bundle, sources: Path) -> Iterator[Client]:
    settings = Settings(allow_adapters_from=(str(sources), str(toy_bundle.path), "memory://good"))
    with served({"toy": toy_bundle}, settings) as client:
        yield client


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[bedplate.Engine]:
    """Those of servers that a test starts."""
    made, found = bedplate.Engine, list[bedplate.Engine]()

    def make(*args: Any, **options: Any) -> bedplate.Engine:
        found.append(made(*args, **options))
        return found[-1]

    monkeypatch.setattr("live.bedplate.Engine", make)
    return found


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        for name in client.models().keys() - {"toy", "all", "all2", "all8"}:
            assert client.unload(name).status_code == 200


def test_an_adapter_is_loaded_listed_used_and_unloaded(
    client: Client, sources: Path, expected: Callable[..., str]
) -> None:
    said = client.load("mine", sources / "all2")
    assert (said.status_code, said.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    card = client.models()["mine"]
    assert card.model_extra is not None
    assert (card.model_extra["root"], card.model_extra["parent"]) == (str(sources / "all2"), "toy")
    assert client.say("mine") == expected("all2") == client.say("toy:mine")
    said = client.unload("mine")
    assert (said.status_code, said.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert "mine" not in client.models()
    with pytest.raises(openai.NotFoundError):
        client.say("mine")
    assert client.unload("mine").status_code == 404


def test_paths_in_an_allowed_folder_need_not_be_absolute(
    client: Client, expected: Callable[..., str]
) -> None:
    assert client.load("mine", "qv").status_code == 200
    assert client.say("mine") == expected("qv")


def test_an_adapter_that_another_bundle_packed(client: Client, toy_bundle: bedplate.Bundle) -> None:
    assert client.load("packed", toy_bundle.path / "adapters/all2").status_code == 200
    assert client.say("packed") == client.say("all2") != client.say("all")
    said = client.load("other", toy_bundle.path / "adapters")
    assert said.status_code == 400


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "nothing"])
def test_a_packed_one_whose_weights_are_no_file(
    client: Client, sources: Path, toy_bundle: bedplate.Bundle, kind: str
) -> None:
    bundle = sources / kind
    shutil.copytree(toy_bundle.path / "adapters/all2", bundle / "adapters/all2")
    shutil.copy(toy_bundle.path / "bundle.json", bundle)
    weights = bundle / "adapters/all2/weights.ptd"
    weights.unlink()
    if kind != "nothing":
        (weights.mkdir if kind == "a folder" else lambda: os.mkfifo(weights))()
    said = client.load("mine", bundle / "adapters/all2")
    assert said.status_code == 400 and "the file is missing" in said.json()["error"]["message"], said.text


def test_a_name_that_is_taken(client: Client, sources: Path, expected: Callable[..., str]) -> None:
    assert client.load("mine", sources / "all").status_code == 200
    said = client.load("mine", sources / "qv")
    assert said.status_code == 400 and "has already been loaded" in said.json()["error"]["message"]
    assert said.json()["error"]["param"] == "lora_name"
    assert client.say("mine") == expected("all")
    assert client.load("mine", sources / "qv", load_inplace=True).status_code == 200
    assert client.say("mine") == expected("qv")
    assert client.load("toy", sources / "qv").status_code == 400


@pytest.mark.parametrize("name", ["base", "", ".hidden", "a/b", "../up", "a:b", "a b", "ä", "x" * 300])
def test_names_that_are_not_allowed(client: Client, sources: Path, name: str) -> None:
    said = client.load(name, sources / "all")
    assert said.status_code == 400, said.text
    assert said.json()["error"]["type"] == "invalid_request_error"


BAD = {
    "malformed": 400,
    "other_rank": 400,
    "cut": 400,
    "empty": 400,
    "none": 404,
    "all/adapter_config.json": 400,
    "all/none/../../none": 404,
    "../outside": 403,
    "all/../../outside": 403,
    "/etc": 403,
    "/etc/passwd": 403,
    "file:///etc/passwd": 403,
    "file://../outside": 403,
    "\0": 404,
    "x" * 4000: 404,
    "memory://bad/all": 403,
    "memory://goodness/all": 403,
    "memory://good/../bad/all": 403,
    "memory://good/%2e%2e/bad/all": 403,
    "memory://good/none": 404,
    "simplecache::memory://good/all": 403,
    "local:///etc": 403,
    "https://127.0.0.1:1/all": 403,
}


@pytest.mark.parametrize("place", BAD)
def test_a_place_that_is_not_allowed_or_has_no_adapter(client: Client, place: str, sources: Path) -> None:
    (sources.parent / "outside").mkdir(exist_ok=True)
    said = client.load("mine", place)
    assert said.status_code == BAD[place], said.text
    error = said.json()["error"]
    assert error["param"] == "lora_path" and str(sources) not in error["message"]
    assert "mine" not in client.models()


def test_links_do_not_lead_out(client: Client, sources: Path, toy_adapters: dict[str, Path]) -> None:
    (sources / "link").symlink_to(toy_adapters["all"])
    shutil.copytree(toy_adapters["all"], sources / "linked")
    (sources / "linked/adapter_config.json").unlink()
    (sources / "linked/adapter_config.json").symlink_to(toy_adapters["all"] / "adapter_config.json")
    assert client.load("mine", sources / "link").status_code == 403
    assert client.load("mine", sources / "linked").status_code == 403
    (sources / "inside").symlink_to(sources / "all")
    assert client.load("mine", sources / "inside").status_code == 200
    (sources / "circle").symlink_to(sources / "circle")
    assert client.load("mine2", sources / "circle").status_code in (403, 404)


def test_without_allowed_places_nothing_is_loaded_or_unloaded(address: str, sources: Path) -> None:
    with closing(Client(address)) as client:
        for said in (client.load("mine", sources / "all"), client.unload("all"), client.unload("none")):
            assert said.status_code == 403 and "--allow-adapters-from" in said.json()["error"]["message"]
        assert "all" in client.models()


@pytest.mark.parametrize("field", ["lora_name", "lora_path"])
def test_what_is_missing_is_told(client: Client, field: str) -> None:
    body = {"lora_name": "mine", "lora_path": "all"}
    del body[field]
    said = client._http.post("/v1/load_lora_adapter", json=body)
    assert said.status_code == 400 and said.json()["error"]["param"] == field


def test_from_a_url(client: Client, sources: Path, expected: Callable[..., str]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in (sources / "qv").iterdir():
        memory.pipe(f"/good/deep/qv/{file.name}", file.read_bytes())
        memory.pipe(f"/bad/all/{file.name}", file.read_bytes())
    memory.pipe("/good/deep/qv/optimizer.pt", b"long")
    assert client.load("mine", "memory://good/deep/qv").status_code == 200
    assert client.say("mine") == expected("qv")
    assert client.models()["mine"].model_extra["root"] == "memory://good/deep/qv"
    assert client.load("mine2", "memory://good/deep").status_code == 400
    for number in range(70):
        memory.pipe(f"/good/many/{number}.json", b"{}")
    said = client.load("mine2", "memory://good/many")
    assert said.status_code == 400 and "more than 64 files" in said.text


def test_a_packed_one_from_a_url_needs_its_bundle(client: Client, toy_bundle: bedplate.Bundle) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for place in ("/good/toy.bundle/adapters/all2", "/good/adapters/all2"):
        for file in (toy_bundle.path / "adapters/all2").iterdir():
            memory.pipe(f"{place}/{file.name}", file.read_bytes())
    memory.pipe("/good/toy.bundle/bundle.json", (toy_bundle.path / "bundle.json").read_bytes())
    assert client.load("mine", "memory://good/toy.bundle/adapters/all2").status_code == 200
    assert client.say("mine") == client.say("all2")
    said = client.load("mine2", "memory://good/adapters/all2")
    assert said.status_code == 400 and "in no bundle that lists it" in said.text
    memory.pipe("/good/toy.bundle/adapters/all2/weights.ptd", b"damaged")
    said = client.load("mine2", "memory://good/toy.bundle/adapters/all2")
    assert said.status_code == 400 and "weights.ptd" not in said.text.split("LoRA")[0]


def test_requests_of_other_adapters_in_parallel(
    client: Client, sources: Path, expected: Callable[..., str]
) -> None:
    names = ["all", "all2", "qv"]
    for name in names:
        assert client.load(f"p-{name}", sources / name).status_code == 200
    prompts = [f"{PROMPT} {number}" for number in range(4)]
    asked = [(name, prompt) for prompt in prompts for name in (*names, None)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: client.say(f"p-{one[0]}" if one[0] else "toy", one[1]), asked))
    assert found == [expected(name, prompt) for name, prompt in asked]


def test_the_same_name_with_other_weights_under_load(
    client: Client, sources: Path, expected: Callable[..., str]
) -> None:
    """Every answer is one of either, and those that were asked for after the swap are of the later one."""
    assert client.load("hot", sources / "all").status_code == 200
    of = {name: expected(name, max_tokens=24) for name in ("all", "all2")}
    swapped, found, stop = list[str](), list[tuple[int, int, str]](), threading.Event()
    swapped.append("all")

    def ask() -> None:
        while not stop.is_set():
            before = len(swapped)
            text = client.say("hot", max_tokens=24)
            found.append((before, len(swapped), text))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for number in range(1, 9):
            name = ["all", "all2"][number % 2]
            assert client.load("hot", sources / name, load_inplace=True).status_code == 200
            swapped.append(name)
        stop.set()
        for one in asking:
            one.result()
    assert len(found) > 8
    for before, after, text in found:
        # The next swap may have happened, and its answer not yet have come.
        could = {of[name] for name in [*swapped[before - 1 : after], *swapped[after : after + 1]]}
        assert text in could
    assert client.say("hot", max_tokens=24) == of["all"]


def test_bad_ones_disturb_no_good_one(client: Client, sources: Path, expected: Callable[..., str]) -> None:
    assert client.load("good", sources / "all").status_code == 200
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.say, "good") for _ in range(12)]
        refused = [
            pool.submit(client.load, "bad", sources / one) for one in ("malformed", "cut", "other_rank")
        ]
        assert [one.result().status_code for one in refused] == [400] * 3
        in_place = client.load("good", sources / "malformed", load_inplace=True)
        assert in_place.status_code == 400
        assert {one.result() for one in answers} == {expected("all")}
    assert client.say("good") == expected("all")


def test_unload_during_many_answers(client: Client, sources: Path, expected: Callable[..., str]) -> None:
    assert client.load("gone", sources / "all").status_code == 200
    given: dict[str, Any] = {"model": "gone", "prompt": PROMPT, "max_tokens": 60, "seed": 3, "temperature": 1}
    stream = iter(client.openai.completions.create(**given, n=16, stream=True))
    texts = [""] * 16
    first = next(stream).choices[0]
    texts[first.index] += first.text
    assert client.unload("gone").status_code == 200
    assert "gone" not in client.models()
    with pytest.raises(openai.NotFoundError):
        client.say("gone")
    for piece in stream:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [expected("all", max_tokens=60, seed=3 + at, temperature=1) for at in range(16)]


def test_one_prompt_of_two_adapters_in_turn(
    client: Client, sources: Path, expected: Callable[..., str]
) -> None:
    """A text that is longer than a block of the cache, which never serves another adapter."""
    prompt = f"{PROMPT} jumps over the lazy dog; " * 3
    for name in ("all", "all2"):
        assert client.load(name[::-1], sources / name).status_code == 200
    for _ in range(2):
        for name in ("all", "all2"):
            assert client.say(name[::-1], prompt) == expected(name, prompt)
        assert client.say("toy", prompt) == expected(None, prompt)


def test_a_salt_that_is_the_name_of_an_adapter(
    client: Client, sources: Path, expected: Callable[..., str]
) -> None:
    prompt = f"{PROMPT} jumps over the lazy dog; " * 3
    assert client.load("salt", sources / "all").status_code == 200
    assert client.say("salt", prompt) == expected("all", prompt)
    assert client.say("toy", prompt, extra_body={"cache_salt": "salt"}) == expected(None, prompt)
    assert client.say("salt", prompt, extra_body={"cache_salt": "toy"}) == expected("all", prompt)


def test_one_on_disk_is_unloaded_and_replaced(
    toy_bundle: bedplate.Bundle, sources: Path, expected: Callable[..., str]
) -> None:
    """Nothing is written into the bundle."""
    with served({"toy": toy_bundle}, Settings(allow_adapters_from=(str(sources),))) as client:
        assert client.unload("all").status_code == 200
        assert list(client.models()) == ["toy", "all2", "all8"]
        with pytest.raises(openai.NotFoundError):
            client.say("all")
        assert client.load("all", sources / "qv").status_code == 200
        assert client.say("all") == expected("qv")
        assert client.unload("all").status_code == 200
        assert "all" not in client.models()
        assert client.load("all2", sources / "qv", load_inplace=True).status_code == 200
        assert client.say("all2") == expected("qv")
    assert set(toy_bundle.adapters) == set(bedplate.Bundle.open(toy_bundle.path).adapters)


def test_most_adapters(toy_bundle: bedplate.Bundle, sources: Path) -> None:
    settings = Settings(allow_adapters_from=(str(sources),), max_adapters=1)
    with served({"toy": toy_bundle}, settings) as client:
        assert client.load("one", "all").status_code == 200
        said = client.load("two", "all2")
        assert said.status_code == 400 and "the most" in said.text
        assert client.load("one", "all2", load_inplace=True).status_code == 200
        assert client.unload("one").status_code == 200
        assert client.load("two", "all2").status_code == 200


def test_of_several_bases_one_is_named(
    toy_bundle: bedplate.Bundle, float_bundle: bedplate.Bundle, sources: Path, expected: Callable[..., str]
) -> None:
    settings = Settings(allow_adapters_from=(str(sources), str(float_bundle.path)))
    with served({"toy": toy_bundle, "other": float_bundle}, settings) as client:
        said = client.load("mine", "all2")
        assert said.status_code == 400 and said.json()["error"]["param"] == "base_model"
        assert client.load("mine", "all2", base_model="none").status_code == 404
        assert client.load("mine", "all2", base_model="toy").status_code == 200
        assert client.say("mine") == expected("all2")
        assert client.load("mine", "all2", base_model="other").status_code == 400, "it would not be found"
        said = client.load("packed", float_bundle.path / "adapters/qv", base_model="toy")
        assert said.status_code == 400 and "another foundation" in said.text
        said = client.unload("all")
        assert said.status_code == 400 and said.json()["error"]["param"] == "base_model"
        assert client.unload("all", base_model="other").status_code == 200
        assert client.unload("mine").status_code == 200


def test_what_another_process_adds_is_seen(
    toy_bundle: bedplate.Bundle, sources: Path, tmp_path: Path, expected: Callable[..., str]
) -> None:
    copy = bedplate.Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "toy.bundle"), check=False)
    settings = Settings(watch=True, allow_adapters_from=(str(sources),))
    with served({"toy": copy}, settings) as client:
        assert client.load("kept", "all").status_code == 200
        copy.add(sources / "qv", name="later", programs=False)
        wait_for(lambda: "later" in client.models())
        assert client.say("later") == expected("qv")
        copy.remove("later")
        wait_for(lambda: "later" not in client.models())
        with pytest.raises(openai.NotFoundError):
            client.say("later")
        assert client.say("kept") == expected("all")


def wait_for(ready: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(100):
        if ready():
            return
        waiting.wait(0.1)
    raise AssertionError("it did not happen in 10 s")


def test_ten_adapters_with_room_for_two(
    toy_bundle: bedplate.Bundle, sources: Path, expected: Callable[..., str]
) -> None:
    overlay = Overlay.open(toy_bundle.path, check=False)
    with bedplate.Engine(overlay, threads=1) as engine:
        size, block = engine.load("all").nbytes, engine.load().new_kv(False).block_nbytes
    settings = Settings(allow_adapters_from=(str(sources),))
    with served({"toy": toy_bundle}, settings, memory_bytes=2 * size + 4 * block) as client:
        names = {f"n{number}": ["all", "all2"][number % 2] for number in range(10)}
        for name, source in names.items():
            assert client.load(name, source).status_code == 200
        with ThreadPoolExecutor(20) as pool:
            found = list(pool.map(client.say, [*names, *names]))
        assert found == [expected(source) for source in [*names.values()] * 2]


def test_answers_that_grow_beyond_the_memory_begin_again(
    toy_bundle: bedplate.Bundle, expected: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each needs two blocks, and together they have three."""
    again, begun_again = Choice._begin_again, list[Choice]()

    async def begin_again(choice: Choice) -> None:
        begun_again.append(choice)
        await again(choice)

    monkeypatch.setattr(Choice, "_begin_again", begin_again)
    with bedplate.Engine(toy_bundle, threads=1) as engine:
        block = engine.load().new_kv(False).block_nbytes
    with served({"toy": toy_bundle}, memory_bytes=3 * block, cache_bytes=0) as client:
        given: dict[str, Any] = {"max_tokens": 90, "temperature": 1.0}
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.say, "toy", seed=seed, **given) for seed in range(4)]
            found = [one.result() for one in asked]
        assert found == [expected(None, seed=seed, **given) for seed in range(4)]
        assert begun_again
        texts = [""] * 4
        for piece in client.openai.completions.create(
            model="toy", prompt=PROMPT, n=4, seed=0, stream=True, **given
        ):
            for choice in piece.choices:
                texts[choice.index] += choice.text
        assert texts == found
        with pytest.raises(openai.BadRequestError, match="more memory than the server has"):
            client.say("toy", "fox " * 220)
        with pytest.raises(openai.BadRequestError, match="more memory than the server has"):
            client.say("toy", max_tokens=240, extra_body={"ignore_eos": True})


def test_who_waits_too_long_for_memory_is_told_so(
    toy_bundle: bedplate.Bundle, engines: list[bedplate.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bedplate.Engine(toy_bundle, threads=1) as engine:
        block = engine.load().new_kv(False).block_nbytes
    settings = Settings(memory_seconds=0.3)
    with served({"toy": toy_bundle}, settings, memory_bytes=block, cache_bytes=0) as client:
        session = engines[-1].session()
        session.step([5])
        with pytest.raises(openai.BadRequestError, match="more memory than the server has"):
            client.say("toy")
        with monkeypatch.context() as patched:
            patched.setattr(type(engines[-1]), "running", 1)
            with pytest.raises(openai.InternalServerError, match="memory is full") as caught:
                client.say("toy")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "5"
        session.reset()
        assert client.say("toy")


def test_memory_is_free_after_an_unload(
    toy_bundle: bedplate.Bundle, sources: Path, engines: list[bedplate.Engine]
) -> None:
    with served({"toy": toy_bundle}, Settings(allow_adapters_from=(str(sources),))) as client:
        alive = engines[-1]._loaded._alive
        assert client.load("mine", "all").status_code == 200
        client.say("mine", n=2)
        assert "mine" in engines[-1].memory().adapters and len(alive) == 1
        (folder,) = {entry.folder for entry in overlay_of(engines[-1]).attached.values()}
        assert client.load("mine", "all2", load_inplace=True).status_code == 200
        wait_for(lambda: len(alive) == 0 and not folder.exists())
        client.say("mine")
        (folder,) = {entry.folder for entry in overlay_of(engines[-1]).attached.values()}
        assert client.unload("mine").status_code == 200
        wait_for(lambda: len(alive) == 0 and not folder.exists())
        assert client.load("mine", "qv").status_code == 200
        (folder,) = {entry.folder for entry in overlay_of(engines[-1]).attached.values()}
    assert not folder.exists()


def test_a_server_leaves_nothing_behind(toy_bundle: bedplate.Bundle, sources: Path, tmp_path: Path) -> None:
    """As a process: neither files nor the process that packs."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = ["--allow-adapters-from", str(sources), "--memory", "1GB", "--watch", "--max-adapters", "2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        with started(toy_bundle, tmp_path, *options) as server, closing(Client(server.address)) as client:
            assert client.load("mine", "all").status_code == 200
            assert client.load("mine", "all2", load_inplace=True).status_code == 200
            assert client.say("mine") and list(temporary.glob("bedplate-serve-*/*"))
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0, server.said
    assert not list(temporary.glob("bedplate-serve-*"))


def overlay_of(engine: bedplate.Engine) -> Overlay:
    assert isinstance(engine.bundle, Overlay)
    return engine.bundle
