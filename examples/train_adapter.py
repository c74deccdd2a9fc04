"""Train a LoRA adapter for SmolLM2-135M-Instruct with PEFT, on a CPU, in minutes.

    python examples/train_adapter.py --task extract
    python examples/train_adapter.py --data my.jsonl --out my_adapter --rank 8 --targets q_proj,v_proj

The data is JSON lines of {"messages": [user turn, ..., assistant turn]}; only the last turn is learned,
with the token that ends it. The result is what PEFT writes: adapter_config.json, adapter_model.safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from smollm2 import MODEL_ID, Message, encode, load_base

EXAMPLES = Path(__file__).parent
IGNORED = -100  # a label that cross_entropy skips


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What `--task` stands for; every part of it has an option of its own."""

    steps: int
    rank: int
    targets: str


TASKS = {
    "extract": Preset(steps=90, rank=4, targets="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
    "sentiment": Preset(steps=90, rank=8, targets="q_proj,v_proj,o_proj"),
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """tokens, mask: int64 [batch, length]; labels: int64 [batch, length], IGNORED outside of the answers."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def read_data(path: Path) -> list[list[Message]]:
    """The conversations of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def tokenize(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with the end token) of a conversation that ends with the assistant."""
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return encode(tokenizer, messages[:-1]), [*answer, tokenizer.eos_token_id]


def collate(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """Pad on the right; labels are shifted, so that position i is scored on token i + 1."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    tokens = torch.zeros(len(pairs), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        ids = torch.tensor(prompt + answer)
        tokens[row, : len(ids) - 1] = ids[:-1]
        mask[row, : len(ids) - 1] = 1
        labels[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return Batch(tokens=tokens, mask=mask, labels=labels)


def batches(
    pairs: list[tuple[list[int], list[int]]], size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Batches without end, the data shuffled anew in every round."""
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([pairs[i] for i in order[start : start + size]])


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens. Only they go through the head, a fifth of the model's work."""
    base = model.get_base_model()
    hidden = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
    wanted = batch.labels != IGNORED
    return F.cross_entropy(base.lm_head(hidden[wanted]), batch.labels[wanted])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model: Any, data: Iterator[Batch], *, steps: int, peak_rate: float) -> None:
    """Fit the adapter's parameters, in place."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=peak_rate, weight_decay=0.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=steps)
        mean_loss = math.nan
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_rate)
            loss = answer_loss(model, next(data))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean_loss = loss.item() if step == 0 else 0.9 * mean_loss + 0.1 * loss.item()
            progress.update(bar, advance=1, description=f"training, loss {mean_loss:.3f}")


def save(model: Any, out: Path, dtype: torch.dtype) -> None:
    """Write the adapter's two files; the same adapter gives the same bytes."""
    model.to(dtype).save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # PEFT holds a set, and its order differs from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", choices=TASKS, help="train one of the adapters of examples/adapters")
    parser.add_argument("--data", type=Path, help="training examples (with --task: what make_data.py wrote)")
    parser.add_argument("--out", type=Path, help="folder to write (with --task: examples/adapters/TASK)")
    parser.add_argument("--resume", type=Path, help="go on from this adapter, with its rank and targets")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 200, or the task's)")
    parser.add_argument("--rank", type=int, help="LoRA rank (default: 8, or the task's)")
    parser.add_argument(
        "--targets", help="names of linears, comma-separated (default: q_proj,v_proj, or the task's)"
    )
    parser.add_argument("--batch", type=int, default=8, help="examples a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="as saved"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first A and of the order (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    preset = Preset(steps=200, rank=8, targets="q_proj,v_proj")
    if args.task:
        preset = TASKS[args.task]
        args.data = args.data or EXAMPLES / "data" / f"{args.task}.train.jsonl"
        args.out = args.out or EXAMPLES / "adapters" / args.task
    if not (args.data and args.out):
        parser.error("give --task, or --data and --out")
    if not args.data.exists():
        parser.error(f"{args.data} does not exist; python examples/make_data.py writes the tasks' data")
    args.steps, args.rank = args.steps or preset.steps, args.rank or preset.rank
    args.targets = (args.targets or preset.targets).split(",")
    return args


def with_adapter(base: Any, args: argparse.Namespace) -> Any:
    """The model with the adapter to train, in float32: a fresh one, or the one to go on from."""
    if args.resume:
        return PeftModel.from_pretrained(base, args.resume, is_trainable=True)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=args.targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = MODEL_ID  # not the folder it was loaded from
    return model


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base, tokenizer = load_base()
    model = with_adapter(base, args)
    pairs = [tokenize(tokenizer, messages) for messages in read_data(args.data)]
    data = batches(pairs, args.batch, torch.Generator().manual_seed(args.seed))
    train(model, data, steps=args.steps, peak_rate=args.rate)
    save(model, args.out, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
