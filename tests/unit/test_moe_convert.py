"""The configuration of mixtures of experts in checkpoints: ours and those of fairseq's gshard."""

from __future__ import annotations

import torch

from fairseq_lite.builtins import load_builtins
from fairseq_lite.training.checkpoint import convert, parts
from tests.unit.test_model_lm_checkpoint import read, run_of, tiny

GSHARD = {
    "moe_freq": 2,
    "moe_expert_count": 8,
    "moe_top1_expert": True,
    "moe_gating_use_fp32": True,
    "moe_second_expert_policy": "all",
    "moe_normalize_gate_prob_before_dropping": True,
    "moe_expert_ffn_dim": 99,
    "moe_eval_capacity_token_fraction": 0.25,
    "moe_normalize_expert_grad": "sqrt_world_size",
    "use_moe_pad_mask": True,
    "moe_batch_prioritized_routing": True,
}
"""Names and values as its configuration has them."""


def cfg_with(**fields: object) -> dict[str, dict[str, object]]:
    cfg = convert.to_cfg(run_of(tiny()))
    cfg["model"] |= fields
    return {"cfg": cfg}


def test_gshards_names_are_ours() -> None:
    config = read(cfg_with(**GSHARD)).model.config
    kept = {name: value for name, value in GSHARD.items() if getattr(config, name) == value}
    # Its layer takes the width of the others, and results that depend on the batch are asked for.
    assert GSHARD.keys() - kept.keys() == {
        "moe_expert_ffn_dim",
        "moe_eval_capacity_token_fraction",
    }
    assert config.moe_expert_ffn_dim is None
    assert config.moe_eval_capacity_token_fraction is None


def test_what_was_chosen_is_kept() -> None:
    chosen = cfg_with(**{**GSHARD, "moe_eval_capacity_token_fraction": 0.5})
    assert read(chosen).model.config.moe_eval_capacity_token_fraction == 0.5
    ours = {**cfg_with(**GSHARD), parts.OWN_KEY: {"format": 1}}
    config = read(ours).model.config
    assert (config.moe_expert_ffn_dim, config.moe_eval_capacity_token_fraction) == (99, 0.25)


def test_overrides_win() -> None:
    overrides = {"moe_eval_capacity_token_fraction": 0.25}
    saved = convert.saved_config(cfg_with(**GSHARD), "x.pt", load_builtins(), overrides)
    assert saved.model.config.moe_eval_capacity_token_fraction == 0.25


def test_what_is_written_is_read_again() -> None:
    fields = {"moe_freq": 2, "moe_expert_count": 4, "moe_expert_ffn_dim": 48}
    config = tiny(**fields, moe_top1_expert=True, max_target_positions=128)
    state = {"cfg": convert.to_cfg(run_of(config)), parts.OWN_KEY: {"format": 1}}
    assert read(state).model.config == config.resolved()


def test_a_file_of_gshards_is_known_by_what_it_lacks() -> None:
    state = {**cfg_with(**GSHARD), "optimizer_history": [{"num_updates": 7}]}
    expert = "decoder.layers.1.moe_layer.experts.0.fc1.weight"
    shared = "decoder.embed_tokens.weight"
    weight = torch.ones(1)
    assert parts.has_numbered_state({**state, "model": {expert: weight}})
    assert parts.has_numbered_state({**state, "model": {shared: weight}})
    assert not parts.has_numbered_state({**state, "model": {shared: weight, expert: weight}})
    assert not parts.has_numbered_state({**cfg_with(), "model": {shared: weight}})
