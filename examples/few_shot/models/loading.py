"""From a model's name or path to a model."""

from __future__ import annotations

import logging
from pathlib import Path

from examples.few_shot import model_configs
from examples.few_shot.model_configs import HUGGING_FACE, NONE, ModelConfig
from examples.few_shot.models.api import Model
from examples.few_shot.options import EvaluationOptions
from fairseq_lite.errors import CheckpointError, ConfigError, FliteError
from fairseq_lite.parallel.world import World

logger = logging.getLogger(__name__)

# The predictor that asks Hugging Face's models only.
_HUGGING_FACE = "clmpromptinghuggingface"


def load_model(name: str, options: EvaluationOptions, world: World) -> Model:
    """Load a model.

    Args:
        name: of `model_configs`, or a path.
        options: device, precision and how much is done at a time.
        world: the processes that share it.

    Raises:
        ConfigError: a name that stands for no model, or options that it has no use for.
        CheckpointError: there is nothing of that name, or it cannot be read.
        MissingDependency: a package that its kind needs.
    """
    if options.predictor_name == "dummy":
        from examples.few_shot.models.dummy import DummyModel

        return DummyModel()
    config, path = found(name, options)
    if _is_theirs(config, path):
        return _hugging_face(path, options, world)
    if options.predictor_name == _HUGGING_FACE:
        raise ConfigError(
            f"--predictor-name {_HUGGING_FACE}: {name} is no Hugging Face model; use clmprompting"
        )
    return _ours(path, config, options, world)


def digest_of_files(name: str, options: EvaluationOptions) -> str | None:
    """The digest of a model's files as they are now, which results name as `model::sha256`.

    None where there is nothing to compare: no model, or no files any more.
    """
    if options.predictor_name == "dummy":
        return None
    from examples.few_shot.models.fingerprint import checkpoint_files, identity_of

    try:
        config, path = found(name, options)
        if _is_theirs(config, path):
            from examples.few_shot.models.huggingface import find

            files = find(path).files
        else:
            files = checkpoint_files(path)
    except FliteError:
        return None
    return str(identity_of(files)["sha256"])


def _is_theirs(config: ModelConfig, path: str) -> bool:
    """Whether a model is one of Hugging Face's."""
    return config.kind == HUGGING_FACE or (config.kind is None and is_hugging_face(path))


def is_hugging_face(path: str) -> bool:
    """Whether a path is a model of this kind."""
    if path.startswith(model_configs.CACHED) or path.endswith(".gguf"):
        return True
    folder = Path(path)
    return (folder / "config.json").is_file() and not any(folder.glob("*.pt"))


def found(name: str, options: EvaluationOptions) -> tuple[ModelConfig, str]:
    """What a name or a path stands for, and the path of its files.

    Raises:
        ConfigError: a name that stands for no model.
        CheckpointError: there is nothing of that name.
    """
    known = model_configs.get_model_config(name)
    if known is not None:
        config, path = known, model_configs.path_of(known)
        if config.kind == NONE:
            implied = config.options.get("predictor_name")
            raise ConfigError(
                f"--predictor-name {options.predictor_name}: {name} stands for no model; leave the"
                f" flag out, which means --predictor-name {implied}"
            )
        missing = model_configs.missing_files(config)
        if missing and options.num_training_updates < 0:
            raise CheckpointError(
                f"--model-name {name}: expected its checkpoint at {missing}: put it there, or name"
                f" the folder of models with {model_configs.VARIABLE}"
            )
    else:
        config, path = _bare(name, options), name
    if options.num_training_updates >= 0:
        if is_hugging_face(path):
            raise ConfigError(f"--num-training-updates: {name} is one model; leave it out")
        path = str(model_configs.checkpoint_at(path, name, options.num_training_updates))
    return config, path


def _bare(name: str, options: EvaluationOptions) -> ModelConfig:
    """What lies at a path."""
    if options.predictor_name == _HUGGING_FACE or is_hugging_face(name):
        return ModelConfig(name, kind=HUGGING_FACE)
    from fairseq_lite.training.checkpoint.parts import readable_files

    for each in filter(None, name.split(":")):
        if not Path(each).is_dir() and not readable_files(Path(each)):
            raise CheckpointError(
                f"--model-name {each}: neither a name of model_configs.py nor a checkpoint"
                f"{model_configs.suggestion(each)}"
            )
    return ModelConfig(name)


def _ours(path: str, config: ModelConfig, options: EvaluationOptions, world: World) -> Model:
    from examples.few_shot.models.flite import FliteModel
    from fairseq_lite.parallel.experts import has_experts

    overrides = dict(config.overrides)
    if options.moe_eval_capacity_token_fraction is not None:
        overrides["moe_eval_capacity_token_fraction"] = options.moe_eval_capacity_token_fraction
    model = FliteModel(
        path,
        world=world,
        max_tokens=options.max_tokens,
        max_prompts=options.batch_size,
        start=config.start,
        options={
            "bf16": options.bf16,
            "fp16": options.fp16,
            "user_dir": model_configs.user_dir_of(config) or options.user_dir,
            "overrides": overrides or None,
        },
    )
    capacity = options.moe_eval_capacity_token_fraction
    if capacity is not None and not any(has_experts(each) for each in model.lm.models):
        raise ConfigError(
            f"--moe-eval-capacity-token-fraction {capacity}: {path} has no experts; leave it out"
        )
    if capacity is not None:
        logger.warning(
            "--moe-eval-capacity-token-fraction %s: experts that are full drop tokens, so scores"
            " depend on what is computed together: --batch-size, --max-tokens, order, processes",
            capacity,
        )
    return model


def _hugging_face(path: str, options: EvaluationOptions, world: World) -> Model:
    if options.moe_eval_capacity_token_fraction is not None:
        raise ConfigError(
            f"--moe-eval-capacity-token-fraction: {path} is a Hugging Face model; leave it out"
        )
    if options.fp16 and world.device.type == "cpu":
        raise ConfigError("--fp16 needs a GPU; on a CPU use --bf16")
    import torch

    from examples.few_shot.models.causal import Limits
    from examples.few_shot.models.huggingface import HuggingFaceModel

    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
    limits = Limits(options.max_tokens or Limits.tokens, options.batch_size)
    return HuggingFaceModel.load(path, world=world, dtype=dtype, limits=limits)
