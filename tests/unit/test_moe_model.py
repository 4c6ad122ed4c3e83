"""Transformers with experts: flags, shapes, first weights, and numbers that must not change."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation.incremental import TreeDecoder, can_cache, incremental_decoder
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.lm_config import TransformerLMConfig
from fairseq_lite.moe.flags import MoEConfig
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.parallel.experts import placements
from fairseq_lite.training.checkpoint import convert
from fairseq_lite.training.checkpoint.parts import OWN_KEY
from tests.helpers.generation import (
    PAD,
    make_language_model,
    make_model,
    make_prefixes,
    make_sample,
)

MOE: dict[str, Any] = {"moe_freq": 2, "moe_expert_count": 4}
TRAIN = ["data", "--optimizer", "adam"]


def model_flags(*argv: str, arch: str = "transformer_tiny") -> Any:
    run = parse("flite-train", [*TRAIN, "--arch", arch, *argv], load_builtins())
    return run.model.config


def layers_with_experts(model: Any) -> list[str]:
    return [name.removesuffix(".moe_layer") for name, m in model.named_modules() if _is_mixture(m)]


def _is_mixture(module: nn.Module) -> bool:
    return isinstance(module, MoELayer)


# -- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["transformer", "transformer_lm"])
def test_every_preset_has_gshards_flags(arch: str) -> None:
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    for name in ARCHITECTURES.names():
        entry = ARCHITECTURES.get(name)
        if arch in (name, entry.of):
            assert fields <= {field.name for field in dataclasses.fields(entry.config)}, name


def test_every_flag_reaches_the_layer() -> None:
    cfg = model_flags(
        *("--moe-freq", "2", "--moe-expert-count", "8", "--moe-gating-use-fp32"),
        *("--moe-second-expert-policy", "random", "--moe-normalize-gate-prob-before-dropping"),
        *("--moe-expert-ffn-dim", "48", "--moe-eval-capacity-token-fraction", "0.25"),
        *("--moe-normalize-expert-grad", "sqrt_world_size", "--use-moe-pad-mask"),
        *("--moe-batch-prioritized-routing", "--moe-capacity-factor", "1.5", "--moe-jitter", "0.1"),
    )
    moe = cfg.decoder_stack().moe
    assert (moe.every, moe.ffn_dim, moe.sqrt_gradients) == (2, 48, True)
    assert dataclasses.asdict(moe.router) == {
        "num_experts": 8,
        "top_k": 2,
        "gate_fp32": True,
        "second_policy": "random",
        "normalize_before_dropping": True,
        "capacity_factor": 1.5,
        "eval_capacity_fraction": 0.25,
        "prioritized": True,
        "mask_padding": True,
        "jitter": 0.1,
    }
    top1 = model_flags("--moe-freq", "1", "--moe-expert-count", "2", "--moe-top1-expert")
    router = top1.decoder_stack().moe.router
    assert (router.top_k, router.capacity_factor, router.eval_capacity_fraction) == (1, 1.0, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"moe_freq": 2}, ["encoder.layers.1", "decoder.layers.1"]),
        ({"moe_freq": 1}, [f"{side}coder.layers.{i}" for side in ("en", "de") for i in (0, 1)]),
        ({"encoder_moe_freq": 2}, ["encoder.layers.1"]),
        ({"decoder_moe_freq": 1}, ["decoder.layers.0", "decoder.layers.1"]),
        # As in fairseq the larger of the two counts.
        ({"moe_freq": 1, "decoder_moe_freq": 2}, [f"encoder.layers.{i}" for i in (0, 1)]
         + ["decoder.layers.1"]),
        # A frequency beyond one stack leaves that one dense.
        ({"moe_freq": 2, "encoder_layers": 1}, ["decoder.layers.1"]),
    ],
)  # fmt: skip
def test_every_nth_layer_has_experts(fields: dict[str, int], expected: list[str]) -> None:
    assert layers_with_experts(make_model(moe_expert_count=2, **fields)) == expected


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--moe-freq", "-1"], "--moe-freq -1: expected 0 .none. to 2"),
        (["--moe-freq", "3", "--moe-expert-count", "4"], "--moe-freq 3: expected 0 .none. to 2"),
        (["--encoder-moe-freq", "3"], "--encoder-moe-freq 3: .*--encoder-layers 2"),
        (["--decoder-moe-freq", "-2"], "--decoder-moe-freq -2: .*--decoder-layers 2"),
        (["--moe-freq", "2"], "--moe-expert-count 0: .*at least 2"),
        (["--moe-freq", "2", "--moe-expert-count", "1"], "--moe-expert-count 1: .*at least 2"),
        (["--moe-expert-count", "-4"], "--moe-expert-count -4: expected 2 or more"),
        (["--moe-expert-count", "4"], "--moe-expert-count: no layer has experts: .*--moe-freq N"),
        (["--moe-top1-expert"], "--moe-top1-expert: no layer has experts"),
        (["--use-moe-pad-mask"], "--use-moe-pad-mask: no layer has experts"),
        (["--alternate-ffn-embed-dim", "8"], "--alternate-ffn-embed-dim: no layer has experts"),
        (["--moe-expert-ffn-dim", "0"], "--moe-expert-ffn-dim 0: expected 1 or more"),
        (["--moe-capacity-factor", "-1"], "--moe-capacity-factor -1.0: expected more than 0"),
        (["--moe-eval-capacity-token-fraction", "0"], "-fraction 0.0: expected a share above 0"),
        (["--moe-eval-capacity-token-fraction", "25"], "-fraction 25.0: expected a share above 0"),
        (["--moe-capacity-factor", "inf"], "--moe-capacity-factor inf: expected more than 0"),
        (["--moe-capacity-factor", "nan"], "--moe-capacity-factor nan: expected more than 0"),
        (["--moe-eval-capacity-token-fraction", "nan"], "-fraction nan: expected a share"),
        (["--moe-eval-capacity-token-fraction", "inf"], "-fraction inf: expected a share"),
        (["--moe-jitter", "1"], "--moe-jitter 1.0: expected 0 to below 1"),
        (["--moe-second-expert-policy", "some"], "--moe-second-expert-policy"),
        (
            ["--moe-freq", "2", "--moe-expert-count", "4", "--decoder-layers-to-keep", "0,1"],
            "--decoder-layers-to-keep: .*leave it out",
        ),
        (
            ["--moe-freq", "1", "--moe-expert-count", "4", "--encoder-layerdrop", "0.1"],
            "--encoder-layerdrop 0.1: layers of experts are never left out",
        ),
        (["--alternate-decoder-ffn-embed-dim", "-1"], "expected a width, or 0"),
        (["--dummy-a2a"], "--dummy-a2a: tokens always go to their experts"),
        (["--base-layers", "1"], "--base-layers: .*--moe-freq 2 --moe-expert-count 8"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        model_flags(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--record-a2a-perf-stats"],
        ["--fp16-no-flatten-grads"],
        ["--num-workers-valid", "0"],
        [*("--moe-freq", "2", "--moe-expert-count", "4", "--moe-top1-expert"),
         *("--moe-second-expert-policy", "all")],
    ],
)  # fmt: skip
def test_what_changes_nothing_is_said(argv: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model_flags(*argv)
    [line] = [record.getMessage() for record in caplog.records]
    assert "has no effect" in line


def test_a_stored_dense_model_may_have_any_flags() -> None:
    cfg = TransformerLMConfig(moe_eval_capacity_token_fraction=0.25, moe_gating_use_fp32=True)
    assert cfg.experts_to_spread() is None


def test_gshards_own_command_line_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """What its sweep of language models types of experts."""
    argv = [
        *("--task", "language_modeling", "--moe-freq", "2", "--moe-expert-count", "8"),
        *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01"),
        *("--moe-gate-loss-combine-method", "sum", "--moe-second-expert-policy", "all"),
        *("--moe-normalize-expert-grad", "sqrt_world_size", "--moe-gating-use-fp32"),
        *("--moe-eval-capacity-token-fraction", "-1.0", "--use-moe-pad-mask"),
        *("--pad-to-fixed-length", "--moe-batch-prioritized-routing"),
    ]
    with caplog.at_level(logging.WARNING):
        cfg = model_flags(*argv, arch="transformer_lm_gpt2_tiny")
    assert caplog.records == []
    assert cfg.decoder_stack().moe.router.eval_capacity_fraction == -1.0
    assert cfg.experts_to_spread() == (8, None)


# -- the dense model to compare with ------------------------------------------------------------


def test_alternate_widths_stand_where_experts_would() -> None:
    model = make_model(
        **MOE, alternate_ffn_embed_dim=40, alternate_decoder_ffn_embed_dim=56, encoder_layers=3
    )
    assert layers_with_experts(model) == []
    assert [layer.fc1.out_features for layer in model.encoder.layers] == [32, 40, 32]
    assert [layer.fc1.out_features for layer in model.decoder.layers] == [32, 56]
    # One side may have experts, the other not; and the number of experts is not needed.
    mixed = make_model(**MOE, alternate_ffn_embed_dim=40)
    assert layers_with_experts(mixed) == ["decoder.layers.1"]
    dense = make_language_model(moe_freq=2, alternate_decoder_ffn_embed_dim=56)
    assert [layer.fc1.out_features for layer in dense.decoder.layers] == [32, 56]


# -- first weights ------------------------------------------------------------------------------


def test_experts_start_different_from_each_other_and_leave_the_rest_as_it_was() -> None:
    one, other = make_model(**MOE), make_model(**MOE, moe_top1_expert=True)
    names = placements(one)
    weights = dict(one.named_parameters())
    experts = [p for name, p in weights.items() if "experts" in name and "fc1.weight" in name]
    assert len(experts) == 8
    for i, first in enumerate(experts):
        bound = 2.5 / first.size(1) ** 0.5  # torch's own; the helper makes weights 2.5 times larger
        assert float(first.detach().abs().max()) <= bound
        assert not any(torch.equal(first, second) for second in experts[:i])
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert all(("experts" in name) != (mark == names["encoder.version"])
               for name, mark in names.items())  # fmt: skip


def test_a_model_drawn_again_is_the_model_that_was_built() -> None:
    torch.manual_seed(7)
    expected = make_model(**MOE).state_dict()
    model = make_model(seed=12, **MOE)
    assert not torch.equal(
        model.state_dict()["decoder.layers.1.moe_layer.experts.2.fc1.weight"],
        expected["decoder.layers.1.moe_layer.experts.2.fc1.weight"],
    )
    torch.manual_seed(11)
    model.to("meta")
    model.materialize("cpu")
    again = make_model(seed=11, **MOE)
    for name, tensor in model.state_dict().items():
        if "experts" in name and tensor.dim() == 2:  # the helper has scaled the other one's
            assert torch.allclose(tensor * 2.5, again.state_dict()[name]), name


# -- numbers ------------------------------------------------------------------------------------


def stepwise_and_whole(**fields: Any) -> tuple[Tensor, Tensor]:
    """Logits of a language model over the same tokens, one at a time and all at once."""
    model = make_language_model(**MOE, **fields)
    tokens = make_prefixes([8, 8, 8])["net_input"]["src_tokens"]
    assert can_cache(model)
    with torch.no_grad():
        tree = TreeDecoder(model.decoder, None, beam=1, max_len=9, sentences=3)
        steps = [tree.step(tokens[:, i : i + 1], None) for i in range(tokens.size(1))]
        return torch.cat(steps, dim=1), model(tokens)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moe_top1_expert": True},
        {"scale_fc": True, "scale_resids": True, "activation_fn": "gelu"},
        {"moe_expert_ffn_dim": 24, "decoder_normalize_before": True},
    ],
)
def test_step_by_step_is_the_whole_at_once(fields: dict[str, Any]) -> None:
    steps, whole = stepwise_and_whole(**fields)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_a_capacity_in_evaluation_would_be_seen() -> None:
    """gshard's way: what is dropped depends on what else is in the batch."""
    steps, whole = stepwise_and_whole(moe_eval_capacity_token_fraction=0.25)
    assert float((steps - whole).abs().max()) > 1e-2


def test_step_by_step_with_an_encoder() -> None:
    model = make_model(**MOE)
    batch = make_sample([6, 4, 3])["net_input"]
    previous = batch["prev_output_tokens"]
    with torch.no_grad():
        decoder = incremental_decoder(
            model, batch["src_tokens"], batch["src_lengths"], beam=1, max_len=8
        )
        steps = [decoder.step(previous[:, i : i + 1], None) for i in range(previous.size(1))]
        expected = model(**batch)[0]
    real = previous.ne(PAD)
    got = torch.cat(steps, dim=1)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [False, True])
def test_padding_moves_no_result_in_evaluation(mask: bool) -> None:
    model = make_model(**MOE, use_moe_pad_mask=mask)
    with torch.no_grad():
        alone, extra = model(**make_sample([4])["net_input"])
        sample = make_sample([4])["net_input"]
        wider = {
            "src_tokens": nn.functional.pad(sample["src_tokens"], (3, 0), value=PAD),
            "src_lengths": sample["src_lengths"],
            "prev_output_tokens": nn.functional.pad(
                sample["prev_output_tokens"], (0, 5), value=PAD
            ),
        }
        padded, wide = model(**wider)
    torch.testing.assert_close(padded[:, :4], alone, rtol=1e-5, atol=1e-5)
    assert list(wide["experts"]) == ["encoder.layers.1", "decoder.layers.1"]
    for name, report in wide["experts"].items():
        assert torch.equal(report.load, extra["experts"][name].load), "padding is not counted"
        assert int(report.tokens) == 4


def test_the_alignment_is_still_there() -> None:
    model = make_model(**MOE)
    _, extra = model(**make_sample([5, 3])["net_input"], need_alignment=True)
    weights = extra["attn"]
    assert weights.shape == (2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.train()
    model.zero_grad()
    out, extra = model(**make_sample([7, 5, 4])["net_input"])
    balance = sum(report.balance for report in extra["experts"].values())
    (out.square().sum() + balance).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("option", ["checkpoint_activations", "offload_activations"])
def test_recomputed_activations_give_the_same_gradients(option: str) -> None:
    """Also the noise by which second experts are drawn is drawn again."""
    fields = {**MOE, "dropout": 0.2, "activation_dropout": 0.1, "moe_jitter": 0.1}
    expected = gradients(make_model(**fields))
    got = gradients(make_model(**fields, **{option: True}))
    assert got.keys() == expected.keys()
    assert any("gate.wg" in name for name in got)
    for name, grad in expected.items():
        assert torch.equal(grad, got[name]), name


def test_layers_of_experts_are_never_left_out() -> None:
    model = make_model(**MOE, encoder_layerdrop=0.9, decoder_layerdrop=0.9).train()
    for seed in range(5):
        torch.manual_seed(seed)
        _, extra = model(**make_sample([4, 3])["net_input"])
        assert list(extra["experts"]) == ["encoder.layers.1", "decoder.layers.1"]


# -- what backends and --compile ask ------------------------------------------------------------


def test_layers_are_sharded_by_what_every_rank_has() -> None:
    model = make_language_model(**MOE, min_params_to_wrap=2000)
    whole = [sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers]
    assert whole[0] > 2000 and whole[1] > 2000
    assert model.layers_to_shard() == [model.decoder.layers[0]]


def test_layers_with_experts_are_compiled_too() -> None:
    model = make_model(**MOE)
    assert model.layers_to_compile() == [*model.encoder.layers, *model.decoder.layers]


# -- configurations in checkpoints --------------------------------------------------------------


def run_of(config: Any, name: str) -> RunConfig:
    return RunConfig(command="flite-train", model=Choice(name, config))


def test_a_dense_models_configuration_has_fields_of_fairseqs_main_branch_only() -> None:
    for config, name in (
        (TransformerLMConfig(), "transformer_lm"),
        (TransformerConfig(), "transformer"),
    ):
        stored = convert.to_cfg(run_of(config, name))["model"]
        assert not [key for key in stored if "moe" in key or "alternate" in key], name


def test_a_configuration_comes_back() -> None:
    config = TransformerLMConfig(**MOE, moe_top1_expert=True, moe_expert_ffn_dim=64)
    cfg = convert.to_cfg(run_of(config, "transformer_lm"))
    state = {"cfg": cfg, "model": {}, OWN_KEY: {"manifest": {}}}
    again = convert.saved_config(state, "x.pt", load_builtins()).model.config
    for field in dataclasses.fields(MoEConfig):
        assert getattr(again, field.name) == getattr(config, field.name), field.name


def test_gshards_configuration_is_read() -> None:
    stored = {
        "_name": "transformer_lm_gpt2_tiny",
        "moe_freq": 2,
        "moe_expert_count": 8,
        "moe_gating_use_fp32": True,
        "moe_second_expert_policy": "all",
        "moe_normalize_expert_grad": "sqrt_world_size",
        "moe_normalize_gate_prob_before_dropping": False,
        "moe_expert_ffn_dim": None,
        "moe_top1_expert": False,
        "moe_eval_capacity_token_fraction": 0.05,
        "use_moe_pad_mask": False,
        "record_a2a_perf_stats": False,
        "dummy_a2a": False,
        "moe_batch_prioritized_routing": True,
        "alternate_decoder_ffn_embed_dim": 0,
    }
    state = {"cfg": {"model": stored}, "model": {}}
    config = convert.saved_config(state, "x.pt", load_builtins()).model.config
    for name, value in stored.items():
        if name not in ("_name", "record_a2a_perf_stats", "dummy_a2a"):
            assert getattr(config, name) == value, name
