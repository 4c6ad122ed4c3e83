"""What the flags and a DeepSpeed configuration file ask of ZeRO, as values.

Much of such a file says what flags of the trainer say: batches, optimizer, precision, clipping.
There is one place for each, so these keys are refused with the flag to type, as is every key that
would change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_lite.errors import ConfigError

STAGES = (0, 1, 2)
_SECTION = "zero_optimization"

_BATCH = "use --batch-size or --max-tokens, and --update-freq"
_PRECISION = "use --bf16 or --fp16: parameters and optimizer state are float32 here"

# Keys that a flag owns, and what to do instead.
_OWNED: dict[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": "use --update-freq",
    "optimizer": "use --optimizer",
    "scheduler": "use --lr-scheduler",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "gradient_clipping": "use --clip-norm",
    "steps_per_print": "use --log-interval",
    "tensorboard": "use --tensorboard-logdir",
    "wandb": "use --wandb-project",
    "activation_checkpointing": "use --checkpoint-activations",
    "compile": "use --compile",
    "seed": "use --seed",
}
_OFFLOAD = "use --ddp-backend fully_sharded --cpu-offload"
_OWNED_IN_SECTION: dict[str, str] = {
    "offload_optimizer": _OFFLOAD,
    "offload_param": _OFFLOAD,
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "allgather_bucket_size": "weights are gathered in one piece, so leave it out",
}

# Keys of the section that say how it is done here, and no other way.
_FIXED: dict[str, tuple[bool, str]] = {
    "allgather_partitions": (True, "updated weights are gathered"),
    "reduce_scatter": (True, "DeepSpeed knows no other way with experts"),
    "contiguous_gradients": (True, "DeepSpeed knows no other way with experts"),
    "ignore_unused_parameters": (True, "a parameter that no batch used is left as it is"),
    "overlap_comm": (False, "gradients are reduced after backward, in the same order on all ranks"),
}
_COUNTS = ("reduce_bucket_size",)
_SWITCHES = ("use_multi_rank_bucket_allreduce", "round_robin_gradients")


@dataclass(frozen=True)
class ZeroSettings:
    """How ZeRO shards; names and defaults are DeepSpeed's.

    Attributes:
        stage: 0 shards nothing, 1 the optimizer's state, 2 its state and gradients.
        reduce_bucket_size: gradients, in numbers, that are reduced at a time.
        use_multi_rank_bucket_allreduce: reduce a bucket once for all ranks, not once for each.
        round_robin_gradients: deal parameters out in turn, not in the order of the model.
    """

    stage: int = 0
    reduce_bucket_size: int = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    round_robin_gradients: bool = False


def settings(zero_stage: int | None, file: str | None) -> ZeroSettings:
    """Read what `--zero-stage` and `--deepspeed-config` say.

    Raises:
        ConfigError: the file cannot be read, has a key that is not taken, or contradicts the flag.
    """
    values = {} if file is None else _section(file)
    named = values.get("stage")
    if zero_stage is not None and named not in (None, zero_stage):
        raise ConfigError(
            f"--zero-stage {zero_stage}, but {file} says {_SECTION}.stage {named}: leave one out"
        )
    stage = zero_stage if zero_stage is not None else named or 0
    where = "--zero-stage" if zero_stage is not None else f"{file}: {_SECTION}.stage"
    if stage == 3:
        raise ConfigError(
            f"{where} 3: DeepSpeed does not split models with experts so: use 2; models without, "
            "and models with experts too, are split by --ddp-backend fully_sharded"
        )
    if stage not in STAGES:
        raise ConfigError(f"{where} {stage}: expected 0, 1 or 2")
    return ZeroSettings(**{**values, "stage": stage})


def _section(file: str) -> dict[str, Any]:
    """The settings in a file, checked."""
    for key, instead in (content := _read(file)).items():
        if key in _OWNED:
            raise ConfigError(f"--deepspeed-config {file}: {key} is not taken: {_OWNED[key]}")
        if key != _SECTION:
            raise ConfigError(
                f"--deepspeed-config {file}: {key} would change nothing here: leave it out (taken: "
                f"{_SECTION})"
            )
        if not isinstance(instead, dict):
            raise ConfigError(f"--deepspeed-config {file}: {key}: expected an object")
    section: Mapping[str, Any] = content.get(_SECTION, {})
    found: dict[str, Any] = {}
    for key, value in section.items():
        where = f"--deepspeed-config {file}: {_SECTION}.{key}"
        if key in _OWNED_IN_SECTION:
            raise ConfigError(f"{where} is not taken: {_OWNED_IN_SECTION[key]}")
        if key in _FIXED:
            wanted, why = _FIXED[key]
            if value is not wanted:
                text = json.dumps(wanted)
                raise ConfigError(f"{where} can only be {text}: {why}; leave it out")
        elif key == "stage":
            found[key] = _stage(where, value)
        elif key in _COUNTS:
            found[key] = _count(where, value)
        elif key in _SWITCHES:
            if not isinstance(value, bool):
                raise ConfigError(f"{where} {value!r}: expected true or false")
            found[key] = value
        else:
            taken = ", ".join(("stage", *_COUNTS, *_SWITCHES))
            raise ConfigError(f"{where} would change nothing here: leave it out (taken: {taken})")
    return found


def _read(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"--deepspeed-config {file}: {e.strerror or e}") from e
    except ValueError as e:  # bytes that are no text are ValueErrors too
        raise ConfigError(f"--deepspeed-config {file}: this is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f'--deepspeed-config {file}: expected an object: {{"{_SECTION}": {{…}}}}')
    return content


def _stage(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where} {value!r}: expected 0, 1 or 2")
    return value


def _count(where: str, value: Any) -> int:
    # 5e8 is how these files spell numbers, and JSON makes that a float.
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole |= isinstance(value, float) and value.is_integer()
    if not whole or value < 1:
        raise ConfigError(f"{where} {value!r}: expected a number of gradients, 1 or more")
    return int(value)
