"""Natural language inference: does one text entail another, contradict it, or neither."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import GROUPS, TASKS, FewShotTask, Paths
from examples.few_shot.tasks.common import pair

LABELS = ("entailment", "contradiction", "neutral")

# As data sets write them.
_SPELLINGS = {
    "e": "entailment",
    "c": "contradiction",
    "n": "neutral",
    "contradictory": "contradiction",
    **{label: label for label in LABELS},
}


def relation(label: str | None) -> str | None:
    """The candidate that a label stands for; None for no label.

    Raises:
        ValueError: none of them.
    """
    if label is None or label in _SPELLINGS:
        return None if label is None else _SPELLINGS[label]
    raise ValueError(f"label {label!r}; expected one of {', '.join(LABELS)}")


@TASKS.register("snli")
class SNLI(FewShotTask):
    """Stanford's corpus (Bowman et al. 2015): JSON lines; rows without a majority are left out."""

    sets = {  # noqa: RUF012
        name: (f"SNLI/{name}.jsonl", f"snli_1.0/snli_1.0_{name}.jsonl")
        for name in ("train", "dev", "test")
    }
    train_set = "train"
    eval_set = "dev"
    template = "gpt3stylenli"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        label = row.get("gold_label")
        if label == "-":
            return None
        return pair(row["sentence1"], row["sentence2"], LABELS, relation(label), where)


def _mnli(name: str) -> tuple[str, ...]:
    return (f"MNLI/{name}.tsv", f"multinli_1.0/multinli_1.0_{name}.jsonl")


@TASKS.register("mnlimatched")
class MNLIMatched(SNLI):
    """MultiNLI (Williams et al. 2018), genres of the training rows: GLUE's TSV or JSON lines."""

    sets = {  # noqa: RUF012
        name: _mnli(name)
        for name in ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
    }
    eval_set = "dev_matched"


@TASKS.register("mnlimismatched")
class MNLIMismatched(MNLIMatched):
    """MultiNLI, other genres than those of the training rows."""

    eval_set = "dev_mismatched"


class _ANLI(FewShotTask):
    """A round of adversarial NLI (Nie et al. 2020), in its JSON lines."""

    train_set = "train"
    eval_set = "dev"
    template = "gpt3stylenli"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        label = relation(row.get("label"))
        return pair(row["context"], row["hypothesis"], LABELS, label, where)


def _anli(number: int) -> dict[str, Paths]:
    return {
        name: (f"anli/R{number}/{name}.jsonl", f"anli_v1.0/R{number}/{name}.jsonl")
        for name in ("train", "dev", "test")
    }


@TASKS.register("anlir1")
class ANLIR1(_ANLI):
    """The first round of adversarial NLI (Nie et al. 2020)."""

    sets = _anli(1)


@TASKS.register("anlir2")
class ANLIR2(_ANLI):
    """The second round of adversarial NLI (Nie et al. 2020)."""

    sets = _anli(2)


@TASKS.register("anlir3")
class ANLIR3(_ANLI):
    """The third round of adversarial NLI (Nie et al. 2020)."""

    sets = _anli(3)


@TASKS.register("gluediag")
class GLUEDiagnostics(FewShotTask):
    """GLUE's diagnostic set (Wang et al. 2018, section 4): NLI by kinds of difficulty.

    The TSV with answers: Lexical Semantics, Predicate-Argument Structure, Logic, Knowledge, Domain,
    Premise, Hypothesis, Label. There is nothing to take shots from.
    """

    sets = {  # noqa: RUF012
        "test": (
            "glue_diagnostics/test.tsv",
            "glue_diagnostics/diagnostic-full.tsv",
            "MNLI/diagnostic-full.tsv",
        )
    }
    eval_set = "test"
    max_shots = 0
    template = "gpt3stylenli"
    metrics = ("r3", "accuracy")
    categories = ("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge")

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if row["Label"] == "-":
            return None
        kinds = {name: row[name] for name in self.categories}
        label = relation(row["Label"])
        return pair(row["Premise"], row["Hypothesis"], LABELS, label, where, **kinds)


GROUPS["anli"] = ("anlir1", "anlir2", "anlir3")
GROUPS["mnli"] = ("mnlimatched", "mnlimismatched")
