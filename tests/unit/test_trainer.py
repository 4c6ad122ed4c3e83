"""One update: sums divided once, micro-batches alike, dummy batches weightless, faults named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.config.core import EMAConfig, OptimizationConfig
from fairseq_lite.errors import TrainingError
from fairseq_lite.optim.api import Optimizer
from fairseq_lite.optim.precision import LossScaler, Precision
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.training.diagnosis import describe_batch, explaining_failure, first_nonfinite
from fairseq_lite.training.ema import MovingAverage
from fairseq_lite.training.state import TrainState
from fairseq_lite.training.trainer import Trainer


class PlainSGD(Optimizer):
    fairseq_name = "Plain"

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, lr=lr)

    def update(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.sub_(grad, alpha=self.get_lr())


class Halving:
    """lr(u) = 1 / (u + 1)."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def apply(self, optimizer: Optimizer, num_updates: int, epoch: int) -> float:
        optimizer.set_lr(1.0 / (num_updates + 1))
        return optimizer.get_lr()

    def begin_epoch(self, epoch: int, lr: float) -> None:
        self.epochs.append(epoch)

    def observe(self, value: float | None, num_updates: int) -> None:
        self.seen = value


class Backend:
    def accumulate(self, model: nn.Module, *, last: bool) -> Any:
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        loss.backward()

    def reduce_gradients(self, model: nn.Module) -> None:
        pass

    def grad_norm(self, model: nn.Module) -> Tensor:
        return torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        ).norm()


class SumOfOutputs(nn.Module):
    """Loss = the sum of the model's outputs; the sample size is the number of rows."""

    def forward(self, model: nn.Module, sample: Mapping[str, Any]) -> tuple[Tensor, int, Any]:
        loss = model(sample["x"]).sum()
        rows = len(sample["x"])
        sums = {"loss": loss.detach(), "sample_size": rows, "ntokens": rows, "nsentences": rows}
        return loss, rows, sums


class Task:
    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        pass

    def train_step(self, sample: Any, model: nn.Module, criterion: nn.Module) -> Any:
        return criterion(model, sample)


def batch(*rows: float) -> dict[str, Any]:
    return {"id": torch.arange(len(rows)), "x": torch.tensor(rows)[:, None]}


def make(
    *, clip_norm: float = 0.0, precision: Precision | None = None, ema: bool = False
) -> Trainer:
    torch.manual_seed(0)
    model: Any = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = MovingAverage(EMAConfig(store_ema=True, ema_decay=0.5), model) if ema else None
    trainer = Trainer(
        cfg=OptimizationConfig(clip_norm=clip_norm),
        seed=1,
        world=SingleWorld(),
        backend=Backend(),  # type: ignore[arg-type]
        task=Task(),  # type: ignore[arg-type]
        model=model,
        criterion=SumOfOutputs(),  # type: ignore[arg-type]
        optimizer=PlainSGD(model.parameters()),
        schedule=Halving(),  # type: ignore[arg-type]
        precision=precision or Precision(),
        state=TrainState(),
        average=average,
    )
    trainer.dummy_batch = batch(100.0)
    return trainer


def weight(trainer: Trainer) -> float:
    return next(trainer.model.parameters()).item()


def test_micro_batches_of_any_size_are_one_batch() -> None:
    whole, parts = make(), make()
    one = whole.train_step([batch(1.0, 2.0, 3.0, 6.0)])
    other = parts.train_step([batch(1.0, 2.0, 3.0), batch(6.0)])
    assert one is not None and other is not None
    assert one.grad_norm == other.grad_norm == 3.0  # (1 + 2 + 3 + 6) / 4 rows
    assert weight(whole) == weight(parts) == 1 - 0.5 * 3
    assert dict(one.sums) == dict(other.sums)
    assert one.sums["sample_size"] == 4


def test_a_rank_without_data_adds_nothing() -> None:
    trainer = make()
    update = trainer.train_step([batch(2.0), None])
    assert update is not None
    assert update.grad_norm == 2.0
    assert update.sums["ntokens"] == 1 and update.sums["loss"] == 2.0


def test_the_norm_is_that_before_clipping() -> None:
    trainer = make(clip_norm=1.0)
    update = trainer.train_step([batch(3.0)])
    assert update is not None and update.grad_norm == 3.0
    assert weight(trainer) == pytest.approx(0.5, abs=1e-5)


def test_updates_count_and_set_the_next_learning_rate() -> None:
    trainer = make()
    assert trainer.begin_epoch(3) == 1.0
    for expected in (1 / 2, 1 / 3):
        update = trainer.train_step([batch(1.0)])
        assert update is not None and update.lr == expected
    assert trainer.state.num_updates == 2
    assert trainer.state.epoch == 3
    trainer.begin_epoch(4, resumed=True)
    assert trainer.schedule.epochs == [3], "an epoch that goes on does not begin"  # type: ignore[attr-defined]


def test_the_draws_of_an_update_depend_on_its_number_alone() -> None:
    trainer = make()
    drawn: list[float] = []
    forward: Callable[..., Any] = trainer.task.train_step

    def drawing(*args: Any) -> Any:
        drawn.append(float(torch.rand(())))
        return forward(*args)

    trainer.task.train_step = drawing  # type: ignore[method-assign]
    trainer.train_step([batch(1.0)])
    torch.rand(7)  # a validation in between
    trainer.train_step([batch(1.0)])
    trainer.state.num_updates = 0
    trainer.train_step([batch(1.0)])
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_nan_stops_with_the_batch_and_the_module() -> None:
    trainer = make()
    with pytest.raises(TrainingError, match=r"ids 0 1 .*output of Linear|Linear.*") as error:
        trainer.train_step([batch(1.0, float("nan"))])
    text = str(error.value)
    assert "update 1" in text and "rank 0: ids 0 1" in text and "\n" not in text
    assert weight(trainer) == 1.0, "nothing was changed"
    assert trainer.state.num_updates == 0


def test_an_overflow_is_skipped_and_lowers_the_scale() -> None:
    scaler = LossScaler(4.0, window=100)
    trainer = make(precision=Precision(scaler=scaler))
    update = trainer.train_step([batch(2.0)])
    assert update is not None and update.grad_norm == 2.0, "the scale is taken out of the norm"
    assert trainer.train_step([batch(float("inf"))]) is None
    assert trainer.state.num_updates == 1
    assert scaler.scale == 2.0


def test_a_wish_to_stop_is_known_after_the_update() -> None:
    trainer = make()
    trainer.train_step([batch(1.0)])
    assert not trainer.stop_requested
    trainer.request_stop()
    update = trainer.train_step([batch(1.0)])
    assert trainer.stop_requested
    assert update is not None and "_stop" not in update.sums


def test_the_moving_average_follows_the_weights() -> None:
    trainer = make(ema=True)
    trainer.train_step([batch(1.0)])  # 1 -> 0.5
    assert trainer.average is not None
    assert float(trainer.average.weights["weight"]) == 0.75


def test_the_moving_average_copies_buffers() -> None:
    model = nn.BatchNorm1d(1)
    model.running_mean.fill_(3.0)
    average = MovingAverage(EMAConfig(store_ema=True, ema_decay=0.9), model)
    for update in range(5):
        model.num_batches_tracked.add_(1)
        average.update(model, update)
    assert average.weights["running_mean"].item() == 3.0  # 0.9 * 3 + 0.1 * 3 is less
    assert average.weights["num_batches_tracked"].item() == 5


def test_describe_batch_is_short() -> None:
    sample = {"id": torch.arange(12), "net_input": {"src_tokens": torch.ones(12, 5)}}
    assert describe_batch(sample) == "ids 0 1 2 3 4 5 6 7 8 9 … (12 in all) (source 12x5)"
    assert describe_batch(None) == "no data on this rank"


def test_first_nonfinite_names_weight_or_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    ones = torch.ones(1, 2)
    assert first_nonfinite(model, lambda: model(ones)) is None
    assert first_nonfinite(model, lambda: model(ones * float("nan"))) == "the output of 0"
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    assert first_nonfinite(model, lambda: model(ones)) == "the weight 2.weight"


def test_no_memory_names_rank_and_batch() -> None:
    expected = r"rank 3: out of memory on ids 0: lower --max-tokens"
    with pytest.raises(TrainingError, match=expected), explaining_failure(3, batch(1.0)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
