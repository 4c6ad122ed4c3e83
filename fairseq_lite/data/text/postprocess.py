"""From subword pieces back to words; see `fairseq_lite.data.postprocess`."""

from __future__ import annotations

from fairseq_lite.data.postprocess import NAMES, post_process

__all__ = ["NAMES", "post_process"]
