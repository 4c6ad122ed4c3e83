"""What torch calls when it is imported where fairseq-lite is installed.

torch cannot be imported where this module cannot, or where it fails. So it stands by itself: an
editable installation has a copy of it (setup.py), which is there when the clone is gone, and
whatever goes wrong behind it, in a half written clone for example, is left aside.
"""

from __future__ import annotations

import sys


def autoload() -> None:
    """Make lm-evaluation-harness know our models, if it is what imports torch; never fail."""
    if "lm_eval" not in sys.modules:
        return
    try:
        from fairseq_lite.lm_eval_hook import register

        register()
    except Exception:  # `python -m fairseq_lite_cli.lm_eval` tells what it is
        return
