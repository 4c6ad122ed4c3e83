"""The same prompts for our evaluator and for lm-evaluation-harness, made of public rows.

A row is a text, the options that could follow it, and the number of the right one; nothing is put
between the two. `parity` is the task of such rows, registered while it is asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.few_shot.evaluation import Evaluation
from examples.few_shot.models.api import Model
from examples.few_shot.results import read_rows
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.settings import plan
from examples.few_shot.tasks.api import TASKS, FewShotTask
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate
from tests.helpers import harness
from tests.helpers.registered import registered
from tests.helpers.shared import shared_dir

Row = Mapping[str, Any]

CONFIG = {**harness.CHOICE, "target_delimiter": ""}


class Parity(FewShotTask):
    """Rows of `query`, `choices` and `gold`."""

    template = "parity"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        return choice(row, row["choices"], row["gold"], where)


class ParityTemplate(FewShotTemplate):
    """The text, then an option."""

    def encode(self, sample: FewShotSample) -> str:
        return str(sample["query"]) + MASK


# -- rows -----------------------------------------------------------------------------------------


def _spaced(query: str, choices: Sequence[str], gold: int) -> Row:
    return {"query": query, "choices": [f" {each}" for each in choices], "gold": gold}


def _query(row: Row) -> Row:
    return _spaced(row["query"], row["choices"], row["gold"])


def _asked(row: Row) -> Row:
    return _spaced(f"{row['query']}\nAnswer:", row["choices"], row["gold"])


def _masked(row: Row) -> Row:
    """Sentences that differ in their middle: what they share comes first."""
    options = row["context_options"]
    shared = os.path.commonprefix(options).rpartition(" ")[0]  # noqa: RUF071 (of characters)
    choices = [each[len(shared) :] + " " + row["continuation"].lstrip() for each in options]
    return {"query": shared, "choices": choices, "gold": row["gold"]}


def _piqa(row: Row) -> Row:
    return _spaced(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _hellaswag(row: Row) -> Row:
    return _spaced(f"{row['activity_label']}: {row['ctx']}", row["endings"], row["label"])


def _blimp(row: Row) -> Row:
    return {"query": "", "choices": [row["sentence_good"], row["sentence_bad"]], "gold": 0}


def _entailment(row: Row) -> Row:
    labels = ("entailment", "contradiction", "neutral")
    query = f"{row['premise']}\nQuestion: {row['hypothesis']} True, False or Neither?\nAnswer:"
    return _spaced(query, ("True", "False", "Neither"), labels.index(row["label"]))


def _xcopa(row: Row) -> Row:
    word = "perché" if row["question"] == "cause" else "quindi"
    query = f"{row['premise'].rstrip('.')} {word}"
    return _spaced(query, [row["choice1"], row["choice2"]], row["label"])


SOURCES: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "copa": ("llmfoundry/copa.jsonl", _query),
    "piqa": ("piqa/valid.jsonl", _piqa),
    "hellaswag": ("hellaswag/hellaswag_val.jsonl", _hellaswag),
    "arc_easy": ("llmfoundry/arc_easy.jsonl", _asked),
    "arc_challenge": ("llmfoundry/arc_challenge.jsonl", _asked),
    "winogrande": ("llmfoundry/winogrande.jsonl", _masked),
    "winograd": ("llmfoundry/winograd_wsc.jsonl", _masked),
    "blimp": ("blimp/wh_island.jsonl", _blimp),
    "openbook_qa": ("llmfoundry/openbook_qa.jsonl", _query),
    "boolq": ("llmfoundry/boolq.jsonl", _query),
    "cb": ("fewglue/CB/train.jsonl", _entailment),
    "xcopa": ("xcopa/it/val.it.jsonl", _xcopa),
}


def public_rows(name: str, count: int, *, shortest: bool = False) -> list[Row]:
    """Rows of public data.

    Args:
        name: of `SOURCES`.
        count: how many.
        shortest: the shortest ones instead of the first.
    """
    path, read = SOURCES[name]
    rows = list(_lines(shared_dir("data", "fewshot", *path.split("/"))))
    if name == "piqa":
        labels = shared_dir("data", "fewshot", "piqa", "valid-labels.lst").read_text().split()
        rows = [{**row, "label": int(x)} for row, x in zip(rows, labels, strict=True)]
    found = [read(row) for row in rows]
    if shortest:
        found.sort(key=lambda row: len(row["query"]) + sum(map(len, row["choices"])))
    assert len(found) >= count
    return found[:count]


def _lines(path: Path) -> Iterator[Row]:
    for line in path.read_text("utf-8").split("\n"):
        if line:
            yield json.loads(line)


# -- both evaluators ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What an evaluator says of a task.

    Attributes:
        accuracy: the share of right answers.
        log_probs: of every row those of its options.
        greedy: of every row whether each option is the greedy continuation.
    """

    accuracy: float
    log_probs: list[tuple[float, ...]]
    greedy: list[tuple[bool, ...]]


def write(folder: Path, tasks: Mapping[str, Sequence[Row]]) -> None:
    """Write tasks for both."""
    for name, rows in tasks.items():
        harness.write_task(folder, name, rows, CONFIG)


def theirs(
    folder: Path, names: Sequence[str], model: Any, tokenizer: Any, **more: Any
) -> dict[str, Found]:
    """What lm-evaluation-harness finds with a model of Hugging Face's."""
    with harness.offline(folder):
        from lm_eval.models.huggingface import HFLM

        given = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    found = harness.evaluate(folder, names, given, **more)
    return {
        name: Found(
            each.accuracy,
            [sample.log_probs for sample in each.samples],
            [sample.greedy for sample in each.samples],
        )
        for name, each in found.items()
    }


def ours(
    folder: Path, names: Sequence[str], model: Model, *, scoring: str = "sum", batch: int = 64
) -> dict[str, Found]:
    """What our evaluator finds."""
    found = {}
    for name in names:
        with registered((TASKS, "parity", Parity), (TEMPLATES, "parity", ParityTemplate)):
            (planned,) = plan(
                name,
                tasks="parity",
                parity_eval_set=str(folder / f"{name}.jsonl"),
                nb_few_shot_samples_values=[0],
                scoring=scoring,
                add_positional_scores_to_meta=True,
                results_dir=tempfile.mkdtemp(dir=folder),
            )
            results = Evaluation(planned, model).run()
        rows = read_rows(planned.prediction_files[0])
        metas = [[said["meta"] for _, said in row["candidates"]] for row in rows]
        found[name] = Found(
            results["accuracy"]["mean"] / 100,
            [tuple(map(_of_answer, each)) for each in metas],
            [tuple(meta["greedy"] for meta in each) for each in metas],
        )
    return found


def _of_answer(meta: Row) -> float:
    """The log-probability of an answer's own tokens."""
    return float(sum(meta["positional_scores"][meta["context_tokens"] + meta["start"] :]))
