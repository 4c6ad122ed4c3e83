"""DeepSpeed's layer on two processes and the native one on one read each other's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training.checkpoint import parts
from tests.helpers.commands import flite, flite_process
from tests.helpers.distributed import run_distributed
from tests.helpers.moe_checkpoints import TRAINING, Training
from tests.helpers.parity import NOISE
from tests.helpers.sharded import digests
from tests.helpers.user_dir import TINY, USER_DIR, needs_deepspeed

pytestmark = [pytest.mark.timeout(300), needs_deepspeed]

COMMON = [
    *("--user-dir", USER_DIR, *TINY, "--cpu", "--batch-size", "8", "--num-workers", "0"),
    *("--deepspeed_moe", "enc,dec", "--num-experts", "4", "--no-drop-tokens"),
    *("--task", "translation_deepspeed", "--criterion", "model_and_base"),
    *("--loss-weights", '{"experts_gate_loss": 0.5}', "--disable-validation"),
    *("--optimizer", "adam", "--lr", "1e-3", "--log-format", "json", "--log-interval", "1"),
]


def train(data: Path, save: Path, updates: int, layer: str, processes: int) -> None:
    """As many sentences an update, whatever the number of processes."""
    done = flite(
        *("train", data, *COMMON, "--moe-layer", layer, "--max-update", updates),
        *("--distributed-world-size", processes, "--ep-world-size", processes),
        *("--update-freq", 2 // processes, "--save-dir", save, "--log-file", save / "train.log"),
    )
    assert done == 0


def losses(save: Path) -> dict[int, float]:
    """Of each update in the log."""
    found = {}
    for line in (save / "train.log").read_text(encoding="utf-8").splitlines():
        if " | train_inner | " in line:
            record = json.loads(line.split(" | train_inner | ")[1])
            found[int(record["num_updates"])] = float(record["loss"])
    return found


def generate_args(data: Path, save: Path, layer: str) -> list[object]:
    return [
        *(data, "--user-dir", USER_DIR, "--task", "translation_deepspeed", "--cpu"),
        *("--path", save / "checkpoint_last.pt", "--max-len-b", 10, "--batch-size", 8),
        *("--model-overrides", json.dumps({"moe_layer": layer})),
    ]


def hypotheses(printed: str) -> list[str]:
    found = sorted(line for line in printed.splitlines() if line.startswith("H-"))
    return [line.split("\t")[2] for line in found]


def test_layers_and_numbers_of_processes_may_change_on_the_way(toy_data, tmp_path, capfd):
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    for folder in (straight, changing):
        folder.mkdir()
    train(toy_data, straight, 6, "native", 1)
    train(toy_data, changing, 2, "deepspeed", 2)
    train(toy_data, changing, 4, "native", 1)
    train(toy_data, changing, 6, "native", 2)
    assert losses(changing).keys() == set(range(1, 7))
    assert losses(changing) == pytest.approx(losses(straight), abs=2e-3)
    # A process that knows nothing of the training.
    done = flite_process("generate", *generate_args(toy_data, changing, "deepspeed"))
    assert done.returncode == 0, done.stderr
    capfd.readouterr()
    assert flite("generate", *generate_args(toy_data, changing, "native")) == 0
    ours = hypotheses(capfd.readouterr().out)
    assert ours == hypotheses(done.stdout)
    assert len(ours) == 20


# -- without rounding ------------------------------------------------------------------------------


class Plugged(Training):
    """A trainer of the plugin's model; its layer is given in the backend's place."""

    def flags(self, experts: int, backend: str) -> list[str]:
        return [
            *("--user-dir", str(USER_DIR), *TINY, "--moe-layer", backend, "--no-drop-tokens"),
            *("--deepspeed_moe", "enc,dec", "--num-experts", str(experts), "--top-k", "2"),
            *("--ep-world-size", str(self.world.size)),
            *("--distributed-world-size", str(self.world.size)),
            *("--task", "translation_deepspeed", "--criterion", "model_and_base"),
            *("--loss-weights", '{"experts_gate_loss": 0.5}', *TRAINING),
        ]


LAYERS = ("deepspeed", "native")


def visit(world: World, data: Path, folder: Path) -> dict[str, list[float]]:
    """Losses of runs that go on from what DeepSpeed's layer has trained; they leave checkpoints."""
    straight = Plugged(world, data, 4, "deepspeed")
    straight.update(2)
    straight.save(folder / "trained.pt")
    losses = {"straight": straight.update(3)}
    straight.save(folder / "on-straight.pt")
    for layer in LAYERS:
        going_on = Plugged(world, data, 4, layer, seed=77)
        going_on.load(folder / "trained.pt")
        going_on.save(folder / f"{layer}.pt", layer)
        losses[layer] = going_on.update(3, skip=2)
        going_on.save(folder / f"on-{layer}.pt", layer)
    for layer in LAYERS:
        forgetful = Plugged(world, data, 4, layer, seed=77)
        forgetful.load_weights(folder / "trained.pt")
        forgetful.trainer.state.num_updates = 2
        losses[f"{layer} without Adam's state"] = forgetful.update(3, skip=2)
        forgetful.save(folder / f"on-{layer} without Adam's state.pt", layer)
    return losses


def weights(folder: Path, name: str) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = parts.whole_state(folder / f"on-{name}.pt")["model"]
    return found


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest distance of two weights."""
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith(NOISE)]
    return max(float((one[name] - other[name]).abs().max()) for name in names)


def test_layers_hand_on_every_number(toy_data, tmp_path):
    (found, _) = run_distributed(
        *(visit, 2, toy_data, tmp_path), user_dir=str(USER_DIR), timeout=200, heartbeat=100
    )
    alone = Plugged(SingleWorld(), toy_data, 4, "native", seed=77)
    alone.load(tmp_path / "trained.pt")
    alone.save(tmp_path / "alone.pt")
    found["alone"] = alone.update(3, skip=2, batches=4)
    alone.save(tmp_path / "on-alone.pt")

    expected = digests(tmp_path / "trained.pt")
    of_experts = [key for key in expected if ".experts." in key]
    assert len({expected[key] for key in of_experts}) == len(of_experts) >= 4 * 2 * 4
    assert any(key.startswith("optimizer.") and "exp_avg" in key for key in expected)
    for name in (*LAYERS, "alone"):
        assert digests(tmp_path / f"{name}.pt") == expected, name

    straight = weights(tmp_path, "straight")
    assert found["deepspeed"] == found["straight"]
    assert apart(weights(tmp_path, "deepspeed"), straight) == 0
    for name in ("native", "alone"):
        assert found[name] == pytest.approx(found["straight"], rel=1e-6)
        assert apart(weights(tmp_path, name), straight) < 1e-5
    for layer in LAYERS:  # a planted fault
        name = f"{layer} without Adam's state"
        assert found[name][0] == pytest.approx(found["straight"][0], rel=1e-6)
        assert found[name][1:] != pytest.approx(found["straight"][1:], rel=1e-4)
        assert apart(weights(tmp_path, name), straight) > 1e-3
