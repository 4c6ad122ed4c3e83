"""What a criterion offers to the trainer.

A criterion turns a batch into a loss that is *summed* over its tokens or sentences. The trainer
sums the losses and sample sizes of all micro-batches and ranks and divides once: averaging per
batch would weight short batches more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.registry import Registry

CRITERIA = Registry("criterion", "--criterion")

Sums = dict[str, "Tensor | float"]


class Criterion(nn.Module):
    """Base of every criterion.

    Args:
        cfg: the entry's config.
        task: the task, for its target dictionary.
        sentence_avg: divide the gradient by the number of sentences, not of tokens.
    """

    fairseq_name: ClassVar[str] = "FairseqCriterion"
    """The class name checkpoints record, compared when training resumes."""

    balances_experts: ClassVar[bool] = False
    """Whether the loss keeps the experts of a mixture in use."""

    def __init__(self, cfg: Any, task: Any, sentence_avg: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.sentence_avg = sentence_avg
        self.padding_idx: int = task.target_dictionary.pad()

    @classmethod
    def check_run(cls, run: RunConfig, world_size: int) -> None:
        """Refuse what cannot work, before any process is started and any model is built.

        Args:
            run: what was asked for.
            world_size: how many processes it will have.

        Raises:
            ConfigError: with what to type instead.
        """

    def forward(self, model: Any, sample: Mapping[str, Any]) -> tuple[Tensor, int, Sums]:
        """The loss of a batch.

        Returns:
            The summed loss (with gradient), the sample size it is to be divided by, and sums to
            log: always loss, ntokens, nsentences and sample_size, plus the criterion's own,
            numbers or vectors. Losses are natural logarithms.
        """
        loss, sample_size, sums, _ = self.judge(model, sample)
        return loss, sample_size, sums

    def judge(
        self, model: Any, sample: Mapping[str, Any]
    ) -> tuple[Tensor, int, Sums, Mapping[str, Any]]:
        """What `forward` returns, and the extras of the model's output.

        A criterion overrides this one, so that another can add to its loss; or `forward`.
        """
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this loss cannot judge; called once before training.

        Raises:
            ConfigError: with what to type instead.
        """

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """What to show of sums added over batches and ranks, in log order. Losses are base 2."""
        raise NotImplementedError

    def sample_size(self, sample: Mapping[str, Any]) -> int:
        """Sentences with `--sentence-avg`, else target tokens."""
        return int(sample["target"].size(0) if self.sentence_avg else sample["ntokens"])
