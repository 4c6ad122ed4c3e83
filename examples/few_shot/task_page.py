"""The list of tasks in docs/TASKS.md, made from the tasks themselves.

python -m examples.few_shot.task_page        # renews it
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from examples.few_shot.builtins import load_builtins
from examples.few_shot.tasks.api import GROUPS, TASKS, FewShotTask, task_type

PAGE = Path(__file__).parent / "docs" / "TASKS.md"
MARK = "<!-- tasks: written by python -m examples.few_shot.task_page -->"

TASK_HEAD = ("task", "what it is", "kind", "by default", "languages", "template", "metrics")
FILE_HEAD = ("task", "set", "file")


def tables() -> str:
    """Tasks that ship, their groups, their files, in Markdown."""
    load_builtins()
    families = _families()
    groups = [f"- `{name}`: {_several(members)}" for name, members in sorted(GROUPS.items())]
    parts = [
        _table(TASK_HEAD, [_row(names) for names in families]),
        "Groups, for `--tasks`:",
        "\n".join(groups),
        "## Files",
        _table(FILE_HEAD, [row for names in families for row in _files(names)]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _families() -> list[list[str]]:
    """Names of tasks; those of the form FAMILY__NAME together. Plugins' tasks are left out."""
    found: dict[str, list[str]] = {}
    for name in TASKS.names():
        if task_type(name).__module__.startswith("examples.few_shot.tasks."):
            family, parts, _ = name.partition("__")
            found.setdefault(family + parts, []).append(name)
    return list(found.values())


def _row(names: Sequence[str]) -> tuple[str, ...]:
    task = task_type(names[0])
    cells = (
        f"`{names[0]}`",
        inspect.cleandoc(task.__doc__ or "").partition("\n")[0].rstrip("."),
        _kind(task),
        _defaults(task),
        _languages(task),
        f"`{task.template}`",
        ", ".join(task.metrics),
    )
    name, *rest = (_anonymous(cell, names) for cell in cells)
    return (name + (f" ({len(names)})" if len(names) > 1 else ""), *rest)


def _files(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The files of each set of a task, in the order in which they are looked for."""
    task = task_type(names[0])
    rows = []
    for each, paths in task.sets.items():
        listed = (paths,) if isinstance(paths, str) else paths
        shown = [
            f"`{path}`" + (" (or .gz)" if f"{path}.gz" in listed else "")
            for path in listed
            if path.removesuffix(".gz") == path or path.removesuffix(".gz") not in listed
        ]
        cells = (f"`{names[0]}`", each, ", or ".join(shown))
        rows.append(tuple(_anonymous(cell, names) for cell in cells))
    return rows


def _anonymous(text: str, names: Sequence[str]) -> str:
    """NAME in place of what tells the members of a family apart."""
    return text.replace(names[0].partition("__")[2], "NAME") if len(names) > 1 else text


def _kind(task: type[FewShotTask]) -> str:
    if task.kind == "generation":
        return f"generation, {task.max_new_tokens} tokens"
    return task.kind + (", no shots" if task.max_shots == 0 else "")


def _languages(task: type[FewShotTask]) -> str:
    if not task.languages:
        return ""
    left_out = sorted({*task.languages} - {*(task.default_languages or task.languages)})
    said = f"; by default without {' '.join(left_out)}" if left_out else ""
    return f"{len(task.languages)}: {' '.join(task.languages)}{said}"


def _defaults(task: type[FewShotTask]) -> str:
    shots = f"{task.train_set} → " if task.train_set and task.max_shots != 0 else ""
    return shots + (task.eval_set or "the file you name")


def _several(names: Sequence[str]) -> str:
    shown = names if len(names) < 10 else [names[0], "…", names[-1]]
    listed = " ".join(f"`{name}`" if name != "…" else name for name in shown)
    return listed + (f" ({len(names)})" if len(names) > len(shown) else "")


def renewed(page: str) -> str:
    """The page with its list made anew."""
    before, mark, rest = page.partition(MARK)
    assert mark, f"{PAGE} needs the line {MARK}"
    _, end, after = rest.partition("<!-- end of tasks -->")
    return f"{before}{mark}\n\n{tables()}\n{end}{after}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
