"""The house is in order: versions agree, commands start fast, no machine is named."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_lite
from tests.helpers.commands import REPOSITORY, flite_process

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

COMMANDS = ("preprocess", "train", "generate", "validate", "interactive", "eval_lm", "score")
# Assembled from parts, so that this file does not contain what it looks for.
FOREIGN = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "py" + "pi.org"]))
TEXT = {".py", ".md", ".toml", ".ini", ".cfg", ".sh", ".txt", ".yaml", ".yml", ".tsv", ".json", ""}


def tracked_files() -> list[Path]:
    """Text files under version control."""
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in found.stdout.split("\0") if name]
    return [path for path in paths if path.suffix in TEXT and path.is_file()]


def test_no_file_names_a_machine_or_an_index():
    named = [
        f"{path.relative_to(REPOSITORY)}: {match.group()}"
        for path in tracked_files()
        if (match := FOREIGN.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert named == []


@pytest.mark.skipif(tomllib is None, reason="tomllib is new in Python 3.11")
def test_metadata_agrees_with_the_code():
    metadata = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    scripts = metadata["project"]["scripts"]
    expected = {_spelled(name): f"fairseq_lite_cli.entry:{name}" for name in COMMANDS}
    assert scripts == expected
    assert "version" in metadata["project"]["dynamic"]
    extras = metadata["project"]["optional-dependencies"]
    assert {"fairscale", "deepspeed", "slurm", "dev"} <= extras.keys()


def test_changelog_knows_this_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{fairseq_lite.__version__}]" in changelog


def test_every_link_between_documents_leads_somewhere():
    broken = []
    for path in tracked_files():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(REPOSITORY)}: {target}")
    assert broken == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick(command):
    # The processor's time, not the clock's: the machine may be busy with something else.
    before = _seconds_of_children()
    shown = flite_process(command, "--help")
    took = _seconds_of_children() - before
    assert shown.returncode == 0, shown.stderr
    assert _spelled(command) in shown.stdout
    assert took < 5, f"{took:.1f} s"


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _spelled(command: str) -> str:
    return f"flite-{command.replace('_', '-')}"


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, fairseq_lite, fairseq_lite.registry, fairseq_lite.plugins;"
        "import fairseq_lite.config.core, fairseq_lite.config.parse, fairseq_lite.config.serial;"
        "import fairseq_lite_cli.entry; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
