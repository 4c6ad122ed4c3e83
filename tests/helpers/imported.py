"""What the servers of `tests/helpers/warm.py` import before they fork: what ranks would, each anew.

Nothing that a rank must be seen to do without: no optional package.
"""

from __future__ import annotations

import gc

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo  # with the first step of an optimizer
import torch.distributed.fsdp  # noqa: F401

from fairseq_lite.builtins import load_builtins
from fairseq_lite_cli import eval_lm, generate, train, validate  # noqa: F401
from tests.helpers import evaluating, moe  # noqa: F401

load_builtins()
# What is imported is never garbage: no rank need look through it, nor copy its pages for that.
gc.collect()
gc.freeze()
