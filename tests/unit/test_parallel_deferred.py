"""What is built without memory becomes what a build in memory gives, to the bit, draws included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.fully_sharded.building import Unmade
from fairseq_lite.parallel.fully_sharded.deferred import CannotDeferError, Recording, view_of
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.tasks.api import build_task


class Everything(nn.Module):
    """Draws, constants, shared and computed tensors, a seed in the middle, new draws at the end."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.embed = nn.Embedding(6, 4, padding_idx=1)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.scaled = nn.Parameter(torch.randn(3, 4) * 0.1)
        torch.manual_seed(9)
        self.seeded = nn.Linear(3, 3)
        nn.init.orthogonal_(self.seeded.weight)
        self.copied = nn.Linear(4, 5)
        with torch.no_grad():
            self.copied.weight.copy_(self.linear.weight)
            self.copied.bias.add_(1.0)
        self.given = nn.Parameter(torch.as_tensor([[1.0, 2.0]]))
        self.register_buffer("numbers", torch.tensor([3.0]))
        self.register_buffer("from_numpy", torch.from_numpy(np.arange(4.0)))
        self.register_buffer("mask", torch.triu(torch.ones(4, 4, dtype=torch.bool), 1))
        angles = torch.arange(5)[:, None] / torch.tensor([1.0, 10.0])
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        table[0] = 0
        self.register_buffer("table", table, persistent=False)
        if again:
            self.apply(self.draw_again)

    def draw_again(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def replayed(build: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors, and the random generator's state afterwards."""
    model, recording = Recording.of(build)
    by_memory: dict[int | None, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors_of(model).items():
        by_memory.setdefault(recording.number_of(tensor), []).append((name, tensor))
    found = {}
    order = []
    for number, content in recording.replay():
        order.append(number)
        for name, tensor in by_memory.get(number, []):
            found[name] = view_of(content, tensor).clone()
    assert order == recording.order()
    return found, torch.get_rng_state()


@pytest.mark.parametrize("again", [False, True])
def test_a_replay_gives_what_a_build_in_memory_gives(again: bool) -> None:
    torch.manual_seed(3)
    expected = tensors_of(Everything(again))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found, state_after = replayed(lambda: Everything(again))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    assert torch.equal(state_after, state)


@pytest.mark.parametrize(
    "flags",
    [
        ["--arch", "transformer_iwslt_de_en"],
        ["--arch", "transformer", "--share-all-embeddings", "--encoder-normalize-before"],
        ["--arch", "transformer_tiny", "--encoder-learned-pos", "--decoder-learned-pos"],
    ],
    ids=["separate", "shared", "learned"],
)
def test_the_transformer(flags: list[str], toy_data: Path) -> None:
    run = parse("flite-train", [str(toy_data), *flags, "--optimizer", "adam"], load_builtins())
    task = build_task(run)
    torch.manual_seed(1)
    expected = tensors_of(task.build_model(run.model))
    torch.manual_seed(1)
    found, _ = replayed(lambda: task.build_model(run.model))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)


def test_tensors_are_made_one_at_a_time_even_if_all_are_drawn_again() -> None:
    _, recording = Recording.of(Deep)
    held: set[str] = set()
    starts, ends = recording._starts(), recording._ends()
    for i in range(len(recording._steps)):
        alive = [n for n in ends if starts.get(n, 0) <= i <= ends[n]]
        large = [n for n in alive if recording._bytes[n] == 32 * 32 * 4]
        assert len(large) <= 1
        held |= {str(n) for n in large}
    assert len(held) == 8


class Failing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        if how == "looks":
            self.scale = float(self.linear.weight.detach().abs().max())
        elif how == "truncated":  # torch draws it anew until all are in range
            nn.init.trunc_normal_(self.linear.weight)
        elif how == "hides":
            self.kept = {"masks": [torch.ones(3)]}
        elif how == "refuses":
            raise ConfigError("--arch: no")


@pytest.mark.parametrize("how", ["looks", "truncated"])
def test_what_looks_at_content_cannot_be_deferred(how: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(CannotDeferError):
        Recording.of(lambda: Failing(how))
    assert torch.equal(torch.get_rng_state(), before), "the build in memory draws the same"


def test_the_users_own_mistakes_are_no_reason_to_build_again() -> None:
    with pytest.raises(ConfigError, match="--arch: no"):
        Unmade.of(lambda: Failing("refuses"), SingleWorld())


@pytest.mark.parametrize("how", ["fine", "looks", "truncated", "hides"])
def test_every_model_is_made_in_the_end(how: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(7)
    expected = Failing(how)
    after = torch.rand(())
    torch.manual_seed(7)
    unmade = Unmade.of(lambda: Failing(how), SingleWorld())
    assert {p.device.type for p in unmade.model.parameters()} == {"meta"}
    unmade.make("cpu")
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(tensors_of(unmade.model)[name], tensor), name
    if how == "hides":
        assert unmade.model.kept["masks"][0].sum() == 3
    assert torch.equal(torch.rand(()), after)
    assert ("in host memory before it is sharded" in caplog.text) == (how != "fine")


def test_shared_tensors_stay_shared() -> None:
    unmade = Unmade.of(Everything, SingleWorld())
    assert unmade.model.tied.weight is unmade.model.embed.weight
    unmade.make("cpu")
    assert unmade.model.tied.weight is unmade.model.embed.weight
    assert unmade.model.embed.weight[1].eq(0).all()
