"""What pyproject.toml cannot say: an editable installation has a real copy of one module.

torch calls `fairseq_lite_autoload` whenever it is imported, and cannot be imported where that is
missing: a clone that is moved or deleted must not take torch with it. In an editable installation
modules are where the clone is; what an extension has for C, its headers, is copied all the same, so
the module is copied as if it were one.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup

MODULE = "fairseq_lite_autoload.py"


class CopyModule(Command):
    """Stands in for `install_headers`: copies MODULE beside an editable installation's files."""

    description = f"install {MODULE}"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        self.outfiles: list[str] = []

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if self.get_finalized_command("build_py").editable_mode:
            folder = self.get_finalized_command("install").install_purelib
            self.outfiles = [str(Path(folder, MODULE))]
            self.copy_file(MODULE, self.outfiles[0])

    def get_outputs(self) -> list[str]:
        """The copies, for `install`."""
        return self.outfiles


setup(headers=[MODULE], cmdclass={"install_headers": CopyModule})
