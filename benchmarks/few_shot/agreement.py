"""The same model on the same prompts: our evaluator beside lm-evaluation-harness.

    pip install 'fairseq-lite[lm-eval,huggingface]' accelerate
    python -m benchmarks.few_shot.agreement --model-name SmolLM2-135M-Instruct.Q4_1.gguf \
        --tasks copa piqa hellaswag arceasy winogrande blimp --arceasy-eval-set test --n 400 \
        --data-dir DATA --out benchmarks/results/few-shot-agreement.json

Takes the flags of gpt3_eval. The harness is given the prompts of our templates, without shots; the
model is loaded once, and both read it. Recorded are the accuracies and the largest difference of a
log-probability of an answer: a sum over its tokens, which rounding tells apart; `--dtype float64`
leaves hardly any of that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_shot import harness
from benchmarks.few_shot.harness import Row
from benchmarks.timing import machine, record
from examples.few_shot import gpt3_eval, prompting
from examples.few_shot.evaluation import Evaluation
from examples.few_shot.models.huggingface import HuggingFaceModel
from examples.few_shot.results import read_rows
from examples.few_shot.settings import PlannedEvaluation, plan
from fairseq_lite.errors import ConfigError


def rows_of(evaluation: Evaluation) -> list[Row]:
    """The questions of an evaluation as the harness takes them.

    Raises:
        ConfigError: there are shots, or nothing to choose from.
    """
    if evaluation.planned.k or evaluation.task.kind != "choice":
        raise ConfigError(f"{evaluation.planned.task}: expected a choice, and no shots")
    found = []
    for question in evaluation.questions:
        prompt = prompting.compose(evaluation.template, question.sample, [])
        choices = tuple(answer + prompt.after for answer in prompt.answers)
        (gold,) = question.sample.correct
        found.append(Row(prompt.before, choices, question.sample.candidates.index(gold)))
    return found


def ours(evaluation: Evaluation, rows: Sequence[Row]) -> tuple[float, list[list[float]]]:
    """Our accuracy, and the log-probability of each answer.

    An answer begins where the harness has it begin: behind as many tokens as its context has alone,
    without spaces at its end.
    """
    model = evaluation.model
    assert model is not None
    results = evaluation.run()
    found = []
    predictions = read_rows(evaluation.planned.prediction_files[0])
    for row, prediction in zip(rows, predictions, strict=True):
        first = len(model.encode(row.query.rstrip()))
        scores = (said["meta"]["positional_scores"] for _, said in prediction["candidates"])
        found.append([math.fsum(each[first:]) for each in scores])
    return results["accuracy"]["mean"] / 100, found


def compare(planned: PlannedEvaluation, model: HuggingFaceModel, lm: Any, folder: Path) -> Any:
    """Both evaluators on one task."""
    evaluation = Evaluation(planned, model)
    rows = rows_of(evaluation)
    begin = time.perf_counter()
    accuracy, mine = ours(evaluation, rows)
    middle = time.perf_counter()
    theirs = harness.evaluate(folder, planned.prefix, rows, lm)
    differences = [
        abs(a - b)
        for one, other in zip(mine, theirs.log_probs, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return {
        "task": planned.task,
        "eval_set": Path(planned.eval_set).name,
        "template": planned.template,
        "rows": len(rows),
        "ours": accuracy,
        "harness": theirs.accuracy,
        "largest_difference": max(differences),
        "seconds": {
            "ours": round(middle - begin, 1),
            "harness": round(time.perf_counter() - middle, 1),
        },
    }


def summary(table: list[dict[str, Any]]) -> list[str]:
    """A Markdown table; tasks of one family are one row."""
    lines = ["| task | rows | ours | harness | largest difference |", "|---|---|---|---|---|"]
    families: dict[str, list[dict[str, Any]]] = {}
    for each in table:
        families.setdefault(each["task"].partition("__")[0], []).append(each)
    for name, members in families.items():
        total = sum(each["rows"] for each in members)
        right = {
            key: 100 * sum(each[key] * each["rows"] for each in members) / total
            for key in ("ours", "harness")
        }
        largest = max(each["largest_difference"] for each in members)
        label = name if len(members) == 1 else f"{name} ({len(members)})"
        lines.append(
            f"| {label} | {total} | {right['ours']:.2f} | {right['harness']:.2f} | {largest:.1e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--harness-batch", type=int, default=8)
    args, words = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    given = gpt3_eval.parse(words)
    given.pop("list_tasks")
    name = given.pop("model_name")
    given["nb_few_shot_samples_values"] = [0]
    given["add_positional_scores_to_meta"] = True
    planned = plan(name, **given)
    model = HuggingFaceModel.load(name, dtype=getattr(torch, args.dtype))
    table = []
    with tempfile.TemporaryDirectory() as folder, harness.offline(Path(folder)):
        lm = harness.model(model.model, model.tokenizer, args.harness_batch)
        for each in planned:
            table.append(compare(each, model, lm, Path(folder)))
            print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    print("\n".join(summary(table)))
    said = {"machine": machine(), "model": model.identity(), "dtype": args.dtype}
    record({**said, "results": table}, args.out)


if __name__ == "__main__":
    main()
