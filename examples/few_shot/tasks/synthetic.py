"""Sums and scrambled words, the synthetic tasks of Brown et al. 2020 (section 3.9)."""

from __future__ import annotations

from typing import Any

from examples.few_shot.samples import FewShotSample
from examples.few_shot.tasks.api import TASKS, FewShotTask

_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

ARITHMETIC = {
    **{f"addition{n}digit": f"{word}_digit_addition" for n, word in _NUMBERS.items()},
    **{f"subtraction{n}digit": f"{word}_digit_subtraction" for n, word in _NUMBERS.items()},
    "multiplication2digit": "two_digit_multiplication",
    "singledigit3ops": "single_digit_three_ops",
    "sumofdigits": "sum_of_digits",
}
WORDS = {
    "cycledletters": "cycle_letters_in_word",
    "anagrams1": "mid_word_1_anagrams",
    "anagrams2": "mid_word_2_anagrams",
    "symbolinsertion": "random_insertion_in_word",
    "reversedwords": "reversed_words",
}


class Synthetic(FewShotTask):
    """Rows of `context` and `completion`; the answer must be written as it stands there.

    The one set is called as its file is; shots come from it, too.
    """

    kind = "generation"
    max_new_tokens = 10

    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        data = {"context": row["context"].strip()}
        return FewShotSample(data, (), (row["completion"].strip(),), where=where)


def _task(file: str, about: str, template: str) -> type[Synthetic]:
    folders = ("gpt3_arithmetic", "gpt-3/data")
    names = tuple(f"{folder}/{file}.jsonl{gz}" for folder in folders for gz in ("", ".gz"))
    members = {
        "__doc__": f"{about} (Brown et al. 2020): the file {file}.",
        "__module__": __name__,
        "sets": {file: names},
        "train_set": file,
        "eval_set": file,
        "template": template,
    }
    return type(f"Synthetic_{file}", (Synthetic,), members)


for _name, _file in ARITHMETIC.items():
    TASKS.register(_name)(_task(_file, "Arithmetic", "synthetic"))
for _name, _file in WORDS.items():
    TASKS.register(_name)(_task(_file, "Scrambled words", "unscrambling"))
