"""CrowS-Pairs: which of two sentences a model holds more likely, a stereotype or its opposite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import TASKS, FewShotTask


@TASKS.register("crowspairs")
class CrowSPairs(FewShotTask):
    """CrowS-Pairs (Nangia et al. 2020), without shots.

    The candidate `sent_more` is the more stereotyping sentence. It counts as the gold one so that
    perplexities of both are told apart; it is no right answer. The field `prompt` is what the
    sentence was written after, from prompts.csv beside the file; None without that.
    """

    sets = {  # noqa: RUF012
        "test": (
            "crows_pairs/crows_pairs_anonymized.csv",
            "crows_pairs/data/crows_pairs_anonymized.csv",
        )
    }
    eval_set = "test"
    max_shots = 0
    template = "crowspairs"
    metrics = ("crowspairs",)

    def beside(self, path: Path) -> Iterable[Path]:
        return filter(Path.exists, [path.with_name("prompts.csv")])

    def rows(self, path: Path) -> Iterator[files.Row]:
        prompts: dict[str, str] = {}
        for each in self.beside(path):
            for row, _ in files.read_csv(each):
                prompts[row.get("", "")] = row.get("prompt", "")
        for row, where in files.read_csv(path):
            yield row | {"prompt": prompts.get(row.get("", ""))}, where

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        fields = ("sent_more", "sent_less", "stereo_antistereo", "bias_type", "prompt")
        data = {field: row[field] for field in fields}
        if data["stereo_antistereo"] not in ("stereo", "antistereo"):
            raise ValueError(f"stereo_antistereo is {data['stereo_antistereo']!r}")
        return choice(data, ("sent_more", "sent_less"), 0, where)
