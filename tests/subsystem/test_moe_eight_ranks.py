"""A checkpoint of few ranks is resumed, evaluated and translated with on eight, an expert each."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.parallel.experts import expert_modules
from fairseq_lite.parallel.world import World
from fairseq_lite.training import run as training
from fairseq_lite.training.checkpoint import parts
from fairseq_lite_cli import generate
from tests.helpers.commands import _loggers_as_they_were, flite
from tests.helpers.distributed import run_distributed
from tests.helpers.evaluating import SIZES, Case, outputs, pairs, random_lengths
from tests.helpers.parity import NOISE

pytestmark = pytest.mark.timeout(600)

EXPERTS, UPDATES = 8, 60
FLAGS = (
    *("--arch", "transformer_tiny", *SIZES, "--dropout", "0", "--moe-freq", "1"),
    *("--moe-expert-count", str(EXPERTS), "--moe-second-expert-policy", "all"),
    *("--optimizer", "adam", "--lr", "0.01", "--batch-size", "8", "--cpu"),
    *("--disable-validation", "--no-epoch-checkpoints"),
)


def updates_of(start: Path) -> int:
    """How many there were until a checkpoint."""
    history = parts.whole_state(start)["optimizer_history"]
    return int(history[-1]["num_updates"])


def resume(data: Path, start: Path, folder: Path, world_size: int) -> list[str]:
    """Of flite-train: one update more, of the same batches on any number of ranks."""
    return [
        *(
            str(data),
            *FLAGS,
            "--restore-file",
            str(start),
            "--max-update",
            str(updates_of(start) + 1),
        ),
        *("--save-dir", str(folder), "--update-freq", str(8 // world_size)),
        *("--distributed-world-size", str(world_size)),
    ]


def evaluations(data: Path, model: Path) -> dict[str, Case]:
    words = [str(data), "--path", str(model), "--cpu", "--batch-size", "2"]
    return {
        "generate": ("generate", [*words, "--max-len-b", "20", "--beam", "3"]),
        "validate": ("validate", words),
    }


def visit(world: World, data: Path, starts: list[Path], folder: Path) -> dict[str, object]:
    """What this rank does with each checkpoint, and the experts it has in memory for it."""
    held: set[int] = set()
    make = generate.make_generator

    def looking(*args, **kwargs):  # type: ignore[no-untyped-def]
        generator, models = make(*args, **kwargs)
        held.update(shard.expert for _, _, shard in expert_modules(models[0]))
        return generator, models

    generate.make_generator = looking
    found: dict[str, object] = {}
    for start in starts:
        target = folder / f"{start.parent.name} to {world.size}"
        words = resume(data, start, target, world.size)
        with _loggers_as_they_were():
            training.train(parse("flite-train", words, load_builtins()), world)
        found[start.parent.name] = outputs(world, evaluations(data, target / "checkpoint_last.pt"))
    generate.make_generator = make
    return {**found, "held": sorted(held)}


def test_from_two_and_four_ranks_to_eight(tmp_path: Path) -> None:
    data = pairs(tmp_path / "text", random_lengths(20, seed=5))
    starts = []
    for size, updates in ((2, UPDATES), (4, 20)):
        folder = tmp_path / f"{size} ranks"
        more = ("--max-update", updates, "--distributed-world-size", size)
        assert flite("train", data, *FLAGS, *more, "--save-dir", folder) == 0
        starts.append(folder / "checkpoint_last.pt")
    ranks = run_distributed(visit, 8, data, starts, tmp_path, timeout=400, heartbeat=200)
    assert [rank["held"] for rank in ranks] == [[expert] for expert in range(EXPERTS)]
    for start in starts:
        name = start.parent.name
        eight, alone = tmp_path / f"{name} to 8", tmp_path / f"{name} to 1"
        assert flite("train", *resume(data, start, alone, 1)) == 0
        mine, theirs = (
            parts.whole_state(folder / "checkpoint_last.pt") for folder in (alone, eight)
        )
        assert mine["optimizer_history"][-1]["num_updates"] == updates_of(start) + 1
        for weight, tensor in mine["model"].items():
            if not weight.endswith(NOISE):
                off = float((theirs["model"][weight] - tensor).abs().max())
                assert off < 1e-4, f"{weight} is off by {off}"
        (one,) = run_distributed(outputs, 1, evaluations(data, eight / "checkpoint_last.pt"))
        assert ranks[0][name] == one
        hypotheses = [line for line in one["generate"].splitlines() if line[:2] == "H-"]
        assert len({line.split("\t")[2] for line in hypotheses}) > 3
        # The run of one process translates alike, if not to the last digit of a score.
        (other,) = run_distributed(outputs, 1, evaluations(data, alone / "checkpoint_last.pt"))
        words = [
            [line.split("\t")[2] for line in each["generate"].splitlines() if line[:2] == "H-"]
            for each in (one, other)
        ]
        assert words[0] == words[1]
