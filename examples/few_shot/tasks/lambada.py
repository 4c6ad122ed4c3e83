"""LAMBADA: the last word of a passage."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask


@TASKS.register("lambada")
class LAMBADA(FewShotTask):
    """LAMBADA (Paperno et al. 2016): rows of `text`, or of `context` and `continuation`.

    The last word is the one candidate: the question is whether the model would write it.
    """

    sets = {  # noqa: RUF012
        "test": ("lambada/lambada_test.jsonl", "llmfoundry/lambada_openai.jsonl",
                 "llmfoundry/lambada_openai_small.jsonl"),
    }  # fmt: skip
    eval_set = "test"
    template = "lambada"
    metrics = ("last_word_accuracy",)

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if "continuation" in row:
            context, word = row["context"], row["continuation"].strip()
        else:
            context, _, word = row["text"].strip().rpartition(" ")
        if not context.strip() or not word:
            raise ValueError("needs a passage and its last word")
        return FewShotSample({"context": context.rstrip()}, (word,), (word,), where=where)
