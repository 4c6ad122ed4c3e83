"""Keyword arguments of the Python API."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fairseq_lite.config.core import GenerationConfig
from fairseq_lite.errors import ConfigError


def generation_config(options: Mapping[str, Any], method: str) -> GenerationConfig:
    """Settings of generation from keyword arguments.

    Raises:
        ConfigError: one that does not exist, or that contradicts another.
    """
    known = {field.name for field in dataclasses.fields(GenerationConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"{method}(): unknown option {unknown[0]!r}")
    for name in ("retain_dropout", "retain_dropout_modules"):
        if options.get(name):
            raise ConfigError(
                f"{method}(): {name} is for flite-generate; here dropout is off: leave it out"
            )
    return GenerationConfig(**options)
