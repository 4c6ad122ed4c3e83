"""A sharded model is noted and made later; its experts are made at once, with the same numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions
from fairseq_lite.parallel.experts import expert_modules
from fairseq_lite.parallel.fully_sharded.building import Unmade
from fairseq_lite.parallel.world import SingleWorld


class Inner(nn.Module):
    """D -> D, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.register_buffer("drawn", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)[:, :4]


class Stack(nn.Module):
    """Parameters before, in and after a layer of experts; `look` makes it impossible to note."""

    def __init__(self, look: bool) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        options = MoEOptions(every=1, router=RouterOptions(3), ffn_dim=6)
        self.mixture = MoELayer(4, options, Inner, "layer")
        self.after = nn.Linear(4, 4)
        if look and float(self.before.weight.detach().sum()) > 1e9:
            raise AssertionError


def built(look: bool) -> Callable[[], Stack]:
    return lambda: Stack(look)


@pytest.mark.parametrize("look", [False, True])
def test_the_numbers_are_those_of_a_build_in_memory(
    look: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    expected, after = Stack(look).state_dict(), torch.rand(3)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        unmade = Unmade.of(built(look), SingleWorld())
    model = unmade.model
    assert bool(caplog.records) == look  # it says so where it has to build twice
    own = {id(p) for _, expert, _ in expert_modules(model) for p in expert.parameters()}
    assert len(own) == 6
    for param in model.parameters():
        assert param.is_meta == (id(param) not in own)
    unmade.make("cpu")
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(torch.rand(3), after)
