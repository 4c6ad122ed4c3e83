"""The tasks that ship: none is lost, and each says where its samples come from."""

from __future__ import annotations

from typing import Any

import pytest

from examples.few_shot.builtins import load_builtins
from examples.few_shot.metrics.api import METRICS
from examples.few_shot.settings import plan
from examples.few_shot.tasks.api import GROUPS, TASKS
from examples.few_shot.templates.api import TEMPLATES
from fairseq_lite.errors import ConfigError

load_builtins()

# Names that users' command lines hold. A new task is added here; none goes away.
KNOWN = """
    addition2digit addition3digit addition4digit addition5digit addition6digit agnews anagrams1
    anagrams2 anlir1 anlir2 anlir3 arcchallenge arceasy boolq cb commonsenseqa copa crowspairs
    cycledletters diagnosisbrand diagnosiscity diagnosiscountry diagnosisname diagnosispos1
    diagnosispos2 diagnosispos3 diagnosispos4 ethoszeroshot exams gluediag hellaswag
    lama_conceptnet lama_googlere lama_squad lama_trex lambada mlama_googlere mlama_trex
    mnlimatched mnlimismatched multiplication2digit multirc naturalquestions openbookqa pawsx
    perplexity piqa processtext record reversedwords rte satanalogies singledigit3ops snli sst2
    stereoset storycloze subtraction2digit subtraction3digit subtraction4digit subtraction5digit
    subtraction6digit sumofdigits symbolinsertion triviaqa webquestions wic winograd winogrande
    wmt14enfr wmt14fren wmt16deen wmt16ende wmt16enro wmt16roen wsc xcopa xnli xwinograd
""".split()

# Some ask without shots only, some have no set that shots could come from by default, and some read
# the file they are given.
WITHOUT_SHOTS = {"crowspairs", "ethoszeroshot", "gluediag", "perplexity", "stereoset"}
WITHOUT_TRAIN_SET = {
    "lama_conceptnet", "lama_googlere", "lama_squad", "lama_trex", "lambada", "mlama_googlere",
    "mlama_trex", "processtext",
}  # fmt: skip
WITHOUT_EVAL_SET = {"perplexity", "processtext"}
LANGUAGES = {
    "exams": 11, "mlama_googlere": 40, "mlama_trex": 53, "pawsx": 7, "storycloze": 11, "xcopa": 12,
    "xnli": 15, "xwinograd": 6,
}  # fmt: skip


def kind(name: str) -> Any:
    return TASKS.get(name).factory


def test_every_known_task_is_there() -> None:
    # Other tests register tasks of their own.
    shipped = {name for name in TASKS.names() if kind(name).__module__.startswith("examples.")}
    assert shipped == {*KNOWN, *GROUPS["blimp"]}


def test_groups_hold_their_tasks() -> None:
    sizes = {name: len(GROUPS[name]) for name in ("blimp", "lama", "mlama", "diagnosis")}
    assert sizes == {"blimp": 67, "lama": 4, "mlama": 2, "diagnosis": 8}
    for members in GROUPS.values():
        assert set(members) <= set(TASKS.names())


@pytest.mark.parametrize("name", TASKS.names())
def test_a_task_says_where_its_samples_come_from(name: str) -> None:
    task = kind(name)
    assert (task.max_shots == 0) == (name in WITHOUT_SHOTS)
    assert (task.train_set is None) == (name in WITHOUT_SHOTS | WITHOUT_TRAIN_SET)
    assert (task.eval_set is None) == (name in WITHOUT_EVAL_SET)
    for chosen in (task.train_set, task.eval_set):
        assert chosen is None or chosen in task.sets
    assert len(task.languages) == LANGUAGES.get(name, 0)
    assert task.template in TEMPLATES
    assert task.metrics and all(metric in METRICS for metric in task.metrics)
    assert (task.__doc__ or "").strip()


@pytest.mark.parametrize("name", TASKS.names())
def test_a_task_can_be_planned(name: str) -> None:
    given: dict[str, Any] = {"tasks": name, "nb_few_shot_samples_values": [0]}
    if name in WITHOUT_EVAL_SET:
        with pytest.raises(ConfigError, match=f"--{name}-eval-set"):
            plan("m", **given)
        given[f"{name}_eval_set"] = "some/file.jsonl"
    found = plan("m", **given)
    assert len(found) == max(1, len(kind(name).default_languages or kind(name).languages))


@pytest.mark.parametrize("name", sorted(WITHOUT_SHOTS | WITHOUT_TRAIN_SET))
def test_shots_that_cannot_be_are_refused(name: str) -> None:
    given = {"tasks": name, "nb_few_shot_samples_values": [1], f"{name}_eval_set": "some/file.txt"}
    with pytest.raises(ConfigError, match="takes no shots|has no training set: say --"):
        plan("m", **given)


@pytest.mark.parametrize("name", TEMPLATES.names())
def test_a_template_says_what_it_is(name: str) -> None:
    assert (TEMPLATES.get(name).factory.__doc__ or "").strip()
