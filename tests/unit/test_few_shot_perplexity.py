"""Perplexity of running text."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from examples.few_shot import sampling
from examples.few_shot.metrics.api import build_metric
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.predictors.api import Prediction, PredictorOptions, ScoredCandidate, Trial
from examples.few_shot.predictors.prompting import CLMPrompting
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import plan
from examples.few_shot.tasks.api import FewShotTask
from fairseq_lite.errors import ConfigError
from tests.helpers.few_shot_tasks import make_task, make_template, reason, write_jsonl, write_text
from tests.helpers.shared import shared_dir

TEXT = "One line.\n\nAnother — line,\u2028and the last\n"


def measured(task: FewShotTask, path: Path, window: int = 2048) -> dict[str, float]:
    samples = task.samples(str(path))
    trial = Trial(
        task,
        make_template("perplexity"),
        samples,
        sampling.draw((), 0, seed=0, trial=0, task=task.name),
        samples,
    )
    predictions = CLMPrompting(DummyModel(window), PredictorOptions()).predict(trial)
    return dict(build_metric("rolling_perplexity").score(predictions))


def test_a_file_is_one_text_as_it_is(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", TEXT)
    (sample,) = make_task("perplexity", tmp_path).samples(str(path))
    assert sample["text"] == TEXT
    lines = make_task("perplexity", tmp_path, documents="line").samples(str(path))
    assert [each["text"] for each in lines] == ["One line.", "Another — line,\u2028and the last"]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"text": TEXT}).encode()))
    assert make_task("perplexity", tmp_path).samples(str(packed)) == (sample,)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say --perplexity-eval-set FILE"):
        plan("m", tasks="perplexity")
    with pytest.raises(ConfigError, match="perplexity takes no shots"):
        plan("m", tasks="perplexity", perplexity_eval_set="a.txt", any_train_set="b.txt",
             nb_few_shot_samples_values=1)  # fmt: skip
    (planned,) = plan("m", tasks="perplexity", perplexity_eval_set="a.txt", documents="line")
    assert planned.k == 0 and planned.task_options.documents == "line"
    path = write_text(tmp_path / "a.txt", " \n")
    assert f"{path}: is no row of perplexity: has no text" in reason(
        make_task("perplexity", tmp_path), str(path)
    )
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert "b.txt: cannot be read as UTF-8" in reason(
        make_task("perplexity", tmp_path), str(tmp_path / "b.txt")
    )


def test_perplexities_are_those_of_the_tokens(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", TEXT)
    found = measured(make_task("perplexity", tmp_path), path)
    ids = np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.int64)
    total = -DummyModel._log_probs(ids).sum(dtype=np.float64)
    assert found["token_perplexity"] == pytest.approx(math.exp(total / len(ids)))
    assert found["byte_perplexity"] == pytest.approx(found["token_perplexity"])
    # U+2028 is a space between words, too; the dash is a word.
    assert found["word_perplexity"] == pytest.approx(math.exp(total / 8))
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_perplexity"]))
    assert next(iter(found)) == "token_perplexity"


def test_every_token_is_scored_once_whatever_the_window(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", TEXT)
    task = make_task("perplexity", tmp_path)
    samples = task.samples(str(path))
    for window in (2, 3, 7, len(TEXT.encode())):
        trial = Trial(task, make_template("perplexity"), samples,
                      sampling.draw((), 0, seed=0, trial=0, task=task.name), samples)  # fmt: skip
        (one,) = CLMPrompting(DummyModel(window), PredictorOptions()).predict(trial)
        assert one.best.meta["tokens"] == len(TEXT.encode())


def test_rolling_perplexity_by_hand() -> None:
    def text(score: float, tokens: int, words: int, size: int) -> Prediction:
        meta = {"tokens": tokens, "words": words, "bytes": size}
        return Prediction(FewShotSample({"text": "t"}), (ScoredCandidate("", score, meta),))

    found = build_metric("rolling_perplexity").score([text(-6, 3, 2, 8), text(-2, 1, 2, 8)])
    assert found["token_perplexity"] == pytest.approx(math.exp(8 / 4))
    assert found["word_perplexity"] == pytest.approx(math.exp(8 / 4))
    assert found["byte_perplexity"] == pytest.approx(math.exp(8 / 16))
    assert found["bits_per_byte"] == pytest.approx(8 / 16 / math.log(2))


def test_rows_are_scored_by_themselves_and_counted_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "ab cd"}, {"text": "ef"})
    found = measured(make_task("perplexity", tmp_path), path)
    totals = [
        -DummyModel._log_probs(np.frombuffer(text, dtype=np.uint8).astype(np.int64)).sum()
        for text in (b"ab cd", b"ef")
    ]
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(map(float, totals)) / 3))


def test_a_real_file() -> None:
    path = shared_dir("data", "lm", "tinyshakespeare")
    file = max(path.glob("*.txt"), key=lambda each: each.stat().st_size)
    (sample,) = make_task("perplexity", path).samples(str(file))
    assert sample["text"].encode() == file.read_bytes()
