"""Held-out accuracy of the base and of each task's adapter, as a Markdown table.

    python examples/evaluate.py float.bundle smollm2.bundle          # bundles that hold both adapters
    python examples/evaluate.py --peft                               # transformers + PEFT, float32

Each question is a conversation of its own, answered greedily. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from scoring import SCORERS, Question, Result, read_questions, summarize, to_json, to_markdown

from bedplate import BedplateError, Bundle, Engine

EXAMPLES = Path(__file__).parent
MAX_TOKENS = {"extract": 96, "sentiment": 24}  # the base talks more than the adapters; let it finish

# (questions, adapter or None, tokens an answer may take) → answers
Answerer = Callable[[list[Question], str | None, int], Iterator[str]]


def engine_answers(engine: Engine) -> Answerer:
    """How to ask bedplate's engine."""

    def answer(questions: list[Question], adapter: str | None, max_tokens: int) -> Iterator[str]:
        session = engine.session(adapter)
        for question in questions:
            yield session.generate(question.messages, max_tokens=max_tokens)

    return answer


def peft_answers() -> Answerer:
    """How to ask transformers and PEFT, the model in float32."""
    import torch  # not needed to ask a bundle
    from peft import PeftModel
    from smollm2 import generate, load_base

    base, tokenizer = load_base()
    model = PeftModel.from_pretrained(base, EXAMPLES / "adapters" / "extract", adapter_name="extract")
    model.load_adapter(EXAMPLES / "adapters" / "sentiment", adapter_name="sentiment")
    torch.set_num_threads(os.cpu_count() or 1)

    def answer(questions: list[Question], adapter: str | None, max_tokens: int) -> Iterator[str]:
        for start in range(0, len(questions), 25):
            some = [question.messages for question in questions[start : start + 25]]
            if adapter is None:
                with model.disable_adapter():
                    answers = generate(model, tokenizer, some, max_tokens)
            else:
                model.set_adapter(adapter)
                answers = generate(model, tokenizer, some, max_tokens)
            yield from answers

    return answer


def answerers(bundles: list[Path], *, peft: bool) -> Iterator[tuple[str, Answerer]]:
    """Each loads when its turn comes."""
    if peft:
        yield "float32, transformers + PEFT", peft_answers()
    for path in bundles:
        bundle = Bundle.open(path)
        with Engine(bundle) as engine:
            yield f"{bundle.manifest.recipe['name']}, {path.name}", engine_answers(engine)


def evaluate(model: str, answer: Answerer, limit: int | None, console: Console) -> Iterator[Result]:
    """One result for the base and one for the adapter of each task."""
    for task in SCORERS:
        questions = read_questions(EXAMPLES / "data" / f"{task}.heldout.jsonl", limit)
        for adapter in (None, task):
            answers = track(
                answer(questions, adapter, MAX_TOKENS[task]),
                f"{model}: {task}, {adapter or 'base'}",
                total=len(questions),
                console=console,
            )
            yield summarize(
                model=model, task=task, adapter=adapter, answers=list(answers), questions=questions
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE")
    parser.add_argument("--peft", action="store_true", help="the float32 model by transformers + PEFT, too")
    parser.add_argument("--limit", type=int, help="ask only the first LIMIT questions of each task")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    args = parser.parse_args()
    if not (args.bundles or args.peft):
        parser.error("give a BUNDLE, or --peft")
    console = Console(stderr=True)
    try:
        results = [
            result
            for name, answer in answerers(args.bundles, peft=args.peft)
            for result in evaluate(name, answer, args.limit, console)
        ]
    except BedplateError as error:
        console.print(f"error: {error}", markup=False)
        raise SystemExit(2) from None
    print(to_markdown(results), end="")
    if args.json:
        args.json.write_text(to_json(results), encoding="utf-8")


if __name__ == "__main__":
    main()
