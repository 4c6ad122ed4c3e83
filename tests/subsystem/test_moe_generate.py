"""Generation and evaluation with experts that are spread over ranks: the same as in one process."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from fairseq_lite import hub
from fairseq_lite.errors import ConfigError, DistributedError
from fairseq_lite.parallel.experts import expert_modules
from fairseq_lite.parallel.free import Rounds
from fairseq_lite.parallel.world import World
from fairseq_lite_cli import generate
from tests.helpers.commands import flite, left_running
from tests.helpers.distributed import run_distributed
from tests.helpers.evaluating import (
    SIZES,
    Case,
    language_model,
    outputs,
    pairs,
    random_lengths,
    translation_model,
)

pytestmark = pytest.mark.timeout(300)

EVERYWHERE = ("--moe-freq", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("data"), random_lengths(20, seed=5))


@pytest.fixture(scope="module")
def cases(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    work = tmp_path_factory.mktemp("models")
    models = {
        experts: translation_model(
            data, work / str(experts), *EVERYWHERE, "--moe-expert-count", experts, *more
        )
        for experts, more in ((2, ("--moe-top1-expert",)), (3, ()), (4, ()))
    }
    lm_data, lm = language_model(work, "--moe-freq", 1, "--moe-expert-count", 5)
    found: dict[str, Case] = {}
    few = ["--batch-size", "3", "--cpu"]
    for experts, model in models.items():
        words = [str(data), "--path", str(model), *few, "--max-len-b", "20"]
        found[f"beam, {experts}"] = ("generate", [*words, "--beam", "3"])
    words = [str(data), "--path", str(models[4]), *few, "--max-len-b", "20"]
    both = [str(data), "--path", f"{models[4]}:{models[2]}", *few, "--max-len-b", "20"]
    validate = [str(data), "--path", str(models[4]), *few]
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 20}']
    go_on = [
        *(str(lm_data), "--task", "language_modeling", "--path", str(lm), "--cpu", "--max-len-b"),
        *("20", "--sample-break-mode", "eos", "--batch-size", "4", "--prefix-size", "2"),
    ]
    return found | {
        "sampling": ("generate", [*words, "--sampling", "--beam", "2", "--seed", "7"]),
        "prefix": ("generate", [*words, "--prefix-size", "2", "--beam", "2"]),
        "reference": ("generate", [*words, "--score-reference"]),
        "alignment": ("generate", [*words, "--print-alignment", "--beam", "2"]),
        "one batch": ("generate", [*words, "--batch-size", "100", "--beam", "2"]),
        "ensemble": ("generate", [*both, "--beam", "2"]),
        "bf16": ("generate", [*words, "--bf16", "--beam", "2"]),
        "go on": ("generate", [*go_on, "--beam", "2"]),
        "words": ("eval_lm", [str(lm_data), "--path", str(lm), "--cpu", "--batch-size", "2",
                              "--output-word-probs"]),
        "validate": ("validate", validate),
        "validate bleu": ("validate", [*validate, *bleu, "--eval-bleu-print-samples"]),
        "validate bf16": ("validate", [*validate, *bleu, "--bf16"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, str]:
    (found,) = run_distributed(outputs, 1, cases)
    return found


# What two ranks do and four need not repeat: it is the search's affair, not that of the experts.
ON_TWO = ("prefix", "alignment", "ensemble", "bf16", "validate", "validate bf16")


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_output_is_that_of_one_process(
    cases: dict[str, Case], alone: dict[str, str], world_size: int
) -> None:
    here = {name: case for name, case in cases.items() if world_size == 2 or name not in ON_TWO}
    assert len(here) == len(cases) - (len(ON_TWO) if world_size == 4 else 0)
    found = run_distributed(outputs, world_size, here, timeout=250)
    for name in here:
        assert found[0][name] == alone[name], name
    hypotheses = [line for line in alone["beam, 4"].splitlines() if line[:2] == "H-"]
    assert len({len(line.split()) for line in hypotheses}) > 3


def held(world: World, words: list[str]) -> list[int]:
    """The experts that this rank has in memory while it translates."""
    found: list[int] = []
    make = generate.make_generator

    def looking(*args, **kwargs):  # type: ignore[no-untyped-def]
        generator, models = make(*args, **kwargs)
        found.extend(sorted({shard.expert for _, _, shard in expert_modules(models[0])}))
        return generator, models

    generate.make_generator = looking
    try:
        outputs(world, {"held": ("generate", [*words, "--quiet"])})
    finally:
        generate.make_generator = make
    return found


def test_a_rank_holds_its_own_experts(cases: dict[str, Case]) -> None:
    _, words = cases["beam, 3"]
    assert run_distributed(held, 2, words, timeout=200) == [[0], [1, 2]]


def serving_nobody(world: World, cases: dict[str, Case]) -> dict[str, str]:
    if world.rank == 1:
        Rounds.serve = lambda self: None  # type: ignore[method-assign]
    return outputs(world, cases)


def test_a_rank_that_does_not_serve_is_noticed(cases: dict[str, Case]) -> None:
    case = {"one batch": cases["one batch"]}
    with pytest.raises(DistributedError):
        run_distributed(serving_nobody, 2, case, timeout=15)
    assert left_running() == []


def test_dropout_of_experts_elsewhere_is_refused(cases: dict[str, Case]) -> None:
    command, words = cases["prefix"]
    case = {"dropout": (command, [*words, "--retain-dropout"])}
    with pytest.raises(ConfigError, match="--retain-dropout with experts on several processes"):
        run_distributed(outputs, 2, case, timeout=200)


# -- results do not depend on batches --------------------------------------------------------------


def scores(text: str) -> dict[str, tuple[float, str]]:
    """Sentence -> score and output."""
    found = {}
    for line in text.splitlines():
        if line[:2] == "H-":
            name, score, output = line.split("\t")
            found[name] = (float(score), output)
    return found


@pytest.mark.parametrize("name", ["beam, 2", "beam, 4", "reference", "go on"])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_no_score_depends_on_its_batch(
    cases: dict[str, Case], alone: dict[str, str], name: str, size: int
) -> None:
    command, words = cases[name]
    (other,) = run_distributed(outputs, 1, {name: (command, [*words, "--batch-size", str(size)])})
    found, expected = scores(other[name]), scores(alone[name])
    assert found.keys() == expected.keys()
    for sentence, (score, output) in expected.items():
        assert found[sentence][1] == output
        assert found[sentence][0] == pytest.approx(score, abs=1e-5)


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:loss|ppl|bleu) ([\d.]+)", text)]


@pytest.mark.parametrize("more", [["--batch-size", "1"], ["--required-seq-len-multiple", "16"]])
def test_no_loss_depends_on_batches_and_padding(
    cases: dict[str, Case], alone: dict[str, str], more: list[str]
) -> None:
    command, words = cases["validate bleu"]
    (other,) = run_distributed(outputs, 1, {"validate": (command, [*words, *more])})
    expected = losses(alone["validate bleu"])
    assert len(expected) >= 3
    assert losses(other["validate"]) == pytest.approx(expected, rel=1e-5)


def test_a_capacity_of_the_batch_is_noticed(cases: dict[str, Case], alone: dict[str, str]) -> None:
    command, words = cases["reference"]
    limited = ["--model-overrides", '{"moe_eval_capacity_token_fraction": 0.3}']
    cases = {size: (command, [*words, *limited, "--batch-size", size]) for size in ("1", "100")}
    (found,) = run_distributed(outputs, 1, cases)
    assert scores(found["1"]) != scores(found["100"])


# -- validation in training ------------------------------------------------------------------------


def validations(model: Path, data: Path, log: Path, ranks: int, *more: object) -> list[Validation]:
    """What the validations of a run say that goes on from a model that tells sentences apart."""
    done = flite(
        "train", data, "--restore-file", model, "--reset-optimizer", "--reset-dataloader",
        *("--reset-lr-scheduler", "--reset-meters", "--arch", "transformer_tiny", *SIZES),
        *(*EVERYWHERE, "--moe-expert-count", 4, "--moe-second-expert-policy", "all"),
        *("--dropout", 0, "--optimizer", "nag", "--lr", 0.05, "--clip-norm", 1, "--cpu"),
        *("--batch-size", 8, "--update-freq", 4 // ranks, "--max-update", 3, "--no-save"),
        *("--batch-size-valid", 4, "--validate-interval-updates", 2, "--log-format", "simple"),
        *("--eval-bleu", "--eval-bleu-print-samples", "--eval-bleu-args"),
        *('{"beam": 3, "max_len_b": 20}', "--distributed-world-size", ranks, "--log-file", log),
        *more,
    )  # fmt: skip
    assert done == 0
    found, samples = [], []
    for line in log.read_text("utf-8").splitlines():
        if "example " in line:
            samples.append(line.split(" | ")[-1])
        elif "valid on 'valid' subset" in line:
            pairs = [text.split() for text in line.split("subset | ")[1].split(" | ")]
            metrics = {name: float(value) for name, value in pairs if name in METRICS}
            found.append(Validation(metrics, samples))
            samples = []
    return found


class Validation(NamedTuple):
    """Metrics, and a sample of each batch: the output and what it should be."""

    metrics: dict[str, float]
    samples: list[str]

    @property
    def lengths(self) -> list[int]:
        """Of outputs, by batch."""
        return [len(line.split()) for line in self.samples if "hypothesis" in line]


METRICS = ("loss", "ppl", "bleu", "num_updates")
ROUNDING = {"loss": 2e-3, "ppl": 2e-2, "bleu": 2e-2, "num_updates": 0.0}


@pytest.fixture(scope="module")
def one_validated(
    cases: dict[str, Case], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Validation]:
    log = tmp_path_factory.mktemp("validated") / "1.log"
    return validations(Path(cases["beam, 4"][1][2]), data, log, 1)


@pytest.mark.parametrize(
    "backend",
    [
        "legacy_ddp",
        "fully_sharded",
        pytest.param(
            "deepspeed_moe",
            marks=pytest.mark.skipif(
                find_spec("deepspeed") is None, reason="deepspeed is not installed"
            ),
        ),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bleu_in_validation_is_that_of_one_process(
    cases: dict[str, Case],
    data: Path,
    one_validated: list[Validation],
    tmp_path: Path,
    ranks: int,
    backend: str,
) -> None:
    """Of weights that training changes, for outputs that take ranks different numbers of steps."""
    model = Path(cases["beam, 4"][1][2])
    several = validations(model, data, tmp_path / "log", ranks, "--ddp-backend", backend)
    first, second = one_validated
    assert first.metrics.keys() == set(METRICS)
    assert abs(first.metrics["loss"] - second.metrics["loss"]) > 10 * ROUNDING["loss"]
    assert first.samples != second.samples
    assert len({sum(first.lengths[rank::ranks]) for rank in range(ranks)}) == ranks
    for one, other in zip(one_validated, several, strict=True):
        assert other.samples == one.samples
        for name, value in one.metrics.items():
            assert other.metrics[name] == pytest.approx(value, abs=ROUNDING[name]), name


# -- one process -----------------------------------------------------------------------------------


def test_the_hub_takes_models_with_experts(cases: dict[str, Case], alone: dict[str, str]) -> None:
    _, words = cases["beam, 4"]
    translator = hub.load(words[2], device="cpu")
    assert isinstance(translator, hub.Translator)
    (source,) = re.findall(r"^S-3\t(.*)$", alone["beam, 4"], re.M)
    (expected,) = re.findall(r"^D-3\t[^\t]*\t(.*)$", alone["beam, 4"], re.M)
    assert translator.translate(source, beam=3, max_len_b=20) == expected
    _, words = cases["words"]
    model = hub.load(words[2], device="cpu")
    assert isinstance(model, hub.LanguageModel)
    assert model.score("w1 w2 w3").perplexity > 1
    assert model.sample("w1 w2", max_len_b=6).startswith("w1 w2")


@pytest.mark.parametrize("command", ["generate", "validate"])
def test_is_moe_is_accepted(cases: dict[str, Case], alone: dict[str, str], command: str) -> None:
    name = {"generate": "beam, 4", "validate": "validate"}[command]
    (found,) = run_distributed(outputs, 1, {name: (command, [*cases[name][1], "--is-moe"])})
    assert found[name] == alone[name]
