"""Renew what is written about flags: the golden list of the tests and the tables of the docs.

python scripts/write_flag_pages.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.commands import COMMANDS
from fairseq_lite.config.fairseq_flags import COMING, IDLE, NO_EFFECT, REFUSED
from fairseq_lite.config.parse import describe_flags

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "unit" / "golden" / "flags.txt"
PAGE = ROOT / "docs" / "fairseq-compatibility.md"
MARK = "<!-- flags: written by scripts/write_flag_pages.py -->"


def golden() -> str:
    """Every flag of every command with its default, one a line."""
    registries = load_builtins()
    lines = [line for name in COMMANDS for line in describe_flags(name, registries)]
    return "\n".join(lines) + "\n"


def tables() -> str:
    """The Markdown tables of flags that do not do what they do in fairseq."""
    parts = [
        "## Flags that come with a later capability",
        "Refused until then, with one line.",
        _table(COMING),
        "## Flags that are refused",
        "They would change results, and what they ask for is not built.",
        _table(REFUSED),
        "## Flags that have no effect",
        "Accepted with a warning: nothing here depends on them.",
        _table(NO_EFFECT),
        "## Flags that fairseq's command takes and never reads",
        "Accepted with a warning by the command named.",
    ]
    for command, flags in IDLE.items():
        name = command.replace("_", "-")
        parts.append(f"- `flite-{name}`: " + ", ".join(f"`{f}`" for f in sorted(flags)))
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| flag | why, and what to use |", "|---|---|"]
    return "\n".join(lines + [f"| `{flag}` | {why} |" for flag, why in sorted(rows.items())])


def main() -> None:
    """Write both."""
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden(), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8").split(MARK)[0].rstrip()
    PAGE.write_text(f"{page}\n\n{MARK}\n\n{tables()}", encoding="utf-8")
    print(f"written: {GOLDEN.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
