"""Prompting a language model: `clmprompting`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.few_shot import calibration, prompting, scoring
from examples.few_shot.models.api import GenerateRequest, Ids, Model, ScoreRequest, Scores
from examples.few_shot.predictors.api import (
    PREDICTORS,
    Prediction,
    Predictor,
    PredictorOptions,
    ScoredCandidate,
    Trial,
)
from examples.few_shot.samples import FewShotSample
from fairseq_lite.errors import ConfigError

logger = logging.getLogger(__name__)

# How many tokens a ranking lists where --beam-size does not say.
_LISTED = 10


@dataclasses.dataclass(frozen=True)
class _Question:
    """A question, or a copy without content that calibrates one.

    Attributes:
        number: of the question.
        option: of the calibration option; None for the question itself.
        encoded: its prompt.
    """

    number: int
    option: int | None
    encoded: prompting.Encoded


@PREDICTORS.register("clmprompting", aliases=("clmpromptinghuggingface", "dummy"))
class CLMPrompting(Predictor):
    """Candidates are scored, or answers written, behind a prompt with shots."""

    def __init__(self, model: Model | None, options: PredictorOptions) -> None:
        super().__init__(model, options)
        assert model is not None
        self.lm = model
        limit = model.max_tokens
        if options.max_positions is not None:
            if options.max_positions > limit:
                logger.warning(
                    "--max-positions %d: the model takes %d", options.max_positions, limit
                )
            limit = min(limit, options.max_positions)
        self.encoding = prompting.Encoding(model, limit, options.newline_to_end)

    def predict(self, trial: Trial) -> list[Prediction]:
        kind = trial.task.kind
        if kind == "choice":
            return self._choose(trial)
        if self.options.calibrator is not None:
            raise ConfigError(
                f"--calibrator-name: {trial.task.name} has no candidates whose scores it could"
                " calibrate; leave it out"
            )
        if kind == "generation":
            return self._write(trial)
        if kind == "ranking":
            return self._rank(trial)
        return self._measure(trial)

    # -- candidates

    def _choose(self, trial: Trial) -> list[Prediction]:
        questions = self._questions(trial)
        found = self._scores(questions, trial)
        unconditional = self._unconditional(trial) if self._needs_unconditional else {}
        by_number: dict[int, list[tuple[_Question, Scores]]] = {}
        for question, scores in zip(questions, found, strict=True):
            by_number.setdefault(question.number, []).append((question, scores))
        return [
            self._prediction(by_number[number], unconditional, trial)
            for number in range(len(trial.questions))
        ]

    def _questions(self, trial: Trial) -> list[_Question]:
        """Every question and its copies for calibration, behind the same shots."""
        most = self._most_shots(trial)
        found: list[_Question] = []
        for number, sample in enumerate(trial.questions):
            texts = self._shots(trial, number)
            copies = calibration.copies(sample, self.options.calibration_options)
            for option, copy in enumerate([sample, *copies]):
                prompt, sequences = self._fitted(trial, copy, texts, most)
                encoded = prompting.encode(prompt, sequences, self.encoding)
                found.append(_Question(number, option - 1 if option else None, encoded))
        self._tell_cut(trial, sum(q.encoded.cut > 0 for q in found if q.option is None))
        return found

    def _scores(self, questions: Sequence[_Question], trial: Trial) -> list[Scores]:
        requests = [question.encoded.request for question in questions]
        per_question = len(requests) / max(1, len(trial.questions))

        def progress(done: int) -> None:
            if trial.progress is not None:
                trial.progress(int(done / per_question))

        return self.lm.score(
            requests, context_scores=self.options.context_scores, progress=progress
        )

    @property
    def _needs_unconditional(self) -> bool:
        """Whether they are scored: for that scoring, or to have all that scorings are made of."""
        return self.options.scoring == "unconditional-norm" or self.options.add_positional_scores

    def _unconditional(self, trial: Trial) -> dict[str, tuple[float, ...]]:
        """Log-probabilities of the words of every candidate behind "Answer:" alone."""
        words = {
            trial.template.verbalize(sample, candidate)
            for sample in trial.questions
            for candidate in sample.candidates
        }
        head = self.encoding("Answer:")
        texts = sorted(words)
        requests = []
        for text in texts:
            whole = self.encoding(f"Answer: {text.strip()}")[-self.encoding.limit :]
            start = min(scoring.common_prefix([head, whole]), max(len(whole) - 1, 0))
            requests.append(ScoreRequest(whole[:start], (whole[start:],)))
        found = self.lm.score(requests)
        return {
            text: tuple(one.continuations[0].tolist())
            for text, one in zip(texts, found, strict=True)
        }

    def _prediction(
        self,
        found: Sequence[tuple[_Question, Scores]],
        unconditional: dict[str, tuple[float, ...]],
        trial: Trial,
    ) -> Prediction:
        (question, scores), *reduced = found
        sample = question.encoded.prompt.sample
        known = self._token_scores(question.encoded, scores, unconditional)
        copies = [self._token_scores(c.encoded, its, unconditional) for c, its in reduced]
        raw = [scoring.score(each, self.options.scoring) for each in known]
        calibrating = [
            [scoring.score(each, self.options.scoring) for each in copy] for copy in copies
        ]
        means = calibration.average(calibrating, len(raw))
        candidates = []
        for j, name in enumerate(sample.candidates):
            meta = self._meta(question.encoded, scores, j, known[j]) | {"score_raw": raw[j]}
            if calibrating:
                meta["calib_score"] = means[j]
                meta["calib_ppls"] = [_perplexities(copy[j]) for copy in copies]
                if self.options.add_calib:
                    meta["calib_metas"] = [
                        {"option": option, "score": its_scores[j], **_kept(copy[j])}
                        for option, its_scores, copy in zip(
                            self.options.calibration_options, calibrating, copies, strict=True
                        )
                    ]
            candidates.append(ScoredCandidate(name, raw[j] - means[j], meta))
        meta = {
            "ppl": _context_perplexity(known),
            **_shots_meta(question.encoded.prompt),
            "tokens_cut": question.encoded.cut,
        }
        if calibrating:
            meta["calib_ppls"] = [
                {"ppl": _context_perplexity(copy), "best": int(np.argmax(scores))}
                for copy, scores in zip(copies, calibrating, strict=True)
            ]
        return Prediction(trial.questions[question.number], tuple(candidates), meta)

    def _token_scores(
        self,
        encoded: prompting.Encoded,
        scores: Scores,
        unconditional: dict[str, tuple[float, ...]],
    ) -> list[scoring.TokenScores]:
        skipped = scores.context is None
        context = 0.0 if scores.context is None else float(scores.context.sum(dtype=np.float64))
        return [
            scoring.TokenScores(
                context,
                len(encoded.request.context),
                tuple(tail.tolist()),
                start,
                encoded.suffix,
                len(answer),
                unconditional.get(answer),
                skipped,
            )
            for tail, start, answer in zip(
                scores.continuations, encoded.starts, encoded.prompt.answers, strict=True
            )
        ]

    def _meta(
        self, encoded: prompting.Encoded, scores: Scores, j: int, known: scoring.TokenScores
    ) -> dict[str, Any]:
        meta: dict[str, Any] = {
            **_perplexities(known), "greedy": scores.greedy[j], **_kept(known)
        }  # fmt: skip
        if self.options.add_prompt:
            meta["prompt"] = encoded.prompt.texts[j]
        if self.options.add_positional_scores:
            context = [] if scores.context is None else scores.context.tolist()
            meta["positional_scores"] = [*context, *known.tail]
        if self.options.add_prompt_tokens:
            ids = np.concatenate([encoded.request.context, encoded.request.continuations[j]])
            meta["prompt_tokens"] = self.lm.symbols(ids)
        return meta

    # -- written answers, one word, running text

    def _write(self, trial: Trial) -> list[Prediction]:
        room = trial.task.max_new_tokens
        most = self._most_shots(trial, room)
        prompts, requests, cut = [], [], 0
        longest = max(self.encoding.limit - room, 1)
        for number, sample in enumerate(trial.questions):
            assert not trial.template.split(sample)[1], "a prompt to go on from ends with its mask"
            prompt, _ = self._fitted(trial, sample, self._shots(trial, number), most, room)
            prompts.append(prompt)
            ids = self.encoding(prompt.before.rstrip(" "))
            cut += len(ids) > longest
            requests.append(GenerateRequest(ids[-longest:], room, trial.task.stop))
        self._tell_cut(trial, cut)
        written = self.lm.generate(requests, beam=self.options.beam_size, progress=trial.progress)
        found = []
        for prompt, text in zip(prompts, written, strict=True):
            meta = {"prompt": prompt.before} if self.options.add_prompt else {}
            answer = trial.template.postprocess(prompt.sample, text)
            one = ScoredCandidate(answer, 1.0, {"text": text, **meta})
            found.append(Prediction(prompt.sample, (one,), _shots_meta(prompt)))
        return found

    def _rank(self, trial: Trial) -> list[Prediction]:
        """Where the answer stands in the vocabulary; of several tokens the first."""
        contexts, wanted, prompts, cut = [], [], [], 0
        most = self._most_shots(trial)
        for number, sample in enumerate(trial.questions):
            texts = self._shots(trial, number)
            prompt, sequences = self._fitted(trial, sample, texts, most)
            encoded = prompting.encode(prompt, sequences, self.encoding)
            ids = encoded.request.continuations[0]
            start = max(encoded.starts[0], 0)
            contexts.append(np.concatenate([encoded.request.context, ids[:start]]))
            wanted.append(int(ids[min(start, len(ids) - 1)]))
            prompts.append(prompt)
            cut += encoded.cut > 0
        self._tell_cut(trial, cut)
        top = self.options.beam_size if self.options.beam_size > 1 else _LISTED
        found = []
        ranked = self.lm.rank(contexts, wanted, top=top)
        for prompt, one in zip(prompts, ranked, strict=True):
            symbols = self.lm.symbols(np.array(one.top, dtype=np.int64))
            meta = {
                "rank": one.rank,
                "top_ranked_predictions": symbols,
                "answer_tokens": self._answer_tokens(prompt),
                **({"prompt": prompt.before} if self.options.add_prompt else {}),
            }
            candidate = ScoredCandidate(prompt.sample.correct[0], one.log_prob, meta)
            found.append(Prediction(prompt.sample, (candidate,), _shots_meta(prompt)))
        return found

    def _answer_tokens(self, prompt: prompting.Prompt) -> int:
        """How many tokens the answer has behind its prompt."""
        with_answer = self.encoding(prompt.before + prompt.answers[0])
        before = scoring.common_prefix([self.encoding(prompt.before), with_answer])
        return max(len(with_answer) - before, 1)

    def _measure(self, trial: Trial) -> list[Prediction]:
        """Log-probabilities of whole texts, in windows that do not overlap."""
        requests, owners = [], []
        for number, sample in enumerate(trial.questions):
            ids = self.encoding(str(sample["text"]))
            start = 0
            while start < len(ids):
                # A window begins behind the last token of the one before it.
                context = ids[max(start - 1, 0) : start]
                part = ids[start : start + self.encoding.limit - len(context)]
                requests.append(ScoreRequest(context, (part,)))
                owners.append(number)
                start += len(part)
        sums = [0.0] * len(trial.questions)
        counts = [0] * len(trial.questions)
        for owner, one in zip(owners, self.lm.score(requests), strict=True):
            sums[owner] += float(one.continuations[0].sum(dtype=np.float64))
            counts[owner] += len(one.continuations[0])
        found = []
        for number, sample in enumerate(trial.questions):
            text = str(sample["text"])
            meta = {
                "tokens": counts[number],
                "words": len(text.split()),
                "bytes": len(text.encode()),
                "ppl": scoring.perplexity(sums[number], counts[number]),
            }
            found.append(Prediction(sample, (ScoredCandidate("", sums[number], meta),), {}))
        return found

    # -- shots

    def _shots(self, trial: Trial, number: int) -> list[str]:
        if not trial.shots.k:
            return []
        parent = trial.parents[number]
        return [trial.template.encode_correct_candidate(shot) for shot in trial.shots.of(parent)]

    def _most_shots(self, trial: Trial, room: int = 0) -> int | None:
        """How many shots fit every question, where all are to have as many; else no limit."""
        if not self.options.same_number_of_shots:
            return None
        every = (
            self._fitted(trial, sample, self._shots(trial, number), None, room)[0]
            for number, sample in enumerate(trial.questions)
        )
        return min((prompt.shots for prompt in every), default=0)

    def _fitted(
        self,
        trial: Trial,
        sample: FewShotSample,
        shots: Sequence[str],
        most: int | None,
        room: int = 0,
    ) -> tuple[prompting.Prompt, list[Ids]]:
        """A question behind as many shots as fit; see `prompting.fitted`."""
        said = self._description(trial)
        return prompting.fitted(trial.template, sample, shots, said, self.encoding, room, most)

    def _tell_cut(self, trial: Trial, count: int) -> None:
        if count:
            logger.warning(
                "%s: %d of %d prompts do not fit in %d tokens without any shot and are cut from the"
                " left", trial.task.name, count, len(trial.questions), self.encoding.limit,
            )  # fmt: skip

    @staticmethod
    def _description(trial: Trial) -> str:
        return trial.template.task_description or trial.task.description


def _perplexities(known: scoring.TokenScores) -> dict[str, float]:
    """Of a candidate from where candidates differ, and with its prompt, if that was scored."""
    found = {"ppl": scoring.perplexity(math.fsum(known.tail), len(known.tail))}
    if not known.skipped:
        found["ppl_full"] = scoring.perplexity(known.total, known.tokens)
    return found


def _context_perplexity(candidates: Sequence[scoring.TokenScores]) -> float:
    """Of what candidates begin with; NaN where that was not scored."""
    known = candidates[0]
    return scoring.perplexity(known.context, 0 if known.skipped else known.context_tokens)


def _shots_meta(prompt: prompting.Prompt) -> dict[str, Any]:
    return {
        "nb_few_shot_samples": prompt.shots,
        "nb_trunc_few_shot_samples": prompt.left_out,
    }


def _kept(known: scoring.TokenScores) -> dict[str, Any]:
    """What every scoring can be made from again; see `scoring.TokenScores`."""
    found = {
        "context_score": None if known.skipped else known.context,
        "context_tokens": known.context_tokens,
        "tail_scores": list(known.tail),
        "start": known.start,
        "suffix": known.suffix,
        "characters": known.characters,
    }
    if known.unconditional is not None:
        found["unconditional_scores"] = list(known.unconditional)
    return found


def token_scores(meta: Mapping[str, Any]) -> scoring.TokenScores:
    """What `_kept` kept."""
    unconditional = meta.get("unconditional_scores")
    return scoring.TokenScores(
        meta["context_score"] or 0.0,
        meta["context_tokens"],
        tuple(meta["tail_scores"]),
        meta["start"],
        meta["suffix"],
        meta["characters"],
        None if unconditional is None else tuple(unconditional),
        meta["context_score"] is None,
    )
