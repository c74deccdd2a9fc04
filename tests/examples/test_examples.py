"""The examples' data, scoring and adapters; no model is loaded here."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import evaluate
import make_data
import pytest
import scoring
import words
from rich.console import Console
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = sorted(make_data.TASKS)
LINEARS = {  # SmolLM2-135M: (out, in) of each linear of a layer
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
ORDER = '{"item": "lanterns", "quantity": 3, "city": "Lima", "day": "today"}'


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, EXAMPLES / "make_data.py", "--out", out], check=True)
    return out


@pytest.mark.parametrize("task", TASKS)
def test_held_out_file_is_what_the_script_writes(written: Path, task: str) -> None:
    name = f"{task}.heldout.jsonl"
    assert (written / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_occurs_twice_or_on_both_sides(task: str) -> None:
    train, held_out = make_data.make_task(task)
    prompts = [example.prompt for example in train + held_out]
    assert len(set(prompts)) == len(prompts) == make_data.TASKS[task].train + make_data.TASKS[task].held_out


def test_unseen_words_occur_only_in_held_out_data() -> None:
    train, held_out = make_data.make_task("extract")
    for pool in (words.CITIES, words.FIRST_NAMES, words.LAST_NAMES, words.JOBS, words.ITEMS):
        assert pool.unseen and not set(pool.unseen) & set(pool.seen)
        assert not any(word in example.answer for word in pool.unseen for example in train)
        assert any(word in example.answer for word in pool.unseen for example in held_out)


@pytest.mark.parametrize("task", TASKS)
def test_expected_answers_score_full(task: str) -> None:
    questions = scoring.read_questions(EXAMPLES / "data" / f"{task}.heldout.jsonl")
    assert len(questions) >= 100
    result = scoring.summarize(
        model="oracle", task=task, adapter=None, answers=[q.answer for q in questions], questions=questions
    )
    assert (result.exact, result.lenient, result.count) == (1.0, 1.0, len(questions))


@pytest.mark.parametrize(
    ("answer", "exact", "lenient"),
    [
        ('{"day":"today","city":"Lima","quantity":3,"item":"lanterns"}', 1.0, 1.0),
        (f"Sure:\n```json\n{ORDER}\n```", 0.0, 1.0),
        (ORDER.replace("3", '"3"'), 0.0, 0.75),
        (ORDER.replace("3", "true"), 0.0, 0.75),
        (ORDER.replace('"day"', '"date"'), 0.0, 0.75),
        (ORDER[:-1] + ', "note": 1}', 0.0, 1.0),
        (ORDER[:-5], 0.0, 0.0),
        (f"{{ no {ORDER}", 0.0, 1.0),
        ("[1, 2]", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_score_extract(answer: str, exact: float, lenient: float) -> None:
    assert scoring.score_extract(answer, ORDER) == scoring.Score(exact=exact, lenient=lenient)


@pytest.mark.parametrize(
    ("answer", "exact", "lenient"),
    [
        ("mixed", 1.0, 1.0),
        (" mixed\n", 1.0, 1.0),
        ("Mixed.", 0.0, 1.0),
        ("It is mixed: positive and negative.", 0.0, 1.0),
        ("positive and negative, so mixed", 0.0, 0.0),
        ("unmixed", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_score_sentiment(answer: str, exact: float, lenient: float) -> None:
    assert scoring.score_sentiment(answer, "mixed") == scoring.Score(exact=exact, lenient=lenient)


def test_results_as_table_and_json() -> None:
    questions = [
        scoring.Question(messages=[], answer="mixed"),
        scoring.Question(messages=[], answer="positive"),
    ]
    result = scoring.summarize(
        model="m", task="sentiment", adapter="a", answers=["mixed", "Positive"], questions=questions
    )
    assert scoring.to_markdown([result]).splitlines()[-1] == "| m | sentiment | a | 50.0% | 100.0% | 2 |"
    assert json.loads(scoring.to_json([result])) == [
        {"model": "m", "task": "sentiment", "adapter": "a", "count": 2, "exact": 0.5, "lenient": 1.0}
    ]


def test_evaluate_asks_base_and_adapter_the_first_questions_of_each_task() -> None:
    def answer(questions: list[scoring.Question], adapter: str | None, max_tokens: int) -> Iterator[str]:
        assert max_tokens > 0
        return iter(question.answer if adapter else "" for question in questions)

    results = list(evaluate.evaluate("m", answer, 7, Console(file=io.StringIO())))
    assert [(r.task, r.adapter, r.count, r.exact) for r in results] == [
        ("extract", None, 7, 0.0),
        ("extract", "extract", 7, 1.0),
        ("sentiment", None, 7, 0.0),
        ("sentiment", "sentiment", 7, 1.0),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_adapter_fits_the_model_and_the_size_limit(task: str) -> None:
    folder = EXAMPLES / "adapters" / task
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["peft_type"], config["bias"]) == ("LORA", "none")
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size <= 3_000_000
    with safe_open(weights, framework="numpy") as file:
        shapes = {name.removeprefix("base_model.model.model."): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        expected = {}
        for layer in range(30):
            for target in config["target_modules"]:
                block = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                rows, columns = LINEARS[target]
                path = f"layers.{layer}.{block}.{target}"
                expected[f"{path}.lora_A.weight"] = [config["r"], columns]
                expected[f"{path}.lora_B.weight"] = [rows, config["r"]]
        assert {name: piece.get_shape() for name, piece in shapes.items()} == expected
        assert all(piece[:].any() for piece in shapes.values())
