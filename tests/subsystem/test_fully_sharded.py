"""`--ddp-backend fully_sharded`: any number of ranks trains as one process, and bugs are noticed.

Processes take longer to start than to train, so each number of ranks is started once and goes
through all its cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from fairseq_lite.parallel.fully_sharded import torch_engine as fully_sharded
from fairseq_lite.parallel.fully_sharded.torch_engine import TorchSharded
from fairseq_lite.parallel.local import local, norm_of
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import BatchLimits
from fairseq_lite.training.trainer import Trainer
from fairseq_lite.training.validation import Validator
from tests.helpers.commands import flite
from tests.helpers.distributed import run_distributed
from tests.helpers.parity import Outcome, assert_alike, train
from tests.helpers.toy import ADAM, write_text

pytestmark = pytest.mark.timeout(300)

# Widths that no number of ranks divides; embeddings that are shared by both sides and the output.
TRANSLATION = [
    *("--arch", "transformer_tiny", "--share-all-embeddings", "--dropout", "0"),
    *("--encoder-embed-dim", "18", "--encoder-ffn-embed-dim", "30", "--encoder-layers", "2"),
    *("--decoder-embed-dim", "18", "--decoder-ffn-embed-dim", "30", "--decoder-layers", "2"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--clip-norm", "1.0", "--store-ema", "--ema-decay", "0.9"),
]
LANGUAGE_MODEL = [
    *("--task", "language_modeling", "--arch", "transformer_lm", "--dropout", "0"),
    *("--decoder-embed-dim", "18", "--decoder-ffn-embed-dim", "30", "--decoder-layers", "2"),
    *("--decoder-attention-heads", "2", "--share-decoder-input-output-embed"),
    *("--tokens-per-sample", "12", "--batch-size", "2", "--clip-norm", "1.0"),
]
NAG = ["--optimizer", "nag", "--lr", "0.05"]
BY_LAYER = ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0"]
AT_ONCE = ["--ddp-backend", "fully_sharded"]
SAVING_MEMORY = ["--cpu-offload", "--checkpoint-activations", "--offload-activations"]
FP16 = ["--fp16", "--fp16-init-scale", "4"]
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_a": 1, "max_len_b": 4}']
LAYERDROP = ["--decoder-layerdrop", "0.5", "--dropout", "0.1"]

ELEMENTWISE = {
    "sgd": ["--optimizer", "sgd", "--momentum", "0.9", "--weight-decay", "0.1", "--lr", "0.1"],
    "adagrad": ["--optimizer", "adagrad", "--lr", "0.001"],
    "adadelta": ["--optimizer", "adadelta", "--lr", "0.1"],
    "adamax": ["--optimizer", "adamax", "--lr", "0.001"],
    "cpu_adam": ["--optimizer", "cpu_adam", "--lr", "0.001", "--adam-betas", "0.9,0.98"],
}

Cases = dict[str, tuple[list[str], int]]

# Name -> the flags, and how many updates. What begins with "lm" is of the language model.
REFERENCES: Cases = {
    "adam": ([*TRANSLATION, *ADAM], 5),
    "nag": ([*TRANSLATION, *NAG], 5),
    "short": ([*TRANSLATION, *ADAM], 4),
    "bf16": ([*TRANSLATION, *ADAM, "--bf16"], 4),
    "fp16": ([*TRANSLATION, *ADAM, *FP16], 4),
    "overflow": ([*TRANSLATION, *ADAM, "--fp16", "--fp16-init-scale", str(2**22)], 14),
    "bleu": ([*TRANSLATION, *ADAM, *BLEU], 4),
    "lm": ([*LANGUAGE_MODEL, *ADAM], 5),
    **{name: ([*TRANSLATION, *flags], 2) for name, flags in ELEMENTWISE.items()},
}


def like(name: str, *more: str) -> tuple[list[str], int]:
    """A reference with more flags."""
    flags, updates = REFERENCES[name]
    return [*flags, *more], updates


# The first word names the reference.
ON_TWO: Cases = {
    "adam on legacy_ddp": like("adam"),
    "adam": like("adam", *BY_LAYER),
    "nag": like("nag", *BY_LAYER),
    "short at once": like("short", *AT_ONCE),
    "short kept": like("short", *BY_LAYER, "--no-reshard-after-forward"),
    "short saving": like("short", *BY_LAYER, *SAVING_MEMORY),
    "layerdrop on legacy_ddp": like("short", *LAYERDROP),
    "layerdrop": like("short", *LAYERDROP, *BY_LAYER),
    "bf16": like("bf16", *BY_LAYER),
    "bf16 wide": like("bf16", *AT_ONCE, "--fp32-reduce-scatter"),
    "fp16": like("fp16", *BY_LAYER, *SAVING_MEMORY),
    "overflow": like("overflow", *BY_LAYER),
    "bleu": like("bleu", *BY_LAYER),
    "lm": like("lm", *BY_LAYER),
    **{name: like(name, *BY_LAYER) for name in ELEMENTWISE},
}
ON_FOUR: Cases = {"adam": like("adam", *BY_LAYER), "lm": like("lm", *AT_ONCE)}


# -- engines with one fault each --------------------------------------------------------------


class Undivided(TorchSharded):
    """Takes the mean over ranks for the sum."""

    def reduce_gradients(self, model: nn.Module) -> None:
        super().reduce_gradients(model)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(self.world.size)


class LocalNorm(TorchSharded):
    """Takes the norm of this rank's parts for that of all."""

    def grad_norm(self, model: nn.Module) -> Tensor:
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        return norm_of(grads, self.world.device)


class Untied(TorchSharded):
    """Loses that the output projection is the embedding."""

    def wrap(self, build: Callable[[], Any]) -> Any:
        def without_tie() -> Any:
            model = build()
            projection = model.decoder.output_projection
            projection.weight = nn.Parameter(projection.weight.detach().clone())
            return model

        return super().wrap(without_tie)


class OnlyTheLast(TorchSharded):
    """Forgets the gradients of all batches of an update but the last."""

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        for p in model.parameters():
            p.grad = None
        super().backward(model, loss)


BUGS = (Undivided, LocalNorm, Untied, OnlyTheLast)


# -- the runs ---------------------------------------------------------------------------------


@dataclass
class Held:
    """Numbers that a rank holds between updates."""

    parameters: int
    optimizer: int
    average: int


def held(trainer: Trainer) -> Held:
    params = list(trainer.model.parameters())
    average = [] if trainer.average is None else list(trainer.average.weights.values())
    states = [t for s in trainer.optimizer.state.values() for t in s.values()]
    return Held(
        sum(local(p).numel() for p in params),
        sum(t.numel() for t in states if isinstance(t, Tensor)),
        sum(local(t).numel() for t in average),
    )


def validated(trainer: Trainer) -> tuple[dict[str, float], float]:
    """What validation finds, each rank on sentences of its own, and the loss of an update after."""
    world, task = trainer.world, trainer.task
    task.load_dataset("valid")
    limits = BatchLimits(max_sentences=4, required_multiple=1)
    data = task.batch_iterator("valid", limits, seed=1, world_size=world.size, rank=world.rank)
    validator = Validator(
        world=world,
        task=task,
        model=trainer.model,
        criterion=trainer.criterion,
        precision=trainer.precision,
        backend=trainer.backend,
    )
    progress: Any = SimpleNamespace(advance=lambda: None)
    batches = data.next_epoch_itr(shuffle=False)
    meters = validator.run("valid", batches, data.first_batch(), progress)
    after = trainer.train_step([trainer.dummy_batch])
    assert after is not None
    values = {k: v for k, v in meters.values().items() if k in ("loss", "nll_loss", "ppl", "bleu")}
    return values, after.sums["loss"] / after.sums["sample_size"]


def train_cases(
    world: World, data: Path, lm_data: Path, cases: Cases, bugs: bool
) -> dict[str, Outcome]:
    try:
        found = {
            name: train(
                world,
                lm_data if name.startswith("lm") else data,
                flags,
                updates,
                validated if name == "bleu" else held,
            )
            for name, (flags, updates) in cases.items()
        }
        for bug in BUGS if bugs else ():
            fully_sharded.TorchSharded = bug  # type: ignore[misc]
            found[bug.__name__] = train(world, data, *like("short", *BY_LAYER))
        return found
    finally:
        fully_sharded.TorchSharded = TorchSharded  # type: ignore[misc]
        if world.size == 1:
            world.close()


def train_on(size: int, data: Path, lm_data: Path, cases: Cases, bugs: bool = False) -> Any:
    return run_distributed(train_cases, size, data, lm_data, cases, bugs, timeout=280)


@pytest.fixture(scope="module")
def lm_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    text = write_text(folder / "text", {"train": 200})
    words = ["--only-source", "--trainpref", text / "train.src", "--destdir", folder / "data-bin"]
    assert flite("preprocess", *words) == 0
    return folder / "data-bin"


@pytest.fixture(scope="module")
def alone(toy_data: Path, lm_data: Path) -> dict[str, Outcome]:
    """By case: what one process does, without sharding."""
    outcomes: dict[str, Outcome] = train_on(1, toy_data, lm_data, REFERENCES)[0]
    return outcomes


@pytest.fixture(scope="module")
def on_two(toy_data: Path, lm_data: Path) -> list[dict[str, Outcome]]:
    """By rank, then by case."""
    outcomes: list[dict[str, Outcome]] = train_on(2, toy_data, lm_data, ON_TWO, bugs=True)
    return outcomes


@pytest.fixture(scope="module")
def on_four(toy_data: Path, lm_data: Path) -> list[dict[str, Outcome]]:
    """By rank, then by case."""
    outcomes: list[dict[str, Outcome]] = train_on(4, toy_data, lm_data, ON_FOUR)
    return outcomes


# -- what must hold ---------------------------------------------------------------------------


def of(name: str, ranks: list[dict[str, Outcome]]) -> list[Outcome]:
    return [by_case[name] for by_case in ranks]


def test_one_sharded_process_trains_as_one_that_is_not(
    alone: dict[str, Outcome], toy_data: Path, lm_data: Path
) -> None:
    cases = {"adam": like("adam", *BY_LAYER), "lm": like("lm", *BY_LAYER, "--cpu-offload")}
    for name, outcome in train_on(1, toy_data, lm_data, cases)[0].items():
        assert_alike(alone[name], [outcome])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "name",
    [
        "adam on legacy_ddp",
        *("adam", "nag", "short at once", "short kept", "short saving", "lm", *ELEMENTWISE),
    ],
)
def test_two_ranks_train_as_one_process(
    name: str, alone: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    assert_alike(alone[name.split()[0]], of(name, on_two))


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_train_as_one_process(
    name: str, alone: dict[str, Outcome], on_four: list[dict[str, Outcome]]
) -> None:
    assert_alike(alone[name], of(name, on_four))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_noticed(
    bug: type[TorchSharded], alone: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    with pytest.raises(AssertionError):
        assert_alike(alone["short"], of(bug.__name__, on_two))


def test_without_adam_the_noisy_biases_agree_too(
    alone: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    assert_alike(alone["nag"], of("nag", on_two), without=())


def test_ranks_drop_the_same_layers(on_two: list[dict[str, Outcome]]) -> None:
    with_all, dropping = on_two[0]["short at once"], on_two[0]["layerdrop"]
    assert dropping.losses != pytest.approx(with_all.losses, rel=1e-3)
    assert_alike(on_two[0]["layerdrop on legacy_ddp"], of("layerdrop", on_two))


@pytest.mark.parametrize(("name", "close"), [("bf16", 1e-2), ("bf16 wide", 1e-2), ("fp16", 2e-3)])
def test_in_16_bits(
    name: str, close: float, alone: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    reference, outcomes = alone[name.split()[0]], of(name, on_two)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(reference.losses, rel=close)
        assert outcome.norms == pytest.approx(reference.norms, rel=2 * close)
        assert outcome.norms == outcomes[0].norms
    assert outcomes[0].losses != pytest.approx(alone["short"].losses, rel=1e-6)
    assert {w.dtype for w in outcomes[0].weights.values()} == {torch.float32}


def test_an_overflow_is_everybodys(
    alone: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    first, second = of("overflow", on_two)
    assert first.scales == second.scales
    skipped = sum(a == 2 * b for a, b in itertools.pairwise([2.0**22, *first.scales]))
    assert skipped > 5 and len(first.losses) == len(second.losses) == 14 - skipped
    assert first.losses and first.losses == second.losses


def test_validation_by_generation(
    alone: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    values, loss_after = alone["bleu"].extra
    assert values.keys() == {"loss", "nll_loss", "ppl", "bleu"}
    for outcome in of("bleu", on_two):
        assert outcome.extra[0] == pytest.approx(values, rel=1e-5)
        assert outcome.extra[1] == pytest.approx(loss_after, rel=1e-5)


def test_a_rank_holds_its_part(
    on_two: list[dict[str, Outcome]], on_four: list[dict[str, Outcome]], alone: dict[str, Outcome]
) -> None:
    whole: Held = alone["adam"].extra
    for ranks in (on_two, on_four):
        parts: list[Held] = [outcome.extra for outcome in of("adam", ranks)]
        assert sum(part.parameters for part in parts) == whole.parameters
        assert sum(part.optimizer for part in parts) == whole.optimizer
        assert max(p.parameters for p in parts) < 1.15 * whole.parameters / len(ranks)
        assert all(p.optimizer == 2 * p.parameters for p in parts)
        assert max(p.average for p in parts) < 1.15 * whole.average / len(ranks)
