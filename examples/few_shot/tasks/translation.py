"""Translation of WMT's test sets, from the files that sacrebleu keeps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask
from fairseq_lite.errors import DataError

# Task -> language pair, where shots come from, what is translated: names of sacrebleu's test sets.
# WMT 2016 is the first with Romanian, so its shots are other sentences of the test set.
WMT = {
    "wmt14fren": ("fr-en", "wmt13", "wmt14"),
    "wmt14enfr": ("en-fr", "wmt13", "wmt14"),
    "wmt16deen": ("de-en", "wmt15", "wmt16"),
    "wmt16ende": ("en-de", "wmt15", "wmt16"),
    "wmt16roen": ("ro-en", "wmt16", "wmt16"),
    "wmt16enro": ("en-ro", "wmt16", "wmt16"),
}


class Translation(FewShotTask):
    """One direction of a WMT test set, one reference a sentence.

    The files are SET/SET.PAIR.src and SET/SET.PAIR.ref in `sacrebleu` below the data folder, or
    where `sacrebleu -t SET -l PAIR --echo src` puts them: in $SACREBLEU or ~/.sacrebleu. A set may
    also be a file *.src, beside which its *.ref lies. Nothing is downloaded here.
    """

    kind = "generation"
    template = "mt"
    metrics = ("bleu",)
    max_new_tokens = 256

    def path(self, set_name: str) -> Path:
        if set_name not in self.sets:
            return super().path(set_name)
        (inside,) = (self.sets[set_name],)
        own = Path(os.environ.get("SACREBLEU") or Path.home() / ".sacrebleu")
        places = [self.data_dir / str(inside), own / str(inside).partition("/")[2]]
        for place in places:
            if place.exists():
                return place
        pair = places[0].name.split(".")[-2]
        raise DataError(
            f"task {self.name}: {places[0]} and {places[1]} are missing; fetch them with"
            f" sacrebleu -t {set_name} -l {pair} --echo src"
        )

    def beside(self, path: Path) -> Iterable[Path]:
        return (path.with_suffix(".ref"),)

    def rows(self, path: Path) -> Iterator[files.Row]:
        (reference,) = self.beside(path)
        sources, targets = list(files.read_lines(path)), list(files.read_lines(reference))
        if len(sources) != len(targets):
            raise DataError(f"{path}: {len(sources)} lines; {reference.name} has {len(targets)}")
        for (source, where), (target, _) in zip(sources, targets, strict=True):
            yield {"source": source, "target": target}, where

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        return FewShotSample({"source": row["source"]}, (), (row["target"],), where=where)


def _direction(name: str) -> type[Translation]:
    pair, train, test = WMT[name]
    sets = {each: f"sacrebleu/{each}/{each}.{pair}.src" for each in dict.fromkeys((train, test))}
    members = {
        "__doc__": f"{pair} of {test} (Bojar et al.), shots of {train}; files of sacrebleu.",
        "__module__": __name__,
        "sets": sets,
        "train_set": train,
        "eval_set": test,
    }
    return type(f"Translation_{name}", (Translation,), members)


for _name in WMT:
    TASKS.register(_name)(_direction(_name))
