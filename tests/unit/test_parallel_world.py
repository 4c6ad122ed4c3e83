"""A world of one process, and the parts of legacy_ddp that need no other."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from fairseq_lite.errors import CheckpointError, DataError, DistributedError
from fairseq_lite.parallel import legacy_ddp, world
from fairseq_lite.parallel.api import Part, PartReader
from fairseq_lite.parallel.legacy_ddp import LegacyDDP, local_norm
from fairseq_lite.parallel.spawn import Failure
from fairseq_lite.parallel.watchdog import is_lost_contact
from fairseq_lite.parallel.world import SingleWorld


class Parts(PartReader):
    """Parts in memory."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts = parts

    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def manifest(self, name: str) -> dict[str, object]:
        return dict(self.parts[name].manifest)

    def read(self, name: str) -> Part:
        return self.parts[name]


def test_sum_takes_numbers_and_tensors_in_the_callers_order() -> None:
    sums = SingleWorld().sum({"b": torch.tensor([3]), "a": 1, "c": torch.tensor(0.5)})
    assert list(sums.items()) == [("b", 3.0), ("a", 1.0), ("c", 0.5)]
    assert SingleWorld().sum({}) == {}


def test_one_process_has_every_method() -> None:
    one = SingleWorld()
    assert one.is_main and one.size == 1
    assert one.gather_objects("x") == ["x"]
    assert one.broadcast_object("x") == "x"
    assert one.max(2) == 2.0
    tensor = torch.ones(2)
    assert one.all_reduce(tensor) is tensor
    one.all_reduce_start(tensor)()
    one.barrier()
    one.close()


def test_state_is_taken_apart_and_put_together() -> None:
    state = {"step": 3, "state": {0: {"m": torch.ones(2)}}, "groups": [{"betas": (0.9, 0.98)}]}
    taken: list[torch.Tensor] = []
    skeleton = world._take_tensors(state, taken)
    tensors = iter(taken)
    again = world._put_tensors(skeleton, lambda slot: next(tensors))
    assert again["groups"] == [{"betas": (0.9, 0.98)}]
    assert torch.equal(again["state"][0]["m"], torch.ones(2))


def test_norm_is_torchs_and_counts_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model(torch.randn(3, 4)).square().sum().backward()
    expected = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    assert len(list(model.parameters())) == 3
    assert torch.allclose(local_norm(model.parameters(), torch.device("cpu")), expected)


def test_norm_of_half_precision_gradients_does_not_overflow() -> None:
    param = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    param.grad = torch.full_like(param, 30000.0)
    norm = local_norm([param], torch.device("cpu"))
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(60000.0)


def test_norm_without_any_gradient_is_zero() -> None:
    assert local_norm([nn.Parameter(torch.ones(2))], torch.device("cpu")).item() == 0.0


def test_buckets_are_limited_and_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_ddp, "BUCKET_ELEMENTS", 10)
    sizes = [4, 4, 4, 20, 1]
    tensors = [torch.zeros(n) for n in sizes] + [torch.zeros(3, dtype=torch.bfloat16)]
    buckets = list(legacy_ddp._buckets(tensors))
    assert [[t.numel() for t in b] for b in buckets] == [[4, 4], [4], [20], [1], [3]]


def test_parts_of_one_process_load_again() -> None:
    backend = LegacyDDP(None, SingleWorld())
    model = backend.wrap(lambda: nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    backend.backward(model, model(torch.ones(1, 2)).sum())
    optimizer.step()
    parts = backend.save_parts(model, optimizer)
    assert set(parts) == {"model"}

    other = backend.wrap(lambda: nn.Linear(2, 2))
    other_optimizer = torch.optim.Adam(other.parameters())
    backend.load_parts(other, other_optimizer, Parts(dict(parts)))
    assert torch.equal(other.weight, model.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1


def test_parts_that_do_not_fit_are_named() -> None:
    backend = LegacyDDP(None, SingleWorld())
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="shard0"):
        backend.load_parts(model, None, Parts({"shard0": Part({})}))
    with pytest.raises(CheckpointError, match="weight") as e:
        backend.load_parts(model, None, Parts({"model": Part({"bias": torch.zeros(2)})}))
    assert "\n" not in str(e.value)


def test_lost_contact_is_told_from_causes() -> None:
    lost = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"
    assert is_lost_contact(RuntimeError(lost))
    assert is_lost_contact(ConnectionResetError())
    assert not is_lost_contact(RuntimeError("shapes (2, 3) and (4, 5) do not match"))
    assert not is_lost_contact(ValueError("gloo"))


def test_a_failure_says_what_ended_the_rank() -> None:
    assert Failure.of_exit(1, -signal.SIGSEGV).line.startswith("rank 1 died (signal 11: ")
    assert "memory" in Failure.of_exit(1, -signal.SIGKILL).line
    assert Failure.of_exit(1, 3).line == "rank 1 died (exit code 3)"
    error = Failure.of(1, DataError("no such file")).error()
    assert type(error) is DataError and str(error) == "no such file"
    error = Failure.of(1, ValueError("x\ny")).error()
    assert type(error) is DistributedError and str(error) == "rank 1 failed: ValueError: x"


def test_a_cause_weighs_less_than_its_consequences() -> None:
    lost = RuntimeError("gloo: Connection closed by peer")
    wrapped = DistributedError("rank 0 lost contact")
    wrapped.__cause__ = lost
    consequences = [
        Failure.of(0, lost),
        Failure.of(0, wrapped),
        Failure.of_exit(0, -signal.SIGABRT),
        Failure.of_exit(0, 1),
    ]
    for cause in (Failure.of(1, DataError("")), Failure.of_exit(1, -signal.SIGKILL)):
        assert all(cause.weight < each.weight for each in consequences)
