"""Generation and evaluation with experts that are spread over ranks: the same as in one process."""

from __future__ import annotations

import re
from pathlib import Path

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


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_output_is_that_of_one_process(
    cases: dict[str, Case], alone: dict[str, str], world_size: int
) -> None:
    found = run_distributed(outputs, world_size, cases, timeout=250)
    for name, text in alone.items():
        assert found[0][name] == text, name
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
        run_distributed(serving_nobody, 2, case, timeout=30)
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


def validations(data: Path, folder: Path, ranks: int, *more: object) -> tuple[list[str], list[str]]:
    """Metrics and samples of the validations of a run, which trains on the same batches."""
    done = flite(
        "train", data, "--arch", "transformer_tiny", "--share-all-embeddings", *EVERYWHERE,
        *("--moe-expert-count", 4, "--encoder-embed-dim", 16, "--decoder-embed-dim", 16),
        *("--optimizer", "nag", "--lr", 0.2, "--max-update", 3, "--cpu", "--dropout", 0.1),
        *("--batch-size", 8 // ranks, "--required-batch-size-multiple", 1, "--no-save"),
        *("--batch-size-valid", 4, "--validate-interval-updates", 2, "--log-format", "simple"),
        *("--eval-bleu", "--eval-bleu-print-samples", "--eval-bleu-args"),
        *('{"beam": 3, "max_len_b": 20}', "--log-file", folder / f"{ranks}.log"),
        *("--distributed-world-size", ranks, "--lr", 0.0),
        *more,
    )  # fmt: skip
    assert done == 0
    lines = (folder / f"{ranks}.log").read_text("utf-8").splitlines()
    metrics = [line.split("subset | ")[1] for line in lines if "valid on 'valid' subset" in line]
    samples = [line.split(" | ")[-1] for line in lines if "example " in line]
    return [re.sub(r"wps [\d.e+]+|wpb .*? \||bsz .*? \|", "", m) for m in metrics], samples


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bleu_in_validation_is_that_of_one_process(
    data: Path, tmp_path: Path, ranks: int, backend: str
) -> None:
    one = validations(data, tmp_path, 1)
    several = validations(data, tmp_path, ranks, "--ddp-backend", backend)
    assert len(one[0]) == 2 and all("bleu" in line for line in one[0])
    assert several == one
    assert len(one[1]) > 10


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
