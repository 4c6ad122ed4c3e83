"""Prompts: what stands in them, and what has to go when they are too long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.few_shot.metrics.basic import CalibrationPerplexity, CandidatePerplexity
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.predictors.api import PredictorOptions, Trial
from examples.few_shot.predictors.prompting import CLMPrompting
from examples.few_shot.prompting import Encoding, compose, encode, fitted
from examples.few_shot.samples import FewShotSample, choice
from examples.few_shot.sampling import draw
from examples.few_shot.tasks.api import FewShotTask
from examples.few_shot.templates.api import MASK, FewShotTemplate


class Questions(FewShotTemplate):
    """Q and A."""

    def encode(self, sample: FewShotSample) -> str:
        return self.lines(("Q:", sample["q"]), ("A:", MASK + sample.get("after", "")))


class Task(FewShotTask):
    """A task for tests."""

    name = "t"

    def sample(self, row: dict[str, object], where: str) -> FewShotSample | None:
        raise AssertionError


def question(text: str = "Why?", *answers: str, after: str = "", gold: int = 0) -> FewShotSample:
    return choice({"q": text, "after": after}, answers or ("yes", "no"), gold)


def encoding(limit: int = 1000, newline_to_end: bool = False) -> Encoding:
    return Encoding(DummyModel(), limit, newline_to_end)


def text_of(tokens: np.ndarray) -> str:
    return "".join(DummyModel().symbols(tokens))


def test_shots_stand_in_front_of_the_question() -> None:
    template = Questions(sep="\n")
    shots = [template.encode_correct_candidate(question("One?"))]
    prompt = compose(template, question(), shots, "Answer these.")
    assert prompt.texts == [
        "Answer these.\nQ: One?\nA: yes\nQ: Why?\nA: yes",
        "Answer these.\nQ: One?\nA: yes\nQ: Why?\nA: no",
    ]


def test_an_empty_field_goes_with_its_label() -> None:
    assert compose(Questions(sep="\n"), question(""), []).before == "A: "


def test_candidates_share_the_context_and_the_end() -> None:
    sample = question("Why?", "cats", "cows", after=" sleep")
    prompt, sequences = fitted(Questions(), sample, [], "", encoding())
    found = encode(prompt, sequences, encoding())
    assert text_of(found.request.context) == "Q: Why? A: c"
    assert [text_of(tail) for tail in found.request.continuations] == ["ats sleep", "ows sleep"]
    assert found.starts == (-1, -1)
    assert found.suffix == len("s sleep")


def test_shots_that_do_not_fit_are_dropped_whole_from_the_last_on() -> None:
    template = Questions(sep="\n")
    shots = [template.encode_correct_candidate(question(f"{n}?")) for n in range(5)]
    one = len("Q: 0?\nA: yes\n")
    bare = len("Q: Why?\nA: yes")
    prompt, sequences = fitted(template, question(), shots, "", encoding(bare + 2 * one + 3))
    assert prompt.shots == 2
    assert prompt.before == "Q: 0?\nA: yes\nQ: 1?\nA: yes\nQ: Why?\nA: "
    assert max(map(len, sequences)) == bare + 2 * one


@given(st.integers(1, 120), st.integers(0, 6))
def test_as_many_shots_as_fit_and_never_more_tokens_than_the_limit(limit: int, k: int) -> None:
    template = Questions(sep="\n")
    shots = [template.encode_correct_candidate(question(f"{n}" * n + "?")) for n in range(k)]
    prompt, sequences = fitted(template, question(), shots, "", encoding(limit))
    whole = max(len("\n".join([*shots[: prompt.shots + 1], "Q: Why?\nA: yes"])) for _ in range(1))
    assert prompt.shots == k or whole > limit
    found = encode(prompt, sequences, encoding(limit)).request
    assert found.longest <= limit
    assert all(len(tail) for tail in found.continuations)


def test_the_description_goes_before_the_question_is_cut() -> None:
    prompt, _ = fitted(Questions(), question(), ["shot"], "Say.", encoding(16))
    assert (prompt.before, prompt.shots) == ("Q: Why? A: ", 0)


def test_a_question_that_is_too_long_is_cut_from_the_left() -> None:
    prompt, sequences = fitted(Questions(), question(), [], "", encoding(8))
    found = encode(prompt, sequences, encoding(8))
    assert text_of(found.request.context) + text_of(found.request.continuations[0]) == "? A: yes"
    assert found.cut == len("Q: Why? A: yes") - 8


def test_line_breaks_become_the_end_symbol() -> None:
    found = encoding(newline_to_end=True)("one\n\n  \ntwo\n")
    assert text_of(found) == "one</s>two</s>"
    assert text_of(encoding()("a\nb")) == "a\nb"


def trial(*questions: FewShotSample, k: int = 0, pool: tuple[FewShotSample, ...] = ()) -> Trial:
    shots = draw(pool, k, seed=0, trial=0, task="t")
    return Trial(Task(), Questions(sep="\n"), questions, shots, questions)


def predictor(**options: object) -> CLMPrompting:
    return CLMPrompting(DummyModel(), PredictorOptions(**options))  # type: ignore[arg-type]


@given(st.permutations(["cats", "dogs", "cows", "a cat"]), st.sampled_from(["sum", "mean"]))
def test_permuting_the_options_permutes_the_scores(order: list[str], scoring: str) -> None:
    names = ["cats", "dogs", "cows", "a cat"]
    (usual,) = predictor(scoring=scoring).predict(trial(question("Why?", *names)))
    (found,) = predictor(scoring=scoring).predict(trial(question("Why?", *order)))
    expected = {one.candidate: one.score for one in usual.candidates}
    assert [one.candidate for one in found.candidates] == order
    for one in found.candidates:
        assert one.score == pytest.approx(expected[one.candidate], abs=1e-5)


def test_scores_are_those_of_the_text_by_itself() -> None:
    (found,) = predictor(add_positional_scores=True).predict(trial(question()))
    model = DummyModel()
    for one in found.candidates:
        expected = model._log_probs(model.encode("Q: Why?\nA: " + one.candidate))
        assert one.meta["positional_scores"] == pytest.approx(expected.tolist())
        assert one.score == pytest.approx(float(expected.sum()), abs=1e-4)


def test_every_scoring_can_be_made_again_from_what_is_kept() -> None:
    for scoring in ("sum", "mean", "unconditional-norm"):
        (found,) = predictor(scoring=scoring).predict(trial(question("Why?", "cats", "a dog")))
        for one in found.candidates:
            meta = one.meta
            again = {
                "sum": meta["context_score"] + sum(meta["tail_scores"]),
                "mean": sum(meta["tail_scores"]) / len(meta["tail_scores"]),
                "unconditional-norm": sum(meta["tail_scores"])
                - sum(meta.get("unconditional_scores", ())),
            }[scoring]
            assert one.score == pytest.approx(again)


def test_calibration_takes_off_what_a_prompt_without_content_gives() -> None:
    options = {"calibrator": "average_option", "calibration_options": ("q::", "q::N/A")}
    (found,) = predictor(add_calib=True, scoring="mean", **options).predict(trial(question()))
    plain = predictor(scoring="mean")
    (raw,) = plain.predict(trial(question()))
    copies = [plain.predict(trial(question(text)))[0] for text in ("", "N/A")]
    for j, one in enumerate(found.candidates):
        mean = sum(copy.candidates[j].score for copy in copies) / 2
        assert one.meta["calib_score"] == pytest.approx(mean)
        assert one.score == pytest.approx(raw.candidates[j].score - mean)
        assert [each["option"] for each in one.meta["calib_metas"]] == ["q::", "q::N/A"]


def test_all_questions_get_as_many_shots_as_the_longest_has_room_for() -> None:
    pool = tuple(question(f"{n}?") for n in range(4))
    questions = [question("Why?"), question("W" + "h" * 40 + "y?")]
    limit = len("Q: Why?\nA: yes") + 4 * len("Q: 0?\nA: yes\n")
    for same, expected in ((False, [4, 1]), (True, [1, 1])):
        found = predictor(max_positions=limit, same_number_of_shots=same).predict(
            trial(*questions, k=4, pool=pool)
        )
        assert [one.meta["nb_few_shot_samples"] for one in found] == expected
        left_out = [4 - count for count in expected]
        assert [one.meta["nb_trunc_few_shot_samples"] for one in found] == left_out


@pytest.mark.parametrize("kind", ["generation", "ranking"])
@pytest.mark.parametrize("same", [False, True])
def test_written_and_ranked_answers_get_as_many_shots_too(kind: str, same: bool) -> None:
    class Other(Task):
        max_new_tokens = 3

    Other.kind = kind  # type: ignore[assignment]
    answers = () if kind == "generation" else ("yes",)
    pool = tuple(question(f"{n}?") for n in range(4))
    long = "W" + "h" * 40 + "y?"
    questions = [FewShotSample({"q": q}, answers, ("yes",)) for q in ("Why?", long)]
    limit = len("Q: Why?\nA: yes") + 4 * len("Q: 0?\nA: yes\n")
    shots = draw(pool, 4, seed=0, trial=0, task="t")
    found = predictor(max_positions=limit, same_number_of_shots=same, add_prompt=True).predict(
        Trial(Other(), Questions(sep="\n"), questions, shots, questions)
    )
    expected = [1, 1] if same else [4, 1]
    assert [one.meta["nb_few_shot_samples"] for one in found] == expected
    prompts = [one.candidates[0].meta["prompt"] for one in found]
    assert [prompt.count("A: yes") for prompt in prompts] == expected


@pytest.mark.parametrize("kind", ["generation", "ranking"])
def test_written_and_ranked_answers_tell_of_prompts_that_are_cut(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(Task):
        max_new_tokens = 3

    Other.kind = kind  # type: ignore[assignment]
    answers = () if kind == "generation" else ("yes",)
    questions = [FewShotSample({"q": q}, answers, ("yes",)) for q in ("Why?", "Wh" * 20 + "?")]
    shots = draw((), 0, seed=0, trial=0, task="t")
    predictor(max_positions=30).predict(
        Trial(Other(), Questions(), questions, shots, questions)
    )  # fmt: skip
    (message,) = caplog.messages
    assert message.startswith("t: 1 of 2 prompts do not fit in 30 tokens")


def test_perplexities_of_what_calibrates_are_those_of_its_copies() -> None:
    options = {"calibrator": "average_option", "calibration_options": ("q::", "q::N/A")}
    asked = [question("One?"), question("Two, then?")]
    found = predictor(**options).predict(trial(*asked))
    plain = [predictor().predict(trial(question(text)))[0] for _ in asked for text in ("", "N/A")]
    expected = CandidatePerplexity().score(plain)
    numbers = CalibrationPerplexity().score(found)
    assert {name: pytest.approx(value) for name, value in numbers.items()} == {
        name.replace("ppl", "ppl_calib", 1): value
        for name, value in expected.items()
        if name.startswith("ppl")
    }
    assert {"ppl_calib_common_prefix", "ppl_calib_candidates_full_prompt__yes"} <= set(numbers)
    assert CalibrationPerplexity().score(plain) == {}


def test_candidates_that_all_questions_have_get_a_perplexity_of_their_own() -> None:
    metric = CandidatePerplexity()
    found = predictor().predict(trial(question("One?"), question("Two?")))
    numbers = metric.score(found)
    for j, name in enumerate(("yes", "no")):
        mean = sum(one.candidates[j].meta["ppl_full"] for one in found) / 2
        assert numbers[f"ppl_candidates_full_prompt__{name}"] == pytest.approx(mean)
    other = predictor().predict(trial(question("One?"), question("Two?", "so", "or")))
    assert not any("__" in name for name in metric.score(other))
