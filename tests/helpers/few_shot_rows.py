"""Made rows for every task that schedule_jobs_few_shot_english.py tries, in their formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.few_shot.builtins import load_builtins
from examples.few_shot.tasks.api import GROUPS, TASKS

_PAIR = [
    {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
    {"premise": "It snows.", "hypothesis": "It is hot.", "label": "contradiction"},
]
_RTE = [_PAIR[0], {**_PAIR[1], "label": "not_entailment"}]
_ANLI = [
    {"context": row["premise"], "hypothesis": row["hypothesis"], "label": row["label"][0]}
    for row in _PAIR
]
_NLI = [
    {"sentence1": row["premise"], "sentence2": row["hypothesis"], "gold_label": row["label"]}
    for row in _PAIR
]
_COPA = [
    {"premise": "The man fell.", "choice1": "He slipped.", "choice2": "He sang.",
     "question": "cause", "label": 0},
    {"premise": "The sun rose.", "choice1": "It got dark.", "choice2": "It got light.",
     "question": "effect", "label": 1},
]  # fmt: skip
_BOOLQ = [
    {"passage": "Cats purr.", "question": "do cats purr", "label": True},
    {"passage": "Cats purr.", "question": "do cats bark", "label": False},
]
_WIC = [
    {"word": "bank", "sentence1": "A bank lends.", "sentence2": "A bank of the river.",
     "label": False},
    {"word": "run", "sentence1": "I run.", "sentence2": "You run.", "label": True},
]  # fmt: skip
_WSC = [
    {"text": "Ann saw Bea as she left.", "label": label,
     "target": {"span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 4}}
    for label in (True, False)
]  # fmt: skip
_ANSWERS = [{"text": "Ann", "label": 1}, {"text": "Bea", "label": 0}]
_MULTIRC = [
    {"passage": {"text": "Ann ran.", "questions": [{"question": "Who?", "answers": _ANSWERS}]}}
]  # fmt: skip
_RECORD = [
    {"passage": {"text": "Ann met Bea.",
                 "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
     "qas": [{"query": "@placeholder was met.", "answers": [{"text": "Bea"}]}]}
]  # fmt: skip
_SCIENCE = [
    {"question": {"stem": "What is wet?", "choices": [
        {"label": "A", "text": "water"}, {"label": "B", "text": "sand"}]}, "answerKey": key}
    for key in "AB"
]  # fmt: skip
_HELLASWAG = [
    {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "ctx": "A man cooks. he",
     "endings": ["eats.", "flies.", "sings.", "sinks."], "label": label}
    for label in (0, 1)
]  # fmt: skip
_WINOGRANDE = [
    {"sentence": "The cup is not in the bag as the _ is big.", "option1": "cup", "option2": "bag",
     "answer": answer}
    for answer in "12"
]  # fmt: skip
_WINOGRAD = [
    {"context_options": ["The cup fell as the cup", "The cup fell as the bag"],
     "continuation": "was wet.", "gold": 0},
    {"context_options": ["The bag fell as the cup", "The bag fell as the bag"],
     "continuation": "was old.", "gold": 1},
]  # fmt: skip
_FACTS = [
    {"masked_sentences": [f"{sub} is [MASK]."], "pred": "HasProperty", "sub": sub, "obj_label": obj}
    for sub, obj in (("Grass", "g"), ("Snow", "w"))
]  # fmt: skip
_PLACES = [
    {"sub_label": "Ann", "obj_label": "Rome", "pred": "/people/person/place_of_birth",
     "predicate_id": "P19"},
    {"sub_label": "Bea", "obj_label": "Bonn", "pred": "/people/person/place_of_birth",
     "predicate_id": "P19"},
    {"sub_label": "Cid", "obj_label": "Oslo", "pred": "/people/person/place_of_birth",
     "predicate_id": "P19"},
]  # fmt: skip
_STORY = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)),
          "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]  # fmt: skip

_JSON: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "CB/val.jsonl": _PAIR,
    "RTE/val.jsonl": _RTE,
    "COPA/val.jsonl": _COPA,
    "BoolQ/val.jsonl": _BOOLQ,
    "WiC/val.jsonl": _WIC,
    "WSC/val.jsonl": _WSC,
    "MultiRC/val.jsonl": _MULTIRC,
    "ReCoRD/val.jsonl": _RECORD,
    "SNLI/dev.jsonl": _NLI,
    "multinli_1.0/multinli_1.0_dev_matched.jsonl": _NLI,
    "multinli_1.0/multinli_1.0_dev_mismatched.jsonl": _NLI,
    **{f"anli/R{i}/dev.jsonl": _ANLI for i in (1, 2, 3)},
    "arc/ARC-Easy/ARC-Easy-Dev.jsonl": _SCIENCE,
    "arc/ARC-Challenge/ARC-Challenge-Dev.jsonl": _SCIENCE,
    "openbookqa/dev.jsonl": _SCIENCE,
    "commonsenseqa/dev_rand_split.jsonl": _SCIENCE,
    "hellaswag/hellaswag_val.jsonl": _HELLASWAG,
    "piqa/valid.jsonl": [{"goal": "To cook", "sol1": "use heat", "sol2": "use ice"}] * 2,
    "winogrande/dev.jsonl": _WINOGRANDE,
    "llmfoundry/winograd_wsc.jsonl": _WINOGRAD,
    "lama/ConceptNet/test.jsonl": _FACTS,
    "lama/Squad/test.jsonl": _FACTS,
    "lama/Google_RE/place_of_birth_test.jsonl": _PLACES,
    "lama/TREx/P19.jsonl": _PLACES,
    "lama/relations.jsonl": [{"relation": "P19", "template": "[X] was born in [Y] ."}],
    "mlama1.1/en/P19.jsonl": _PLACES,
    "mlama1.1/en/place_of_birth.jsonl": _PLACES,
    "mlama1.1/en/templates.jsonl": [
        {"relation": "P19", "template": "[X] was born in [Y] ."},
        {"relation": "place_of_birth", "template": "[X] was born in [Y] ."},
    ],
}


def write_english_tasks(folder: Path) -> Path:
    """A data folder with two rows or three of each of these tasks, of what is evaluated."""
    load_builtins()
    files = dict(_JSON)
    for name in GROUPS["blimp"]:
        (file,) = (f"blimp/{each}.jsonl" for each in TASKS.get(name).factory.sets)
        files[file] = [
            {"sentence_good": "She sings.", "sentence_bad": "She sing."},
            {"sentence_good": "They sing.", "sentence_bad": "They sings."},
        ]
    for name in GROUPS["diagnosis"]:
        kind = name.removeprefix("diagnosis")
        rows = [{"choices": ["tea", "Rome", "red"], "label": i} for i in (0, 1)]
        files[f"diagnosis/{kind}.test.jsonl"] = rows
    for name, content in files.items():
        _write(folder / name, "".join(json.dumps(row) + "\n" for row in content))
    _write(folder / "piqa/valid-labels.lst", "0\n1\n")
    _write(folder / "sst2/dev.tsv", "sentence\tlabel\ngood\t1\nbad\t0\n")
    _write(folder / "agnews/test.csv", '"2","Goal","They won."\n"3","Shares","They fell."\n')
    stories = folder / "storycloze/spring2016.test.en.tsv"
    _write(stories, "")
    with stories.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerow(_STORY)
        out.writerow(
            ["1", "Ann sat.", "She ate.", "It was hot.", "She hurt.", "Ouch.", "Yes.", "1"]
        )
        out.writerow(["2", "Bea ran.", "She fell.", "It bled.", "She sat.", "Fine.", "Sad.", "2"])
    return folder


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
