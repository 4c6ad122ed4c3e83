"""--user-dir: by path, once, under any name, with errors that say what is wrong."""

from __future__ import annotations

import sys

import pytest

from fairseq_lite.errors import PluginError
from fairseq_lite.plugins import import_user_dir


def test_package_is_imported_once_even_by_another_spelling(tmp_path, monkeypatch):
    folder = tmp_path / "my_plugin_once"
    folder.mkdir()
    (folder / "__init__.py").write_text("from . import part\nCOUNT = part.COUNT\n")
    (folder / "part.py").write_text("COUNT = object()\n")
    first = import_user_dir(folder)
    monkeypatch.chdir(tmp_path)
    assert import_user_dir("my_plugin_once") is first


def test_name_of_an_installed_package_does_not_clash(tmp_path):
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "__init__.py").write_text("MINE = 1\n")
    before = sys.modules.get("yaml")
    assert import_user_dir(folder).MINE == 1
    assert sys.modules.get("yaml") is before


def test_absolute_import_of_itself(tmp_path):
    folder = tmp_path / "self_importing_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text("import self_importing_plugin.inner as i\nX = i.X\n")
    (folder / "inner.py").write_text("X = 5\n")
    assert import_user_dir(folder).X == 5


def test_folder_of_modules_without_a_package(tmp_path):
    (tmp_path / "one.py").write_text("VALUE = 3\n")
    module = import_user_dir(tmp_path)
    assert sys.modules[f"{module.__name__}.one"].VALUE == 3


def test_errors_name_the_flag_and_the_cause(tmp_path):
    with pytest.raises(PluginError, match="no such folder"):
        import_user_dir(tmp_path / "nothing")
    folder = tmp_path / "broken_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text("import does_not_exist_anywhere\n")
    with pytest.raises(PluginError, match="ModuleNotFoundError.*does_not_exist_anywhere"):
        import_user_dir(folder)
