"""lm-evaluation-harness's own command, which knows `--model fairseq_lite` however it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq_lite import lm_eval_hook
from fairseq_lite.errors import MissingDependency
from fairseq_lite_cli.entry import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Do what `lm_eval` does with the same arguments."""
    try:
        lm_eval_hook.register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as e:
        raise MissingDependency(
            f"lm-evaluation-harness 0.4.10 or newer is needed ({e}):"
            " pip install 'fairseq-lite[lm-eval]'"
        ) from None
    before = sys.argv
    # The harness reads its arguments nowhere else.
    sys.argv = ["lm_eval", *(sys.argv[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(run_command("lm_eval", main))
