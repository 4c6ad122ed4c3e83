"""From a model's name or path to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.few_shot.models.api import Model
from examples.few_shot.settings import EvaluationOptions


def load_model(name: str, options: EvaluationOptions, world: Any) -> Model:
    """Load a model.

    Args:
        name: of `model_configs`, or a path.
        options: device, precision and batches.
        world: the processes that share it.

    Raises:
        ConfigError: neither a name nor a path.
        CheckpointError: it cannot be read.
    """
    if options.predictor_name == "dummy":
        from examples.few_shot.models.dummy import DummyModel

        return DummyModel()
    from examples.few_shot.models.flite import FliteModel

    overrides = {}
    if options.moe_eval_capacity_token_fraction is not None:
        overrides["moe_eval_capacity_token_fraction"] = options.moe_eval_capacity_token_fraction
    return FliteModel(
        str(Path(name)),
        world=world,
        batch_tokens=options.max_tokens,
        options={
            "device": "cpu" if options.cpu else None,
            "bf16": options.bf16,
            "fp16": options.fp16,
            "user_dir": options.user_dir,
            "overrides": overrides or None,
        },
    )
