"""WMT's test sets through sacrebleu's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from sacrebleu.dataset import DATASETS

from examples.few_shot.metrics.api import build_metric
from examples.few_shot.predictors.api import Prediction, ScoredCandidate
from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.translation import WMT
from tests.helpers.few_shot_tasks import make_task, make_template, reason, scores_of, write_text


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of sacrebleu's own."""
    monkeypatch.setenv("SACREBLEU", str(tmp_path / "home"))
    return tmp_path / "home"


def test_translation(tmp_path: Path, no_home: Path) -> None:
    write_text(tmp_path / "sacrebleu/wmt16/wmt16.de-en.src", "Guten Tag.\nDanke\u2028sehr.\n")
    write_text(tmp_path / "sacrebleu/wmt16/wmt16.de-en.ref", "Good day.\nThank you.\n")
    task = make_task("wmt16deen", tmp_path)
    assert (task.train_set, task.eval_set) == ("wmt15", "wmt16")
    first, second = task.samples("wmt16")
    assert second["source"] == "Danke\u2028sehr." and second.correct == ("Thank you.",)
    template = make_template("mt")
    assert template.encode(second) == "Danke\u2028sehr. = <mask>"
    assert template.encode_correct_candidate(first) == "Guten Tag. = Good day."
    assert template.postprocess(first, " Good day.\nMore") == "Good day."
    assert (task.kind, task.max_new_tokens) == ("generation", 256)
    assert set(scores_of(task, template, [first, second], k=1)) == {"bleu"}


def test_sacrebleus_own_folder_is_looked_into(tmp_path: Path, no_home: Path) -> None:
    write_text(no_home / "wmt15/wmt15.en-de.src", "Hi.\n")
    write_text(no_home / "wmt15/wmt15.en-de.ref", "Hallo.\n")
    (sample,) = make_task("wmt16ende", tmp_path).samples("wmt15")
    assert sample.correct == ("Hallo.",)


def test_what_is_missing_is_named_with_the_way_to_it(tmp_path: Path, no_home: Path) -> None:
    task = make_task("wmt14fren", tmp_path)
    text = reason(task, "wmt14")
    assert str(tmp_path / "sacrebleu/wmt14/wmt14.fr-en.src") in text
    assert str(no_home / "wmt14/wmt14.fr-en.src") in text
    assert "sacrebleu -t wmt14 -l fr-en --echo src" in text
    assert not no_home.exists(), "nothing is downloaded"
    path = write_text(tmp_path / "sacrebleu/wmt14/wmt14.fr-en.src", "a\nb\n")
    assert "wmt14.fr-en.ref" in reason(task, "wmt14")
    write_text(path.with_suffix(".ref"), "a\n")
    assert f"{path}: 2 lines; wmt14.fr-en.ref has 1" in reason(task, "wmt14")


@pytest.mark.parametrize("name", WMT)
def test_sets_are_where_sacrebleu_puts_them(name: str, tmp_path: Path) -> None:
    pair = WMT[name][0]
    for set_name in make_task(name, tmp_path).sets:
        found = DATASETS[set_name]
        assert pair in found.langpairs
        places = [found._get_txt_file_path(pair, field) for field in ("src", "ref")]
        assert [Path(place).parts[-2:] for place in places] == [
            (set_name, f"{set_name}.{pair}.{field}") for field in ("src", "ref")
        ]
        assert found.fieldnames(pair)[:2] == ["src", "ref"]


def test_bleu_is_sacrebleus() -> None:
    def said(text: str, reference: str) -> Prediction:
        sample = FewShotSample({"source": "s"}, (), (reference,))
        return Prediction(sample, (ScoredCandidate(text, 1.0),))

    right = "The cat sat on the mat, and the dog lay there."
    metric = build_metric("bleu")
    assert metric.score([said(right, right)])["bleu"] == pytest.approx(100)
    # Ten of eleven words and all but the last n-grams of each order: by hand.
    found = metric.score([said("a b c d e f g h i j", "a b c d e f g h i k")])["bleu"]
    assert found == pytest.approx(100 * (9 / 10 * 8 / 9 * 7 / 8 * 6 / 7) ** 0.25)
