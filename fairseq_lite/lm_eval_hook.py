"""Makes lm-evaluation-harness know `--model fairseq_lite`, without torch and without importing it.

The harness looks a model up by name in a registry of its own, and asks no other package for more
of them. torch does ask: it ends its import with a call of every installed entry point in the group
"torch.backends" (https://docs.pytorch.org/docs/stable/accelerator/autoload.html). By
then the `lm_eval` command, which imports torch, is loaded, and it has not looked for a model yet.
The entry point is `fairseq_lite_autoload`, a module outside this package, which may be gone.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

NAME = "fairseq_lite"
TARGET = "fairseq_lite.hub.lm_eval:FairseqLiteLM"


def register() -> None:
    """Register the model with the harness, which imports the class when it is asked for.

    Raises:
        ImportError: the harness is not installed, or older than 0.4.10.
    """
    from lm_eval.api.registry import model_registry

    # The harness fills its registry when it finds it empty: it must not find ours alone in it.
    importlib.import_module("lm_eval.models")
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def autoload() -> None:
    """The entry point of editable installations from before `fairseq_lite_autoload`.

    They do not know that module, and torch must be imported all the same.
    """
    if "lm_eval" in sys.modules:
        with contextlib.suppress(Exception):
            register()
