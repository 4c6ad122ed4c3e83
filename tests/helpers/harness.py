"""lm-evaluation-harness without a network: tasks from rows on disk, and what it found for each.

A task is YAML as the harness wants it, beside a JSONL file of its rows. `reference_tasks` makes
them of public rows as they were published; `write_task` of any.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.shared import shared_dir

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What the harness asked about a row and what the model answered.

    Attributes:
        pairs: context and continuation of every option; of a whole text ("", text).
        log_probs: of each.
        greedy: whether each is what greedy decoding gives.
        output: of a task that generates.
        metrics: of this row, by name.
    """

    pairs: tuple[tuple[str, str], ...]
    log_probs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    output: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """A task's results.

    Attributes:
        metrics: over all rows, by name.
        samples: in the order of the rows.
    """

    metrics: Mapping[str, float]
    samples: list[Sample]

    @property
    def accuracy(self) -> float:
        """The share of rows whose right option is the likeliest."""
        return self.metrics["acc"]


# -- tasks ----------------------------------------------------------------------------------------


def _mean(*names: str) -> list[dict[str, Any]]:
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": _mean("acc", "acc_norm"),
}
# The harness takes a number for "the contexts are what differs".
CONTEXTS = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "context_options",
    "doc_to_target": "continuation",
    "metric_list": _mean("acc"),
}
TEXTS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
ANSWERS = {
    "output_type": "generate_until",
    "doc_to_text": "text",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["ship"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": _mean("exact_match"),
}
ENTAILMENT = "{{premise}}\nQuestion: {{hypothesis}} True, False or Neither?\nAnswer:"
COPA = "{{premise.rstrip('.')}} {{'perché' if question == 'cause' else 'quindi'}}"


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from and how the harness is to read them.

    Attributes:
        path: below the shared folder of few-shot data.
        config: the task's YAML.
        labels: a file with the rows' labels, where they are not in the rows.
    """

    path: str
    config: Mapping[str, Any]
    labels: str | None = None


def _choices(path: str, text: str, choices: str | list[str], label: str, **more: Any) -> Source:
    config = {"doc_to_text": text, "doc_to_choice": choices, "doc_to_target": label}
    return Source(path, {**CHOICE, **config}, **more)


REFERENCE = {
    "copa": Source("llmfoundry/copa.jsonl", CHOICE),
    "openbook_qa": Source("llmfoundry/openbook_qa.jsonl", CHOICE),
    "boolq": Source("llmfoundry/boolq.jsonl", CHOICE),
    "arc_easy": _choices("llmfoundry/arc_easy.jsonl", "{{query}}\nAnswer:", "choices", "gold"),
    "arc_challenge": _choices(
        "llmfoundry/arc_challenge.jsonl", "{{query}}\nAnswer:", "choices", "gold"
    ),
    "winogrande": Source("llmfoundry/winogrande.jsonl", CONTEXTS),
    "winograd": Source("llmfoundry/winograd_wsc.jsonl", CONTEXTS),
    "hellaswag": _choices("hellaswag/hellaswag_val.jsonl", "ctx", "endings", "label"),
    "piqa": _choices(
        "piqa/valid.jsonl",
        "Question: {{goal}}\nAnswer:",
        "{{[sol1, sol2]}}",
        "label",
        labels="piqa/valid-labels.lst",
    ),
    "blimp": _choices(
        "blimp/wh_island.jsonl", "", "{{[sentence_good, sentence_bad]}}", "label", labels=None
    ),
    "cb": _choices(
        "fewglue/CB/train.jsonl",
        ENTAILMENT,
        ["True", "False", "Neither"],
        "{{['entailment', 'contradiction', 'neutral'].index(label)}}",
    ),
    "rte": _choices(
        "fewglue/RTE/train.jsonl",
        ENTAILMENT,
        ["True", "False"],
        "{{['entailment', 'not_entailment'].index(label)}}",
    ),
    "xcopa": _choices("xcopa/it/val.it.jsonl", COPA, "{{[choice1, choice2]}}", "label"),
}


def reference_tasks(folder: Path, names: Sequence[str], rows: int = 8, longest: int = 900) -> None:
    """Write tasks of the first rows of public data.

    Args:
        folder: for their files.
        names: of `REFERENCE`.
        rows: of each.
        longest: rows of more characters are passed over.
    """
    for name in names:
        source = REFERENCE[name]
        write_task(folder, name, _read(source, rows, longest), source.config)


def _read(source: Source, wanted: int, longest: int) -> list[Row]:
    lines = shared_dir("data", "fewshot", *source.path.split("/")).read_text("utf-8").split("\n")
    labels: list[Any] = [None] * len(lines)
    if source.labels is not None:
        path = shared_dir("data", "fewshot", *source.labels.split("/"))
        labels = [int(label) for label in path.read_text("utf-8").split()]
    found: list[Row] = []
    for line, label in zip(lines, labels, strict=False):
        if line and len(line) <= longest and len(found) < wanted:
            row = json.loads(line)
            found.append(row if "label" in row or "gold" in row else {**row, "label": label or 0})
    assert len(found) == wanted, source.path
    return found


def write_task(
    folder: Path, name: str, rows: Sequence[Row], config: Mapping[str, Any] = CHOICE
) -> None:
    """Write a task for the harness.

    Args:
        folder: for its files.
        name: of the task.
        rows: `query`, `choices` and `gold` where the config does not say otherwise.
        config: its YAML, but for where the rows are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    where = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": files}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **config}), "utf-8")


# -- running --------------------------------------------------------------------------------------


@contextmanager
def offline(folder: Path, scan: bool = True) -> Iterator[None]:
    """Inside, the harness asks no machine for anything and keeps its caches in a folder.

    Args:
        folder: for them.
        scan: whether its command reads the thousands of tasks it ships with, which takes seconds.
    """
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
    values = {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    loggers = [logging.getLogger(name) for name in (None, "lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    with pytest.MonkeyPatch.context() as patched:
        for key, value in values.items():
            patched.setenv(key, value)
        if not scan:
            import lm_eval.tasks

            manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
            patched.setattr(lm_eval.tasks, "TaskManager", manager)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def evaluate(
    folder: Path,
    names: Sequence[str],
    model: Any,
    model_args: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Evaluated]:
    """Run the harness on tasks that were written into a folder.

    Args:
        folder: where they are.
        names: of them.
        model: a name the harness knows, or an `LM`.
        model_args: of a name.
        more: arguments of `simple_evaluate`.
    """
    with offline(folder):
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        given = None if model_args is None else dict(model_args)
        found = simple_evaluate(
            model=model,
            model_args=given,
            tasks=list(names),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            **more,
        )
    return {
        name: Evaluated(
            _numbers({k.split(",")[0]: v for k, v in found["results"][name].items()}),
            [_sample(sample) for sample in found["samples"][name]],
        )
        for name in names
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in values.items() if isinstance(v, (int, float))}


def _sample(found: Mapping[str, Any]) -> Sample:
    arguments = [tuple(args) for args in found["arguments"]]
    answers = [answer[0] for answer in found["resps"]]
    metrics = _numbers({name: found[name] for name in found["metrics"]})
    if isinstance(answers[0], str):
        return Sample(((arguments[0][0], ""),), output=answers[0], metrics=metrics)
    if len(arguments[0]) == 1:  # a whole text
        texts = tuple(("", args[0]) for args in arguments)
        return Sample(texts, tuple(map(float, answers)), metrics=metrics)
    return Sample(
        tuple((context, continuation) for context, continuation in arguments),
        tuple(float(score) for score, _ in answers),
        tuple(bool(greedy) for _, greedy in answers),
        metrics=metrics,
    )
