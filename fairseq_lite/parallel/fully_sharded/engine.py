"""What the engines of `--ddp-backend fully_sharded` have in common."""

from __future__ import annotations

from typing import Any

import torch

from fairseq_lite.parallel.holding import HoldsParts
from fairseq_lite.parallel.world import World


class Engine(HoldsParts):
    """A backend under which each rank holds a part of the parameters and of their gradients."""

    def __init__(self, cfg: Any, world: World, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(cfg, world, dtype=dtype)
        self.writes_shards = bool(cfg.use_sharded_state)
