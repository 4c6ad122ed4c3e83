"""Winograd, XWinograd and WinoGrande: rows, answers in place of pronouns, real files."""

from __future__ import annotations

import json

import pytest

from examples.few_shot.scoring import SCORINGS
from examples.few_shot.tasks.common import masked
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    reason,
    write_jsonl,
    write_text,
)
from tests.helpers.shared import shared_dir

SCHEMA = """
  <schema>
    <text><txt1>{before}</txt1><pron>{pronoun}</pron><txt2>{after}</txt2></text>
    <quote><quote1>q</quote1><pron>{pronoun}</pron></quote>
    <answers><answer> {one}
      </answer><answer>{other}</answer></answers>
    <correctAnswer> {right}. </correctAnswer>
  </schema>"""
TROPHY = {
    "before": "The trophy doesn't fit into the\n brown suitcase because", "pronoun": "it",
    "after": "is too large.", "one": "The trophy", "other": "The suitcase", "right": "A",
}  # fmt: skip
BACK = {
    "before": "Ann saw Bob, and", "pronoun": "his", "after": "cat ran.",
    "one": "Bob", "other": "The boys", "right": "B",
}  # fmt: skip
START = {
    "before": "Ann saw Bob.", "pronoun": "He", "after": ", too, left.",
    "one": "the boy", "other": "Bob", "right": "A",
}  # fmt: skip


def _collection(*schemas: dict[str, str]) -> str:
    return f"<collection>{''.join(SCHEMA.format(**each) for each in schemas)}\n</collection>\n"


class TestWinograd:
    def test_prompts(self, tmp_path):
        write_text(tmp_path / "winograd/WSCollection.xml", _collection(TROPHY, BACK, START))
        trophy, back, start = make_task("winograd", tmp_path).samples("test")
        template = make_template("winograd")
        assert trophy.candidates == ("The trophy", "The suitcase")
        assert (trophy.correct, back.correct) == (("The trophy",), ("The boys",))
        assert full_prompt(template, trophy)[1] == (
            "The trophy doesn't fit into the brown suitcase because the suitcase is too large."
        )
        assert full_prompt(template, back, trophy) == [
            "The trophy doesn't fit into the brown suitcase because the trophy is too large.\n"
            "Ann saw Bob, and Bob's cat ran.",
            "The trophy doesn't fit into the brown suitcase because the trophy is too large.\n"
            "Ann saw Bob, and the boys' cat ran.",
        ]
        assert full_prompt(template, start)[0] == "Ann saw Bob. The boy, too, left."

    def test_the_first_273_schemas_are_evaluated(self, tmp_path):
        schemas = [TROPHY | {"before": f"Case {n}:"} for n in range(285)]
        write_text(tmp_path / "winograd/WSCollection.xml", _collection(*schemas))
        samples = make_task("winograd", tmp_path).samples("test")
        assert len(samples) == 273
        assert samples[-1]["txt1"] == "Case 272: "

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("<collection>", "WSCollection.xml: cannot be read as XML"),
            (_collection(TROPHY, BACK | {"right": "C"}), "WSCollection.xml: schema 2: expected"),
        ],
    )
    def test_damaged_files(self, tmp_path, text, says):
        write_text(tmp_path / "winograd/WSCollection.xml", text)
        assert says in reason(make_task("winograd", tmp_path), "test")

    def test_rows_with_the_answers_in_place(self, tmp_path):
        row = {"context_options": ["Ann saw the cat as the cat", "Ann saw the cat as the bus"],
               "continuation": "ran.", "gold": 1}  # fmt: skip
        write_jsonl(tmp_path / "llmfoundry/winograd_wsc.jsonl", row)
        [sample] = make_task("winograd", tmp_path).samples("test")
        assert sample.candidates == ("cat", "bus")
        assert sample.correct == ("bus",)
        assert (
            full_prompt(make_template("winograd"), sample)[0] == "Ann saw the cat as the cat ran."
        )


@pytest.mark.parametrize(
    ("one", "other", "behind", "parts"),
    [
        ("It is Ann", "It is Eve", "who ran.", ("It is ", ("Ann", "Eve"), " who ran.")),
        # Letters in common are no words in common.
        ("I saw Anna", "I saw Ann", ".", ("I saw ", ("Anna", "Ann"), ".")),
        ("See Ann's", "See Ann's cat's", "tail.", ("See ", ("Ann's", "Ann's cat's"), " tail.")),
        ("in the  car", "in the  bus", "'s way.", ("in the  ", ("car", "bus"), "'s way.")),
        ("Ann", "Eve", '"Hm" said.', ("", ("Ann", "Eve"), ' "Hm" said.')),
    ],
)
def test_sentences_given_twice_are_parted(one, other, behind, parts):
    found = masked({"context_options": [one, other], "continuation": behind})
    assert found == parts
    assert "".join((found[0], found[1][0], found[2])).startswith(one)


def _columns(language: str, text: str, words: list[str], pronoun: list, *answers: list) -> str:
    columns = (json.dumps(each) for each in (words, pronoun, answers))
    return "\t".join((language, "original", "?", text, *columns)) + "\n"


CUP = _columns(
    "fr", "La coupe n'entre pas dans la valise, car elle est grande.",
    [*"La coupe n'entre pas dans la valise , car elle est grande .".split()],
    ["elle", [9, 10], ["elle"]],
    ["La coupe", [0, 2], ["La", "coupe"], True], ["la valise", [5, 7], ["la", "valise"], False],
)  # fmt: skip
QUOTED = _columns(
    "en", 'Ann said "she ran", and she did.',
    ["Ann", "said", "``", "she", "ran", "''", ",", "and", "she", "did", "."],
    ["she", [8, 9], ["she"]],
    ["Ann", [0, 1], ["Ann"], False], ["Eve", [1, 2], ["Eve"], True],
)  # fmt: skip
CHINESE = _columns(
    "zh", "奖杯放不进箱子，因为它太大。 ", ["奖杯", "放不进", "箱子", "，因为", "它", "太大。 "],
    ["它", [4, 5], ["它"]],
    ["奖杯", [0, 1], ["奖杯"], True], ["箱子", [2, 3], ["箱子"], False],
)  # fmt: skip


class TestXWinograd:
    @pytest.mark.parametrize(
        ("language", "texts"),
        [
            (
                "fr",
                [
                    "La coupe n'entre pas dans la valise, car la coupe est grande.",
                    "La coupe n'entre pas dans la valise, car la valise est grande.",
                ],
            ),
            ("en", ['Ann said "she ran", and Ann did.', 'Ann said "she ran", and Eve did.']),
            ("zh", ["奖杯放不进箱子，因为奖杯太大。", "奖杯放不进箱子，因为箱子太大。"]),
        ],
    )
    def test_prompts(self, tmp_path, language, texts):
        write_text(tmp_path / "xwinograd" / "dataset.tsv", CUP + QUOTED + CHINESE)
        [sample] = make_task("xwinograd", tmp_path, language).samples("test")
        assert full_prompt(make_template("winograd"), sample) == texts
        assert sample.correct == (sample.candidates[language == "en"],)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (CUP.replace("[9, 10]", "[3, 4]"), "the text does not have the pronoun 'elle'"),
            (CUP.replace('"coupe", "n', '"tasse", "n'), "the text does not have the word 'tasse'"),
            (CUP.replace("true", "false"), "expected two answers, one of them right"),
            (CUP.replace('["La", "coupe", "n', '["La, "coupe", "n'), "Expecting"),
            ("fr\toriginal\n", "2 fields; expected 7"),
        ],
    )
    def test_damaged_rows(self, tmp_path, line, says):
        path = write_text(tmp_path / "xwinograd" / "dataset.tsv", CUP + line)
        text = reason(make_task("xwinograd", tmp_path, "fr"), "test")
        assert text.startswith(f"{path}:2: ")
        assert says in text


NAMES = {"option1": "Ann", "option2": "Eve"}


class TestWinoGrande:
    ROWS = (
        {"sentence": "Ann is better than Eve so _ won.", "answer": "1", **NAMES},
        {"sentence": "_ lost.", "answer": "2", **NAMES},
        {"sentence": "_ sang.", "answer": "", **NAMES},
    )

    def test_prompts(self, tmp_path):
        write_jsonl(tmp_path / "winogrande_1.1" / "dev.jsonl", *self.ROWS)
        first, second, third = make_task("winogrande", tmp_path).samples("dev")
        assert [s.correct for s in (first, second, third)] == [("Ann",), ("Eve",), ()]
        assert full_prompt(make_template("winogrande"), second, first) == [
            "Ann is better than Eve so Ann won.\nAnn lost.",
            "Ann is better than Eve so Ann won.\nEve lost.",
        ]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"sentence": "No gap."}, "expected a sentence with one gap _, found 0"),
            ({"answer": "3"}, "answer '3'; expected 1 or 2"),
        ],
    )
    def test_damaged_rows(self, tmp_path, change, says):
        path = write_jsonl(tmp_path / "winogrande" / "dev.jsonl", self.ROWS[0] | change)
        text = reason(make_task("winogrande", tmp_path), "dev")
        assert text.startswith(f"{path}:1: ")
        assert says in text


@pytest.mark.parametrize(
    ("name", "file"),
    [("winograd", "winograd/WSCollection.xml"), ("winogrande", "winogrande/dev.jsonl")],
)
def test_a_missing_file_is_named(tmp_path, name, file):
    task = make_task(name, tmp_path)
    assert f"{tmp_path}/{file} is missing" in reason(task, task.eval_set)


def test_candidates_end_alike_so_that_the_suffix_can_be_scored():
    """Partial scoring is for these tasks: every real sample has something behind its mask."""
    assert "suffix" in SCORINGS
    data = shared_dir("data", "fewshot")
    template = make_template("winogrande")
    for name, set_name in (("winograd", "test"), ("winogrande", "dev")):
        assert all(template.split(s)[1] for s in make_task(name, data).samples(set_name))


@pytest.mark.parametrize(
    ("name", "set_name", "count"), [("winograd", "test", 273), ("winogrande", "dev", 1267)]
)
def test_real_rows(name, set_name, count):
    task = make_task(name, shared_dir("data", "fewshot"))
    check_real_set(task, set_name, [name], count)


def test_real_rows_give_back_the_sentences_of_the_file():
    data = shared_dir("data", "fewshot")
    file = data / "llmfoundry" / "winogrande.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    template = make_template("winogrande")
    for row, sample in zip(rows, make_task("winogrande", data).samples("dev"), strict=True):
        for option, text in zip(row["context_options"], full_prompt(template, sample), strict=True):
            assert text.replace(" ", "") == (option + row["continuation"]).replace(" ", "")
            assert text.startswith(option)


@pytest.mark.parametrize(
    ("language", "count"),
    [("en", 2325), ("fr", 83), ("jp", 959), ("pt", 263), ("ru", 315), ("zh", 16)],
)
def test_real_xwinograd(language, count):
    task = make_task("xwinograd", shared_dir("data", "fewshot"), language)
    check_real_set(task, "test", ["winograd"], count)
