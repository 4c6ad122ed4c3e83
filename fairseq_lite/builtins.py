"""The entries that ship with fairseq-lite: each command loads them once."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from fairseq_lite.registry import Registry

# Section of the configuration -> the module and name of its registry.
_REGISTRIES = {
    "task": ("fairseq_lite.tasks.api", "TASKS"),
    "model": ("fairseq_lite.models.api", "ARCHITECTURES"),
    "criterion": ("fairseq_lite.criteria.api", "CRITERIA"),
    "optimizer": ("fairseq_lite.optim.api", "OPTIMIZERS"),
    "lr_scheduler": ("fairseq_lite.optim.api", "SCHEDULES"),
    "ddp_backend": ("fairseq_lite.parallel.api", "BACKENDS"),
    "scoring": ("fairseq_lite.scoring.api", "SCORERS"),
    "bpe": ("fairseq_lite.data.text.api", "BPE"),
    "tokenizer": ("fairseq_lite.data.text.api", "TOKENIZERS"),
}

# The modules whose import registers entries.
_ENTRIES = (
    "fairseq_lite.tasks.translation",
    "fairseq_lite.tasks.language_modeling",
    "fairseq_lite.tasks.multilingual_language_modeling",
    "fairseq_lite.models.transformer",
    "fairseq_lite.models.transformer_lm",
    "fairseq_lite.models.presets",
    "fairseq_lite.criteria.cross_entropy",
    "fairseq_lite.criteria.moe",
    "fairseq_lite.optim.optimizers",
    "fairseq_lite.optim.schedules",
    "fairseq_lite.parallel.legacy_ddp",
    "fairseq_lite.parallel.fully_sharded.choice",
    "fairseq_lite.parallel.deepspeed_moe.choice",
    "fairseq_lite.scoring",
    "fairseq_lite.data.text",
)


def registries() -> Mapping[str, Registry]:
    """Section name -> registry."""
    return MappingProxyType(
        {
            section: getattr(importlib.import_module(module), name)
            for section, (module, name) in _REGISTRIES.items()
        }
    )


def load_builtins() -> Mapping[str, Registry]:
    """Import every module that ships entries; return the registries. Doing it twice is a no-op."""
    for module in _ENTRIES:
        importlib.import_module(module)
    return registries()
