"""LAMA: facts as sentences with one word left out, which is ranked among all words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import GROUPS, TASKS, FewShotTask
from fairseq_lite.errors import DataError

GAP = "[MASK]"

# Templates of Google-RE, which LAMA has in its code and not in its data.
_GOOGLE_RE = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}


class LAMA(FewShotTask):
    """A part of LAMA (Petroni et al. 2019).

    What is ranked is one token: of an answer of several the first. In `mlama_trex` and
    `mlama_googlere`, whose languages have English among them, whole answers are compared.

    Samples have the fields `sentence`, with [MASK] where the answer belongs, `relation`, `subject`
    and `answer`; the answer is the one candidate. A fact that is there twice is asked once.
    """

    kind = "ranking"
    template = "lama"
    metrics = ("precision@1", "precision@10", "mrr")

    def rows(self, path: Path) -> Iterator[files.Row]:
        """Of a file, or of all files of a folder."""
        for each in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            yield from files.read_jsonl(each)

    def read(self, path: Path) -> Iterator[FewShotSample]:
        seen = set()
        for each in super().read(path):
            key = each["relation"], each["sentence"], each["answer"]
            if key not in seen:
                seen.add(key)
                yield each

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        sentence = " ".join(row["masked_sentences"])
        # A few sentences have the answer twice: both places cannot be asked for at once.
        if sentence.count(GAP) != 1:
            return None
        return fact(sentence, row.get("pred", ""), row.get("sub", ""), row["obj_label"], where)


def fact(sentence: str, relation: str, subject: str, answer: str, where: str) -> FewShotSample:
    """A sentence with a gap as a sample."""
    data = {"sentence": sentence, "relation": relation, "subject": subject, "answer": answer}
    return FewShotSample(data, (answer,), (answer,), where=where)


def filled(template: str, subject: str) -> str:
    """A relation's template with its subject, and a gap for its object."""
    if template.count("[X]") != 1 or template.count("[Y]") != 1:
        raise ValueError(f"template {template!r} needs one [X] and one [Y]")
    return template.replace("[Y]", GAP).replace("[X]", subject)


@TASKS.register("lama_conceptnet")
class LAMAConceptNet(LAMA):
    """LAMA (Petroni et al. 2019): sentences for triples of ConceptNet."""

    sets = {  # noqa: RUF012
        "conceptnet_test": ("LAMA/ConceptNet/test.jsonl", "lama/ConceptNet/test.jsonl")
    }
    eval_set = "conceptnet_test"


@TASKS.register("lama_squad")
class LAMASquad(LAMA):
    """LAMA (Petroni et al. 2019): questions of SQuAD as sentences."""

    sets = {"squad_test": ("LAMA/Squad/test.jsonl", "lama/Squad/test.jsonl")}  # noqa: RUF012
    eval_set = "squad_test"


@TASKS.register("lama_googlere")
class LAMAGoogleRE(LAMA):
    """LAMA (Petroni et al. 2019): birth and death of people, by LAMA's templates."""

    sets = {"googlere": ("LAMA/Google_RE", "lama/Google_RE")}  # noqa: RUF012
    eval_set = "googlere"

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        relation = row["pred"].rpartition("/")[2]
        sentence = filled(_GOOGLE_RE[relation], row["sub_label"])
        return fact(sentence, relation, row["sub_label"], row["obj_label"], where)


@TASKS.register("lama_trex")
class LAMATREx(LAMA):
    """LAMA (Petroni et al. 2019): triples of T-REx, by the templates of relations.jsonl.

    The rows of one file may have their templates with them (`template`) instead.
    """

    sets = {"trex": ("LAMA/TREx", "lama/TREx", "lama/trex16.jsonl")}  # noqa: RUF012
    eval_set = "trex"

    def beside(self, path: Path) -> Iterable[Path]:
        return (path.parent / "relations.jsonl",) if path.is_dir() else ()

    def rows(self, path: Path) -> Iterator[files.Row]:
        templates: dict[str, str] = {}
        for each in self.beside(path):
            templates |= relation_templates(each)
        for row, where in super().rows(path):
            yield {"template": templates.get(row.get("predicate_id", ""))} | row, where

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        if row["template"] is None:
            raise DataError(f"{where}: relations.jsonl has no {row['predicate_id']}")
        sentence = filled(row["template"], row["sub_label"])
        return fact(sentence, row["predicate_id"], row["sub_label"], row["obj_label"], where)


def relation_templates(path: Path) -> Mapping[str, str]:
    """The template of every relation.

    Raises:
        DataError: a row does not have both.
    """
    found = {}
    for row, where in files.read_jsonl(path):
        if "relation" not in row or "template" not in row:
            raise DataError(f"{where}: expected `relation` and `template`")
        found[row["relation"]] = row["template"]
    return found


GROUPS["lama"] = ("lama_conceptnet", "lama_googlere", "lama_squad", "lama_trex")
