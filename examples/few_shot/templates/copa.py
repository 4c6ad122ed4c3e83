"""Templates of COPA and its translations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate
from examples.few_shot.templates.text import decapitalised, without_stop
from fairseq_lite.config.flags import flag


@dataclass(frozen=True)
class COPAConfig:
    """What stands between premise and choice."""

    cause_conj: str = flag(" because ", "COPA: between an effect and its cause")
    effect_conj: str = flag(" so ", "COPA: between a cause and its effect")
    capitalization: str = flag(
        "correct",
        "COPA: the first word of a choice is lower-cased unless it is I (correct), or left as it is"
        " (bug); or premise and choice are in capitals (upper), or in small letters (lower)",
        choices=("correct", "bug", "upper", "lower"),
    )


def joined(premise: str, conjunction: str) -> str:
    """A premise without its full stop and what follows it; alone, the conjunction begins."""
    premise = without_stop(premise)
    return premise + conjunction if premise else conjunction.lstrip(" ,，")


@TEMPLATES.register("copa", config=COPAConfig)
class COPATemplate(FewShotTemplate):
    """The premise without its full stop, a conjunction, the choice."""

    cfg: COPAConfig

    def encode(self, sample: FewShotSample) -> str:
        effect = sample["question"] == "effect"
        prompt = joined(
            str(sample["premise"]), self.cfg.effect_conj if effect else self.cfg.cause_conj
        )
        return self._cased(prompt) + MASK

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        if self.cfg.capitalization == "correct":
            return decapitalised(candidate)
        return self._cased(candidate)

    def _cased(self, text: str) -> str:
        if self.cfg.capitalization == "upper":
            return text.upper()
        return text.lower() if self.cfg.capitalization == "lower" else text


Conjunctions = Mapping[str, tuple[str, str]]

# In front of a cause and of an effect, punctuated as the language does.
_IN_USE: Conjunctions = {
    "en": (" because ", " so "),
    "et": (", sest ", ", seega "),
    "ht": (" paske ", ", kidonk "),
    "id": (" karena ", " sehingga "),
    "it": (" perché ", ", quindi "),
    "qu": (", imaraykuchus ", ", chayrayku "),
    "ru": (", потому что ", ", поэтому "),
    "sw": (" kwa sababu ", ", kwa hiyo "),
    "ta": (", ஏனெனில் ", ", எனவே "),
    "th": ("เพราะ", " ดังนั้น"),
    "tr": (" çünkü ", ", bu yüzden "),
    "vi": (" vì ", ", vì vậy "),
    "zh": ("，因为", "，所以"),
}

# "because" and "so" as a dictionary has them, between spaces.
_WORD_BY_WORD: Conjunctions = {
    "en": (" because ", " so "),
    "et": (" sest ", " nii et "),
    "ht": (" paske ", " donk "),
    "id": (" karena ", " jadi "),
    "it": (" perché ", " così "),
    "qu": (" imarayku ", " chaymi "),
    "ru": (" потому что ", " так что "),
    "sw": (" kwa sababu ", " hivyo "),
    "ta": (" ஏனெனில் ", " எனவே "),
    "th": (" เพราะ ", " ดังนั้น "),
    "tr": (" çünkü ", " yani "),
    "vi": (" bởi vì ", " nên "),
    "zh": ("因为", "所以"),
}

_NONE: Conjunctions = {"en": (" ", " "), "zh": ("", "")}


class _XCOPA(FewShotTemplate):
    """The premise without its full stop, a conjunction of a language, the choice.

    Attributes:
        conjunctions: of each language; where one has none, those of English.
        fixed: the language of the conjunctions, whatever that of the sample.
    """

    conjunctions: ClassVar[Conjunctions] = _IN_USE
    fixed: ClassVar[str | None] = None

    def encode(self, sample: FewShotSample) -> str:
        known = self.conjunctions
        language = self.fixed or self._language(sample)
        cause, effect = known[language if language in known else "en"]
        conjunction = effect if sample["question"] == "effect" else cause
        return joined(str(sample["premise"]), conjunction) + MASK

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return decapitalised(candidate, self._language(sample))

    def _language(self, sample: FewShotSample) -> str:
        return str(sample.get("lang") or self.language or "en")


@TEMPLATES.register("xcopa")
class XCOPATemplate(_XCOPA):
    """The conjunction as the language uses it."""


@TEMPLATES.register("xcopa_mt")
class XCOPAWordByWordTemplate(_XCOPA):
    """The conjunction translated word by word."""

    conjunctions = _WORD_BY_WORD


@TEMPLATES.register("xcopa__en")
class XCOPAEnglishTemplate(_XCOPA):
    """English conjunctions in any language."""

    fixed = "en"


@TEMPLATES.register("xcopa_simple")
class XCOPASimpleTemplate(_XCOPA):
    """No conjunction: the choice behind the premise."""

    conjunctions = _NONE
