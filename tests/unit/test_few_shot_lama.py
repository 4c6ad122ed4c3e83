"""LAMA and mLAMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.few_shot import sampling
from examples.few_shot.metrics.api import build_metric
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.predictors.api import (
    Prediction,
    PredictorOptions,
    ScoredCandidate,
    Trial,
)
from examples.few_shot.predictors.prompting import CLMPrompting
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import plan
from examples.few_shot.tasks.api import TASKS, task_names
from tests.helpers.few_shot_tasks import (
    full_prompt,
    make_task,
    make_template,
    predicted,
    reason,
    scores_of,
    write_jsonl,
    write_text,
)
from tests.helpers.shared import shared_dir


def test_sentences_of_conceptnet_and_squad(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"sub": "alive", "pred": "HasSubevent", "obj_label": "think",
         "masked_sentences": ["When alive you [MASK]."]},
        {"obj_label": "a", "masked_sentences": ["[MASK] and [MASK]."]},
        {"sub": "bird", "pred": "CapableOf", "obj_label": "fly",
         "masked_sentences": ["A bird.", "It can [MASK] far."]},
    ]  # fmt: skip
    write_jsonl(tmp_path / "LAMA/ConceptNet/test.jsonl", *rows, rows[0])
    task = make_task("lama_conceptnet", tmp_path)
    first, second = task.samples("conceptnet_test")
    assert first.candidates == first.correct == ("think",)
    assert (first["relation"], first["subject"]) == ("HasSubevent", "alive")
    template = make_template("lama", sep=" ")
    assert template.encode(second) == "A bird. It can <mask> far."
    assert full_prompt(template, second, first) == ["When alive you think. A bird. It can fly far."]
    found = scores_of(task, template, [first, second], k=0)
    single = {f"{name}_single_token" for name in task.metrics}
    assert set(found) == {*task.metrics, *single, "single_token_answers"}
    assert 0 < found["mrr"] <= 1 and found["single_token_answers"] == 0  # a token is a letter
    write_jsonl(tmp_path / "LAMA/Squad/test.jsonl", {"masked_sentences": ["It was [MASK]."]})
    text = reason(make_task("lama_squad", tmp_path), "squad_test")
    assert "Squad/test.jsonl:1: is no row of lama_squad: has no field 'obj_label'" in text


def test_google_re_is_put_by_templates(tmp_path: Path) -> None:
    born = {"pred": "/people/person/place_of_birth", "sub_label": "Ann [Y]", "obj_label": "Bonn"}
    write_jsonl(tmp_path / "LAMA/Google_RE/place_of_birth_test.jsonl", born)
    write_jsonl(
        tmp_path / "LAMA/Google_RE/date_of_birth_test.jsonl",
        born | {"pred": "/people/person/date_of_birth", "obj_label": "1900"},
    )
    date, place = make_task("lama_googlere", tmp_path).samples("googlere")
    assert date["sentence"] == "Ann [Y] (born [MASK])."
    assert place["sentence"] == "Ann [Y] was born in [MASK] ."
    write_jsonl(tmp_path / "LAMA/Google_RE/x_test.jsonl", born | {"pred": "/a/b"})
    assert "x_test.jsonl:1: is no row of lama_googlere" in reason(
        make_task("lama_googlere", tmp_path), "googlere"
    )


def test_trex_takes_templates_from_relations(tmp_path: Path) -> None:
    row = {"predicate_id": "P19", "sub_label": "Ann", "obj_label": "Bonn", "evidences": []}
    write_jsonl(tmp_path / "LAMA/TREx/P19.jsonl", row, row)
    write_jsonl(
        tmp_path / "LAMA/relations.jsonl", {"relation": "P19", "template": "[X] is from [Y] ."}
    )
    (sample,) = make_task("lama_trex", tmp_path).samples("trex")
    assert full_prompt(make_template("lama"), sample) == ["Ann is from Bonn ."]
    write_jsonl(tmp_path / "LAMA/relations.jsonl", {"relation": "P20", "template": "[X] [Y]"})
    text = reason(make_task("lama_trex", tmp_path), "trex")
    assert "P19.jsonl:1: relations.jsonl has no P19" in text
    assert "LAMA/TREx is missing" in reason(make_task("lama_trex", tmp_path / "no"), "trex")


def test_rank_metrics() -> None:
    def ranked(rank: int, tokens: int) -> Prediction:
        sample = FewShotSample({}, ("w",), ("w",))
        meta = {"rank": rank, "answer_tokens": tokens}
        return Prediction(sample, (ScoredCandidate("w", -1.0, meta),))

    predictions = [ranked(1, 1), ranked(4, 2), ranked(10, 2), ranked(20, 1)]
    assert build_metric("precision@1").score(predictions) == {
        "precision@1": 25, "precision@1_single_token": 50, "single_token_answers": 50,
    }  # fmt: skip
    assert build_metric("precision@10").score(predictions) == {
        "precision@10": 75, "precision@10_single_token": 50,
    }  # fmt: skip
    assert build_metric("mrr").score(predictions) == {
        "mrr": pytest.approx((1 + 1 / 4 + 1 / 10 + 1 / 20) / 4),
        "mrr_single_token": pytest.approx((1 + 1 / 20) / 2),
    }
    for name in ("precision@1", "precision@10", "mrr"):
        said = build_metric(name).definition()
        assert "Of an answer of several tokens the first alone counts" in said


class Words(DummyModel):
    """Tokens are letters, but for one name."""

    name = "Bonn"

    def encode(self, text: str) -> Any:
        before, found, after = text.partition(f" {self.name}")
        parts = [super().encode(before), np.array([255] * bool(found)), super().encode(after)]
        return np.concatenate(parts).astype(np.int64)


def test_the_first_token_of_an_answer_is_ranked_and_its_tokens_are_counted(tmp_path: Path) -> None:
    rows = [
        {"predicate_id": "P19", "sub_label": who, "obj_label": where, "template": "[X]: [Y] ."}
        for who, where in (("Ann", "Bonn"), ("Bob", "Rome"))
    ]
    write_jsonl(tmp_path / "lama/trex16.jsonl", *rows)
    task = make_task("lama_trex", tmp_path)
    samples = task.samples("trex")
    shots = sampling.draw((), 0, seed=0, trial=0, task="t")
    trial = Trial(task, make_template("lama"), samples, shots, samples)
    model = Words()
    one, two = CLMPrompting(model, PredictorOptions()).predict(trial)
    assert [p.candidates[0].meta["answer_tokens"] for p in (one, two)] == [1, len("Rome")]
    for beam, listed in ((1, 10), (3, 3), (12, 12)):
        (first, _) = CLMPrompting(model, PredictorOptions(beam_size=beam)).predict(trial)
        assert len(first.candidates[0].meta["top_ranked_predictions"]) == listed
    for prediction, context, token in ((one, "Ann:", 255), (two, "Bob: ", ord("R"))):
        (expected,) = model.rank([model.encode(context)], [token])
        assert prediction.candidates[0].meta["rank"] == expected.rank


CITIES = ("Bonn", "Rom", "Kiew", "Oslo")


def make_mlama(root: Path) -> None:
    write_jsonl(
        root / "mlama1.1/de/templates.jsonl",
        {"relation": "P19", "template": "[X] stammt aus [Y]."},
        {"relation": "place_of_birth", "template": "[X] kam in [Y] zur Welt."},
        {"relation": "P36", "template": "Die Hauptstadt von [X] ist [Y]."},
    )
    facts = [{"sub_label": f"Person {n}", "obj_label": city} for n, city in enumerate(CITIES)]
    write_jsonl(root / "mlama1.1/de/P19.jsonl", *facts)
    write_jsonl(root / "mlama1.1/de/P36.jsonl", {"sub_label": "Italien", "obj_label": "Rom"})
    write_jsonl(root / "mlama1.1/de/place_of_birth.jsonl", *facts[:2])
    write_text(
        root / "mlama1.1/TREx_multilingual_objects/de.json",
        json.dumps({"P36": {"objects": ["Rom", "Wien", "Bern"], "subjects": []}}),
    )


def test_mlama_chooses_among_the_objects_of_a_relation(tmp_path: Path) -> None:
    make_mlama(tmp_path)
    task = make_task("mlama_trex", tmp_path, "de")
    samples = task.samples("trex")
    assert len(samples) == 5
    assert samples[0].candidates == tuple(sorted(CITIES)) and samples[0].correct == ("Bonn",)
    # A list of objects beside the facts counts more than the facts.
    assert samples[4].candidates == ("Bern", "Rom", "Wien")
    template = make_template("mlama", language="de")
    assert full_prompt(template, samples[4], samples[0])[1] == (
        "Person 0 stammt aus Bonn.\nDie Hauptstadt von Italien ist Rom."
    )
    found = scores_of(task, template, samples, k=0)
    assert set(found) == {"precision@1", "precision@1_P19", "precision@1_P36", "accuracy"}
    births = make_task("mlama_googlere", tmp_path, "de").samples("googlere")
    assert [each["relation"] for each in births] == ["place_of_birth"] * 2
    assert births[0].candidates == ("Bonn", "Rom")


def test_max_cands_keeps_the_right_one_and_never_changes(tmp_path: Path) -> None:
    make_mlama(tmp_path)
    for most in (1, 2, 3):
        samples = make_task("mlama_trex", tmp_path, "de", max_cands=most).samples("trex")
        again = make_task("mlama_trex", tmp_path, "de", max_cands=most).samples("trex")
        assert samples == again
        for sample in samples:
            assert len(sample.candidates) == most
            assert sample.correct[0] in sample.candidates
            assert list(sample.candidates) == sorted(sample.candidates)
    assert {each.candidates for each in samples[:4]} != {samples[0].candidates}


def test_what_is_wrong_with_mlama_is_named(tmp_path: Path) -> None:
    assert "mlama1.1/fr is missing" in reason(make_task("mlama_trex", tmp_path, "fr"), "trex")
    make_mlama(tmp_path)
    facts = tmp_path / "mlama1.1/de/P19.jsonl"
    write_jsonl(facts, {"sub_label": "Ann"})
    text = reason(make_task("mlama_trex", tmp_path, "de"), "trex")
    assert f"{facts}: is no file of mlama_trex" in text
    write_jsonl(tmp_path / "mlama1.1/de/P99.jsonl", {"sub_label": "Ann", "obj_label": "b"})
    facts.unlink()
    assert "has no template for P99" in reason(make_task("mlama_trex", tmp_path, "de"), "trex")
    write_jsonl(tmp_path / "mlama1.1/de/templates.jsonl", {"relation": "P36"})
    text = reason(make_task("mlama_trex", tmp_path, "de"), "trex")
    assert "templates.jsonl:1: expected `relation` and `template`" in text


def test_the_metric_of_mlama_averages_over_relations() -> None:
    def fact(relation: str, best: str) -> Prediction:
        return predicted(FewShotSample({"relation": relation}, ("r", "w"), ("r",)), best)

    found = build_metric("mlama").score([fact("P1", "r"), fact("P1", "w"), fact("P2", "r")])
    assert found == {"precision@1": 75, "precision@1_P1": 50, "precision@1_P2": 100}


def test_languages_and_groups() -> None:
    assert len(TASKS.get("mlama_trex").factory.languages) == 53
    assert len(TASKS.get("mlama_googlere").factory.languages) == 40
    assert task_names(["lama", "mlama"]) == [
        "lama_conceptnet", "lama_googlere", "lama_squad", "lama_trex",
        "mlama_googlere", "mlama_trex",
    ]  # fmt: skip
    assert len(plan("m", tasks="mlama", max_cands=2)) == 93
    assert [each.k for each in plan("m", tasks="lama")] == [0] * 4


def test_real_files() -> None:
    task = make_task("lama_trex", shared_dir("data", "fewshot"))
    samples = task.samples("trex")
    # 26 of the 14077 facts are there twice.
    assert len(samples) == 14051
    template = make_template("lama")
    assert all(template.encode(each).count("<mask>") == 1 for each in samples)
    assert len({each["relation"] for each in samples}) == 16
    assert 0 < scores_of(task, template, samples[:3], k=1)["mrr"] <= 1
