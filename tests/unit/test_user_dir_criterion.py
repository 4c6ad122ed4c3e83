"""model_and_base: weights by name, every loss logged, the base comparable with a dense run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.errors import ConfigError
from tests.helpers.user_dir import part, train_config

PAD = 1
BASE = "label_smoothed_cross_entropy"


class Model(nn.Module):
    """Scores every position alike, and offers two losses."""

    output_weight = None

    def __init__(self, words: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.linspace(-1, 1, words))
        self.runs = 0

    def forward(self, src_tokens, prev_output_tokens):
        self.runs += 1
        out = self.scores.expand(*prev_output_tokens.shape, -1)
        return out, {"one": self.scores.sum() * 2.0, "two": self.scores.square().sum()}

    def get_targets(self, sample, net_output):
        return sample["target"]

    def get_losses(self, net_output):
        return {name: net_output[1][name] for name in ("one", "two")}


@pytest.fixture
def task():
    symbols = Dictionary()
    for letter in "abcdef":
        symbols.add_symbol(letter)
    return SimpleNamespace(target_dictionary=symbols)


@pytest.fixture
def model(task):
    return Model(len(task.target_dictionary))


SAMPLE = {
    "net_input": {
        "src_tokens": torch.tensor([[4, 5, 2]] * 2),
        "prev_output_tokens": torch.tensor([[2, 4, 5], [2, 6, PAD]]),
    },
    "target": torch.tensor([[4, 5, 2], [6, 2, PAD]]),
    "ntokens": 5,
}


def make(task, base=BASE, config=None, weights=None, sentence_avg=False):
    made = part("criterion")
    cfg = made.ModelAndBaseConfig(
        base_criterion=base,
        base_criterion_config={"label_smoothing": 0.1} if config is None else config,
        loss_weights=weights or {},
    )
    return made.ModelAndBaseCriterion(cfg, task, sentence_avg=sentence_avg)


def base_alone(task, model, sentence_avg=False):
    entry = load_builtins()["criterion"].get(BASE)
    criterion = entry.factory(entry.config(label_smoothing=0.1), task, sentence_avg=sentence_avg)
    return criterion, criterion(model, SAMPLE)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, (1, 1, 1)),
        ({"base_crit": 2}, (2, 1, 1)),
        ({BASE: 2}, (2, 1, 1)),
        ({"LabelSmoothedCrossEntropyCriterion": 3}, (3, 1, 1)),
        ({"base_crit": 1, "one": 10}, (1, 10, 1)),
        ({"one": None}, (1, 0, 1)),
        ({"one": None, "two": 0.5}, (1, 0, 0.5)),
        ({"base_crit": None}, (0, 1, 1)),
        ({"two": 0}, (1, 1, 0)),
        ({"two": -1}, (1, 1, -1)),
    ],
)
def test_the_loss_is_the_weighted_sum(task, model, weights, expected):
    _, (base, size, _) = base_alone(task, model)
    offered = [model.scores.sum() * 2.0, model.scores.square().sum()]
    wanted = sum(w * loss for w, loss in zip(expected, [base, *offered], strict=True))
    loss, sample_size, sums = make(task, weights=weights)(model, SAMPLE)
    assert sample_size == size
    torch.testing.assert_close(loss, wanted)
    grads = [torch.autograd.grad(each, model.scores)[0] for each in (loss, wanted)]
    torch.testing.assert_close(*grads)
    for name, value in zip(("one", "two"), offered, strict=True):  # logged whatever they weigh
        assert float(sums[f"loss_{name}"]) == pytest.approx(float(value.detach()))


def test_the_model_runs_once(task, model):
    make(task)(model, SAMPLE)
    assert model.runs == 1
    assert not model._forward_hooks


def test_a_wrong_weight_is_noticed(task, model):
    right = make(task, weights={"one": 10})(model, SAMPLE)[0]
    wrong = make(task, weights={"one": 10, "two": 0})(model, SAMPLE)[0]
    assert float(right.detach()) != pytest.approx(float(wrong.detach()))


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_what_the_base_shows_is_what_it_shows_alone(task, model, sentence_avg):
    alone, (_, size, base_sums) = base_alone(task, model, sentence_avg)
    criterion = make(task, weights={"one": 10}, sentence_avg=sentence_avg)
    _, sample_size, sums = criterion(model, SAMPLE)
    assert sample_size == size == (2 if sentence_avg else 5)
    theirs = alone.metrics({name: float(value) for name, value in base_sums.items()})
    shown = criterion.metrics({name: float(value) for name, value in sums.items()})
    assert shown[f"loss_{BASE}"] == theirs["loss"]
    for name in ("nll_loss", "ppl"):
        assert shown[name] == theirs[name]
    added = 10 * float(sums["loss_one"]) + float(sums["loss_two"])
    assert shown["loss"] == pytest.approx(theirs["loss"] + added / size / math.log(2))
    assert shown["loss_one"] == pytest.approx(float(model.scores.detach().sum() * 2))


def test_in_evaluation_the_loss_is_the_bases(task, model):
    criterion = make(task, weights={"base_crit": 2, "one": 10}).eval()
    _, (base, _, _) = base_alone(task, model)
    loss, _, sums = criterion(model, SAMPLE)
    torch.testing.assert_close(loss, 2 * base)
    assert "loss_one" in sums


def test_model_losses_are_means_over_batches(task, model):
    criterion = make(task)
    _, _, sums = criterion(model, SAMPLE)
    twice = {name: 2 * float(value) for name, value in sums.items()}
    assert criterion.metrics(twice)["loss_two"] == pytest.approx(float(sums["loss_two"]))


@pytest.mark.parametrize("weights", [{"gate": 1}, {"ones": None}])
def test_an_unknown_loss_is_an_error(task, model, weights):
    with pytest.raises(
        ConfigError, match=r"has no such loss; expected base_crit, label_.*one, two"
    ):
        make(task, weights=weights)(model, SAMPLE)


def test_leaving_out_every_loss_is_an_error(task, model):
    with pytest.raises(ConfigError, match="leaves out every loss"):
        make(task, weights={"base_crit": None, "one": None, "two": None})(model, SAMPLE)


MOE = ["--arch", "transformer_ds_moe_tiny", "--criterion", "model_and_base"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--base-criterion", "cross_entrophy"], "did you mean cross_entropy"),
        (["--base-criterion", "model_and_base"], "expected another criterion"),
        (["--base-criterion-config", '{"smoothing": 1}'], "unknown field 'smoothing'"),
        (["--base-criterion-config", '{"sentence_avg": true}'], "type --sentence-avg"),
        (["--base-criterion-config", "{label"], "--base-criterion-config"),
        (
            [
                *["--base-criterion", "label_smoothed_cross_entropy"],
                *["--base-criterion-config", '{"label_smoothing": 5}'],
            ],
            "--base-criterion-config: --label-smoothing 5.0",
        ),
        (["--base-criterion", "moe_cross_entropy"], "type --base-criterion cross_entropy, or"),
        (["--loss-weights", '{"base_crit": "1"}'], "expected a number, or null"),
        (["--loss-weights", '{"base_crit": NaN}'], "expected a number, or null"),
        (["--loss-weights", '{"base_crit": 1, "cross_entropy": 1}'], "are the same loss"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words):
    with pytest.raises(ConfigError) as refused:
        train_config(*MOE, *flags)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_base_may_balance_the_experts_in_place_of_the_models_loss():
    flags = ["--base-criterion", "moe_cross_entropy"]
    train_config(*MOE, *flags, "--loss-weights", '{"experts_gate_loss": null}')


def test_a_name_the_architecture_does_not_offer_is_refused_before_any_process():
    from fairseq_lite.training.assembly import check

    right = ["--loss-weights", '{"base_crit": 1, "experts_gate_loss": 10}']
    check(train_config(*MOE, *right))
    with pytest.raises(ConfigError, match=r"expert_gate_loss.*did you mean experts_gate_loss"):
        check(train_config(*MOE, "--loss-weights", '{"expert_gate_loss": 10}'))


def test_a_dense_model_needs_the_bases_loss():
    from fairseq_lite.training.assembly import check

    alone = ["--loss-weights", '{"base_crit": null}']
    with pytest.raises(ConfigError, match="a model without experts has no other"):
        check(train_config(*MOE, *alone, "--deepspeed_moe", ""))
    experts = ["--deepspeed_moe", "enc", "--num-experts", "2", "--moe-layer", "native"]
    check(train_config(*MOE, *alone, *experts))


@pytest.mark.parametrize("text", ["", "{}", '{"experts_gate_loss": null}'])
def test_weights_may_be_empty_or_null(text):
    config = train_config(*MOE, "--loss-weights", text).criterion.config
    assert config.loss_weights == ({"experts_gate_loss": None} if "null" in text else {})


def transformer(task, **more):
    """A small Transformer of the other family, or a dense one."""
    from fairseq_lite.models.transformer import TransformerConfig, TransformerModel

    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    sizes |= {"encoder_embed_dim": 8, "encoder_ffn_embed_dim": 8, "encoder_attention_heads": 2}
    cfg = TransformerConfig(**sizes, decoder_attention_heads=2, dropout=0.0, **more)
    whole = SimpleNamespace(
        source_dictionary=task.target_dictionary,
        target_dictionary=task.target_dictionary,
        max_positions=lambda: (9, 9),
    )
    return TransformerModel.build(cfg, whole)


def test_any_model_with_experts_offers_their_gate_loss(task):
    experts = {"moe_expert_count": 4, "moe_second_expert_policy": "all"}
    model = transformer(task, moe_freq=2, **experts)
    sample = {**SAMPLE, "net_input": {**SAMPLE["net_input"], "src_lengths": None}}
    loss, _, sums = make(task, weights={"experts_gate_loss": 10})(model, sample)
    base = make(task, weights={"experts_gate_loss": None})(model, sample)[0]
    added = 10 * float(sums["loss_experts_gate_loss"])
    assert added > 10
    assert float((loss - base).detach()) == pytest.approx(added, rel=1e-3)
    make(task, weights={"experts_gate_loss": 10}).check(model)


def test_a_dense_model_offers_none(task):
    model = transformer(task)
    make(task).check(model)
    with pytest.raises(ConfigError, match="experts_gate_loss: TransformerModel has no such loss"):
        make(task, weights={"experts_gate_loss": 10}).check(model)
