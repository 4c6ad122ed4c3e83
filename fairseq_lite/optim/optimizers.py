"""All optimizers; importing this module registers them."""

from __future__ import annotations

from fairseq_lite.optim.adam import Adam, AdamConfig

__all__ = ["Adam", "AdamConfig"]
