"""Language models in checkpoints: what fairseq wrote is read, what we write fairseq can read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice, CommonConfig, DatasetConfig, RunConfig
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import open_dataset
from fairseq_lite.errors import CheckpointError
from fairseq_lite.models.api import ARCHITECTURES
from fairseq_lite.models.lm_config import TransformerLMConfig
from fairseq_lite.models.transformer_lm import TransformerLanguageModel
from fairseq_lite.tasks.language_modeling import LanguageModelingConfig
from fairseq_lite.tasks.multilingual_language_modeling import MultilingualLanguageModelingConfig
from fairseq_lite.training.checkpoint import convert, store
from tests.helpers.shared import shared_dir

BLOCKS = LanguageModelingConfig(data="lm/data-bin", tokens_per_sample=128)


@pytest.fixture(scope="module")
def reference() -> Path:
    return shared_dir("reference", "lm")


@pytest.fixture(scope="module")
def words(reference: Path) -> Dictionary:
    return Dictionary.load(reference / "data-bin" / "dict.txt")


def run_of(config: TransformerLMConfig, name: str = "transformer_lm_gpt2_tiny") -> RunConfig:
    return RunConfig(
        command="flite-train",
        common=CommonConfig(seed=7),
        dataset=DatasetConfig(batch_size=4),
        model=Choice(name, config),
        task=Choice("language_modeling", BLOCKS),
        criterion=Choice("cross_entropy"),
    )


def tiny(**fields: Any) -> TransformerLMConfig:
    return TransformerLMConfig(
        **{**ARCHITECTURES.get("transformer_lm_gpt2_tiny").overrides, **fields}
    )


def read(state: dict[str, Any], path: str = "x.pt") -> convert.SavedConfig:
    return convert.saved_config(state, path, load_builtins())


def build(cfg: TransformerLMConfig, words: Dictionary, longest: int) -> TransformerLanguageModel:
    task = SimpleNamespace(
        source_dictionary=words, target_dictionary=words, max_positions=lambda: longest
    )
    return TransformerLanguageModel.build(cfg, task)


# -- reading fairseq's ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["init.pt", "trained.pt"])
def test_reference_weights_fit_name_by_name(reference: Path, words: Dictionary, name: str) -> None:
    state = store.load(reference / name)
    saved = read(state)
    assert saved.model.name == "transformer_lm_gpt2_tiny"
    assert (saved.model.config.decoder_embed_dim, saved.model.config.activation_fn) == (64, "gelu")
    model = build(saved.model.config, words, longest=16)
    assert model.max_positions() == 128  # of training
    model.load_weights(state["model"])
    assert list(model.state_dict()) == list(state["model"])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][key]), key


def test_optimizer_state_belongs_to_our_parameters_in_order(
    reference: Path, words: Dictionary
) -> None:
    state = store.load(reference / "trained.pt")
    moments = state["last_optimizer_state"]["state"]
    shapes = [tuple(p.shape) for p in build(read(state).model.config, words, 1).parameters()]
    assert [tuple(moments[i]["exp_avg"].shape) for i in range(len(moments))] == shapes


def test_perplexity_of_the_reference(reference: Path, words: Dictionary) -> None:
    # fairseq's eval_lm: 8,045 tokens, 6.4679 bits each, in blocks of 128.
    state = store.load(reference / "trained.pt")
    model = build(read(state).model.config, words, 128).eval()
    model.load_weights(state["model"])
    split = open_dataset(reference / "data-bin" / "test")
    stream = torch.cat([torch.as_tensor(split[i]).long() for i in range(len(split))])
    source = torch.cat([torch.tensor([words.eos()]), stream[:-1]])
    bits = 0.0
    with torch.no_grad():
        for x, y in zip(source.split(128), stream.split(128), strict=True):
            bits += float(F.cross_entropy(model(x[None])[0][0], y, reduction="sum")) / math.log(2)
    assert len(stream) == 8045
    assert bits / len(stream) == pytest.approx(6.4679, abs=5e-5)


def test_flat_args_of_old_fairseq() -> None:
    """fairseq 0.10 and before: a flat namespace; older ones knew no final normalisation."""
    flat = {
        "arch": "transformer_lm_gpt", "task": "language_modeling", "tokens_per_sample": 96,
        "decoder_embed_dim": 48, "decoder_attention_heads": 4, "decoder_input_dim": 48,
        "decoder_output_dim": 48, "no_tie_adaptive_proj": True, "relu_dropout": 0.2,
    }  # fmt: skip
    config = read({"args": flat}).model.config
    assert (config.max_target_positions, config.no_decoder_final_norm) == (96, True)
    assert config.activation_dropout == 0.2
    assert not read(
        {"args": {**flat, "decoder_final_norm": True}}
    ).model.config.no_decoder_final_norm


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ("model", "adaptive_input", "--adaptive-input True: adaptive"),
        ("model", "character_embeddings", "--character-embeddings True: character"),
        ("model", "base_layers", "--base-layers True: BASE"),
        ("task", "future_target", "--future-target True: only the next"),
    ],
)
def test_features_that_are_not_built_are_named(section: str, field: str, message: str) -> None:
    cfg = convert.to_cfg(run_of(tiny()))
    cfg[section][field] = True
    with pytest.raises(CheckpointError, match=f"x.pt: was trained with {message}"):
        read({"cfg": cfg})


def test_flags_that_fairseq_lost_are_off() -> None:
    # fairseq 0.12 takes --scale-* and builds a plain model.
    state = {"cfg": convert.to_cfg(run_of(tiny(scale_attn=True, scale_heads=True)))}
    assert read(state).model.config.scale_attn
    lost = read({**state, "model": {"decoder.layers.0.c_attn": torch.ones(1)}}).model.config
    assert (lost.scale_attn, lost.scale_heads) == (False, True)


# -- writing ours --------------------------------------------------------------------------------


def test_cfg_is_that_of_a_real_one(reference: Path) -> None:
    real = store.load(reference / "init.pt")["cfg"]
    cfg = tiny(dropout=0.0, attention_dropout=0.0, share_decoder_input_output_embed=True)
    ours = convert.to_cfg(dataclasses.replace(run_of(cfg), dataset=DatasetConfig()))
    assert list(ours) == list(real)
    assert list(ours["model"]) == list(real["model"])
    assert ours["model"] == real["model"]
    assert ours["task"] == real["task"]


def test_what_is_written_is_read_again() -> None:
    config = tiny(
        decoder_input_dim=32, decoder_output_dim=48, scale_heads=True, decoder_learned_pos=True,
        decoder_layers=6, decoder_layers_to_keep=(0, 4), offload_activations=True,
        max_target_positions=200,
    )  # fmt: skip
    cfg = convert.to_cfg(run_of(config))
    assert cfg["model"]["max_target_positions"] == 200
    pruned = dataclasses.replace(config, decoder_layers=2, decoder_layers_to_keep=None)
    assert read({"cfg": cfg}).model.config == pruned.resolved()


@pytest.mark.parametrize(
    ("task", "longest"),
    [
        (BLOCKS, 128),
        (dataclasses.replace(BLOCKS, add_bos_token=True), 129),
        (dataclasses.replace(BLOCKS, add_bos_token=True, max_target_positions=64), 64),
        # Its symbols of languages are counted in the length of a block.
        (MultilingualLanguageModelingConfig(tokens_per_sample=128, add_bos_token=True), 128),
        (MultilingualLanguageModelingConfig(tokens_per_sample=128, max_source_positions=96), 96),
    ],
)
def test_the_longest_input_is_the_one_the_model_was_built_for(
    task: LanguageModelingConfig, longest: int, words: Dictionary
) -> None:
    run = dataclasses.replace(run_of(tiny()), task=Choice("language_modeling", task))
    config = read({"cfg": convert.to_cfg(run)}).model.config
    assert build(config, words, 1024).max_positions() == longest == task.longest_input()


def test_widths_that_follow_are_spelled_out() -> None:
    # fairseq takes no None for them.
    config = TransformerLMConfig(
        decoder_embed_dim=96, decoder_input_dim=None, decoder_ffn_embed_dim=None
    )
    model = convert.to_cfg(run_of(config))["model"]
    assert (model["decoder_input_dim"], model["decoder_output_dim"]) == (96, 512)
    assert (model["decoder_ffn_embed_dim"], model["max_target_positions"]) == (384, 128)


def test_fields_of_a_plugins_architecture_are_kept() -> None:
    @dataclasses.dataclass(frozen=True)
    class MyConfig(TransformerLMConfig):
        depth_scale: float = 0.5

    cfg = convert.to_cfg(run_of(MyConfig(), "my_lm"))
    assert cfg["model"]["depth_scale"] == 0.5
