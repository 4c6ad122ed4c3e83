"""The transformer language model: names, shapes, initialisation and numbers of fairseq's."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.generation.incremental import TreeDecoder, can_cache
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.models.lm_config import TransformerLMConfig
from fairseq_lite.models.transformer import TransformerModel
from fairseq_lite.models.transformer_lm import TransformerLanguageModel
from tests.helpers.generation import PAD, Words
from tests.helpers.shared import shared_dir

SMALL: dict[str, Any] = {
    "decoder_embed_dim": 16,
    "decoder_input_dim": None,
    "decoder_output_dim": None,
    "decoder_ffn_embed_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_normalize_before": True,
    "dropout": 0.0,
}
SCALES = {f"scale_{x}": True for x in ("attn", "fc", "heads", "resids")}


def build(
    cfg: TransformerLMConfig, words: int = 40, *, targets: int | None = None, longest: int = 64
) -> TransformerLanguageModel:
    task = SimpleNamespace(
        source_dictionary=Words(words),
        target_dictionary=Words(words if targets is None else targets),
        max_positions=lambda: longest,
    )
    return TransformerLanguageModel.build(cfg, task)


def make(seed: int = 3, words: int = 40, **fields: Any) -> TransformerLanguageModel:
    """A small model; factors that start at one are moved away from it."""
    torch.manual_seed(seed)
    model = build(TransformerLMConfig(**{**SMALL, **fields}), words)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.3)
            elif "embed" not in name:
                p.mul_(2.0)
    return model.eval()


def preset(name: str, **fields: Any) -> TransformerLMConfig:
    entry = ARCHITECTURES.get(name)
    return TransformerLMConfig(**{**entry.preset_values(fields), **fields})


def tokens(batch: int, length: int, words: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, words, (batch, length), generator=generator)


# -- presets and derived fields -----------------------------------------------------------------

# Fields of features that are refused; `add_bos_token` belongs to the task.
NOT_OURS = {
    "adaptive_input", "adaptive_input_cutoff", "adaptive_input_factor", "adaptive_softmax_cutoff",
    "adaptive_softmax_dropout", "adaptive_softmax_factor", "add_bos_token", "base_sublayers",
    "model", "quant_noise_pq_block_size", "tie_adaptive_proj", "tie_adaptive_weights",
}  # fmt: skip


def test_presets_are_fairseqs() -> None:
    reference = json.loads(shared_dir("reference", "fairseq-architectures.json").read_text())
    ours = {n for n in ARCHITECTURES.names() if ARCHITECTURES.get(n).config is TransformerLMConfig}
    theirs = {n for n in reference if n.startswith("transformer_lm")}
    assert theirs == ours
    assert len(theirs) == 21
    for name in theirs:
        expected = reference[name]
        if expected.get("adaptive_input"):
            with pytest.raises(
                ConfigError, match=f"--arch {name}: .*use --arch transformer_lm_big"
            ):
                preset(name)
            continue
        got = dataclasses.asdict(preset(name).resolved())
        shared = expected.keys() & got.keys()
        assert {k: got[k] for k in shared} == {k: expected[k] for k in shared}, name
        assert expected.keys() - got.keys() <= NOT_OURS


def test_widths_of_a_named_architecture_follow_what_is_typed() -> None:
    cfg = preset("transformer_lm_gpt", decoder_embed_dim=384).resolved()
    assert (cfg.decoder_input_dim, cfg.decoder_output_dim, cfg.decoder_ffn_embed_dim) == (
        384,
        384,
        3072,
    )
    gpt3 = preset("transformer_lm_gpt3_small", decoder_embed_dim=96).resolved()
    assert (gpt3.decoder_input_dim, gpt3.decoder_output_dim, gpt3.decoder_ffn_embed_dim) == (
        96,
        96,
        384,
    )


def test_widths_of_transformer_lm_itself_are_fixed() -> None:
    with torch.device("meta"):
        model = build(preset("transformer_lm", decoder_embed_dim=256))
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert shapes["decoder.embed_tokens.weight"] == (40, 512)
    assert shapes["decoder.project_in_dim.weight"] == (256, 512)
    assert shapes["decoder.project_out_dim.weight"] == (512, 256)
    assert shapes["decoder.output_projection.weight"] == (40, 512)
    assert "decoder.layer_norm.weight" not in shapes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decoder_embed_dim": 100}, ["--decoder-embed-dim 100", "--decoder-attention-heads 8"]),
        ({"attention_dropout": -1.0}, ["--attention-dropout -1.0"]),
        ({"decoder_layers": 0}, ["--decoder-layers 0"]),
        ({"decoder_layers_to_keep": (-1,)}, ["--decoder-layers-to-keep -1"]),
        (
            {"share_decoder_input_output_embed": True, "decoder_output_dim": 256},
            ["--decoder-input-dim 512", "--decoder-output-dim 256"],
        ),
    ],
)
def test_contradictory_flags_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        TransformerLMConfig(**fields)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_an_adaptive_architecture_is_refused_on_the_command_line() -> None:
    typed = ["data", "--optimizer", "adam", "--arch", "transformer_lm_wiki103"]
    with pytest.raises(ConfigError, match="^--arch transformer_lm_wiki103: adaptive"):
        parse("flite-train", typed, load_builtins())


def test_a_model_for_the_wrong_task_is_refused() -> None:
    pair = SimpleNamespace(max_positions=lambda: (9, 9))
    for length in (None, 48):  # a checkpoint's configuration says how long
        cfg = TransformerLMConfig(max_target_positions=length)
        with pytest.raises(ConfigError, match="--task language_modeling"):
            TransformerLanguageModel.build(cfg, pair)  # type: ignore[arg-type]
    one = SimpleNamespace(source_dictionary=Words(9), target_dictionary=Words(9))
    one.max_positions = lambda: 9
    with pytest.raises(ConfigError, match="--task translation"):
        TransformerModel.build(ARCHITECTURES.get("transformer").config(), one)


# -- names and sizes ----------------------------------------------------------------------------


def test_names_come_in_fairseqs_order() -> None:
    fields = {**SMALL, "decoder_layers": 1, "decoder_input_dim": 12, "decoder_output_dim": 20}
    model = build(
        TransformerLMConfig(decoder_learned_pos=True, layernorm_embedding=True, **SCALES, **fields)
    )
    names = list(model.state_dict())
    assert names == [
        "decoder.version",
        "decoder.embed_tokens.weight",
        "decoder.project_in_dim.weight",
        "decoder.embed_positions.weight",
        *[f"decoder.layernorm_embedding.{x}" for x in ("weight", "bias")],
        "decoder.layers.0.c_attn",
        "decoder.layers.0.w_resid",
        *[
            f"decoder.layers.0.{part}.{x}"
            for part in (
                "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
                "attn_ln", "self_attn_layer_norm", "ffn_layernorm", "fc1", "fc2",
                "final_layer_norm",
            )
            for x in ("weight", "bias")
        ],
        *[f"decoder.layer_norm.{x}" for x in ("weight", "bias")],
        "decoder.project_out_dim.weight",
        "decoder.output_projection.weight",
    ]  # fmt: skip
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert shapes["decoder.layers.0.c_attn"] == (2,)
    assert shapes["decoder.layers.0.w_resid"] == (16,)
    assert shapes["decoder.layers.0.ffn_layernorm.weight"] == (24,)
    assert shapes["decoder.embed_positions.weight"] == (64 + 2, 16)


def test_a_shared_matrix_scores_every_input_symbol() -> None:
    shared = build(
        TransformerLMConfig(share_decoder_input_output_embed=True, **SMALL), 40, targets=24
    )
    assert shared(tokens(1, 3))[0].shape == (1, 3, 40)
    assert shared.output_weight is shared.decoder.embed_tokens.weight
    apart = build(TransformerLMConfig(**SMALL), 40, targets=24)
    assert apart(tokens(1, 3))[0].shape == (1, 3, 24)


# -- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["at once", "from the meta device"])
def test_initialisation(late: bool) -> None:
    fields = {
        **SMALL, **SCALES, "decoder_embed_dim": 256, "decoder_ffn_embed_dim": 512,
        "decoder_layers": 1, "decoder_learned_pos": True, "share_decoder_input_output_embed": True,
    }  # fmt: skip
    torch.manual_seed(1)
    with torch.device("meta" if late else "cpu"):
        model = build(TransformerLMConfig(**fields), 900)
    if late:
        torch.manual_seed(1)
        model.materialize("cpu")
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    layer: Any = model.decoder.layers[0]
    assert float(model.decoder.embed_tokens.weight[2:].detach().std()) == pytest.approx(
        256**-0.5, rel=0.03
    )
    assert not model.decoder.embed_tokens.weight[PAD].any()
    bound = math.sqrt(6 / 512) / math.sqrt(2)
    for part in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, part).weight
        assert 0.97 * bound < float(weight.detach().abs().max()) <= bound
    assert not layer.self_attn.out_proj.bias.any()
    for ones in (layer.c_attn, layer.w_resid, layer.attn_ln.weight, layer.ffn_layernorm.weight):
        assert bool(ones.eq(1).all())


# -- numbers ------------------------------------------------------------------------------------


def by_hand(layer: Any, x: Tensor) -> Tensor:
    """A pre-norm layer with all of NormFormer's additions, written out from fairseq's order."""
    length, heads = x.size(1), layer.c_attn.numel()

    def normed(part: Any, y: Tensor) -> Tensor:
        mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
        return (y - mean) / (var + 1e-5).sqrt() * part.weight + part.bias

    def projected(part: Any, y: Tensor) -> Tensor:
        return y @ part.weight.t() + part.bias

    y, out = normed(layer.self_attn_layer_norm, x), []
    q, k, v = (projected(getattr(layer.self_attn, f"{p}_proj"), y) for p in "qkv")
    for h in range(heads):
        part = slice(h * x.size(2) // heads, (h + 1) * x.size(2) // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(x.size(2) / heads)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v[..., part])
    mixed = projected(layer.self_attn.out_proj, torch.cat(out, dim=-1))
    mixed = mixed * layer.c_attn.repeat_interleave(x.size(2) // heads)
    x = x + normed(layer.attn_ln, mixed)
    inner = F.relu(projected(layer.fc1, normed(layer.final_layer_norm, x)))
    return layer.w_resid * x + projected(layer.fc2, normed(layer.ffn_layernorm, inner))


def test_normformers_additions_are_the_formula() -> None:
    model = make(**SCALES)
    x = model.decoder.embed(tokens(2, 7))
    for layer in model.decoder.layers:
        expected = by_hand(layer, x)
        x = layer(x, None, True)[0]
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SCALES))
def test_each_addition_is_used_and_trained(name: str) -> None:
    plain = make(seed=3)
    scaled = make(seed=3, **{name: True})
    added = scaled.state_dict().keys() - plain.state_dict().keys()
    assert added
    with torch.no_grad():  # alike but for what was added
        for key, value in plain.state_dict().items():
            scaled.state_dict()[key].copy_(value)
    x = tokens(2, 6)
    assert not torch.allclose(plain(x)[0], scaled(x)[0], atol=1e-3)
    scaled(x)[0].logsumexp(-1).sum().backward()
    grads = {n: p.grad for n, p in scaled.named_parameters()}
    assert all(grads[key] is not None and bool(grads[key].any()) for key in added)  # type: ignore[union-attr]


def test_factors_of_one_change_nothing() -> None:
    fields = {"scale_heads": True, "scale_resids": True}
    torch.manual_seed(0)
    scaled = build(TransformerLMConfig(**SMALL, **fields)).eval()
    plain = build(TransformerLMConfig(**SMALL)).eval()
    plain.load_state_dict(scaled.state_dict(), strict=False)
    assert torch.equal(plain(tokens(2, 6))[0], scaled(tokens(2, 6))[0])


VARIANTS: list[dict[str, Any]] = [
    {},
    SCALES,
    {"decoder_normalize_before": False},
    {"decoder_learned_pos": True, "layernorm_embedding": True},
    {"no_token_positional_embeddings": True, "no_scale_embedding": True, "activation_fn": "gelu"},
    {"decoder_input_dim": 12, "decoder_output_dim": 20, "no_decoder_final_norm": True},
    {"share_decoder_input_output_embed": True},
]
IDS = [",".join(v) or "default" for v in VARIANTS]


@pytest.mark.parametrize("fields", VARIANTS, ids=IDS)
def test_neither_padding_nor_company_nor_the_future_changes_a_token(fields: dict[str, Any]) -> None:
    model = make(**fields)
    batch = tokens(3, 9)
    lengths = [9, 6, 2]
    for row, n in zip(batch, lengths, strict=True):
        row[n:] = PAD
    together = model(batch, torch.tensor(lengths))[0]
    for i, n in enumerate(lengths):
        alone = model(batch[i : i + 1, :n])[0]
        torch.testing.assert_close(together[i, :n], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone[0, :1], model(batch[i : i + 1, :1])[0][0])


@pytest.mark.parametrize("fields", VARIANTS, ids=IDS)
def test_token_by_token_is_the_whole_prefix_at_once(fields: dict[str, Any]) -> None:
    model = make(**fields)
    assert can_cache(model)
    batch = tokens(2, 11)
    with torch.no_grad():
        tree = TreeDecoder(model.decoder, None, beam=1, max_len=11, sentences=2)
        steps = [tree.step(batch[:, i : i + 1], None) for i in range(11)]
        expected = model(batch)[0]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_features_and_output_layer_make_the_logits() -> None:
    model = make(decoder_output_dim=20)
    x = tokens(2, 5)
    features, _ = model(x, features_only=True)
    assert features.shape == (2, 5, 20)
    torch.testing.assert_close(model.output_layer(features), model(x)[0])
    probs = model.get_normalized_probs(model(x), log_probs=False)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5))


def test_bf16_autocast_keeps_states_narrow_and_numbers_close() -> None:
    model = make(**SCALES)
    x = tokens(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(x, features_only=True)[0]
    assert features.dtype == torch.bfloat16
    exact = model(x, features_only=True)[0]
    assert float((features.float() - exact).detach().norm() / exact.detach().norm()) < 0.05


# -- training-time options ----------------------------------------------------------------------


def gradients(model: TransformerLanguageModel, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.train()
    model.zero_grad()
    model(tokens(3, 7))[0].square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("option", ["checkpoint_activations", "offload_activations"])
def test_recomputed_activations_give_the_same_gradients(option: str) -> None:
    fields = {**SCALES, "dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.1}
    expected = gradients(make(**fields))
    got = gradients(make(**fields, **{option: True}))
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(grad, got[name]), name


def test_layerdrop_leaves_layers_out_in_training_only() -> None:
    model = make(decoder_layerdrop=0.5)
    seen = {
        frozenset(n.split(".")[2] for n in gradients(model, seed) if n.startswith("decoder.layers"))
        for seed in range(12)
    }
    assert len(seen) > 2
    assert torch.equal(model.eval()(tokens(1, 4))[0], make()(tokens(1, 4))[0])


def test_dropout_is_selected_by_fairseqs_names() -> None:
    model = make(dropout=0.5)
    assert torch.equal(model(tokens(1, 4))[0], model(tokens(1, 4))[0])
    model.retain_dropout(("TransformerDecoderLayerBase",))
    assert not torch.equal(model(tokens(1, 4))[0], model(tokens(1, 4))[0])


def test_small_layers_are_not_worth_sharding() -> None:
    assert len(make().layers_to_shard()) == 0
    assert len(make(min_params_to_wrap=1000).layers_to_shard()) == 2
    assert len(make(checkpoint_activations=True).layers_to_shard()) == 2


# -- checkpoints --------------------------------------------------------------------------------


def test_layers_to_keep_picks_layers_of_a_deeper_checkpoint() -> None:
    deep = make(seed=5, decoder_layers=4)
    pruned = make(seed=6, decoder_layers=4, decoder_layers_to_keep=(1, 3))
    assert len(pruned.decoder.layers) == 2
    pruned.load_weights(deep.state_dict())
    for mine, theirs in ((0, 1), (1, 3)):
        a, b = pruned.decoder.layers[mine], deep.decoder.layers[theirs]
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_files_from_before_the_final_norm_switch_it_off() -> None:
    model = make()
    state = {**model.state_dict(), "decoder.version": torch.tensor([2.0])}
    model.load_weights(state)
    assert model.decoder.layer_norm is None


def test_weights_of_another_shape_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"unknown decoder\.layers\.0\.attn_ln\.bias"):
        make().load_weights(make(scale_attn=True).state_dict())


def test_the_length_of_training_counts_before_the_tasks() -> None:
    cfg = TransformerLMConfig(decoder_learned_pos=True, max_target_positions=48, **SMALL)
    model = build(cfg, longest=16)
    assert model.max_positions() == 48
    assert model.state_dict()["decoder.embed_positions.weight"].shape == (50, 16)
    assert build(TransformerLMConfig(**SMALL), longest=16).max_positions() == 16
