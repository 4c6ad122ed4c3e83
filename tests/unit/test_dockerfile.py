"""The image is made of the README's steps. No Docker is needed: the file is read."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY

DOCUMENTED = "\n".join((REPOSITORY / name).read_text() for name in ("README.md", "Makefile"))


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of every instruction, with continued lines joined."""
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        found.append((name, re.sub(r"\s+", " ", rest)))
    return found


FOUND = instructions()


def all_of(name: str) -> list[str]:
    return [rest for instruction, rest in FOUND if instruction == name]


def substituted(text: str) -> str:
    """With the defaults of the build arguments."""
    for argument in all_of("ARG"):
        name, _, default = argument.partition("=")
        text = text.replace(f"${{{name}}}", default)
    return re.sub(r"\s+", " ", text)


def test_every_line_is_an_instruction() -> None:
    known = {"ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}
    assert {name for name, _ in FOUND} <= known
    assert FOUND[0] == ("ARG", "BASE=python:3.11-slim") and FOUND[1] == ("FROM", "${BASE}")


@pytest.mark.parametrize("step", all_of("RUN"))
def test_steps_are_shell(step: str) -> None:
    assert subprocess.run(["sh", "-n", "-c", substituted(step)]).returncode == 0


def test_what_is_installed_is_what_the_readme_installs() -> None:
    installed = [
        command.strip()
        for step in all_of("RUN")
        for command in re.split(r"&&|\|\||[{};]", substituted(step))
        if command.strip().startswith("pip ")
    ]
    assert installed == ["pip install torch", "pip install -e .", "pip install setuptools wheel"]
    for command in installed:
        assert re.search(rf"^{re.escape(command)}( |$)", DOCUMENTED, re.MULTILINE), command


def test_arguments_are_explained() -> None:
    comments = re.findall(r"^#.*", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    for argument in all_of("ARG"):
        name = argument.partition("=")[0]
        assert any(re.match(rf"#   {name} ", comment) for comment in comments), name


def test_text_is_utf8() -> None:
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(all_of("ENV"))))
    assert variables["LANG"] == variables["LC_ALL"] == "C.UTF-8"
    assert variables["LESSCHARSET"] == "utf-8"


def test_commands_do_not_run_as_root() -> None:
    user = all_of("USER")[-1]
    assert user != "root"
    assert any(re.search(rf"useradd .*\b{user}\b", step) for step in all_of("RUN"))
    assert FOUND.index(("USER", user)) > max(
        i for i, (name, _) in enumerate(FOUND) if name == "RUN"
    )


def test_the_image_holds_the_sources_and_no_more() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]

    def left_out(path: Path) -> bool:
        return any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns)

    for name in (".git", ".venv", "data-bin", "checkpoints", ".pytest_cache"):
        assert left_out(Path(name)), name
    for name in ("fairseq_lite", "fairseq_lite_cli", "pyproject.toml", "setup.py", "README.md"):
        assert (REPOSITORY / name).exists() and not left_out(Path(name)), name
