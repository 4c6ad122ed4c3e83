"""The transformer: what fairseq's users expect of names, shapes, initialisation and numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.layers import ACTIVATIONS, SinusoidalPositions, positions_of
from fairseq_lite.models.transformer import TransformerModel
from tests.helpers.generation import PAD, Words, make_model, make_sample, one_of
from tests.helpers.shared import shared_dir


def build(cfg: TransformerConfig, source: int = 336, target: int = 336) -> TransformerModel:
    words = Words(source)
    task = SimpleNamespace(
        source_dictionary=words,
        target_dictionary=words if cfg.share_all_embeddings else Words(target),
        max_positions=lambda: (1024, 1024),
    )
    return TransformerModel.build(cfg, task)


def preset(name: str, **fields: Any) -> TransformerConfig:
    entry = ARCHITECTURES.get(name)
    return TransformerConfig(**{**entry.overrides, **fields})


TINY: dict[str, Any] = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_embed_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}


# -- presets and derived fields -----------------------------------------------------------------


# Fields of features that are refused; `decoder_input_dim` is always the decoder's width here.
NOT_OURS = {
    "adaptive_softmax_cutoff", "adaptive_softmax_dropout", "cross_self_attention",
    "decoder_embed_path", "decoder_input_dim", "encoder_embed_path", "merge_src_tgt_embed", "model",
    "no_cross_attention", "quant_noise_pq_block_size", "tie_adaptive_weights",
}  # fmt: skip


def test_presets_are_fairseqs() -> None:
    reference = json.loads(shared_dir("reference", "fairseq-architectures.json").read_text())
    ours = {n for n in ARCHITECTURES.names() if ARCHITECTURES.get(n).config is TransformerConfig}
    names = {n for n, fields in reference.items() if "encoder_layers" in fields}
    assert names <= ours
    assert len(names) == 8
    for name in names:
        got = dataclasses.asdict(preset(name).resolved())
        expected = {k: v for k, v in reference[name].items() if k in got}
        assert {k: got[k] for k in expected} == expected, name
        assert reference[name].keys() - got.keys() == NOT_OURS


def test_decoder_follows_encoder_where_unset() -> None:
    cfg = TransformerConfig(
        encoder_embed_dim=64, encoder_ffn_embed_dim=96, encoder_layers=3, encoder_attention_heads=4
    ).resolved()
    assert (cfg.decoder_embed_dim, cfg.decoder_ffn_embed_dim, cfg.decoder_output_dim) == (
        64,
        96,
        64,
    )
    assert (cfg.decoder_layers, cfg.decoder_attention_heads) == (6, 8)  # these never follow


def test_a_presets_decoder_does_not_follow() -> None:
    cfg = preset("transformer_iwslt_de_en", encoder_embed_dim=256).resolved()
    assert cfg.decoder_embed_dim == 512


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder_embed_dim": 100}, ["--encoder-embed-dim 100", "--encoder-attention-heads 8"]),
        ({"dropout": 1.5}, ["--dropout 1.5"]),
        ({"share_all_embeddings": True, "decoder_embed_dim": 256}, ["--share-all-embeddings"]),
        (
            {"share_decoder_input_output_embed": True, "decoder_output_dim": 256},
            ["--decoder-output-dim 256"],
        ),
        ({"encoder_layers": 0}, ["--encoder-layers 0"]),
    ],
)
def test_contradictory_flags_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        TransformerConfig(**fields)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_sharing_all_embeddings_needs_one_dictionary() -> None:
    task = SimpleNamespace(
        source_dictionary=Words(10), target_dictionary=Words(12), max_positions=lambda: (9, 9)
    )
    with pytest.raises(ConfigError, match="--joined-dictionary"):
        TransformerModel.build(TransformerConfig(share_all_embeddings=True, **TINY), task)


# -- names and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "vocabulary", "parameters", "entries"),
    [
        ("transformer_iwslt_de_en", {}, 336, 32_059_392, 257),
        (
            "transformer_iwslt_de_en",
            {"share_decoder_input_output_embed": True},
            336,
            31_887_360,
            257,
        ),
        ("transformer_iwslt_de_en", {"share_all_embeddings": True}, 664, 31_883_264, 257),
        (
            "transformer",
            {
                "encoder_normalize_before": True,
                "decoder_normalize_before": True,
                "encoder_learned_pos": True,
                "decoder_learned_pos": True,
                "layernorm_embedding": True,
                "encoder_embed_dim": 256,
                "decoder_embed_dim": 128,
                "decoder_output_dim": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
            },
            336,
            4_568_576,
            100,
        ),
        ("transformer_wmt_en_de_big_t2t", {}, 336, 177_393_664, 261),
    ],
)
def test_sizes_are_fairseqs(
    name: str, fields: dict[str, Any], vocabulary: int, parameters: int, entries: int
) -> None:
    with torch.device("meta"):
        model = build(preset(name, **fields), vocabulary, vocabulary)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries


def test_names_come_in_fairseqs_order() -> None:
    # Optimizer states are stored by position, so the order is part of the format.
    cfg = TransformerConfig(
        encoder_normalize_before=True, decoder_normalize_before=True, encoder_learned_pos=True,
        decoder_learned_pos=True, layernorm_embedding=True, decoder_output_dim=16, **TINY,
    )  # fmt: skip
    attention = [f"{x}_proj.{kind}" for x in ("k", "v", "q", "out") for kind in ("weight", "bias")]
    norm = ["weight", "bias"]

    def stack(side: str, blocks: list[str]) -> list[str]:
        names = [f"{side}.version", f"{side}.embed_tokens.weight", f"{side}.embed_positions.weight"]
        names += [f"{side}.layernorm_embedding.{x}" for x in norm]
        for block in blocks:
            names += [f"{side}.layers.0.{block}.{x}" for x in attention]
            names += [f"{side}.layers.0.{block}_layer_norm.{x}" for x in norm]
        for part in ("fc1", "fc2", "final_layer_norm"):
            names += [f"{side}.layers.0.{part}.{x}" for x in norm]
        return names + [f"{side}.layer_norm.{x}" for x in norm]

    assert list(build(cfg).state_dict()) == [
        *stack("encoder", ["self_attn"]),
        *stack("decoder", ["self_attn", "encoder_attn"]),
        "decoder.project_out_dim.weight",
        "decoder.output_projection.weight",
    ]


def test_no_final_norm_where_asked() -> None:
    cfg = TransformerConfig(decoder_normalize_before=True, no_decoder_final_norm=True, **TINY)
    assert "decoder.layer_norm.weight" not in build(cfg).state_dict()


def test_sharing_is_sharing() -> None:
    model = build(TransformerConfig(share_all_embeddings=True, **TINY))
    shared = model.encoder.embed_tokens.weight
    assert model.decoder.embed_tokens.weight is shared
    assert model.decoder.output_projection.weight is shared
    assert model.output_weight is shared
    assert [n for n, _ in model.named_parameters()].count("encoder.embed_tokens.weight") == 1


# -- initialisation -----------------------------------------------------------------------------


def assert_uniform(weight: Tensor, bound: float) -> None:
    assert float(weight.detach().abs().max()) <= bound
    rel = max(0.03, 3 / math.sqrt(weight.numel()))
    assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=rel)


def assert_initialised_as_fairseq(model: TransformerModel) -> None:
    embed = model.encoder.embed_tokens.weight
    assert float(embed[2:].detach().std()) == pytest.approx(256**-0.5, rel=0.03)
    assert not embed[PAD].any()
    layer: Any = model.decoder.layers[0]
    square = math.sqrt(6 / (256 + 256))
    for attention in (layer.self_attn, layer.encoder_attn):
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert_uniform(part.weight, square / math.sqrt(2))
            assert_uniform(part.bias, 1 / math.sqrt(256))
        assert_uniform(attention.out_proj.weight, square)
        assert not attention.out_proj.bias.any()
    assert_uniform(layer.fc1.weight, 1 / math.sqrt(256))
    assert_uniform(layer.fc2.weight, 1 / math.sqrt(512))
    assert float(model.encoder.version) == float(model.decoder.version) == 3.0


WIDE: dict[str, Any] = {
    **TINY, "encoder_embed_dim": 256, "decoder_embed_dim": 256, "encoder_ffn_embed_dim": 512,
    "decoder_ffn_embed_dim": 512,
}  # fmt: skip


def test_initialisation() -> None:
    torch.manual_seed(1)
    model = build(TransformerConfig(encoder_learned_pos=True, **WIDE), 500, 2000)
    assert_initialised_as_fairseq(model)
    out = model.decoder.output_projection.weight
    assert float(out.detach().std()) == pytest.approx(256**-0.5, rel=0.03)
    assert out[PAD].any()  # untied: no padding row
    positions = model.encoder.embed_positions
    assert positions is not None
    assert not positions.weight[PAD].any()


def test_initialisation_of_cross_attention_between_widths() -> None:
    torch.manual_seed(1)
    cfg = TransformerConfig(**{**WIDE, "decoder_embed_dim": 128})
    layer: Any = build(cfg).decoder.layers[0]
    assert_uniform(layer.encoder_attn.k_proj.weight, math.sqrt(6 / (128 + 256)))
    assert_uniform(layer.self_attn.k_proj.weight, math.sqrt(6 / 256) / math.sqrt(2))


def test_a_model_made_without_storage_is_as_good() -> None:
    cfg = TransformerConfig(share_all_embeddings=True, **WIDE)
    with torch.device("meta"):
        model = build(cfg, 500)
    assert model.encoder.embed_tokens.weight.is_meta
    torch.manual_seed(1)
    model.materialize("cpu")
    assert_initialised_as_fairseq(model)
    assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight
    fresh = build(cfg, 500)
    fresh.load_state_dict(model.state_dict())
    sample = random_inputs(500)
    assert torch.equal(model.eval()(**sample)[0], fresh.eval()(**sample)[0])


def random_inputs(words: int, batch: int = 2, length: int = 5) -> dict[str, Tensor]:
    tokens = torch.randint(4, words, (2, batch, length))
    return {"src_tokens": tokens[0], "src_lengths": None, "prev_output_tokens": tokens[1]}  # type: ignore[dict-item]


# -- positions ----------------------------------------------------------------------------------


def test_positions_count_real_tokens() -> None:
    tokens = torch.tensor([[1, 1, 7, 8], [7, 8, 9, 1]])
    assert positions_of(tokens, PAD).tolist() == [[1, 1, 2, 3], [2, 3, 4, 1]]


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_table(width: int) -> None:
    module = SinusoidalPositions(10, width, PAD)
    position, half = 5, width // 2
    freq = [math.exp(-i * math.log(10000) / (half - 1)) for i in range(half)]
    expected = [math.sin(position * f) for f in freq] + [math.cos(position * f) for f in freq]
    expected += [0.0] * (width - 2 * half)
    row = module(torch.tensor([[position]]))[0, 0]
    assert row.tolist() == pytest.approx(expected, abs=1e-6)
    assert not module(torch.tensor([[PAD]])).any()
    assert not module.state_dict()


def test_sinusoidal_table_grows() -> None:
    module, longer = SinusoidalPositions(3, 8, PAD), SinusoidalPositions(40, 8, PAD)
    positions = positions_of(torch.full((1, 30), 5), PAD)
    assert torch.equal(module(positions), longer(positions))


# -- numbers ------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"encoder_normalize_before": True, "decoder_normalize_before": True},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
    {"no_token_positional_embeddings": True, "no_scale_embedding": True, "activation_fn": "gelu"},
    {"decoder_output_dim": 8, "decoder_normalize_before": True, "no_decoder_final_norm": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=[",".join(v) or "default" for v in VARIANTS])
def test_neither_padding_nor_company_changes_a_sentence(fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    sample = make_sample([9, 6, 3])
    together = model(**sample["net_input"])[0]
    for i, n in enumerate([9, 6, 3]):
        alone = model(**one_of(sample, i)["net_input"])[0]
        torch.testing.assert_close(together[i, :n], alone[0], rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_of_the_target_changes_nothing() -> None:
    model = make_model()
    sample = make_sample([6, 4])["net_input"]
    right = model(**sample)[0]
    prev = sample["prev_output_tokens"]
    left = torch.stack([prev[0], torch.cat([prev[1, 4:], prev[1, :4]])])
    got = model(**{**sample, "prev_output_tokens": left})[0]
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], right[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1, 2:], right[1, :4], rtol=1e-5, atol=1e-5)


def test_the_future_is_not_seen() -> None:
    model = make_model()
    sample = make_sample([8])["net_input"]
    before = model(**sample)[0]
    sample["prev_output_tokens"][0, 5:] = 6
    after = model(**sample)[0]
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5:], after[0, 5:])


def test_fully_padded_rows_stay_finite() -> None:
    # A rank without data runs a batch of nothing but padding.
    model = make_model().train()
    nothing = torch.full((2, 3), PAD)
    logits = model(nothing, None, nothing)[0]
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_features_and_output_layer_make_the_logits() -> None:
    model = make_model(decoder_output_dim=8)
    sample = make_sample([5, 4])["net_input"]
    features, _ = model(**sample, features_only=True)
    assert features.shape == (2, 5, 8)
    assert model.output_weight is not None
    torch.testing.assert_close(features @ model.output_weight.t(), model(**sample)[0])
    torch.testing.assert_close(model.output_layer(features), model(**sample)[0])
    probs = model.get_normalized_probs(model(**sample), log_probs=False)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5))


def test_encode_then_decode_is_forward() -> None:
    model = make_model()
    sample = make_sample([5, 4])["net_input"]
    out = model.encode(sample["src_tokens"], sample["src_lengths"])
    assert out.padding_mask is not None
    assert out.padding_mask.sum() == 1
    got = model.decoder(sample["prev_output_tokens"], out)[0]
    assert torch.equal(got, model(**sample)[0])


def test_alignment_is_a_distribution_over_real_source_tokens() -> None:
    model = make_model()
    sample = make_sample([6, 3])["net_input"]
    logits, extra = model(**sample, need_alignment=True)
    assert extra["attn"].shape == (2, 6, 6)
    torch.testing.assert_close(extra["attn"].sum(-1), torch.ones(2, 6))
    assert not extra["attn"][1, :, :3].any()
    torch.testing.assert_close(logits, model(**sample)[0])
    first = model(**sample, need_alignment=True, alignment_layer=0)[1]["attn"]
    assert not torch.equal(first, extra["attn"])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    x = torch.linspace(-3, 3, 13)
    exact = {
        "relu": x.clamp(min=0),
        "tanh": x.tanh(),
        "linear": x,
        "gelu": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    }
    approximate = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(ACTIVATIONS[name](x), exact.get(name, approximate))


def test_bf16_autocast_keeps_states_narrow_and_numbers_close() -> None:
    model = make_model()
    sample = make_sample([6, 4])["net_input"]
    with torch.autocast("cpu", torch.bfloat16):
        features = model(**sample, features_only=True)[0]
    assert features.dtype == torch.bfloat16
    exact = model(**sample, features_only=True)[0]
    assert float((features.float() - exact).detach().norm() / exact.norm()) < 0.05


# -- training-time options ----------------------------------------------------------------------


def gradients(model: TransformerModel, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.train()
    model.zero_grad()
    logits = model(**make_sample([7, 5, 4])["net_input"])[0]
    logits.square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("option", ["checkpoint_activations", "offload_activations"])
def test_recomputed_activations_give_the_same_gradients(option: str) -> None:
    drop = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.1}
    expected = gradients(make_model(**drop))
    got = gradients(make_model(**drop, **{option: True}))
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(grad, got[name]), name


def test_layerdrop_leaves_layers_out_in_training_only() -> None:
    model = make_model(encoder_layerdrop=1.0, decoder_layerdrop=0.5, dropout=0.0)
    assert not [n for n in gradients(model) if n.startswith("encoder.layers")]
    seen = {
        frozenset(n.split(".")[2] for n in gradients(model, seed) if n.startswith("decoder.layers"))
        for seed in range(12)
    }
    assert len(seen) > 2
    sample = make_sample([4])["net_input"]
    kept = make_model(dropout=0.0)
    assert torch.equal(model.eval()(**sample)[0], kept(**sample)[0])


def test_dropout_stays_on_where_asked() -> None:
    model = make_model(dropout=0.5)
    sample = make_sample([6])["net_input"]
    assert torch.equal(model(**sample)[0], model(**sample)[0])
    model.retain_dropout(("TransformerDecoderBase",))
    assert not torch.equal(model(**sample)[0], model(**sample)[0])
    source = sample["src_tokens"]
    assert torch.equal(model.encode(source).states, model.encode(source).states)
    model.retain_dropout()
    assert not torch.equal(model.encode(source).states, model.encode(source).states)
    with pytest.raises(ConfigError, match=r"--retain-dropout-modules Decodr: .*TransformerDecoder"):
        model.retain_dropout(("Decodr",))


def test_small_layers_are_not_worth_sharding() -> None:
    assert len(make_model().layers_to_shard()) == 0
    assert len(make_model(min_params_to_wrap=1000).layers_to_shard()) == 4
    assert len(make_model(checkpoint_activations=True).layers_to_shard()) == 4


# -- checkpoints of other versions --------------------------------------------------------------


def legacy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of fairseq's first releases."""
    old: dict[str, Tensor] = {}
    numbers = {
        "encoder": {"self_attn_layer_norm": 0, "final_layer_norm": 1},
        "decoder": {"self_attn_layer_norm": 0, "encoder_attn_layer_norm": 1, "final_layer_norm": 2},
    }
    for name, tensor in state.items():
        side, *rest = name.split(".")
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            old[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif "layer_norm" in name and rest[0] == "layers":
            number = numbers[side][rest[2]]
            old[f"{side}.layers.{rest[1]}.layer_norms.{number}.{rest[3]}"] = tensor
        elif name == "decoder.output_projection.weight":
            old["decoder.embed_out"] = tensor
        elif not any(x in name for x in ("k_proj", "v_proj")):
            old[name] = tensor
    old["encoder.embed_positions._float_tensor"] = torch.zeros(1)
    old["decoder.embed_positions.weights"] = torch.zeros(4, 4)
    return old


@pytest.mark.parametrize("share", [False, True])
def test_names_of_old_releases_load(share: bool) -> None:
    fields = {"share_decoder_input_output_embed": share}
    old, new = make_model(seed=1, **fields), make_model(seed=2, **fields)
    state = legacy(dict(old.state_dict()))
    if share:
        del state["decoder.embed_out"]
    new.load_weights(state)
    sample = make_sample([6, 4])["net_input"]
    assert torch.equal(new(**sample)[0], old(**sample)[0])


def test_files_from_before_the_final_norm_switch_it_off() -> None:
    fields = {"encoder_normalize_before": True, "decoder_normalize_before": True}
    model = make_model(**fields)
    state = dict(model.state_dict())
    state["encoder.version"], state["decoder.version"] = torch.ones(1), torch.tensor([2.0])
    model.load_weights(state)
    assert model.encoder.layer_norm is None
    assert model.decoder.layer_norm is None
    # What it saves says so, and loads the same way.
    again = make_model(**fields)
    again.load_weights(model.state_dict())
    sample = make_sample([5])["net_input"]
    assert torch.equal(again(**sample)[0], model(**sample)[0])


def test_layers_to_keep_picks_layers_of_a_deeper_checkpoint() -> None:
    deep = make_model(seed=5, encoder_layers=4)
    pruned = make_model(seed=6, encoder_layers=4, encoder_layers_to_keep=(1, 3))
    assert len(pruned.encoder.layers) == 2
    pruned.load_weights(deep.state_dict())
    for mine, theirs in ((0, 1), (1, 3)):
        a, b = pruned.encoder.layers[mine], deep.encoder.layers[theirs]
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    # A checkpoint of the pruned model is not pruned again.
    again = make_model(seed=7, encoder_layers=4, encoder_layers_to_keep=(1, 3))
    again.load_weights(pruned.state_dict())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder_layers": 3}, ["lacks encoder.layers.2", "more"]),
        ({"encoder_layers": 1}, ["unknown encoder.layers.1"]),
        ({"encoder_ffn_embed_dim": 40}, ["(32, 16)", "(40, 16)"]),
    ],
)
def test_weights_that_do_not_fit_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        make_model(**fields).load_weights(make_model().state_dict())
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
