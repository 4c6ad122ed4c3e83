"""What a task is: the data, the dictionaries, and what one step of training or validation means.

The trainer, generation and validation know a task only through this class. A plugin's task usually
overrides `setup`, `load_dataset` and, where its loss is unusual, `train_step`.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.criteria.api import CRITERIA, Criterion
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.folders import part_names
from fairseq_lite.data.iterators import EpochBatchIterator
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.models.api import ARCHITECTURES, Model
from fairseq_lite.parallel.world import World
from fairseq_lite.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

TASKS = Registry("task", "--task")

Sample = dict[str, Any]
# What a criterion returns: the loss summed over the batch (with its graph), the number it is to be
# divided by, and sums to be added up over batches and ranks before anything is averaged.
StepOutput = tuple[Tensor, float, dict[str, Any]]
MaxPositions = int | tuple[int | None, ...] | None


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be, and which examples are too long.

    Attributes:
        max_tokens: tokens in a batch, padding included.
        max_sentences: examples in a batch.
        required_multiple: batch sizes are below this or a multiple of it.
        max_positions: the longest example, one number or one a side.
        skip_invalid: leave out longer ones instead of stopping.
    """

    max_tokens: int | None = None
    max_sentences: int | None = None
    required_multiple: int = 8
    max_positions: MaxPositions = None
    skip_invalid: bool = False


class Task(ABC):
    """A kind of work: its data and its steps.

    Args:
        cfg: the task's own config.
        run: the whole run, for the sections every task may read (dataset, common, …).
    """

    def __init__(self, cfg: Any, run: RunConfig) -> None:
        self.cfg = cfg
        self.run = run
        self.datasets: dict[str, Any] = {}

    @classmethod
    def setup(cls, cfg: Any, run: RunConfig) -> Task:
        """Make the task: read its dictionaries, check that its data folder is there."""
        return cls(cfg, run)

    # -- dictionaries ---------------------------------------------------------------------------

    @property
    def source_dictionary(self) -> Dictionary | None:
        """Symbols of the input, or None."""
        return None

    @property
    def target_dictionary(self) -> Dictionary | None:
        """Symbols of the output, or None."""
        return None

    # -- data -----------------------------------------------------------------------------------

    @abstractmethod
    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False) -> None:
        """Open a split and keep it in `self.datasets`.

        Args:
            split: "train", "valid", "test", …
            epoch: the epoch it is for, where the data folder changes with the epoch.
            combine: read `split`, `split1`, `split2`, … as one.

        Raises:
            DataError: the split is missing or damaged.
        """

    def dataset(self, split: str) -> Any:
        """A loaded split.

        Raises:
            DataError: it was not loaded.
        """
        try:
            return self.datasets[split]
        except KeyError:
            raise DataError(f"the split {split!r} has not been loaded") from None

    def has_split(self, split: str) -> bool:
        """Whether the data folder has this split; tasks that can tell override it."""
        return split in self.datasets

    def unused_valid_subsets(self, used: Sequence[str]) -> list[str]:
        """`valid1`, `valid2`, … of the data folder (see `has_split`) that are not among `used`."""
        numbered = itertools.islice(part_names("valid"), 1, None)
        found = itertools.takewhile(self.has_split, numbered)
        return [split for split in found if split not in used]

    def validated_splits(self, subsets: Sequence[str]) -> list[str]:
        """What validation reports on, all of it loaded, when it was asked for `subsets`."""
        return list(subsets)

    def data_paths(self, epoch: int = 1) -> list[str]:
        """The data folders of the run; several are taken in turn, one an epoch."""
        return []

    def changes_with_epoch(self) -> bool:
        """Whether an epoch's training data is not the last one's, and is to be loaded anew."""
        return len(self.data_paths()) > 1

    def max_positions(self) -> MaxPositions:
        """The longest source and target this task allows."""
        return None

    def batch_iterator(
        self,
        split: str,
        limits: BatchLimits,
        *,
        seed: int,
        epoch: int = 1,
        world_size: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> EpochBatchIterator:
        """Batches of a loaded split, epoch after epoch, shared out over the ranks.

        Batches are made once, from the seed alone: a resumed run has those of the uninterrupted
        one. Their order changes with the epoch.

        Raises:
            DataError: an example is too long, and is not to be left out; or there is no batch.
        """
        dataset = self.dataset(split)
        batches = dataset.batches(
            max_tokens=limits.max_tokens,
            max_sentences=limits.max_sentences,
            required_multiple=limits.required_multiple,
            max_positions=limits.max_positions,
            skip_invalid=limits.skip_invalid,
            seed=seed,
            name=split,
        )
        if not len(batches):
            tokens = "" if limits.max_tokens is None else f"--max-tokens {limits.max_tokens}, "
            raise DataError(
                f"the split {split!r} has no batch: it is empty, or every example was left out "
                f"({tokens}longest allowed {limits.max_positions})"
            )
        return EpochBatchIterator(
            dataset,
            batches,
            seed=seed,
            world_size=world_size,
            rank=rank,
            num_workers=num_workers,
            epoch=epoch,
            pin_memory=pin_memory,
        )

    # -- models and losses ----------------------------------------------------------------------

    def build_model(self, choice: Choice) -> Model:
        """Build the architecture `choice` names, with this task's dictionaries."""
        if choice.name is None:
            raise ConfigError("no architecture: add --arch, for example --arch transformer")
        architecture: Any = ARCHITECTURES.get(choice.name).factory
        model: Model = architecture.build(choice.config, self)
        return model

    def build_criterion(self, choice: Choice, sentence_avg: bool) -> Criterion:
        """Build the loss `choice` names."""
        if choice.name is None:
            raise ConfigError(
                "no criterion: add --criterion, for example --criterion cross_entropy"
            )
        entry = CRITERIA.get(choice.name)
        criterion: Criterion = entry.factory(choice.config, self, sentence_avg=sentence_avg)
        return criterion

    # -- steps ----------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, model: Model) -> None:  # noqa: B027
        """Called before each epoch, on every rank."""

    def train_step(self, sample: Sample, model: Model, criterion: Criterion) -> StepOutput:
        """The loss of one batch; the trainer does the backward pass."""
        return criterion(model, sample)  # type: ignore[no-any-return]

    def valid_step(self, sample: Sample, model: Model, criterion: Criterion) -> StepOutput:
        """The loss of one validation batch; may add its own keys to the sums."""
        with torch.no_grad():
            return criterion(model, sample)  # type: ignore[no-any-return]

    @property
    def generates_in_validation(self) -> bool:
        """Whether `valid_step` runs parts of the model by themselves, as a generator does.

        Ranks then take different numbers of steps, and a sharded model is gathered for validation.
        """
        return False

    def begin_validation(self, split: str, model: Model) -> None:  # noqa: B027
        """Called before a split is validated, on every rank."""

    def end_validation(self, split: str, world: World) -> None:  # noqa: B027
        """Called after a split was validated, on every rank."""

    def extra_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics beyond the criterion's, from sums over all batches and ranks (BLEU, …)."""
        return {}

    # -- what else belongs to a trained model ---------------------------------------------------

    def build_generator(self, models: Sequence[Model], generation: Any) -> Any:
        """A generator over this task's target dictionary.

        Raises:
            ConfigError: the task does not generate.
        """
        raise ConfigError(f"--task {self.run.task.name}: this task does not generate")

    def build_dataset_for_inference(self, lines: Sequence[npt.NDArray[np.int64]]) -> Any:
        """A dataset over lines that were typed, without references.

        Args:
            lines: the ids of each line, the end symbol included.

        Returns:
            What has `batches` and `collate`, as the datasets of `load_dataset`.

        Raises:
            ConfigError: the task does not read lines.
        """
        raise ConfigError(f"--task {self.run.task.name}: this task does not read lines of text")

    def state_dict(self) -> dict[str, Any]:
        """State to be kept in checkpoints (`task_state`)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` gave."""

    def files(self) -> Mapping[str, Path]:
        """Files that must travel with a checkpoint: name beside it -> where it is now."""
        return {}


def build_task(run: RunConfig) -> Task:
    """Set up the task the run names."""
    if run.task.name is None:
        raise ConfigError("no task: add --task, for example --task translation")
    factory: Any = TASKS.get(run.task.name).factory
    task: Task = factory.setup(run.task.config, run)
    return task


def to_device(sample: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`; everything else as it is."""
    if isinstance(sample, Tensor):
        return sample.to(device, non_blocking=True)
    if isinstance(sample, dict):
        return {key: to_device(value, device) for key, value in sample.items()}
    if isinstance(sample, (list, tuple)):
        return type(sample)(to_device(value, device) for value in sample)
    return sample


def resolve_max_positions(*limits: MaxPositions) -> MaxPositions:
    """The tightest of several limits; a single number counts for source and target alike.

    >>> resolve_max_positions((1024, None), (512, 256), 2000)
    (512, 256)
    """
    result: MaxPositions = None
    for limit in limits:
        if limit is None:
            continue
        if result is None:
            result = limit
        elif isinstance(result, tuple) or isinstance(limit, tuple):
            width = len(result if isinstance(result, tuple) else limit)  # type: ignore[arg-type]
            a = result if isinstance(result, tuple) else (result,) * width
            b = limit if isinstance(limit, tuple) else (limit,) * width
            if len(a) != len(b):
                raise ConfigError(
                    f"the task's and the model's length limits have {len(a)} and {len(b)} parts"
                )
            result = tuple(
                y if x is None else x if y is None else min(x, y) for x, y in zip(a, b, strict=True)
            )
        else:
            result = min(result, limit)
    return result
