"""Who owns which expert, what its mark says, and first weights that hang on its number alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.experts import (
    SHARED,
    ExpertLayout,
    ExpertShard,
    drawn_for,
    expert_modules,
    expert_parameters,
    has_experts,
    mark,
    placements,
    planned_layout,
    replicas_of,
    shared_parameters,
    site,
    spread_over,
    stores,
)
from fairseq_lite.parallel.groups import Group
from fairseq_lite.parallel.world import SingleWorld, World

counts = st.integers(1, 70)
sizes = st.integers(1, 40)


@st.composite
def layouts(draw: st.DrawFn) -> ExpertLayout:
    """Any layout, also with a size of the exchange group that was asked for."""
    experts, world = draw(counts), draw(sizes)
    fitting = [p for p in range(1, world + 1) if world % p == 0 and p <= experts]
    return ExpertLayout.of(experts, world, draw(st.sampled_from([None, *fitting])))


# -- the layout -------------------------------------------------------------------------------


@given(layouts())
def test_every_exchange_group_holds_every_expert_once(layout: ExpertLayout) -> None:
    for group in layout.exchange_groups():
        held = [e for rank in group for e in layout.owned(layout.place(rank))]
        assert held == list(range(layout.num_experts))


@given(layouts())
def test_ranks_own_the_same_number_or_one_more(layout: ExpertLayout) -> None:
    numbers = layout.counts()
    assert sum(numbers) == layout.num_experts
    assert min(numbers) >= 1
    assert max(numbers) - min(numbers) == (layout.num_experts % layout.group_size > 0)


@given(layouts())
def test_owners_are_those_who_own(layout: ExpertLayout) -> None:
    for expert in range(layout.num_experts):
        owners = [
            rank for rank in range(layout.world_size) if expert in layout.owned(layout.place(rank))
        ]
        assert list(layout.owners(expert)) == owners
        assert len(owners) == layout.replicas
        assert tuple(owners) in layout.replica_groups()
        assert [layout.replica(rank) for rank in owners] == list(range(layout.replicas))


@given(layouts())
def test_groups_divide_the_ranks(layout: ExpertLayout) -> None:
    for groups in (layout.exchange_groups(), layout.replica_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for exchange in layout.exchange_groups():  # each replica group has one member in each
        for replicas in layout.replica_groups():
            assert len(set(exchange) & set(replicas)) == 1


@given(counts, sizes)
def test_by_itself_a_group_is_as_large_as_can_be(experts: int, world: int) -> None:
    size = ExpertLayout.of(experts, world).group_size
    larger = [p for p in range(size + 1, world + 1) if world % p == 0 and p <= experts]
    assert larger == []
    if experts >= world:
        assert size == world


@pytest.mark.parametrize(
    ("experts", "world", "group", "owned", "replicas"),
    [
        (8, 4, None, [[0, 1], [2, 3], [4, 5], [6, 7]], 1),
        (3, 2, None, [[0], [1, 2]], 1),
        (2, 4, None, [[0], [1], [0], [1]], 2),
        (3, 4, None, [[0], [1, 2], [0], [1, 2]], 2),
        (5, 6, None, [[0], [1, 2], [3, 4], [0], [1, 2], [3, 4]], 2),
        (4, 4, 2, [[0, 1], [2, 3], [0, 1], [2, 3]], 2),
        (4, 4, 1, [[0, 1, 2, 3]] * 4, 4),
        (7, 1, None, [[0, 1, 2, 3, 4, 5, 6]], 1),
    ],
)
def test_examples(
    experts: int, world: int, group: int | None, owned: list[list[int]], replicas: int
) -> None:
    layout = ExpertLayout.of(experts, world, group)
    assert [list(layout.owned(layout.place(rank))) for rank in range(world)] == owned
    assert layout.replicas == replicas


@pytest.mark.parametrize(("experts", "world", "group"), [(4, 4, 3), (2, 4, 4), (4, 4, 0)])
def test_groups_that_cannot_be_are_refused(experts: int, world: int, group: int) -> None:
    with pytest.raises(ConfigError, match=f"{experts} experts cannot be spread over groups of"):
        ExpertLayout.of(experts, world, group)


# -- marks ------------------------------------------------------------------------------------


class Store(nn.Module):
    """Two experts of four, and a buffer in each."""

    def __init__(self) -> None:
        super().__init__()
        layout = ExpertLayout.of(4, 2)
        for expert in layout.owned(1):
            module = nn.BatchNorm1d(3)
            mark(module, ExpertShard(expert, layout))
            self.add_module(str(expert), module)


class Mixture(nn.Module):
    """A gate, experts, and a tensor that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4, bias=False)
        self.again = nn.Linear(3, 4, bias=False)
        self.again.weight = self.gate.weight
        self.experts = Store()
        self.register_buffer("version", torch.ones(1))


def test_every_tensor_is_shared_or_an_experts() -> None:
    found = placements(Mixture())
    layout = ExpertLayout.of(4, 2)
    expert = {
        f"experts.{e}.{name}": ExpertShard(e, layout)
        for e in (2, 3)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    shared = {"gate.weight": SHARED, "again.weight": SHARED, "version": SHARED}
    assert found == {**expert, **shared}


def test_absence_is_not_the_mark_of_a_shared_tensor() -> None:
    found = placements(Mixture())
    assert "experts.0.weight" not in found  # another rank's
    with pytest.raises(KeyError):
        found["experts.0.weight"]
    assert None not in found.values() and SHARED is not None
    assert ExpertShard(0, ExpertLayout.of(1, 1)) != SHARED


def test_parameters_are_one_or_the_other() -> None:
    model = Mixture()
    shared = shared_parameters(model)
    theirs = [param for param, _ in expert_parameters(model)]
    assert [id(p) for p in shared] == [id(model.gate.weight)]
    assert len(theirs) == 4
    assert {id(p) for p in (*shared, *theirs)} == {id(p) for p in model.parameters()}
    assert [shard.expert for _, _, shard in expert_modules(model)] == [2, 3]
    assert has_experts(model) and not has_experts(nn.Linear(2, 2))


def test_a_store_is_found_by_its_experts() -> None:
    model = nn.Sequential(Mixture(), Mixture())
    assert [(name, module, shard.expert) for name, module, shard in stores(model)] == [
        ("0.experts", model[0].experts, 2),
        ("1.experts", model[1].experts, 2),
    ]


def test_a_store_holds_nothing_else() -> None:
    model = Mixture()
    model.experts.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="experts has parameters beside those of its experts"):
        stores(model)


class Counting(World):
    """A world of which only `split` can be asked."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size, 0, torch.device("cpu"))
        self.asked: list[tuple[tuple[int, ...], ...]] = []

    def split(self, groups: tuple[tuple[int, ...], ...]) -> Group:
        self.asked.append(groups)
        return Group(groups[0], 0)


Counting.__abstractmethods__ = frozenset()


def test_one_process_has_one_group() -> None:
    world = SingleWorld()
    model = Mixture()
    assert world.split(((0,),)) is world.split(((0,),))
    ((group, experts),) = replicas_of(model, world)
    assert group.ranks == (0,) and [shard.expert for _, shard in experts] == [2, 3]


# -- a model that is being built --------------------------------------------------------------


def test_outside_a_world_a_model_has_all_experts() -> None:
    world, layout = site(6)
    assert world.size == 1 and list(layout.owned(0)) == list(range(6))


def test_inside_it_has_those_of_its_rank() -> None:
    spread = Counting(4)
    with spread_over(spread):
        assert site(6) == (spread, ExpertLayout.of(6, 4))
        assert site(6, 2) == (spread, ExpertLayout.of(6, 4, 2))
        with pytest.raises(ConfigError):
            site(6, 3)
        with spread_over(spread, regroup=True):
            assert site(6, 3) == (spread, ExpertLayout.of(6, 4))
    assert site(6)[0].size == 1


def weights_of(layer: str, expert: int) -> torch.Tensor:
    with drawn_for(layer, expert):
        return nn.Linear(5, 5).weight.detach()


def test_experts_differ_and_are_the_same_everywhere() -> None:
    torch.manual_seed(3)
    first = {(layer, e): weights_of(layer, e) for layer in ("one", "two") for e in range(4)}
    for i, one in enumerate(first.values()):
        assert not any(torch.equal(one, other) for other in list(first.values())[:i])
    torch.manual_seed(3)
    torch.rand(17)  # elsewhere other things were drawn before
    again = {(layer, e): weights_of(layer, e) for layer in ("two", "one") for e in (3, 1)}
    for key, weight in again.items():
        assert torch.equal(weight, first[key])
    torch.manual_seed(4)
    assert not torch.equal(weights_of("one", 0), first["one", 0])


def test_what_is_drawn_later_does_not_know_of_experts() -> None:
    torch.manual_seed(3)
    without = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), drawn_for("layer", 1):
        raise ZeroDivisionError
    weights_of("layer", 2)
    assert torch.equal(torch.rand(4), without)
    assert torch.initial_seed() == 3


# -- what a run will have ---------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Flags of a model that may have experts."""

    experts: int
    group: int | None = None

    def experts_to_spread(self) -> tuple[int, int | None] | None:
        if self.experts == 1:
            raise ConfigError("--num-experts 1: at least 2")
        return (self.experts, self.group) if self.experts else None


def test_flags_tell_where_experts_will_be() -> None:
    assert planned_layout(object(), 4) is None
    assert planned_layout(Config(0), 4) is None
    assert planned_layout(Config(6, 2), 4) == ExpertLayout.of(6, 4, 2)
    for config in (Config(1), Config(6, 3)):
        with pytest.raises(ConfigError):
            planned_layout(config, 4)
