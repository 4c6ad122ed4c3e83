"""Pictures of logs: what the scripts that draw them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq_lite.errors import DataError, MissingDependency


def pyplot(otherwise: str = "") -> Any:
    """matplotlib's pyplot, which needs no screen.

    Args:
        otherwise: what the message says beside how to install it.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingDependency(
            f"drawing needs matplotlib: pip install 'fairseq-lite[plot]'{otherwise}"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots


def lines_of(path: Path) -> list[str]:
    """The lines of a log.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
