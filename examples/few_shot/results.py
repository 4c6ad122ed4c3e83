"""Results and predictions on disk: strict JSON, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.few_shot.predictors.api import Prediction, ScoredCandidate
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import PlannedEvaluation
from fairseq_lite.errors import DataError
from fairseq_lite_cli.writing import write_atomically

FORMAT = 1  # of results files; a file of another one is not complete


def strict(value: Any) -> Any:
    """A value that JSON knows: what is no finite number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(each) for each in value]
    return value


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results file."""
    text = json.dumps(strict(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, [text, "\n"])


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        DataError: missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise DataError(f"{path}: is no results file: {e}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: is no results file")
    return found


def complete(planned: PlannedEvaluation) -> dict[str, Any] | None:
    """The results of an evaluation, if they are whole and made with the same settings."""
    try:
        found = read_results(planned.results_file)
    except DataError:
        return None
    whole = (
        found.get("complete") is True
        and found.get("format") == FORMAT
        and found.get("settings") == strict(planned.settings)
    )
    return found if whole else None


def is_complete(planned: PlannedEvaluation) -> bool:
    """Whether the results of an evaluation are there, whole, and made with the same settings."""
    return complete(planned) is not None


# -- predictions


def prediction_rows(
    predictions: Sequence[Prediction],
    numbers: Sequence[str],
    shots: Sequence[Sequence[str]],
    run: str,
) -> list[dict[str, Any]]:
    """Predictions as they are written, one a line.

    Args:
        predictions: of a trial.
        numbers: of each the number of its sample, and of the subproblem behind a dot.
        shots: of each the identities of its shots.
        run: what made them: settings and model.
    """
    rows = []
    for prediction, number, its_shots in zip(predictions, numbers, shots, strict=True):
        best = prediction.best
        rows.append(
            {
                "id": prediction.sample.identity,
                "idx": number,
                "run": run,
                "shots": list(its_shots),
                "pred_meta": strict(prediction.meta),
                "candidates": [
                    [
                        each.candidate,
                        {
                            "best": each is best,
                            "gold": each.candidate in prediction.sample.correct,
                            "score": strict(each.score),
                            "meta": strict(each.meta),
                        },
                    ]
                    for each in prediction.candidates
                ],
            }
        )
    return rows


def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the predictions of a trial."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically(path, lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read predictions as they were written.

    Raises:
        DataError: missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.split("\n") if line]
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise DataError(f"{path}: is no file of predictions: {e}") from None
    if not all(isinstance(row, dict) and "candidates" in row for row in found):
        raise DataError(f"{path}: is no file of predictions")
    return found


def predictions_of(
    rows: Sequence[Mapping[str, Any]], questions: Sequence[FewShotSample], path: Path
) -> list[Prediction]:
    """Written predictions of known questions.

    Raises:
        DataError: they are of other questions.
    """
    if [row["id"] for row in rows] != [sample.identity for sample in questions]:
        raise DataError(f"{path}: are predictions for other samples than those of the data file")
    return [
        Prediction(
            sample,
            tuple(
                ScoredCandidate(name, _number(said["score"]), _numbers(said["meta"]))
                for name, said in row["candidates"]
            ),
            _numbers(row["pred_meta"]),
        )
        for row, sample in zip(rows, questions, strict=True)
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _numbers(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexities that were no number are that again; other nulls stay."""
    found: dict[str, Any] = {}
    for key, value in meta.items():
        if key == "calib_ppls":
            found[key] = [_numbers(each) for each in value]
        else:
            found[key] = math.nan if value is None and key.startswith("ppl") else value
    return found
