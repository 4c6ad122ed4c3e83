"""A table for the eye, in Markdown or HTML, with a plot for each task: metric against shots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.few_shot.collecting import Row, columns_of, pivot, variants
from examples.few_shot.settings import safe
from fairseq_lite.errors import MissingDependency

# Columns that say nothing where they are empty for every row.
_OPTIONAL = (
    "language", "train_set", "train_lang", "calibrator_name", "calibration_options", "template",
)  # fmt: skip


def table(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """The pivot of results, without columns that are empty throughout."""
    found = pivot(rows)
    columns = [
        name
        for name in columns_of(found)
        if name not in _OPTIONAL or any(line[name] for line in found)
    ]
    return columns, found


def markdown(rows: Sequence[Row], pictures: Mapping[str, Path]) -> str:
    """The table, and pictures beside it.

    Args:
        rows: results.
        pictures: title -> file, relative to the page.
    """
    columns, found = table(rows)
    lines = [_bars(columns), _bars(["---"] * len(columns))]
    lines += [_bars([str(line[name]) for name in columns]) for line in found]
    lines += [f"\n![{title}]({path.as_posix()})" for title, path in pictures.items()]
    return "\n".join(lines) + "\n"


def _bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(rows: Sequence[Row], pictures: Mapping[str, bytes]) -> str:
    """One HTML file that needs nothing else.

    Args:
        rows: results.
        pictures: title -> PNG.
    """
    columns, found = table(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(str(line[name]))}</td>" for name in columns) + "</tr>"
        for line in found
    )
    images = "\n".join(
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">'
        for title, data in pictures.items()
    )
    style = (
        "body{font-family:sans-serif}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}img{max-width:32em}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Few-shot results'
        f"</title><style>{style}</style></head><body>\n<table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table>\n{images}\n</body></html>\n"
    )


def curves(
    rows: Sequence[Row],
) -> Iterator[tuple[str, str, dict[str, list[tuple[int, float, float]]]]]:
    """Of each task what is plotted: title, metric, and for each model (shots, mean, std)."""
    groups: dict[tuple[str, str], dict[str, list[tuple[int, float, float]]]] = {}
    for row, told in zip(rows, variants(rows), strict=True):
        metric = row["preferred_metric"]
        values = row[metric]
        if values["mean"] is None:
            continue
        parts = (row["task"], row["language"], row["template"], row["eval_set"], row["scoring"])
        title = " ".join(str(part) for part in parts if part)
        if row["calibrator_name"]:
            title += f" {row['calibrator_name']} {'; '.join(row['calibration_options'])}"
        title += f" {told}" if told else ""
        lines = groups.setdefault((title, metric), {})
        point = (row["nb_few_shot_samples"], values["mean"], values["std"] or 0.0)
        lines.setdefault(row["model_name"], []).append(point)
    for (title, metric), lines in groups.items():
        yield title, metric, {model: sorted(points) for model, points in lines.items()}


def plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """A picture for each task: the metric against the number of shots, a line for each model.

    Returns:
        Title -> PNG.

    Raises:
        MissingDependency: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency(
            "plots need matplotlib: pip install 'fairseq-lite[plot]'; or leave --plots and"
            " --html out"
        ) from None
    found = {}
    for title, metric, lines in curves(rows):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes: Any = figure.subplots()
        shots = sorted({point[0] for points in lines.values() for point in points})
        places = {k: i for i, k in enumerate(shots)}
        for model, points in lines.items():
            k, mean, spread = zip(*points, strict=True)
            axes.errorbar([places[each] for each in k], mean, yerr=spread, marker="o", capsize=3,
                          label=model)  # fmt: skip
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        axes.set(title=title, xlabel="shots", ylabel=metric)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
        found[title] = data.getvalue()
    return found


def save_plots(pictures: Mapping[str, bytes], folder: Path) -> dict[str, Path]:
    """Write pictures; title -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for title, data in pictures.items():
        path = folder / f"{safe(title)}.png"
        path.write_bytes(data)
        found[title] = path
    return found
