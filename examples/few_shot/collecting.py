"""Many results files as one table: rows, views of them, accuracies made again from predictions."""

from __future__ import annotations

import glob
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.few_shot import results, scoring
from examples.few_shot.metrics.api import percentage
from examples.few_shot.predictors.prompting import token_scores
from examples.few_shot.settings import safe
from examples.few_shot.statistics import over_trials
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite_cli.writing import write_atomically

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# What an evaluation is, in the order in which tables are sorted.
KEYS = (
    "task", "language", "template", "eval_set", "train_set", "train_lang", "nb_few_shot_samples",
    "calibrator_name", "calibration_options", "scoring",
)  # fmt: skip

# Where a row says which of its metrics are none of its results file; see `recalculated`.
MADE_AGAIN = "recalculated"


def results_files(words: Iterable[str]) -> list[Path]:
    """Results files below folders, and one level further down; patterns are filled in.

    Raises:
        DataError: a word names nothing.
    """
    found: dict[Path, None] = {}
    for word in words:
        places = sorted(map(Path, glob.glob(word))) if glob.has_magic(word) else [Path(word)]
        for place in places:
            if place.is_file():
                found[place] = None
            elif place.is_dir():
                for pattern in ("*_results.json", "*/*_results.json"):
                    found.update(dict.fromkeys(sorted(place.glob(pattern))))
            else:
                raise DataError(f"{word}: neither a folder nor a results file")
        if not places:
            raise DataError(f"{word}: no folder or file has such a name")
    return list(found)


def load(paths: Iterable[Path]) -> list[Row]:
    """Results as they were written, `path` added; what is damaged is left out, with a warning."""
    found = []
    for path in paths:
        try:
            one = results.read_results(path)
        except DataError as e:
            logger.warning("%s; left out", e)
            continue
        if one.get("complete") is not True or not _says(one):
            logger.warning("%s: is not complete; left out", path)
            continue
        found.append(one | {"path": str(path)})
    return found


def _says(one: Mapping[str, Any]) -> bool:
    """Whether results say what every table asks for."""
    values = one.get(str(one.get("preferred_metric")))
    return (
        isinstance(values, Mapping)
        and {"scores", "mean", "std", "mean_confidence_interval"} <= set(values)
        and {"model_name", *KEYS} <= set(one)
    )


def flat(one: Mapping[str, Any]) -> Row:
    """Nested names joined by `::`, and the preferred metric as `_metric`, its mean and spread."""
    found: Row = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                add(f"{name}::{key}" if name else key, each)
        else:
            found[name] = " ".join(map(str, value)) if isinstance(value, list) else value

    add("", one)
    metric = one["preferred_metric"]
    return found | {
        "_metric": metric,
        "_metric_val": one[metric]["mean"],
        "_metric_val_std": one[metric]["std"],
    }


# -- views


def _raw(rows: Sequence[Row]) -> list[Row]:
    return [flat(row) for row in rows]


def _preferred(rows: Sequence[Row], *, spread: bool) -> list[Row]:
    """A row for each evaluation: what it is, its preferred metric, accuracies made again."""
    found = []
    for row in sorted(rows, key=_sort_key):
        values = row[row["preferred_metric"]]
        found.append(
            {"model_name": row["model_name"]}
            | {key: _text(row.get(key)) for key in KEYS}
            | {"metric": row["preferred_metric"], "mean": values["mean"]}
            | (_spread(values) if spread else {})
            | {"eval_examples_cnt": row.get("eval_examples_cnt")}
            | {name: row[name]["mean"] for name in row.get(MADE_AGAIN, ())}
        )  # fmt: skip
    return found


def _spread(values: Mapping[str, Any]) -> Row:
    names = ("std", "mean_confidence_interval")
    return {name: values[name] for name in names} | {"trials": len(values["scores"])}


def variants(rows: Sequence[Row]) -> list[str]:
    """Of each row the settings that tell it from others that a table has one cell for.

    A model may be evaluated several times with settings that are no column (the number of samples,
    of trials, an option of a template). Empty where no model is.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_what(row), []).append(row)
    differing: dict[tuple[str, ...], list[str]] = {}
    for what, some in groups.items():
        models = [row["model_name"] for row in some]
        if len(set(models)) < len(models):
            settings = [row.get("settings", {}) for row in some]
            names = sorted({name for each in settings for name in each} - {"model_name"})
            differing[what] = [
                name for name in names if len({_text(each.get(name)) for each in settings}) > 1
            ]
    return [
        " ".join(
            f"{name}={_text(row.get('settings', {}).get(name))}"
            for name in differing.get(_what(row), ())
        )
        for row in rows
    ]


def _what(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_text(row.get(key)) for key in KEYS)


def pivot(rows: Sequence[Row], *, every_metric: bool = False) -> list[Row]:
    """A row for each evaluation and metric, a column for each model: mean, with ± std over trials.

    Where a model has several results for one cell, a column `settings` tells them apart.

    Args:
        rows: results.
        every_metric: all metrics; otherwise the preferred one, and accuracies made again.
    """
    models = list(dict.fromkeys(row["model_name"] for row in rows))
    table: dict[tuple[str, ...], Row] = {}
    told = variants(rows)
    apart = {id(row): {"settings": text} for row, text in zip(rows, told, strict=True)}
    for row in sorted(rows, key=_sort_key):
        more = apart[id(row)] if any(told) else {}
        chosen = [row["preferred_metric"], *row.get(MADE_AGAIN, ())]
        names = _metrics(row) if every_metric else chosen
        for name in names:
            what = dict(zip(KEYS, _what(row), strict=True)) | more | {"metric": name}
            line = table.setdefault(tuple(what.values()), what | dict.fromkeys(models, ""))
            line[row["model_name"]] = cell(row[name])
    return list(table.values())


VIEWS: Mapping[str, Callable[[Sequence[Row]], list[Row]]] = {
    "raw": _raw,
    "preferred_metrics_mean": lambda rows: _preferred(rows, spread=False),
    "preferred_metrics": lambda rows: _preferred(rows, spread=True),
    "by_run_params_simple": pivot,
    "by_run_params_simple_ext": lambda rows: pivot(rows, every_metric=True),
}


def cell(values: Mapping[str, Any]) -> str:
    """A metric in a table."""
    if values["mean"] is None:
        return "-"
    spread = f" ± {values['std']:.2f}" if len(values["scores"]) > 1 and values["std"] else ""
    return f"{values['mean']:.2f}{spread}"


def _metrics(row: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in row.items()
        if isinstance(value, Mapping) and {"scores", "mean", "std"} <= set(value)
    ]


def _sort_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    found = [row.get(key) for key in KEYS]
    return tuple(
        (isinstance(v, str), v) if isinstance(v, int | str) else (True, _text(v)) for v in found
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ; ".join(map(str, value))
    return "" if value is None else str(value)


# -- accuracies made again


def _mean_full(known: scoring.TokenScores) -> float | None:
    return None if known.skipped else known.total / known.tokens


def _suffix(known: scoring.TokenScores) -> float | None:
    return scoring.score(known, "suffix") if known.suffix else None


def _unconditional_norm(known: scoring.TokenScores) -> float | None:
    return None if known.unconditional is None else scoring.score(known, "unconditional-norm")


def _sum_charnorm(known: scoring.TokenScores) -> float:
    """Of a candidate's words, by their characters; what all begin with is in the context."""
    return math.fsum(known.tail[max(known.start, 0) :]) / max(known.characters, 1)


# None where predictions do not hold what it takes.
SCORINGS: Mapping[str, Callable[[scoring.TokenScores], float | None]] = {
    "sum": lambda known: known.total,
    "mean": lambda known: scoring.score(known, "mean"),
    "mean_full": _mean_full,
    "suffix": _suffix,
    "unconditional-norm": _unconditional_norm,
    "sum_charnorm": _sum_charnorm,
}


def recalculated(row: Row, folder: Path | None = None) -> Row:
    """Accuracies of every scoring, with and without calibration, and of ensembles over trials.

    Names are `accuracy_<scoring>`, `accuracy_<scoring>_calib`, and with `_ensemble` (the mean of
    the trials' probabilities, a softmax of scores) or `_majority` (the most votes) behind them.
    The field `recalculated` lists them. They are of questions with a known answer. `suffix` is
    there for masks in mid-sentence, and `unconditional-norm` where that was the evaluation's
    scoring, or predictions were made with `--add-positional-scores-to-meta`.

    Args:
        row: of `load`.
        folder: where predictions are; None: beside the results.

    Raises:
        DataError: the predictions are not beside the results, or hold no scores of tokens.
    """
    place = Path(row["path"]).parent if folder is None else folder
    trials = [results.read_rows(place / name) for name in row["predictions"]]
    try:
        found = _recalculated(trials)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise DataError(f"{row['path']}: its predictions are damaged: {e!r}") from None
    if not found:
        raise DataError(f"{row['path']}: its predictions hold no scores of candidates by token")
    return row | results.strict(found) | {MADE_AGAIN: list(found)}


def _recalculated(trials: Sequence[Sequence[Row]]) -> Row:
    """What `recalculated` adds; nothing where predictions hold no scores of tokens."""
    found: Row = {}
    for name, function in SCORINGS.items():
        for calibrated in (False, True):
            scores = [_scores(trial, function, calibrated) for trial in trials]
            if any(each is None for each in scores):
                continue
            label = f"accuracy_{name}" + ("_calib" if calibrated else "")
            known = [each for each in scores if each is not None]
            found[label] = over_trials(
                [_accuracy(t, s) for t, s in zip(trials, known, strict=True)]
            )
            if len(trials) > 1:
                found[f"{label}_ensemble"] = over_trials([_accuracy(trials[0], _mean(known))])
                found[f"{label}_majority"] = over_trials([_accuracy(trials[0], _votes(known))])
    return found


Scores = list[list[float]]


def _scores(
    trial: Sequence[Row], function: Callable[[scoring.TokenScores], float | None], calibrated: bool
) -> Scores | None:
    """Of each question the score of each candidate; None where predictions do not say."""
    found: Scores = []
    for line in trial:
        its = []
        for _, said in line["candidates"]:
            meta = said["meta"]
            if "tail_scores" not in meta or (calibrated and "calib_metas" not in meta):
                return None
            copies = meta["calib_metas"] if calibrated else ()
            values = [function(token_scores(each)) for each in (meta, *copies)]
            numbers = [each for each in values if each is not None]
            if len(numbers) < len(values):
                return None
            value, *reduced = numbers
            its.append(value - math.fsum(reduced) / max(len(reduced), 1))
        found.append(its)
    return found


def _accuracy(trial: Sequence[Row], scores: Scores) -> float:
    hits = [
        line["candidates"][int(np.argmax(its))][1]["gold"]
        for line, its in zip(trial, scores, strict=True)
        if any(said["gold"] for _, said in line["candidates"])
    ]
    return percentage(hits)


def _mean(trials: Sequence[Scores]) -> Scores:
    """The mean over trials of a softmax over candidates."""
    found: Scores = []
    for question in zip(*trials, strict=True):
        array = np.array(question)
        probabilities = np.exp(array - array.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        found.append(probabilities.mean(axis=0).tolist())
    return found


def _votes(trials: Sequence[Scores]) -> Scores:
    """The number of trials that a candidate is best in; of equal ones the first is."""
    found: Scores = []
    for question in zip(*trials, strict=True):
        votes = Counter(int(np.argmax(its)) for its in question)
        found.append([float(votes[j]) for j in range(len(question[0]))])
    return found


def recalculate(rows: Sequence[Row], folder: Path | None = None) -> list[Row]:
    """Rows with what `recalculated` finds; those it finds nothing for as they are, with a warning.

    Raises:
        DataError: nothing is found for any.
    """
    found = []
    last: DataError | None = None
    for row in rows:
        try:
            found.append(recalculated(row, folder))
        except DataError as e:
            logger.warning("%s; nothing is computed anew", e)
            found.append(row)
            last = e
    if last is not None and all(a is b for a, b in zip(found, rows, strict=True)):
        raise last
    return found


# -- tables


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def tsv_lines(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Lines of a table, without the one of names; tabs and line breaks in values become spaces."""
    return ["\t".join(" ".join(_text(row.get(name)).split()) for name in columns) for row in rows]


def write_tsv(path: Path, rows: Sequence[Row], *, append: bool) -> None:
    """Write a table, or put its rows behind those of a file with the same columns.

    Raises:
        DataError: the file has other columns, or cannot be written.
    """
    columns = columns_of(rows)
    lines = tsv_lines(rows, columns)
    head = "\t".join(columns)
    if append and path.exists():
        there = path.read_text(encoding="utf-8").split("\n")
        if there[0] != head:
            raise DataError(
                f"{path}: has other columns than this table; give another --output, or"
                " --overwrite-output"
            )
        known = set(there)
        lines = [*filter(None, there[1:]), *(line for line in lines if line not in known)]
    write_atomically(path, [f"{line}\n" for line in (head, *lines)])


def select(
    rows: Sequence[Row], *, tasks: Iterable[str] | None = None, models: Iterable[str] | None = None
) -> list[Row]:
    """The rows of tasks and models.

    Raises:
        ConfigError: none is left.
    """
    wanted = None if tasks is None else set(tasks)
    names = None if models is None else set(models)
    found = [
        row
        for row in rows
        if (wanted is None or row["task"] in wanted)
        and (names is None or row["model_name"] in names or safe(row["model_name"]) in names)
    ]
    if not found:
        there = (
            ", ".join(sorted({f"{r['model_name']}: {r['task']}" for r in rows})[:8]) or "nothing"
        )
        raise ConfigError(f"no results of these tasks and models; there are {there}")
    return found
