"""What a template is: a sample as text with one `<mask>`, where the answer belongs.

    @TEMPLATES.register("mytask")
    class MyTemplate(FewShotTemplate):
        "Question ⏎ answer."
        def encode(self, sample):
            return self.lines(("Question:", sample["question"]), ("Answer:", MASK))

An empty field vanishes together with its label: calibration takes the content out of a prompt by
emptying fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from examples.few_shot.samples import FewShotSample
from fairseq_lite.errors import DataError
from fairseq_lite.registry import NoConfig, Registry

TEMPLATES = Registry("template", "--TASK-template")

MASK = "<mask>"


NO_CONFIG = NoConfig()


class FewShotTemplate(ABC):
    """From samples to prompts and back.

    Attributes:
        task_description: said once, in front of the shots; empty for the task's own.

    Args:
        cfg: the values of its own options.
        sep: what stands between shots, `--train-sep`; `lines` joins fields with it too.
        language: of the samples.
    """

    task_description: ClassVar[str] = ""

    def __init__(
        self, cfg: Any = NO_CONFIG, *, sep: str = " ", language: str | None = None
    ) -> None:
        self.cfg = cfg
        self.sep = sep
        self.language = language

    @abstractmethod
    def encode(self, sample: FewShotSample) -> str:
        """The prompt, with exactly one MASK; at the end where the model writes the answer."""

    def verbalize(self, sample: FewShotSample, candidate: str) -> str:
        """The words that stand for a candidate in place of the mask."""
        return candidate

    def postprocess(self, sample: FewShotSample, text: str) -> str:
        """What a written answer is compared as."""
        return text.strip()

    def encode_correct_candidate(self, sample: FewShotSample) -> str:
        """The sample as a shot: its prompt with the answer; of several the first.

        Raises:
            DataError: the sample has none.
        """
        if sample.subproblems:
            return self.sep.join(self.encode_correct_candidate(each) for each in sample.subproblems)
        if not sample.correct:
            raise DataError(f"{sample.where}: has no answer and cannot be a shot")
        return self.fill(sample, sample.correct[0])

    def fill(self, sample: FewShotSample, candidate: str) -> str:
        """The prompt with a candidate in place of its mask."""
        before, after = self.split(sample)
        return before + self.verbalize(sample, candidate) + after

    def split(self, sample: FewShotSample) -> tuple[str, str]:
        """The prompt in front of the mask and behind it.

        Raises:
            DataError: there is no mask, or the sample's own text has one.
        """
        before, mask, after = self.encode(sample).partition(MASK)
        if not mask or MASK in after:
            raise DataError(
                f"{sample.where or 'a sample'}: {type(self).__name__} must give one {MASK}, found"
                f" {after.count(MASK) + len(mask) // len(MASK)}; a row may not have it in its text"
            )
        return before, after

    def lines(self, *fields: tuple[str, str]) -> str:
        """Labels with their texts, joined by the separator; what is empty goes with its label."""
        return self.sep.join(f"{label} {text}" if label else text for label, text in fields if text)


def build_template(name: str, cfg: Any, *, sep: str, language: str | None) -> FewShotTemplate:
    """A template that is registered.

    Raises:
        ConfigError: unknown.
    """
    template: FewShotTemplate = TEMPLATES.get(name).factory(cfg, sep=sep, language=language)
    return template
