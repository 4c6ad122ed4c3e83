"""SNLI, MNLI, ANLI, GLUE's diagnostics, XNLI and PAWS-X: rows, prompts, metrics, real files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.few_shot import calibration
from examples.few_shot.builtins import load_builtins
from examples.few_shot.metrics.api import build_metric
from examples.few_shot.metrics.classification import matthews
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import plan
from examples.few_shot.tasks.common import pair
from examples.few_shot.tasks.nli import LABELS
from examples.few_shot.templates.api import MASK, TEMPLATES
from examples.few_shot.templates.nli_words import (
    PAWSX,
    TAGS_IN_USE,
    TAGS_WORD_BY_WORD,
    XNLI,
)
from fairseq_lite.errors import ConfigError, DataError
from tests.helpers.few_shot_tasks import (
    check_real_set,
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

SNLI = (
    {"gold_label": "neutral", "sentence1": "A man walks.", "sentence2": "He is tall."},
    {"gold_label": "entailment", "sentence1": "A dog runs.", "sentence2": "An animal moves."},
    {"gold_label": "-", "sentence1": "A cat.", "sentence2": "A dog."},
)


@pytest.fixture
def snli(tmp_path: Path):
    write_jsonl(tmp_path / "SNLI" / "dev.jsonl", *SNLI)
    return make_task("snli", tmp_path)


class TestEnglish:
    def test_candidates_and_gold(self, snli):
        # The row without a majority is left out.
        samples = snli.samples("dev")
        assert [s.candidates for s in samples] == [LABELS, LABELS]
        assert [s.correct for s in samples] == [("neutral",), ("entailment",)]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "gpt3stylenli",
                "Paragraph: A dog runs.\nQuestion: An animal moves. True, False, or Neither?\n"
                "Answer: True\nParagraph: A man walks.\n"
                "Question: He is tall. True, False, or Neither?\nAnswer: Neither",
            ),
            ("petstylenli", "A dog runs? Yes, an animal moves.\nA man walks? Maybe, he is tall."),
            (
                "generativenli",
                "A dog runs, right? Yes, an animal moves.\nA man walks, right? Also, he is tall.",
            ),
        ],
    )
    def test_prompts(self, snli, name, text):
        first, second = snli.samples("dev")
        assert full_prompt(make_template(name), first, second)[2] == text

    @pytest.mark.parametrize(
        ("name", "option", "text"),
        [
            (
                "gpt3stylenli",
                "sentence1::",
                "Question: He is tall. True, False, or Neither?\nAnswer: True",
            ),
            (
                "gpt3stylenli",
                "premise:: | hypothesis::",
                "Question: True, False, or Neither?\nAnswer: True",
            ),
            ("generativenli", "premise::", "Yes, he is tall."),
            ("generativenli", "sentence2::", "A man walks, right? Yes"),
            ("petstylenli", "premise::", "Yes, he is tall."),
        ],
    )
    def test_calibration_empties_fields(self, snli, name, option, text):
        [copy] = calibration.copies(snli.samples("dev")[0], [option])
        assert full_prompt(make_template(name), copy)[0] == text

    def test_an_english_i_stays_large(self):
        sample = pair("We left", "I'm home.", LABELS, "neutral", "")
        assert (
            full_prompt(make_template("generativenli"), sample)[0]
            == "We left, right? Yes, I'm home."
        )
        sample = pair("we left.", "In Rome.", LABELS, "neutral", "")
        assert (
            full_prompt(make_template("generativenli"), sample)[0]
            == "We left, right? Yes, in Rome."
        )

    def test_a_template_without_a_word_for_a_candidate_says_so(self, snli):
        with pytest.raises(DataError, match=r"BoolQTemplate has no word for 'entailment'"):
            make_template("boolq").verbalize(snli.samples("dev")[0], "entailment")

    @pytest.mark.parametrize("form", ["tsv", "jsonl"])
    def test_mnli_reads_both_formats(self, tmp_path, form):
        for name, answer in (("dev_matched", "contradiction"), ("dev_mismatched", "neutral")):
            if form == "tsv":
                write_text(
                    tmp_path / "MNLI" / f"{name}.tsv",
                    "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
                    f'0\tHe said "go.\tHe went.\tneutral\t{answer}\n',
                )
            else:
                row = {"gold_label": answer, "sentence1": 'He said "go.', "sentence2": "He went."}
                write_jsonl(tmp_path / "multinli_1.0" / f"multinli_1.0_{name}.jsonl", row)
        for name in ("matched", "mismatched"):
            task = make_task(f"mnli{name}", tmp_path)
            [sample] = task.samples(task.eval_set)
            assert sample.correct == ("contradiction" if name == "matched" else "neutral",)
            assert sample["premise"] == 'He said "go.'

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_anli(self, tmp_path, number):
        rows = [
            {"uid": letter, "context": "A.", "hypothesis": f"{letter}.", "label": letter}
            for letter in "ecn"
        ]
        write_jsonl(tmp_path / "anli_v1.0" / f"R{number}" / "dev.jsonl", *rows)
        samples = make_task(f"anlir{number}", tmp_path).samples("dev")
        assert [s.correct[0] for s in samples] == list(LABELS)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            (SNLI[0] | {"gold_label": "yes"}, "dev.jsonl:2: is no row of snli: label 'yes'"),
            ({"gold_label": "neutral"}, "dev.jsonl:2: is no row of snli: has no field 'sentence1'"),
        ],
    )
    def test_damaged_rows(self, tmp_path, row, says):
        write_jsonl(tmp_path / "SNLI" / "dev.jsonl", SNLI[0], row)
        assert says in reason(make_task("snli", tmp_path), "dev")

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("snli", "SNLI/dev.jsonl"),
            ("mnlimatched", "MNLI/dev_matched.tsv"),
            ("mnlimismatched", "MNLI/dev_mismatched.tsv"),
            ("anlir2", "anli/R2/dev.jsonl"),
            ("gluediag", "glue_diagnostics/test.tsv"),
        ],
    )
    def test_a_missing_file_is_named(self, tmp_path, name, file):
        task = make_task(name, tmp_path)
        assert f"{tmp_path}/{file} is missing" in reason(task, task.eval_set)


HEAD = (
    "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis"
    "\tLabel\n"
)


class TestDiagnostics:
    @pytest.fixture
    def task(self, tmp_path):
        rows = [
            "Quantifiers;Factivity\t\tNegation\t\tNews\tA.\tB.\tneutral",
            "\t\tNegation\tCommon sense\tNews\tC.\tD.\tentailment",
            "Factivity\t\t\t\tNews\tE.\tF.\tcontradiction",
        ]
        write_text(tmp_path / "glue_diagnostics" / "test.tsv", HEAD + "\n".join(rows) + "\n")
        return make_task("gluediag", tmp_path)

    def test_prompt(self, task):
        assert full_prompt(make_template("gpt3stylenli"), task.samples("test")[0])[1] == (
            "Paragraph: A.\nQuestion: B. True, False, or Neither?\nAnswer: False"
        )
        assert task.max_shots == 0

    def test_numbers_by_category(self, task):
        given_answers = ["neutral", "entailment", "neutral"]
        predictions = [
            predicted(s, best) for s, best in zip(task.samples("test"), given_answers, strict=True)
        ]
        found = build_metric("r3").score(predictions)
        # All: 2 hits of 3; right 1, 1, 1; given 1, 0, 2 of entailment, contradiction, neutral:
        # (2·3 - (1 + 0 + 2)) / sqrt((9 - 3) (9 - 5)).
        assert found["r3"] == pytest.approx(100 * 3 / math.sqrt(24))
        assert found["r3__logic"] == pytest.approx(100)
        assert found["r3__logic__negation"] == pytest.approx(100)
        # Neutral and contradiction, both said to be neutral.
        assert found["r3__lexical_semantics"] == 0
        assert found["r3__lexical_semantics__factivity"] == 0
        # One question only: all right answers are of one class.
        assert found["r3__knowledge__common_sense"] == 0
        assert math.isnan(found["r3__predicate-argument_structure"])
        assert next(iter(found)) == "r3"

    def test_evaluation(self, task):
        found = scores_of(task, make_template("gpt3stylenli"), task.samples("test"), k=0)
        assert {"r3", "accuracy"} <= set(found)


class TestMatthews:
    def test_two_classes_by_hand(self):
        # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
        pairs = [("p", "p")] * 3 + [("n", "p")] + [("p", "n")] * 2 + [("n", "n")] * 4
        assert matthews(pairs) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))

    @given(st.lists(st.tuples(*[st.sampled_from("abc")] * 2), min_size=1))
    def test_within_bounds_and_symmetric(self, pairs):
        value = matthews(pairs)
        assert -1 - 1e-9 <= value <= 1 + 1e-9
        assert value == pytest.approx(matthews([(b, a) for a, b in pairs]))
        golds = [(a, a) for a, _ in pairs]
        assert matthews(golds) == pytest.approx(1 if len({a for a, _ in pairs}) > 1 else 0)


XNLI_ROWS = [
    dict(zip(("language", "gold_label", "sentence1", "sentence2"), values, strict=True))
    for values in (
        ("de", "neutral", "Er geht.", "Sie lacht."),
        ("zh", "entailment", "他走了。", "他离开了。"),
        ("de", "contradiction", "es regnet!", "Es ist trocken."),
    )
]

XNLI_PROMPTS = {
    "gpt3stylenli": (
        "Paragraph: Er geht.\nQuestion: Sie lacht. True, False, or Neither?\nAnswer: True"
    ),
    "xnli__en": "Paragraph: Er geht. Question: Sie lacht. True, False, or Neither? True",
    "xnli_mt": "Absatz: Er geht. Frage: Sie lacht. Wahr, falsch oder keines von beiden? Wahr",
    "xnli_mt__fr": (
        "Paragraphe : Er geht. Question : Sie lacht. Vrai, faux ou ni l'un ni l'autre ? Vrai"
    ),
    "xnli_generativenli__en": "Er geht, right? Yes, sie lacht.",
    "xnli_generativenli_mt": "Er geht, richtig? Ja, sie lacht.",
    "xnli_generativenli_ht": "Er geht, oder? Ja, sie lacht.",
    "xnli_generativenli_sentence__en": "Er geht. Right? Yes, sie lacht.",
    "xnli_generativenli_sentence_mt": "Er geht. Richtig? Ja, sie lacht.",
}


class TestXNLI:
    @pytest.fixture
    def data(self, tmp_path):
        write_jsonl(tmp_path / "XNLI-1.0" / "xnli.dev.jsonl", *XNLI_ROWS)
        return tmp_path

    @pytest.mark.parametrize("name", XNLI_PROMPTS)
    def test_prompts(self, data, name):
        sample, _ = make_task("xnli", data, "de").samples("dev")
        assert full_prompt(make_template(name, language="de"), sample)[0] == XNLI_PROMPTS[name]

    def test_a_shot_in_another_language_is_put_in_its_own_words(self, data):
        [shot] = make_task("xnli", data, "zh").samples("dev")
        sample = make_task("xnli", data, "de").samples("dev")[1]
        assert full_prompt(make_template("xnli_mt", language="de"), sample, shot)[1] == (
            "段落：他走了。 问题：他离开了。 对、错，还是都不是？ 对\n"
            "Absatz: es regnet! Frage: Es ist trocken. Wahr, falsch oder keines von beiden? Falsch"
        )
        template = make_template("xnli_generativenli_ht", language="de")
        assert full_prompt(template, sample, shot)[1] == (
            "他走了，对吧？是的，他离开了。\nEs regnet, oder? Nein, es ist trocken."
        )

    def test_calibration_empties_fields(self, data):
        sample, _ = make_task("xnli", data, "de").samples("dev")
        [copy] = calibration.copies(sample, ["sentence1:: | sentence2::"])
        for name, text in (
            ("xnli_mt", "Wahr, falsch oder keines von beiden? Wahr"),
            ("xnli_generativenli_ht", "Ja"),
        ):
            assert full_prompt(make_template(name, language="de"), copy)[0] == text

    @pytest.mark.parametrize("form", ["three columns", "xnli's own", "translated for training"])
    def test_other_formats(self, tmp_path, form):
        text, file = {
            "three columns": ("Er geht.\tSie lacht.\tneutral\n", "xnli_de/dev.txt"),
            "xnli's own": (
                "language\tgold_label\tsentence1\tsentence2\nde\tneutral\tEr geht.\tSie lacht.\n"
                "zh\tneutral\tA.\tB.\n",
                "XNLI-1.0/xnli.dev.tsv",
            ),
            "translated for training": (
                "premise\thypo\tlabel\nEr geht.\tSie lacht.\tcontradictory\n",
                "XNLI-MT-1.0/multinli/multinli.train.de.tsv",
            ),
        }[form]
        write_text(tmp_path / file, text)
        [sample] = make_task("xnli", tmp_path, "de").samples("train" if "train" in file else "dev")
        assert (sample["premise"], sample["sentence2"]) == ("Er geht.", "Sie lacht.")
        assert sample.correct == ("contradiction" if "train" in file else "neutral",)


class TestPAWSX:
    @pytest.fixture
    def samples(self, tmp_path):
        write_text(
            tmp_path / "x-final" / "ja" / "dev_2k.tsv",
            "id\tsentence1\tsentence2\tlabel\n1\t犬が走る。\t走る犬。\t0\n2\t猫。\t猫。\t1\n"
            "3\tNS\t猫。\t0\n4\t\t猫。\t0\n",
        )
        return make_task("pawsx", tmp_path, "ja").samples("dev")

    def test_candidates_and_gold(self, samples):
        # Sentences that nobody translated are left out.
        assert [s.candidates for s in samples] == [("true", "false")] * 2
        assert [s.correct for s in samples] == [("false",), ("true",)]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "pawsx__en",
                "Sentence 1: 犬が走る。 Sentence 2: 走る犬。"
                " Sentence 1 and Sentence 2 have the same meaning. True or False? True",
            ),
            (
                "pawsx_mt",
                "文1：犬が走る。 文2：走る犬。 文1と文2は同じ意味です。正しいか、誤りか？ 正しい",
            ),
            (
                "pawsx_mt__de",
                "Satz 1: 犬が走る。 Satz 2: 走る犬。 Satz 1 und Satz 2 bedeuten dasselbe."
                " Richtig oder falsch? Richtig",
            ),
            (
                "pawsx_conditional_mt",
                "文1と文2は同じ意味です。正しいか、誤りか？ 正しい 文1：犬が走る。 文2：走る犬。",
            ),
            ("pawsx_generativenli__en", "犬が走る, right? Yes, 走る犬。"),
            ("pawsx_generativenli_mt", "犬が走る、正しいですか？はい、走る犬。"),
            ("pawsx_generativenli_ht", "犬が走る、そうですよね？はい、走る犬。"),
        ],
    )
    def test_prompts(self, samples, name, text):
        assert full_prompt(make_template(name, language="ja"), samples[0])[0] == text

    def test_older_names_of_templates(self):
        load_builtins()
        assert TEMPLATES.get("pawsx_default").factory is TEMPLATES.get("pawsx__en").factory
        assert TEMPLATES.get("pawsx_googletranslate").factory is TEMPLATES.get("pawsx_mt").factory

    def test_damaged_rows(self, tmp_path):
        path = write_text(
            tmp_path / "pawsx_de" / "dev.tsv",
            "id\tsentence1\tsentence2\tlabel\n1\ta\tb\t1\n2\ta\tb\t2\n",
        )
        text = reason(make_task("pawsx", tmp_path, "de"), "dev")
        assert text == f"{path}:3: is no row of pawsx: label '2'; expected 0 or 1"


class TestWords:
    def test_every_language_of_the_tasks_has_words(self, tmp_path):
        xnli = set(make_task("xnli", tmp_path, "de").languages)
        pawsx = set(make_task("pawsx", tmp_path, "de").languages)
        assert set(XNLI) == xnli
        assert set(PAWSX) == pawsx
        assert set(TAGS_WORD_BY_WORD) == set(TAGS_IN_USE) == xnli | pawsx

    @pytest.mark.parametrize("words", [XNLI, PAWSX])
    def test_answers_differ(self, words):
        for said in words.values():
            assert len(set(said.answers.values())) == len(said.answers)

    @pytest.mark.parametrize("words", [TAGS_WORD_BY_WORD, TAGS_IN_USE])
    def test_tags_ask_and_answers_differ(self, words):
        for said in words.values():
            assert said.tag[-1] in "?？؟;"
            assert len({said.yes, said.no, said.also}) == 3

    def test_fixed_languages(self):
        load_builtins()
        for language in set(XNLI) - {"en"}:
            sample = pair("A.", "B.", LABELS, "neutral", "", lang="en")
            text = make_template(f"xnli_mt__{language}").encode(sample)
            assert text.count(MASK) == 1
            assert XNLI[language].question in text

    def test_a_language_without_words_is_refused(self):
        sample = pair("A.", "B.", LABELS, "neutral", "", lang="xx")
        with pytest.raises(ConfigError, match=r"XNLITemplate: has no words in 'xx'"):
            make_template("xnli_mt", language="xx").encode(sample)


def test_a_sample_without_answer_counts_in_no_metric():
    known = predicted(FewShotSample({}, LABELS, ("neutral",)), "neutral")
    unknown = predicted(FewShotSample({}, LABELS), "entailment")
    assert build_metric("prf1_micro").score([known, unknown])["micro_F1"] == 1
    assert math.isnan(build_metric("prf1_macro").score([unknown])["macro_F1"])


XNLI_TEMPLATES = [
    *("gpt3stylenli", "xnli__en", "xnli_mt", "xnli_mt__zh", "xnli_generativenli_mt"),
    *("xnli_generativenli_ht", "xnli_generativenli_sentence_mt"),
]


@pytest.mark.parametrize(("set_name", "count"), [("dev", 250), ("train", 2245), ("test", 5010)])
def test_real_xnli(set_name, count):
    task = make_task("xnli", shared_dir("data", "fewshot"), "de")
    check_real_set(task, set_name, XNLI_TEMPLATES, count)


@pytest.mark.parametrize(("set_name", "count"), [("dev", 1932), ("test", 1968)])
def test_real_pawsx(set_name, count):
    task = make_task("pawsx", shared_dir("data", "fewshot"), "de")
    templates = ["pawsx__en", "pawsx_mt", "pawsx_conditional_mt", "pawsx_generativenli_ht"]
    check_real_set(task, set_name, templates, count)


def test_data_sets_of_several_parts_are_groups() -> None:
    found = [each.task for each in plan("m", tasks=["mnli", "anli"], nb_few_shot_samples_values=0)]
    assert found == ["mnlimatched", "mnlimismatched", "anlir1", "anlir2", "anlir3"]
