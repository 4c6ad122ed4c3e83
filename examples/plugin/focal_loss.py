"""A criterion: tokens already predicted well count less (Lin et al., 2017, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq_lite.config.flags import flag
from fairseq_lite.criteria.api import CRITERIA, Criterion
from fairseq_lite.criteria.cross_entropy import base2


@dataclass(frozen=True)
class FocalLossConfig:
    focal_gamma: float = flag(2.0, "how much less well-predicted tokens count; 0 is cross-entropy")


@CRITERIA.register("focal_loss", config=FocalLossConfig)
class FocalLoss(Criterion):
    """The sum of (1 - p)^gamma * -log p over the target tokens."""

    def forward(self, model, sample):
        net_output = model(**sample["net_input"])
        target = model.get_targets(sample, net_output)
        lprobs = model.get_normalized_probs(net_output, log_probs=True)
        lprob = lprobs.gather(-1, target[..., None])[..., 0][target != self.padding_idx]
        loss = ((1 - lprob.exp()) ** self.cfg.focal_gamma * -lprob).sum()
        sample_size = self.sample_size(sample)
        sums = {"loss": loss.detach(), "nll_loss": -lprob.detach().sum()}
        sums |= {"ntokens": sample["ntokens"], "nsentences": len(target)}
        return loss, sample_size, {**sums, "sample_size": sample_size}

    def metrics(self, sums):
        nll = base2(sums["nll_loss"], sums["ntokens"])
        return {"loss": base2(sums["loss"], sums["sample_size"]), "nll_loss": nll, "ppl": 2**nll}
