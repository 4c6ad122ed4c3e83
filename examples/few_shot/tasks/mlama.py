"""mLAMA: facts in many languages; the object is chosen among all objects of its relation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from examples.few_shot import files, sampling
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import GROUPS, TASKS, FewShotTask
from examples.few_shot.tasks.lama import filled, relation_templates
from fairseq_lite.config.flags import flag
from fairseq_lite.errors import DataError


@dataclass(frozen=True)
class MLAMAConfig:
    """How many objects there are to choose from."""

    max_cands: int = flag(
        0, "mLAMA: candidates of a question, the right one among them, always the same; 0 for all"
    )


class MLAMA(FewShotTask):
    """A part of mLAMA (Kassner et al. 2021), the folder mlama1.1.

    The candidates are the objects that OBJECTS/LANG.json lists for the relation, or, without that
    file, those of the relation's own facts.
    """

    cfg: MLAMAConfig
    template = "mlama"
    metrics = ("mlama", "accuracy")
    pattern: ClassVar[str] = ""
    objects: ClassVar[str] = ""

    def beside(self, path: Path) -> Iterable[Path]:
        listed = self._list(path)
        return (path / "templates.jsonl", *([listed] if listed.exists() else ()))

    def read(self, path: Path) -> Iterator[FewShotSample]:
        """The facts of a language's folder, relation by relation."""
        templates = relation_templates(path / "templates.jsonl")
        listed = self._listed(path)
        for file in sorted(path.glob(self.pattern)):
            relation = file.name.removesuffix(".jsonl")
            rows = list(files.read_jsonl(file))
            if relation not in templates:
                raise DataError(f"{path / 'templates.jsonl'}: has no template for {relation}")
            try:
                labels = [row["obj_label"] for row, _ in rows]
                # One tuple for all facts of the relation, which may have a thousand objects.
                known = tuple(sorted({*labels, *listed.get(relation, {}).get("objects", ())}))
                for row, where in rows:
                    yield self._fact(row, where, relation, templates[relation], known)
            except (KeyError, TypeError, ValueError) as e:
                raise DataError(f"{file}: is no file of {self.name}: {e}") from None

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        raise AssertionError("facts need the objects of their relation: see `read`")

    def _list(self, path: Path) -> Path:
        return path.parent / self.objects / f"{self.language}.json"

    def _listed(self, path: Path) -> dict[str, Any]:
        file = self._list(path)
        return dict(files.read_json(file)) if file.exists() else {}

    def _fact(
        self, row: dict[str, Any], where: str, relation: str, template: str,
        known: tuple[str, ...],
    ) -> FewShotSample:  # fmt: skip
        answer, subject = row["obj_label"], row["sub_label"]
        data = {
            "sentence": filled(template, subject),
            "relation": relation,
            "subject": subject,
            "answer": answer,
        }
        return FewShotSample(data, self._candidates(data, known), (answer,), where=where)

    def _candidates(self, data: dict[str, Any], known: tuple[str, ...]) -> tuple[str, ...]:
        """All objects or a few, in the order of the alphabet, the right one among them."""
        if not self.cfg.max_cands or len(known) <= self.cfg.max_cands:
            return known
        key = f"{data['relation']}/{data['subject']}/{data['answer']}"
        others = [each for each in known if each != data["answer"]]
        drawn = sampling.order(len(others), seed=0, trial=0, task=key)[: self.cfg.max_cands - 1]
        return tuple(sorted([data["answer"], *(others[i] for i in drawn)]))


_LANGUAGES = """
    af ar az be bg bn ca ceb cs cy da de el en es et eu fa fi fr ga gl he hi hr hu hy id it ja ka ko
    la lt lv ms nl pl pt ro ru sk sl sq sr sv ta th tr uk ur vi zh
""".split()
_WITHOUT_GOOGLE_RE = "af az be ceb cy et he ka la ms ta ur zh".split()


@TASKS.register("mlama_trex", config=MLAMAConfig)
class MLAMATREx(MLAMA):
    """mLAMA (Kassner et al. 2021): triples of T-REx in 53 languages."""

    sets = {"trex": "mlama1.1/{lang}"}  # noqa: RUF012
    eval_set = "trex"
    languages = tuple(_LANGUAGES)
    pattern = "P*.jsonl"
    objects = "TREx_multilingual_objects"


@TASKS.register("mlama_googlere", config=MLAMAConfig)
class MLAMAGoogleRE(MLAMA):
    """mLAMA (Kassner et al. 2021): birth and death of people in 40 languages."""

    sets = {"googlere": "mlama1.1/{lang}"}  # noqa: RUF012
    eval_set = "googlere"
    languages = tuple(each for each in _LANGUAGES if each not in _WITHOUT_GOOGLE_RE)
    pattern = "*_of_*.jsonl"
    objects = "GoogleRE_objects"


GROUPS["mlama"] = ("mlama_googlere", "mlama_trex")
