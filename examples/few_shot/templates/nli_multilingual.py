"""Templates of XNLI and PAWS-X, in the language of the sample or in a fixed one.

`_mt` says the English template word by word in another language, `_ht` as its speakers do; a
language behind two underscores is fixed, whatever the language of the sample. Shots in another
language than the question are put in their own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from examples.few_shot.samples import FewShotSample
from examples.few_shot.templates.api import MASK, TEMPLATES, FewShotTemplate
from examples.few_shot.templates.nli_words import (
    PAWSX,
    TAGS_IN_USE,
    TAGS_WORD_BY_WORD,
    XNLI,
    QuestionWords,
    TagWords,
)
from examples.few_shot.templates.text import capitalised, decapitalised, ended, without_marks
from fairseq_lite.errors import ConfigError, DataError


class _Spoken(FewShotTemplate):
    """A template that speaks several languages.

    Attributes:
        fixed: the language it speaks; None for that of the sample.
    """

    fixed: ClassVar[str | None] = None

    def spoken(self, sample: FewShotSample, known: Mapping[str, object]) -> str:
        """The language of the words for a sample.

        Raises:
            ConfigError: there are no words in it.
        """
        language = self.fixed or str(sample.get("lang") or self.language or "en")
        if language not in known:
            raise ConfigError(
                f"{type(self).__name__}: has no words in {language!r}; it has {', '.join(known)}:"
                " choose a template with a fixed language"
            )
        return language


class _Question(_Spoken):
    """Two labelled sentences, a question about them, the answer.

    Attributes:
        words: what is said, by language.
    """

    words: ClassVar[Mapping[str, QuestionWords]] = XNLI

    def encode(self, sample: FewShotSample) -> str:
        return " ".join(filter(None, self._parts(sample)))

    def _parts(self, sample: FewShotSample) -> tuple[str, str, str]:
        said = self._said(sample)
        first, second = sample["premise"], sample["hypothesis"]
        return (
            f"{said.first}{first}" if first else "",
            f"{said.second}{second}" if second else "",
            f"{said.question} {MASK}",
        )

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        return _word(self, sample, self._said(sample).answers, candidate)

    def _said(self, sample: FewShotSample) -> QuestionWords:
        return self.words[self.spoken(sample, self.words)]


class _Tag(_Spoken):
    """The first sentence, right? The answer, the second sentence.

    Attributes:
        words: what is said, by language.
        apart: the tag is a sentence of its own.
    """

    words: ClassVar[Mapping[str, TagWords]] = TAGS_WORD_BY_WORD
    apart: ClassVar[bool] = False

    def encode(self, sample: FewShotSample) -> str:
        said = self._said(sample)
        first, second = sample["premise"], decapitalised(sample["hypothesis"], sample.get("lang"))
        if self.apart:
            first = ended(first)
            tag = capitalised(said.tag) if said.tag[0] != "¿" else f"¿{capitalised(said.tag[1:])}"
            between = said.gap
        else:
            first = capitalised(without_marks(first))
            tag, between = said.tag, said.comma
        before = f"{first}{between}{tag}{said.gap}" if first else ""
        return before + MASK + (f"{said.comma}{second}" if second else "")

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        said = self._said(sample)
        answers = dict.fromkeys(("entailment", "true"), said.yes)
        answers |= dict.fromkeys(("contradiction", "not_entailment", "false"), said.no)
        return _word(self, sample, answers | {"neutral": said.also}, candidate)

    def _said(self, sample: FewShotSample) -> TagWords:
        return self.words[self.spoken(sample, self.words)]


def _word(
    template: FewShotTemplate, sample: FewShotSample, answers: Mapping[str, str], candidate: str
) -> str:
    if candidate not in answers:
        raise DataError(
            f"{sample.where}: {type(template).__name__} has no word for {candidate!r}; it has words"
            f" for {', '.join(answers)}: choose another template"
        )
    return answers[candidate]


@TEMPLATES.register("xnli__en")
class XNLIEnglishTemplate(_Question):
    """Paragraph, Question, True, False, or Neither? in English."""

    fixed = "en"


@TEMPLATES.register("xnli_mt")
class XNLITemplate(_Question):
    """As xnli__en, in the language of the sample."""


@TEMPLATES.register("xnli_generativenli__en", aliases=("xnli_generativenli_base",))
class XNLIGenerativeEnglishTemplate(_Tag):
    """Premise, right? Yes, No or Also, hypothesis."""

    fixed = "en"


@TEMPLATES.register("xnli_generativenli_mt")
class XNLIGenerativeTemplate(_Tag):
    """As xnli_generativenli__en, word by word in the language of the sample."""


@TEMPLATES.register("xnli_generativenli_ht")
class XNLIGenerativeInUseTemplate(_Tag):
    """As xnli_generativenli__en, as one says it in the language of the sample."""

    words = TAGS_IN_USE


@TEMPLATES.register("xnli_generativenli_sentence__en")
class XNLISentenceEnglishTemplate(_Tag):
    """Premise. Right? Yes, No or Also, hypothesis."""

    fixed = "en"
    apart = True


@TEMPLATES.register("xnli_generativenli_sentence_mt")
class XNLISentenceTemplate(_Tag):
    """As xnli_generativenli_sentence__en, word by word in the language of the sample."""

    apart = True


@TEMPLATES.register("pawsx__en", aliases=("pawsx_default",))
class PAWSXEnglishTemplate(_Question):
    """Sentence 1, Sentence 2, whether they mean the same, True or False, in English."""

    words = PAWSX
    fixed = "en"


@TEMPLATES.register("pawsx_mt", aliases=("pawsx_googletranslate",))
class PAWSXTemplate(_Question):
    """As pawsx__en, in the language of the sample."""

    words = PAWSX


@TEMPLATES.register("pawsx_conditional_mt")
class PAWSXConditionalTemplate(PAWSXTemplate):
    """As pawsx_mt, question and answer in front of the sentences."""

    def encode(self, sample: FewShotSample) -> str:
        first, second, question = self._parts(sample)
        return " ".join(filter(None, (question, first, second)))


@TEMPLATES.register("pawsx_generativenli__en")
class PAWSXGenerativeEnglishTemplate(_Tag):
    """Sentence 1, right? Yes or No, sentence 2."""

    fixed = "en"


@TEMPLATES.register("pawsx_generativenli_mt")
class PAWSXGenerativeTemplate(_Tag):
    """As pawsx_generativenli__en, word by word in the language of the sample."""


@TEMPLATES.register("pawsx_generativenli_ht")
class PAWSXGenerativeInUseTemplate(_Tag):
    """As pawsx_generativenli__en, as one says it in the language of the sample."""

    words = TAGS_IN_USE


def _in(base: type[_Question], language: str) -> type[_Question]:
    """A template in one language."""
    text = f"{(base.__doc__ or '').rstrip('.')}; here always {language!r}."
    name = f"{base.__name__}_{language}"
    return type(name, (base,), {"fixed": language, "__doc__": text, "__module__": __name__})


for _language in XNLI:
    if _language != "en":
        TEMPLATES.register(f"xnli_mt__{_language}")(_in(XNLITemplate, _language))
for _language in PAWSX:
    if _language != "en":
        TEMPLATES.register(f"pawsx_mt__{_language}")(_in(PAWSXTemplate, _language))
