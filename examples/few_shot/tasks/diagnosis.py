"""Small lists of which one entry is asked for: what a model makes of its shots."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.tasks.api import GROUPS, TASKS, FewShotTask

# The entry of a kind (a brand among other words), or at a place.
KINDS = ("brand", "city", "country", "name", "pos1", "pos2", "pos3", "pos4")


class Diagnosis(FewShotTask):
    """Rows of `choices` and `label`, the number of the right one; candidates are the numbers.

    Which entry it is, only shots say.
    """

    train_set, eval_set = "train", "test"
    template = "diagnosis"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        numbers = [str(n) for n in range(len(row["choices"]))]
        return choice({"choices": list(row["choices"])}, numbers, row["label"], where)


def _task(kind: str) -> type[Diagnosis]:
    what = f"the entry at place {kind[3:]}" if kind.startswith("pos") else f"the {kind}"
    members = {
        "__doc__": f"Diagnosis: {what} of a list.",
        "__module__": __name__,
        "sets": {each: f"diagnosis/{kind}.{each}.jsonl" for each in ("train", "test")},
    }
    return type(f"Diagnosis_{kind}", (Diagnosis,), members)


for _kind in KINDS:
    TASKS.register(f"diagnosis{_kind}")(_task(_kind))
GROUPS["diagnosis"] = tuple(f"diagnosis{kind}" for kind in KINDS)
