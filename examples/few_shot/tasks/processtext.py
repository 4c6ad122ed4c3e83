"""Any file of texts with candidates: to try a model on a few lines of one's own."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask


@TASKS.register("processtext")
class ProcessText(FewShotTask):
    """JSON lines of `text` and `candidates`, and `answer`: a candidate, or several.

    The candidates stand where the text has <mask>, or behind it. --processtext-eval-set names the
    file.
    """

    eval_set = None
    template = "processtext"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if not row["candidates"]:
            raise ValueError("has no candidates")
        answers = row.get("answer", [])
        answers = [answers] if isinstance(answers, str) else answers
        return FewShotSample(row, tuple(row["candidates"]), tuple(answers), where=where)
