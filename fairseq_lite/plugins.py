"""`--user-dir`: import a folder of plugins by its path, once a process.

The folder is a package (it has an `__init__.py`) or just holds modules. It is imported under a name
made from its path, so its own name may be that of an installed package, and every process, the data
workers included, can import it again to find the same classes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fairseq_lite.errors import FliteError, PluginError


def module_name(path: Path) -> str:
    """The module name a plugin folder is imported under: its own name and a digest of its path."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    safe = "".join(c if c.isalnum() else "_" for c in path.name)
    return f"flite_user_{safe}_{digest}"


def import_user_dir(path: str | Path) -> ModuleType:
    """Import a plugin folder; importing it again returns the same module.

    Raises:
        PluginError: no such folder, or its code fails; the first cause is named.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise PluginError(f"--user-dir {path}: no such folder (looked at {folder})")
    name = module_name(folder)
    if name in sys.modules:
        return sys.modules[name]
    init = folder / "__init__.py"
    if init.exists():
        return _load(name, init, folder, path, alias=_free_name(folder.name))
    # Modules without a package around them: each is imported as a part of an empty one.
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    try:
        for source in sorted(folder.glob("*.py")):
            _load(f"{name}.{source.stem}", source, None, path)
    except BaseException:
        del sys.modules[name]
        raise
    return package


def _free_name(name: str) -> str | None:
    """The folder's own name, when nothing installed has it: plugins import themselves by it."""
    try:
        free = name.isidentifier() and importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        free = False
    return name if free else None


def _load(
    name: str, source: Path, package: Path | None, given: str | Path, alias: str | None = None
) -> ModuleType:
    locations = [str(package)] if package else None
    spec = importlib.util.spec_from_file_location(
        name, source, submodule_search_locations=locations
    )
    if spec is None or spec.loader is None:
        raise PluginError(f"--user-dir {given}: {source.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    names = [name] if alias is None else [name, alias]
    sys.modules.update(dict.fromkeys(names, module))
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        for each in names:
            sys.modules.pop(each, None)
        if isinstance(e, FliteError) or not isinstance(e, Exception):
            raise
        raise PluginError(f"--user-dir {given}: {source.name}: {type(e).__name__}: {e}") from e
    return module
