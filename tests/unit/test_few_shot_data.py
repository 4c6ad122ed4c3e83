"""Data files: looked for before a model is loaded, read once, let go of afterwards."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.few_shot import gpt3_eval
from examples.few_shot.evaluation import Tasks
from examples.few_shot.samples import FewShotSample
from examples.few_shot.settings import plan
from examples.few_shot.stale import data_digests
from examples.few_shot.tasks.api import FewShotTask
from fairseq_lite.errors import DataError
from tests.helpers.few_shot_tasks import write_jsonl, write_text

LANGUAGES = ("et", "it", "zh")


def copa_rows(said: str, count: int = 4) -> list[dict[str, Any]]:
    return [
        {"premise": f"{said} {i} fell.", "choice1": f"a {i}.", "choice2": "b.", "label": i % 2,
         "question": ("cause", "effect")[i % 2], "idx": i}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three tasks, one of them in three languages."""
    root = tmp_path / "data"
    for name in ("train", "val"):
        write_jsonl(root / "COPA" / f"{name}.jsonl", *copa_rows(f"copa {name}"))
        write_jsonl(
            root / "BoolQ" / f"{name}.jsonl",
            *({"passage": f"{name} {i}.", "question": f"is it {i}", "label": True, "idx": i}
              for i in range(4)),
        )  # fmt: skip
    for language in LANGUAGES:
        for name in ("val", "test"):
            path = root / "xcopa" / language / f"{name}.{language}.jsonl"
            write_jsonl(path, *copa_rows(f"{language} {name}"))
    return root


class Watch:
    """Follows what is read, and which samples are alive whenever a file is about to be.

    Attributes:
        read: files, in order.
        held: whose samples were alive at some such time: sets of tasks with their languages.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[Path] = []
        self.held: set[frozenset[str]] = set()
        self._born: list[tuple[str, weakref.ref[FewShotSample]]] = []
        plain, watch = FewShotTask.read, self

        def read(task: FewShotTask, path: Path) -> Iterator[FewShotSample]:
            watch.read.append(path)
            owner = f"{task.name} {task.language or ''}"
            watch.look(owner)
            for sample in plain(task, path):
                watch._born.append((owner, weakref.ref(sample)))
                yield sample

        monkeypatch.setattr(FewShotTask, "read", read)

    def look(self, owner: str = "") -> None:
        if self._alive() - {owner}:
            gc.collect()
        self.held.add(self._alive())

    def _alive(self) -> frozenset[str]:
        return frozenset(owner for owner, ref in self._born if ref() is not None)


def evaluate(data: Path, predictor: str = "dummy", **given: Any) -> list[dict[str, Any]]:
    return gpt3_eval.run_evaluations_from_model_name(
        "m", predictor_name=predictor, data_dir=str(data), results_dir=str(data.parent / "out"),
        **{"tasks": ["copa", "xcopa", "boolq"], "nb_few_shot_samples_values": [0, 1, 2],
           "num_trials": 1, "xcopa_languages": list(LANGUAGES), "xcopa_eval_set": "test",
           **given},
    )  # fmt: skip


@pytest.mark.parametrize("predictor", ["dummy", "random"])
def test_samples_of_one_task_are_held_at_a_time(
    predictor: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    assert len(evaluate(data, predictor)) == 3 + 3 * len(LANGUAGES) + 3
    # When a file is read, only the same task's in the same language are there, from its other set.
    assert watch.held == {frozenset(), *(frozenset({f"xcopa {each}"}) for each in LANGUAGES),
                          frozenset({"copa "}), frozenset({"boolq "})}  # fmt: skip
    watch.held.clear()
    watch.look()
    assert watch.held == {frozenset()}
    assert len(watch.read) == len(set(watch.read)) == 2 + 2 * len(LANGUAGES) + 2


def test_a_leak_would_be_seen(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    plain, kept = Tasks.of, []

    def hoard(self: Tasks, planned: Any) -> FewShotTask:
        kept.append(plain(self, planned))
        return kept[-1]

    monkeypatch.setattr(Tasks, "of", hoard)
    evaluate(data, "random", tasks=["xcopa", "boolq"], nb_few_shot_samples_values=[0])
    assert max(map(len, watch.held)) == len(LANGUAGES)


def test_shots_in_one_language_for_all_are_read_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    evaluate(data, tasks="xcopa", xcopa_train_lang="it")
    names = [path.name for path in watch.read]
    # Where questions are in this language, too, its shots are let go of with them.
    assert [names.count(f"val.{each}.jsonl") for each in LANGUAGES] == [0, 2, 0]
    assert [names.count(f"test.{each}.jsonl") for each in LANGUAGES] == [1, 1, 1]
    assert watch.held == {frozenset(), *(frozenset({f"xcopa {each}"}) for each in ("et", "it"))}


def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded, and no file be read."""
    from examples.few_shot.models import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(FewShotTask, "read", lambda *_: pytest.fail("a file was read"))


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("BoolQ/val.jsonl", {}),
        ("BoolQ/train.jsonl", {}),
        ("xcopa/zh/test.zh.jsonl", {}),
        ("xcopa/it/val.it.jsonl", {"xcopa_train_lang": "it"}),
    ],
)
def test_a_file_that_the_last_task_misses_is_named_before_anything_is_done(
    file: str, given: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloadable(monkeypatch)
    (data / file).unlink()
    for predictor in ("dummy", "random"):
        with pytest.raises(DataError, match=f"{file} is missing") as raised:
            evaluate(data, predictor, **given)
        assert "\n" not in str(raised.value)
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize(
    ("task", "file", "beside", "given"),
    [
        ("piqa", "piqa/valid.jsonl", "piqa/valid-labels.lst", {}),
        ("lama_trex", "LAMA/TREx/P1.jsonl", "LAMA/relations.jsonl", {}),
        ("mlama_trex", "mlama1.1/de/P1.jsonl", "mlama1.1/de/templates.jsonl",
         {"mlama_trex_languages": "de"}),
        ("wmt14fren", "sacrebleu/wmt14/wmt14.fr-en.src", "sacrebleu/wmt14/wmt14.fr-en.ref", {}),
    ],
)  # fmt: skip
def test_files_beside_are_looked_for_and_known_by_their_digests(
    task: str, file: str, beside: str, given: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    unloadable(monkeypatch)
    write_text(tmp_path / file, "{}\n")
    values = {"tasks": task, "nb_few_shot_samples_values": 0, "data_dir": str(tmp_path), **given}
    with pytest.raises(DataError, match=f"{beside} is missing, which .* needs"):
        gpt3_eval.run_evaluations_from_model_name("m", predictor_name="dummy", **values)
    (one,) = plan("m", **values)
    digests = []
    for text in ("1\n", "2\n"):
        write_text(tmp_path / beside, text)
        digests.append(json.dumps(data_digests(one)))
    assert digests[0] != digests[1]
