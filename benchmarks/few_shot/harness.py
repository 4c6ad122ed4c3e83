"""lm-evaluation-harness on rows of our own, without a network.

pip install 'fairseq-lite[lm-eval,huggingface]' accelerate
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the harness is told about rows of `query`, `choices` and `gold`, with nothing in between.
_TASK: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "test_split": "test",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@dataclass(frozen=True)
class Row:
    """A question.

    Attributes:
        query: what stands in front of the answer.
        choices: what could follow, a space in front of it included.
        gold: the number of the right one.
    """

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Found:
    """What the harness says.

    Attributes:
        accuracy: the share of right answers.
        log_probs: of the choices of every row.
    """

    accuracy: float
    log_probs: list[list[float]]


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """Inside, no machine is asked for anything, and caches lie in a folder."""
    values = {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def model(given: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's own wrapper of a model of transformers that is loaded already."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=given, tokenizer=tokenizer, batch_size=batch_size, device=str(given.device)
    )


def evaluate(folder: Path, name: str, rows: Sequence[Row], lm: Any) -> Found:
    """Evaluate a model on rows.

    Args:
        folder: where the task's files are put.
        name: of the task.
        rows: its questions.
        lm: what `model` gave.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
    where = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": where, **_TASK}
    # JSON is YAML, too.
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    found = simple_evaluate(
        model=lm,
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return Found(
        found["results"][name]["acc,none"],
        [[float(each[0][0]) for each in sample["resps"]] for sample in found["samples"][name]],
    )
