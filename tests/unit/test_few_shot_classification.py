"""SST-2 and AG News: rows, prompts, real files."""

from __future__ import annotations

import pytest

from examples.few_shot import calibration
from tests.helpers.few_shot_tasks import (
    check_real_set,
    full_prompt,
    make_task,
    make_template,
    reason,
    write_text,
)
from tests.helpers.shared import shared_dir

SST = {
    "SST-2/dev.tsv": "sentence\tlabel\na fine film . \t1\ntoo long\t0\n",
    "sst2/stsa.binary.dev": "1 a fine film .\n0 too long\n",
}


class TestSST2:
    @pytest.mark.parametrize("file", SST)
    def test_both_formats(self, tmp_path, file):
        write_text(tmp_path / file, SST[file])
        good, bad = make_task("sst2", tmp_path).samples("dev")
        assert good.candidates == ("0", "1")
        assert (good.correct, bad.correct) == (("1",), ("0",))
        assert full_prompt(make_template("sentimentanalysis"), good, bad) == [
            "too long .\nAll in all, it was bad\na fine film .\nAll in all, it was bad",
            "too long .\nAll in all, it was bad\na fine film .\nAll in all, it was good",
        ]

    def test_calibration_empties_fields(self, tmp_path):
        write_text(tmp_path / "SST-2/dev.tsv", SST["SST-2/dev.tsv"])
        [copy] = calibration.copies(make_task("sst2", tmp_path).samples("dev")[0], ["sentence::"])
        assert full_prompt(make_template("sentimentanalysis"), copy)[0] == "All in all, it was bad"

    def test_a_test_set_without_answers(self, tmp_path):
        write_text(tmp_path / "SST-2/test.tsv", "index\tsentence\n0\tfine\n")
        assert make_task("sst2", tmp_path).samples("test")[0].correct == ()

    @pytest.mark.parametrize(
        ("file", "text", "says"),
        [
            ("SST-2/dev.tsv", "sentence\tlabel\nfine\t2\n", "label '2'"),
            ("sst2/stsa.binary.dev", "1 fine\n1\n", "has no field 'sentence'"),
        ],
    )
    def test_damaged_rows(self, tmp_path, file, text, says):
        path = write_text(tmp_path / file, text)
        found = reason(make_task("sst2", tmp_path), "dev")
        assert found.startswith(f"{path}:2: is no row of sst2: {says}")

    def test_a_missing_file_is_named(self, tmp_path):
        assert f"{tmp_path}/SST-2/dev.tsv is missing" in reason(make_task("sst2", tmp_path), "dev")


class TestAGNews:
    def test_prompts(self, tmp_path):
        write_text(
            tmp_path / "agnews/test.csv",
            '"3","Oil ""up""","Prices rose\\on Monday.\\nMore, later."\n"4","Chips","Faster."\n',
        )
        oil, chips = make_task("agnews", tmp_path).samples("test")
        assert oil.candidates == ("World", "Sports", "Business", "Sci/Tech")
        assert (oil.correct, chips.correct) == (("Business",), ("Sci/Tech",))
        assert full_prompt(make_template("agnews"), oil, chips)[3] == (
            "Article: Chips Faster.\nTopic: Technology\n"
            'Article: Oil "up" Prices rose on Monday. More, later.\nTopic: Technology'
        )
        [copy] = calibration.copies(oil, ["title:: | description::"])
        assert full_prompt(make_template("agnews"), copy)[0] == "Topic: World"

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ('"5","A","B"', "test.csv:2: the answer is number 4 of 4 candidates"),
            ('"x","A","B"', "test.csv:2: is no row of agnews: invalid literal"),
            ('"1","A"', "test.csv:2: expected 3 fields"),
        ],
    )
    def test_damaged_rows(self, tmp_path, line, says):
        write_text(tmp_path / "agnews/test.csv", f'"1","A","B"\n{line}\n')
        assert says in reason(make_task("agnews", tmp_path), "test")

    def test_a_missing_file_is_named(self, tmp_path):
        task = make_task("agnews", tmp_path)
        assert f"{tmp_path}/agnews/train.csv is missing" in reason(task, "train")


@pytest.mark.parametrize(("set_name", "count"), [("train", 6920), ("dev", 872), ("test", 1821)])
def test_real_sst2(set_name, count):
    task = make_task("sst2", shared_dir("data", "fewshot"))
    check_real_set(task, set_name, ["sentimentanalysis"], count)


def test_real_agnews():
    task = make_task("agnews", shared_dir("data", "fewshot"))
    samples = check_real_set(task, "test", ["agnews"], 7600)
    assert {s.correct[0]: 0 for s in samples}.keys() == set(task.topics)
