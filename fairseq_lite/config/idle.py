"""Flags of a command's sections that change nothing: not read by it, or not without another flag.

Sections are shared between commands, so `--max-valid-steps` reaches flite-generate as well. Such a
flag is accepted, as in fairseq, but whoever types it is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fairseq_lite.config import core


def _all_but(config: type, read: str) -> set[str]:
    names = {field.name for field in dataclasses.fields(config)}
    used = set(read.split())
    assert used <= names, used - names
    return names - used


_PRECISION = "cpu bf16 memory_efficient_bf16 fp16 memory_efficient_fp16 amp"
_BATCHES = (
    "max_tokens batch_size required_batch_size_multiple required_seq_len_multiple dataset_impl "
    "skip_invalid_size_inputs_valid_test num_shards shard_id"
)
_IN_VALIDATION = {
    "eval_bleu",
    "eval_bleu_args",
    "eval_bleu_detok",
    "eval_bleu_detok_args",
    "eval_bleu_print_samples",
    "eval_bleu_remove_bpe",
    "eval_tokenized_bleu",
}

# Command -> fields that it takes and never reads.
_UNREAD: dict[str, frozenset[str]] = {
    "flite-preprocess": frozenset(_all_but(core.CommonConfig, "user_dir")),
    "flite-train": frozenset({"gen_subset", "num_shards", "shard_id"}),
    "flite-generate": frozenset(
        _all_but(
            core.CommonConfig, f"no_progress_bar log_format log_file seed user_dir {_PRECISION}"
        )
        | _all_but(core.DatasetConfig, f"gen_subset {_BATCHES}")
        | _IN_VALIDATION
        | {"upsample_primary"}
    ),
    "flite-interactive": frozenset(
        _all_but(core.CommonConfig, f"log_file seed user_dir {_PRECISION}")
        | _all_but(core.CommonEvalConfig, "path post_process model_overrides is_moe")
        | _all_but(core.DatasetConfig, "max_tokens batch_size")
        | _IN_VALIDATION
        | {"sacrebleu", "upsample_primary", "truncate_source", "left_pad_target"}
        | {"num_batch_buckets"}
        | {"sample_break_mode", "pad_to_fixed_length", "pad_to_fixed_bsz"}
        | {"shorten_method", "shorten_data_split_list"}
    ),
    "flite-validate": frozenset(
        _all_but(
            core.CommonConfig,
            "no_progress_bar log_format log_interval log_file tensorboard_logdir wandb_project "
            f"seed user_dir {_PRECISION}",
        )
        | _all_but(core.CommonEvalConfig, "path model_overrides is_moe")
        | _all_but(
            core.DatasetConfig,
            "num_workers valid_subset combine_valid_subsets fixed_validation_seed max_valid_steps "
            + _BATCHES,
        )
    ),
    "flite-eval-lm": frozenset(
        _all_but(
            core.CommonConfig, f"no_progress_bar log_format log_file seed user_dir {_PRECISION}"
        )
        | _all_but(core.CommonEvalConfig, "path post_process model_overrides results_path is_moe")
        | _all_but(core.DatasetConfig, f"num_workers gen_subset max_valid_steps {_BATCHES}")
    ),
}

# Fields that count only when one of the others is on.
_NEEDS: dict[str, tuple[str, ...]] = {
    "fp16_init_scale": ("fp16", "memory_efficient_fp16"),
    "fp16_scale_window": ("fp16", "memory_efficient_fp16"),
    "fp16_scale_tolerance": ("fp16", "memory_efficient_fp16", "amp"),
    "min_loss_scale": ("fp16", "memory_efficient_fp16", "amp"),
    "threshold_loss_scale": ("fp16", "memory_efficient_fp16", "amp"),
    "amp_init_scale": ("amp",),
    "amp_scale_window": ("amp",),
    "fp32_reduce_scatter": (
        *("bf16", "fp16", "amp"),
        *("memory_efficient_bf16", "memory_efficient_fp16"),
    ),
    "keep_interval_updates": ("save_interval_updates",),
    "keep_interval_updates_pattern": ("keep_interval_updates",),
    "ema_decay": ("store_ema",),
    "ema_start_update": ("store_ema",),
    "ema_seed_model": ("store_ema",),
    "ema_update_freq": ("store_ema",),
    "ema_fp32": ("store_ema",),
    "diverse_beam_strength": ("diverse_beam_groups",),
    "retain_dropout_modules": ("retain_dropout",),
    "lm_weight": ("lm_path",),
    "shorten_data_split_list": ("shorten_method",),
    **dict.fromkeys(_IN_VALIDATION - {"eval_bleu"}, ("eval_bleu",)),
}

_OF_VALIDATION = (
    "batch_size_valid combine_valid_subsets eval_bleu fixed_validation_seed max_tokens_valid "
    "max_valid_steps validate_after_updates validate_interval validate_interval_updates"
)
_OF_SAVING = (
    "keep_best_checkpoints keep_last_epochs no_epoch_checkpoints no_last_checkpoints "
    "no_save_optimizer_state save_interval write_checkpoints_asynchronously"
)

# Fields that no longer count when one of the others is on.
_OVERRULED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_OF_VALIDATION.split(), ("disable_validation",)),
    **dict.fromkeys(_OF_SAVING.split(), ("no_save",)),
    "valid_subset": ("disable_validation", "combine_valid_subsets"),
    "lenpen": ("unnormalized",),
    "max_len_a": ("match_source_len",),
    "max_len_b": ("match_source_len",),
    "keep_last_epochs": ("no_epoch_checkpoints", "no_save"),
    "optimizer_overrides": ("reset_optimizer",),
    "thresholdsrc": ("srcdict",),
    "nwordssrc": ("srcdict",),
    "thresholdtgt": ("tgtdict", "joined_dictionary", "only_source"),
    "nwordstgt": ("tgtdict", "joined_dictionary", "only_source"),
    "moe_second_expert_policy": ("moe_top1_expert",),
    "moe_normalize_gate_prob_before_dropping": ("moe_top1_expert",),
}


def without_effect(
    command: str, typed: Collection[str], values: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The flags somebody typed that change nothing.

    Args:
        command: the command, for example "flite-generate".
        typed: names of the fields that were typed.
        values: every field of the run's sections and entries.

    Yields:
        The flag and why it has no effect.
    """
    unread = _UNREAD.get(command, frozenset())
    for name in sorted(set(typed) & set(values)):
        others = [o for o in _NEEDS.get(name, ()) if o in values]
        stronger = [o for o in _OVERRULED.get(name, ()) if _on(values.get(o))]
        if name in unread:
            yield _flag(name), f"{command} does not use it"
        elif others and not any(_on(values[o]) for o in others):
            yield _flag(name), f"it counts with {' or '.join(map(_flag, others))}"
        elif stronger:
            yield _flag(name), f"{_flag(stronger[0])} decides"


def _on(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return value > 0
    return bool(value) and value != "none"


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
