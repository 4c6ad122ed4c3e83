"""DeepSpeed's family of architectures: sizes, where experts are, what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.models import presets
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.parallel.experts import SHARED, placements
from fairseq_lite.training.assembly import check
from tests.helpers.user_dir import TINY, needs_deepspeed, part, train_config

NAMES = [
    *("transformer_ds_moe", "transformer_ds_moe_tiny", "transformer_ds_moe_iwslt_de_en"),
    *("transformer_ds_moe_wmt_en_de", "transformer_ds_moe_vaswani_wmt_en_de_big"),
    *("transformer_ds_moe_vaswani_wmt_en_fr_big", "transformer_ds_moe_wmt_en_de_big"),
    "transformer_ds_moe_wmt_en_de_big_t2t",
]
NATIVE = ["--moe-layer", "native"]


def build(*flags: object):
    """A model of a few symbols."""
    run = train_config(*TINY, *flags)
    symbols = Dictionary()
    for letter in "abcdef":
        symbols.add_symbol(letter)
    task = SimpleNamespace(
        source_dictionary=symbols, target_dictionary=symbols, max_positions=lambda: (32, 32)
    )
    torch.manual_seed(1)
    return ARCHITECTURES.get(run.model.name).factory.build(run.model.config, task)


def with_experts(model) -> set[str]:
    """The layers that have experts."""
    return {
        ".".join(name.split(".")[:3])
        for name, place in placements(model).items()
        if place != SHARED
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_the_sizes_of_the_dense_one(name):
    sparse = train_config(
        "--arch", name, "--deepspeed_moe", "enc,dec", "--num-experts", "4", *NATIVE
    )
    dense = train_config("--arch", name.replace("_ds_moe", ""))
    for side in ("encoder_stack", "decoder_stack"):
        ours, theirs = (getattr(run.model.config, side)() for run in (sparse, dense))
        assert ours.moe.ffn_dim == theirs.ffn_embed_dim
        assert dataclasses.replace(ours, moe=None) == theirs


def test_every_named_transformer_has_a_counterpart():
    part("model")
    assert set(NAMES) == {
        "transformer_ds_moe",
        *(name.replace("transformer", "transformer_ds_moe", 1) for name in presets.TRANSFORMER),
    }
    assert set(NAMES) <= set(ARCHITECTURES.names())


@pytest.mark.parametrize(
    ("sides", "layers"),
    [
        ("enc", {"encoder.layers.1", "encoder.layers.3"}),
        ("dec", {"decoder.layers.1"}),
        ("enc,dec", {"encoder.layers.1", "encoder.layers.3", "decoder.layers.1"}),
        ("", set()),
    ],
)
@pytest.mark.parametrize("spelling", ["--deepspeed_moe", "--deepspeed-moe"])
def test_every_second_layer_of_the_stacks_named_has_experts(sides, layers, spelling):
    flags = ["--encoder-layers", 4, "--decoder-layers", 3, "--num-experts", 4, *NATIVE]
    assert with_experts(build(spelling, sides, *flags)) == layers


def test_experts_have_the_activation_asked_for_and_start_different():
    def expert(model, number):
        return model.get_submodule(f"decoder.layers.1.moe_layer.experts.{number}")

    x = torch.linspace(-1, 1, 32).view(2, 16)
    outputs = []
    for activation in ("relu", "tanh"):
        model = build(
            *("--deepspeed_moe", "dec", "--num-experts", 3, "--activation-fn", activation, *NATIVE)
        ).eval()
        outputs += [expert(model, number)(x) for number in (0, 1)]
    assert not torch.allclose(outputs[0], outputs[1])  # two experts
    assert not torch.allclose(outputs[0], outputs[2])  # two activations


@needs_deepspeed
def test_both_layers_have_the_same_parameters_and_start_the_same():
    flags = ["--deepspeed_moe", "enc,dec", "--num-experts", 4, "--top-k", 2]
    ours, theirs = build(*flags, *NATIVE).state_dict(), build(*flags).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "decoder.layers.1.moe_layer.gate.wg.weight" in ours
    assert "encoder.layers.1.moe_layer.experts.3.fc2.bias" in ours


MOE = ["--deepspeed_moe", "enc,dec", "--num-experts", "4", *NATIVE]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--deepspeed_moe", "encoder"], "--deepspeed_moe encoder: expected enc, dec"),
        (["--deepspeed_moe", "enc,enc"], "--deepspeed_moe enc,enc: expected"),
        (["--num-experts", "4"], "which layers have experts? add --deepspeed_moe"),
        (["--top-k", "1"], "which layers have experts? add --deepspeed_moe"),
        ([*MOE, "--num-experts", "0"], "--num-experts 0: expected 1 or more"),
        ([*MOE, "--num-experts", "1", "--top-k", "2"], "--top-k 2 needs two experts"),
        ([*MOE, "--top-k", "3"], "--top-k"),
        ([*MOE, "--ep-world-size", "0"], "--ep-world-size 0"),
        ([*MOE, "--ep-world-size", "3"], "--num-experts 4 is not divisible by --ep-world-size 3"),
        ([*MOE, "--min-capacity", "-1"], "--min-capacity -1"),
        ([*MOE, "--capacity-factor", "0"], "expected numbers above 0"),
        ([*MOE, "--eval-capacity-factor", "-1"], "expected numbers above 0"),
        ([*MOE, "--capacity-factor", "inf"], "expected numbers above 0"),
        ([*MOE, "--no-drop-tokens", "--capacity-factor", "2"], "means nothing with --no-drop"),
        ([*MOE, "--no-drop-tokens", "--min-capacity", "2"], "means nothing with --no-drop"),
        ([*MOE, "--no-drop-tokens", "--use-rts"], "--use-rts means nothing with --no-drop"),
        ([*MOE, "--top-k", "2", "--use-rts"], "--use-rts is a rule of --top-k 1"),
        (
            [*MOE, "--top-k", "2", "--noisy-gate-policy", "RSample"],
            "RSample is a rule of --top-k 1",
        ),
        ([*MOE, "--top2-2nd-expert-sampling"], "is a rule of --top-k 2"),
        ([*MOE, "--noisy-gate-policy", "Gumbel"], "--noisy-gate-policy"),
        ([*MOE, "--moe-layer", "tutel"], "--moe-layer"),
        ([*MOE, "--decoder-layers", "1"], "a stack has one only"),
        ([*MOE, "--encoder-layerdrop", "0.1"], "run whole"),
        ([*MOE, "--decoder-layers-to-keep", "0,1"], "keeps all its layers"),
        ([*MOE, "--moe-freq", "2"], "--moe-freq is not for --arch transformer_ds_moe*"),
        ([*MOE, "--moe-expert-count", "4"], "type --num-experts"),
        ([*MOE, "--moe-top1-expert"], "type --top-k 1"),
        ([*MOE, "--alternate-ffn-embed-dim", "8"], "type --deepspeed_moe '' for a dense model"),
        ([*MOE, "--moe-batch-prioritized-routing"], "DeepSpeed's gate has no such rule"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_type(flags, words):
    with pytest.raises(ConfigError) as refused:
        train_config("--arch", "transformer_ds_moe_tiny", *flags)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--moe-normalize-expert-grad", "sqrt_world_size"],
        ["--moe-expert-ffn-dim", "12"],
        ["--encoder-layerdrop", "0.1", "--deepspeed_moe", "dec"],
        ["--encoder-layers", "1", "--deepspeed_moe", "dec"],
        ["--no-drop-tokens", "--min-capacity", "2", "--eval-capacity-factor", "2"],
    ],
)
def test_what_works_is_taken(flags):
    train_config("--arch", "transformer_ds_moe_tiny", *MOE, *flags)


@pytest.mark.parametrize("processes", [1, 3])
def test_groups_that_do_not_fit_the_processes_are_refused_before_any_is_started(processes):
    flags = [*MOE, "--ep-world-size", "2", "--distributed-world-size", processes, "--cpu"]
    with pytest.raises(ConfigError, match=f"--ep-world-size 2 does not divide .* {processes}"):
        check(train_config("--arch", "transformer_ds_moe_tiny", *flags))


def test_the_size_of_a_group_that_is_advised_divides_the_experts_too():
    flags = [*MOE, "--ep-world-size", "4", "--distributed-world-size", "6", "--cpu"]
    with pytest.raises(ConfigError, match="processes, 6: type --ep-world-size 2, or"):
        check(train_config("--arch", "transformer_ds_moe_tiny", *flags))


def test_without_deepspeed_the_user_is_told_what_to_type(monkeypatch):
    layers = part("layers")
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependency, match=r"needs DeepSpeed: pip install .* --moe-layer native"
    ):
        check(train_config("--arch", "transformer_ds_moe_tiny", *MOE, "--moe-layer", "deepspeed"))
    check(train_config("--arch", "transformer_ds_moe_tiny", *MOE))


def test_translating_does_not_need_deepspeed(monkeypatch):
    layers = part("layers")
    monkeypatch.setattr(layers.comm, "load", lambda device: pytest.fail("imports deepspeed"))
    model = build("--deepspeed_moe", "enc,dec", "--num-experts", "4").eval()
    model(torch.tensor([[4, 5, 2]]), torch.tensor([3]), torch.tensor([[2, 4, 5]]))


def test_the_dense_model_offers_a_gate_loss_of_zero():
    model = build("--deepspeed_moe", "", "--num-experts", "8")
    out = model(torch.tensor([[4, 5, 2]]), torch.tensor([3]), torch.tensor([[2, 4, 5]]))
    assert float(model.get_losses(out)["experts_gate_loss"]) == 0.0
