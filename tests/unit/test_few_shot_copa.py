"""COPA and XCOPA: rows, prompts in thirteen languages, real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.few_shot import calibration
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    reason,
    write_jsonl,
)
from tests.helpers.shared import shared_dir

FAUCET = {
    "premise": "The man turned on the faucet.",
    "choice1": "The toilet filled with water.",
    "choice2": "Water flowed from the spout.",
    "question": "effect",
    "label": 1,
    "idx": 0,
}
CANDLE = {
    "premise": "The flame on the candle went out.",
    "choice1": "I blew on the wick.",
    "choice2": "I put a match to the wick.",
    "question": "cause",
    "label": 0,
    "idx": 1,
}


@pytest.fixture
def copa(tmp_path: Path):
    write_jsonl(tmp_path / "COPA" / "val.jsonl", FAUCET, CANDLE)
    return make_task("copa", tmp_path)


class TestCOPA:
    def test_candidates_and_gold(self, copa):
        faucet, candle = copa.samples("val")
        assert faucet.candidates == (FAUCET["choice1"], FAUCET["choice2"])
        assert faucet.correct == (FAUCET["choice2"],)
        assert candle.correct == (CANDLE["choice1"],)

    def test_prompts(self, copa):
        faucet, candle = copa.samples("val")
        template = make_template("copa")
        assert full_prompt(template, faucet) == [
            "The man turned on the faucet so the toilet filled with water.",
            "The man turned on the faucet so water flowed from the spout.",
        ]
        assert full_prompt(template, candle, faucet)[1] == (
            "The man turned on the faucet so water flowed from the spout.\n"
            "The flame on the candle went out because I put a match to the wick."
        )

    @pytest.mark.parametrize(
        ("options", "first"),
        [
            ({"cause_conj": " since "}, "The flame on the candle went out since I blew"),
            ({"capitalization": "lower"}, "the flame on the candle went out because i blew"),
            ({"capitalization": "upper"}, "THE FLAME ON THE CANDLE WENT OUT BECAUSE I BLEW"),
        ],
    )
    def test_options(self, copa, options, first):
        [text, _] = full_prompt(make_template("copa", **options), copa.samples("val")[1])
        assert text.startswith(first + " ")

    def test_bug_leaves_choices_as_they_are(self, copa):
        text = full_prompt(make_template("copa", capitalization="bug"), copa.samples("val")[0])[0]
        assert text == "The man turned on the faucet so The toilet filled with water."

    def test_an_empty_premise_leaves_the_conjunction(self, copa):
        [copy] = calibration.copies(copa.samples("val")[1], ["premise::"])
        assert full_prompt(make_template("copa"), copy)[0] == "because I blew on the wick."

    def test_rows_with_a_prompt_of_their_own(self, tmp_path):
        row = {
            "query": "The woman retired, therefore",
            "gold": 0,
            "choices": ["she rested.", "no."],
        }
        write_jsonl(tmp_path / "llmfoundry" / "copa.jsonl", row)
        [sample] = make_task("copa", tmp_path).samples("val")
        assert sample.correct == ("she rested.",)
        assert full_prompt(make_template("copa"), sample)[0] == "The woman retired so she rested."
        assert full_prompt(make_template("query"), sample)[0] == (
            "The woman retired, therefore she rested."
        )

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            (FAUCET | {"label": 2}, "val.jsonl:2: the answer is number 2 of 2 candidates"),
            (FAUCET | {"question": "why"}, "val.jsonl:2: is no row of copa: question 'why'"),
            ({"premise": "A."}, "val.jsonl:2: is no row of copa: has no field 'question'"),
            ({"query": "A but", "choices": ["b", "c"]}, "val.jsonl:2: is no row of copa: a query"),
        ],
    )
    def test_damaged_rows(self, tmp_path, row, says):
        write_jsonl(tmp_path / "COPA" / "val.jsonl", FAUCET, row)
        assert says in reason(make_task("copa", tmp_path), "val")

    def test_a_missing_file_is_named(self, tmp_path):
        assert f"{tmp_path}/COPA/val.jsonl is missing" in reason(make_task("copa", tmp_path), "val")


XCOPA_PROMPTS = {
    ("xcopa", "it"): "Ho aperto il rubinetto, quindi l'acqua è uscita.",
    ("xcopa_mt", "it"): "Ho aperto il rubinetto così l'acqua è uscita.",
    ("xcopa__en", "it"): "Ho aperto il rubinetto so l'acqua è uscita.",
    ("xcopa_simple", "it"): "Ho aperto il rubinetto l'acqua è uscita.",
    ("xcopa", "zh"): "我打开水龙头，所以水流出来了。",
    ("xcopa_mt", "zh"): "我打开水龙头所以水流出来了。",
    ("xcopa_simple", "zh"): "我打开水龙头水流出来了。",
    ("xcopa", "tr"): "Musluğu açtım, bu yüzden ılık su aktı.",
    ("xcopa", "th"): "ฉันเปิดก๊อก ดังนั้นน้ำไหล",
}
XCOPA_ROWS = {
    "it": ("Ho aperto il rubinetto.", "L'acqua è uscita."),
    "zh": ("我打开水龙头。", "水流出来了。"),
    "tr": ("Musluğu açtım.", "Ilık su aktı."),
    "th": ("ฉันเปิดก๊อก", "น้ำไหล"),
}


class TestXCOPA:
    @pytest.mark.parametrize(("template", "language"), XCOPA_PROMPTS)
    def test_prompts(self, tmp_path, template, language):
        premise, choice = XCOPA_ROWS[language]
        row = FAUCET | {"premise": premise, "choice1": choice, "choice2": "?", "label": 0}
        write_jsonl(tmp_path / "xcopa" / language / f"val.{language}.jsonl", row)
        [sample] = make_task("xcopa", tmp_path, language).samples("val")
        text = full_prompt(make_template(template, language=language), sample)[0]
        assert text == XCOPA_PROMPTS[template, language]

    def test_a_shot_in_another_language_has_its_own_conjunction(self, tmp_path):
        for language in ("it", "zh"):
            premise, choice = XCOPA_ROWS[language]
            row = FAUCET | {"premise": premise, "choice1": choice, "choice2": "?", "label": 0}
            write_jsonl(tmp_path / "xcopa" / language / f"val.{language}.jsonl", row)
        [shot] = make_task("xcopa", tmp_path, "zh").samples("val")
        [sample] = make_task("xcopa", tmp_path, "it").samples("val")
        assert full_prompt(make_template("xcopa", language="it"), sample, shot)[0] == (
            f"{XCOPA_PROMPTS['xcopa', 'zh']}\n{XCOPA_PROMPTS['xcopa', 'it']}"
        )

    def test_an_empty_premise_leaves_the_conjunction(self, tmp_path):
        row = FAUCET | {"premise": "A.", "choice1": "Вода потекла.", "choice2": "?"}
        write_jsonl(tmp_path / "xcopa" / "ru" / "val.ru.jsonl", row)
        [sample] = make_task("xcopa", tmp_path, "ru").samples("val")
        [copy] = calibration.copies(sample, ["premise::"])
        template = make_template("xcopa", language="ru")
        assert full_prompt(template, copy)[0] == "поэтому вода потекла."

    def test_every_language_has_conjunctions(self, tmp_path):
        rows = [FAUCET, FAUCET | {"question": "cause"}]
        for language in make_task("xcopa", tmp_path, "it").languages:
            write_jsonl(tmp_path / "xcopa" / language / f"val.{language}.jsonl", *rows)
            task = make_task("xcopa", tmp_path, language)
            for name in ("xcopa", "xcopa_mt"):
                effect, cause = (
                    make_template(name, language=language).encode(s) for s in task.samples("val")
                )
                assert effect != cause
                assert "because" not in cause


def test_real_copa():
    data = shared_dir("data", "fewshot")
    copa = make_task("copa", data)
    check_real_set(copa, "train", ["copa"], 32)
    check_real_set(copa, "val", ["copa", "query"], 100)
    unlabeled = str(data / "fewglue" / "COPA" / "unlabeled.jsonl")
    check_real_set(copa, unlabeled, ["copa"], 400, answered=False)


@pytest.mark.parametrize("language", "et ht id it qu sw ta th tr vi zh".split())
def test_real_xcopa(language):
    task = make_task("xcopa", shared_dir("data", "fewshot"), language)
    templates = ["xcopa", "xcopa_mt", "xcopa__en", "xcopa_simple"]
    for set_name, count in (("val", 100), ("test", 500)):
        for sample in check_real_set(task, set_name, templates, count):
            assert sample["lang"] == language
