"""Templates of COPA and its translations."""

from __future__ import annotations

from dataclasses import dataclass

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate
from fairseq_lite.config.flags import flag


@dataclass(frozen=True)
class COPAConfig:
    """What stands between premise and choice."""

    cause_conj: str = flag(" because ", "COPA: between an effect and its cause")
    effect_conj: str = flag(" so ", "COPA: between a cause and its effect")
    capitalization: str = flag(
        "correct",
        "COPA: the first word of a choice: lower-cased unless it is I (correct), or"
        " always (bug), the whole choice in capitals (upper) or in small letters (lower)",
        choices=("correct", "bug", "upper", "lower"),
    )


@TEMPLATES.register("copa", config=COPAConfig)
class COPATemplate(FewShotTemplate):
    """The premise without its full stop, a conjunction, the choice."""

    cfg: COPAConfig

    def encode(self, sample: FewShotSample) -> str:
        premise = str(sample["premise"]).strip().rstrip(".")
        effect = sample["question"] == "effect"
        return premise + (self.cfg.effect_conj if effect else self.cfg.cause_conj) + MASK

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        way = self.cfg.capitalization
        if way == "upper":
            return candidate.upper()
        if way == "lower":
            return candidate.lower()
        first, space, rest = candidate.partition(" ")
        keep = way == "correct" and (first == "I" or first.startswith("I'"))
        return candidate if keep else first[:1].lower() + first[1:] + space + rest
