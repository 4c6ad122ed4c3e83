"""What came out of the runs: a row for each, from its record and its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_lite_cli.drawing import lines_of
from fairseq_lite_cli.logs import Log, read
from fairseq_lite_cli.writing import write_atomically

from . import state
from .grid import Run
from .state import State

# Column -> how its numbers are shown; a column without any number is left out of the table.
_COLUMNS = {
    "updates": "{:.0f}",
    "valid_loss": "{:.3f}",
    "valid_ppl": "{:.2f}",
    "valid_bleu": "{:.2f}",
    "train_loss": "{:.3f}",
    "tokens_per_second": "{:.0f}",
    "seconds": "{:.0f}",
}


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        name: of the run.
        state: how far it is.
        values: column -> number, as far as known. Of validations the best on the first subset:
            the lowest loss and its perplexity, the highest BLEU. Losses are in base 2, as logged.
        error: why it failed.
    """

    name: str
    state: State
    values: dict[str, float]
    error: str = ""


def result_of(run: Run) -> Result:
    """The row of a run."""
    how_far, record = state.state_of(run.save_dir)
    path = run.save_dir / state.LOG
    values = values_of(read(lines_of(path))) if path.is_file() else {}
    if record is not None and record.ended:
        values["seconds"] = record.seconds
    error = record.error if record is not None and how_far is State.FAILED else ""
    return Result(run.name, how_far, values, error)


def values_of(log: Log) -> dict[str, float]:
    """The columns that a log fills."""
    values: dict[str, float] = {}
    trained = log.epochs or log.inner
    counts = [*log.epochs, *log.inner, *(n for records in log.valid.values() for n in records)]
    if counts:
        values["updates"] = max(counts)
    first: dict[int, dict[str, float]] = next(iter(log.valid.values()), {})
    losses = [r for r in first.values() if math.isfinite(r.get("loss", math.nan))]
    if losses:
        best = min(losses, key=lambda record: record["loss"])
        values["valid_loss"] = best["loss"]
        if "ppl" in best:
            values["valid_ppl"] = best["ppl"]
    bleus = [record["bleu"] for record in first.values() if "bleu" in record]
    if bleus:
        values["valid_bleu"] = max(bleus)
    if trained and "loss" in trained[max(trained)]:
        values["train_loss"] = trained[max(trained)]["loss"]
    # The middle one: the first interval pays for warm-up, that with a validation for waiting.
    speeds = [r["wps"] for r in (log.inner or log.epochs).values() if "wps" in r]
    if speeds:
        values["tokens_per_second"] = statistics.median(speeds)
    return values


def summary(result: Result) -> str:
    """What a finished run reached, for a line of progress."""
    values = result.values
    parts = []
    if "updates" in values:
        parts.append(f"{values['updates']:.0f} updates")
    if "valid_loss" in values:
        ppl = f" (ppl {values['valid_ppl']:.2f})" if "valid_ppl" in values else ""
        parts.append(f"best valid loss {values['valid_loss']:.3f}{ppl}")
    elif "train_loss" in values:
        parts.append(f"train loss {values['train_loss']:.3f}")
    return ", ".join(parts) or "no figures in its log"


def table(results: Sequence[Result]) -> str:
    """The rows as aligned text."""
    columns = [c for c in _COLUMNS if any(c in result.values for result in results)]
    rows = [["run", "state", *columns]]
    for result in results:
        shown = [
            _COLUMNS[c].format(result.values[c]) if c in result.values else "–" for c in columns
        ]
        rows.append([result.name, result.state.value, *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [word.ljust(width) for word, width in zip(row[:2], widths[:2], strict=True)]
        right = [word.rjust(width) for word, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def write_tsv(results: Sequence[Result], path: Path) -> None:
    """The rows with all columns and digits, separated by tabs."""
    lines = [["run", "state", *_COLUMNS, "error"]]
    for result in results:
        numbers = [f"{result.values[c]:g}" if c in result.values else "" for c in _COLUMNS]
        error = " ".join(result.error.split())
        lines.append([result.name, result.state.value, *numbers, error])
    write_atomically(path, ("\t".join(line) + "\n" for line in lines))
