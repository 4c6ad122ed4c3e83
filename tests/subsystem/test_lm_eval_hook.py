"""An editable installation: torch can be imported whatever becomes of the clone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY

# What pyproject.toml needs of a clone, and what a harness finds.
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fairseq_lite_autoload.py",
         "fairseq_lite/__init__.py", "fairseq_lite/lm_eval_hook.py")  # fmt: skip

# Imports torch, or does what torch does with its entry points, as an installation's Python would;
# without the packages that this environment may have installed as editable ones.
CHILD = """
import importlib.metadata, pathlib, runpy, sys, types
site, torch, *places = sys.argv[1:]
sys.path[:0] = [site]
sys.path += places
for line in next(pathlib.Path(site).glob("*.pth")).read_text().splitlines():
    exec(line)
known = {}
for name in ("lm_eval", "lm_eval.api", "lm_eval.api.registry", "lm_eval.models"):
    sys.modules[name] = types.ModuleType(name)
class Registry(dict):
    def register(self, name, target):
        self[name] = target
sys.modules["lm_eval.api.registry"].model_registry = known = Registry()
if torch == "torch":
    import torch
else:
    for each in importlib.metadata.entry_points(group="torch.backends"):
        each.load()()
print(sorted(known))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / "clone" / name)
    (tmp_path / "clone/fairseq_lite_cli").mkdir()
    (tmp_path / "clone/fairseq_lite_cli/__init__.py").touch()
    return tmp_path / "clone"


@pytest.fixture
def site(clone: Path, tmp_path: Path) -> Path:
    """What `pip install -e` puts into a folder of packages."""
    if int(version("setuptools").partition(".")[0]) < 71:
        pytest.skip("setuptools before 71 makes no wheel by itself")
    code = "from setuptools import build_meta as b; b.build_editable('../wheels')"
    (tmp_path / "wheels").mkdir()
    words = [sys.executable, "-c", code]
    subprocess.run(words, cwd=clone, check=True, timeout=120, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*editable*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    return tmp_path / "site"


def imported(site: Path, what: str = "entry points") -> str:
    """The names that a harness knows when torch has been imported; or the last line of an error."""
    places = [place for place in sys.path if place and Path(place) != REPOSITORY]
    words = [sys.executable, "-E", "-S", "-c", CHILD, str(site), what, *places]
    done = subprocess.run(words, cwd=site, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_torch_can_be_imported_whatever_becomes_of_the_clone(clone: Path, site: Path) -> None:
    assert imported(site) == "['fairseq_lite']"
    half = "def register(:\n"  # as when somebody is editing it
    for name in ("fairseq_lite/lm_eval_hook.py", "fairseq_lite/__init__.py"):
        (clone / name).write_text(half)
        assert imported(site) == "[]"
    shutil.rmtree(clone)
    assert imported(site) == "[]"
    assert imported(site, "torch") == "[]"


def test_an_entry_point_inside_the_package_would_break_torch(clone: Path, site: Path) -> None:
    (entries,) = site.glob("*.dist-info/entry_points.txt")
    text = entries.read_text()
    assert "fairseq_lite_autoload:autoload" in text
    entries.write_text(text.replace("fairseq_lite_autoload:", "fairseq_lite.lm_eval_hook:"))
    assert imported(site) == "['fairseq_lite']"
    shutil.rmtree(clone)
    assert "No module named 'fairseq_lite'" in imported(site)


def test_a_wheel_has_the_module_once(clone: Path, tmp_path: Path, site: Path) -> None:
    code = "from setuptools import build_meta as b; b.build_wheel('../whole')"
    subprocess.run(
        [sys.executable, "-c", code], cwd=clone, check=True, timeout=120, capture_output=True
    )
    (wheel,) = (tmp_path / "whole").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if name.endswith("fairseq_lite_autoload.py")]
    assert names == ["fairseq_lite_autoload.py"]
