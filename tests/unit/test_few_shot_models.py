"""Models by name, what sequences share as a tree, and who loads what; no model is loaded."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.few_shot import model_configs
from examples.few_shot.model_configs import ModelConfig
from examples.few_shot.models import loading, stems
from examples.few_shot.models.dummy import DummyModel
from examples.few_shot.models.fingerprint import identity_of
from examples.few_shot.models.stems import Stem
from examples.few_shot.settings import EvaluationOptions, plan
from fairseq_lite.errors import CheckpointError, ConfigError, FliteError, MissingDependency
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.training.checkpoint import store

# -- trees ----------------------------------------------------------------------------------------

few = st.integers(0, 2)
sequences = st.lists(st.lists(few, min_size=1, max_size=9).map(np.array), max_size=12)


def places(stem: Stem, depth: int = 0) -> list[tuple[int, int]]:
    """Sequences and the depths of their stems."""
    found = [(number, stem.depth) for number in stem.leaves]
    return found + [each for branch in stem.branches for each in places(branch, stem.depth)]


def stems_of(stem: Stem) -> list[tuple[Stem, Stem]]:
    """Every stem with the one it goes on from."""
    pairs = [(stem, branch) for branch in stem.branches]
    return pairs + [each for branch in stem.branches for each in stems_of(branch)]


@given(sequences, st.integers(1, 4))
def test_every_sequence_goes_on_from_one_stem_which_it_begins_with(
    given_ones: list[Any], shortest: int
) -> None:
    tree = stems.grow(given_ones, shortest)
    found = dict(places(tree))
    assert sorted(number for number, _ in places(tree)) == list(range(len(given_ones)))
    assert all(depth < len(given_ones[number]) for number, depth in found.items())
    for above, below in stems_of(tree):
        assert below.depth >= above.depth + shortest
        members = [number for number, _ in places(below)]
        assert len(members) > 1 and below.first in members
        heads = {tuple(given_ones[number][: below.depth]) for number in members}
        assert len(heads) == 1


@given(sequences, st.integers(1, 4))
def test_no_two_sequences_of_a_stem_share_another(given_ones: list[Any], shortest: int) -> None:
    depths = dict(places(stems.grow(given_ones, shortest)))
    for a, one in enumerate(given_ones):
        for b, other in enumerate(given_ones[:a]):
            common = next(
                (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y),
                min(len(one), len(other)),
            )
            shared = min(common, len(one) - 1, len(other) - 1)
            assert shared < max(min(depths[a], depths[b]), 0) + shortest


def test_shots_are_a_stem_and_a_question_below_them_another() -> None:
    shots, question = list(range(40)), list(range(100, 140))
    texts = [
        np.array(tokens)
        for tokens in (
            [*shots, 1, 2], [*shots, *question, 1], [*shots, *question, 2], [5, 6], [*shots, 7]
        )
    ]  # fmt: skip
    tree = stems.grow(texts)
    assert places(tree) == [(3, 0), (0, 40), (4, 40), (1, 80), (2, 80)]
    # The question saves 40 tokens, the shots 120.
    assert places(stems.grow(texts, saves=41)) == [(3, 0), (0, 40), (4, 40), (1, 40), (2, 40)]
    assert {depth for _, depth in places(stems.grow(texts, saves=121))} == {0}


@given(
    st.lists(st.integers(3, 9), max_size=20),
    st.integers(0, 2),
    st.integers(1, 30),
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(1, 4)),
    st.one_of(st.none(), st.integers(0, 20)),
)
def test_batches_keep_limits_and_padding_pays(
    lengths: list[int], depth: int, tokens: int, cells: int, rows: int | None, costs: int | None
) -> None:
    limits: dict[str, Any] = {"max_tokens": tokens, "max_cells": cells, "max_rows": rows}
    found = list(stems.batches(range(len(lengths)), lengths, depth, **limits, pass_costs=costs))
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[number] for number in batch)
        padded = len(batch) * (longest - depth)
        real = sum(lengths[number] - depth for number in batch)
        if len(batch) > 1:
            assert padded <= tokens and len(batch) * longest <= cells
        assert rows is None or len(batch) <= rows
        assert padded == real or costs is not None

    def cost(batches: list[list[int]]) -> int:
        """Of passes, and of tokens with padding."""
        longest = (max(lengths[number] for number in batch) for batch in batches)
        return sum(
            (costs or 0) + len(batch) * (most - depth)
            for batch, most in zip(batches, longest, strict=True)
        )

    apart = list(stems.batches(range(len(lengths)), lengths, depth, **limits, pass_costs=None))
    assert cost(found) <= cost(apart)


# -- names ----------------------------------------------------------------------------------------


def test_names_of_the_guides_are_known() -> None:
    names = model_configs.get_model_names()
    for name in (
        "125M_gpt3_setting", "6.7B_gpt3_setting_1024ctx", "moe_1.1T", "tiny_multi_moe",
        "dense_lang16", "moe_128exp_lang16", "random", "majority", "dummy",
    ):  # fmt: skip
        assert name in names
    groups = model_configs.get_model_config_groups()
    assert {"dense", "moe", "multilingual", "gpt3_setting", "tiny", "dummy"} <= groups.keys()
    assert all(name in names for members in groups.values() for name in members)
    assert "6.7B_gpt3_setting_1024ctx" not in groups["gpt3_setting"]


@pytest.mark.parametrize(
    ("name", "predictor"),
    [("random", "random"), ("majority", "majorityclass"), ("dummy", "dummy"),
     ("125M_gpt3_setting", "clmprompting"), ("some/path.pt", "clmprompting")],
)  # fmt: skip
def test_a_name_implies_its_predictor(name: str, predictor: str) -> None:
    (planned,) = plan(name, tasks="copa", nb_few_shot_samples_values=[0])
    assert planned.options.predictor_name == predictor
    assert planned.settings["predictor_name"] == predictor


def test_what_is_typed_wins_over_what_a_name_implies() -> None:
    (planned,) = plan(
        "random", tasks="copa", nb_few_shot_samples_values=[0], predictor_name="majorityclass"
    )
    assert planned.options.predictor_name == "majorityclass"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLITE_MODELS", str(tmp_path))
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def found(name: str, **options: Any) -> str:
    return loading.found(name, EvaluationOptions(**options))[1]


def test_the_names_stand_for_files_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="FLITE_MODELS") as caught:
        found("125M_gpt3_setting")
    assert str(folder / "en_dense_lm_125m" / "model.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"125M_gpt3_setting: expected {folder}" in "\n".join(model_configs.check_model_paths())
    path = touch(folder / "en_dense_lm_125m" / "model.pt")
    assert found("125M_gpt3_setting") == str(path)
    assert model_configs.check_model_paths(["125M_gpt3_setting", "random"]) == []


def test_a_mixture_of_experts_goes_by_a_name_that_no_file_has(folder: Path) -> None:
    for part in ("shared", "rank-0"):
        touch(folder / "tiny_multi_8e" / f"checkpoint_eval-{part}.pt")
    assert found("tiny_multi_moe") == str(folder / "tiny_multi_8e" / "checkpoint_eval.pt")


def test_where_nothing_says_where_models_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLITE_MODELS", raising=False)
    with pytest.raises(CheckpointError, match=r"expected its checkpoint at models/.*FLITE_MODELS"):
        found("moe_15B")


OWN = {
    "ours": {
        "path": "ours/checkpoint_best.pt:ours/checkpoint_last.pt", "groups": ["mine"],
        "user_dir": "plugin", "overrides": {"dropout": 0.0}, "start": "<de>",
        "options": {"train_sep": "\n", "nb_few_shot_samples_values": [2]},
    },
    "theirs": {"path": "hf", "kind": "huggingface"},
    "125M_gpt3_setting": "elsewhere/model.pt",
    "asleep": {"path": "x.pt", "groups": ["mine"], "enabled": False},
}  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(json.dumps(OWN))  # JSON is YAML
    monkeypatch.setenv("FLITE_MODELS", str(path))
    return tmp_path


def test_ones_own_models_are_in_a_file(own: Path) -> None:
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        touch(own / "ours" / name)
    config, path = loading.found("ours", EvaluationOptions())
    assert path == f"{own}/ours/checkpoint_best.pt:{own}/ours/checkpoint_last.pt"
    assert (config.start, config.overrides) == ("<de>", {"dropout": 0.0})
    assert model_configs.user_dir_of(config) == str(own / "plugin")
    assert list(model_configs.get_model_config_groups()["mine"]) == ["ours"]
    (planned,) = plan("ours", tasks="copa")
    assert (planned.k, planned.options.train_sep) == (2, "\n")
    assert model_configs.path_of(model_configs.all_configs()["125M_gpt3_setting"]) == str(
        own / "elsewhere" / "model.pt"
    )
    # Those that ship lie beside the file.
    shipped = model_configs.all_configs()["moe_15B"]
    assert model_configs.path_of(shipped) == str(own / "en_moe_lm_15b" / "model.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected names"),
        ("{a: {path: x, kid: y}}", "no field 'kid'"),
        ("{a: {path: x, kind: gguf}}", "kind 'gguf': expected one of"),
        ("{a: {groups: [b]}}", "needs a path"),
        ("{a: {path: x, groups: b}}", "groups: 'b' is of another kind"),
        ("{a: 3}", "expected a path"),
        ("{a: [", "neither YAML nor JSON"),
    ],
)
def test_a_file_of_models_that_is_wrong_is_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    monkeypatch.setenv("FLITE_MODELS", str(path))
    with pytest.raises(ConfigError, match=message) as caught:
        model_configs.all_configs()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_models_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLITE_MODELS", "nowhere.yaml")
    with pytest.raises(ConfigError, match="FLITE_MODELS=nowhere.yaml: No such file"):
        model_configs.get_model_names()


# -- checkpoints of a model -----------------------------------------------------------------------


def test_checkpoints_of_a_run_go_by_their_updates(folder: Path) -> None:
    there = folder / "tiny_125m"
    for name in (
        "checkpoint_1_5.pt",
        "checkpoint_2_20.pt",
        "checkpoint_best.pt",
        "checkpoint2.pt",
        "checkpoint_3_100-shard0.pt",
        "checkpoint_3_100-shard1.pt",
    ):
        touch(there / name)  # fmt: skip
    names = model_configs.get_model_checkpoint_names("tiny_125m")
    assert names == [f"tiny_125m__step{n:08d}" for n in (5, 20, 100)]
    assert found(names[1]) == str(there / "checkpoint_2_20.pt")
    assert found("tiny_125m", num_training_updates=100) == str(there / "checkpoint_3_100.pt")
    assert found(str(there), num_training_updates=5) == str(there / "checkpoint_1_5.pt")
    best = str(there / "checkpoint_best.pt")
    assert found(best, num_training_updates=5) == str(there / "checkpoint_1_5.pt")
    with pytest.raises(CheckpointError, match="updates 5, 20, 100"):
        found("tiny_125m", num_training_updates=6)
    with pytest.raises(CheckpointError, match="__step00000007"):
        found("tiny_125m__step00000007")
    assert model_configs.options_of("dummy__step00000007") == {"predictor_name": "dummy"}


# -- who loads what -------------------------------------------------------------------------------


def test_a_checkpoint_that_is_named_counts_by_the_updates_it_has(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_last.pt"
    store.save(path, {"model": {}, "optimizer_history": [{"num_updates": 3}, {"num_updates": 8}]})
    options = EvaluationOptions(num_training_updates=8)
    assert loading.found(str(path), options) == (ModelConfig(str(path)), str(path))
    for name, message in (
        (path, f"no file there is called so, and {path} is of update 8$"),
        (tmp_path, "no file there is called so$"),
    ):
        with pytest.raises(CheckpointError, match=message):
            loading.found(str(name), EvaluationOptions(num_training_updates=9))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {}, "leave the flag out, which means --predictor-name random"),
        ("125M_gpt3_settin", {}, "neither a name .* did you mean 125M_gpt3_setting"),
        ("no/such.pt", {}, "--model-name no/such.pt: neither"),
        ("x.gguf", {"num_training_updates": 3}, "--num-training-updates: x.gguf is one model"),
    ],
)
def test_a_name_that_stands_for_no_model_is_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FliteError, match=message) as caught:
        found(name, **options)
    assert "\n" not in str(caught.value)


def load(name: str, **options: Any) -> Any:
    return loading.load_model(name, EvaluationOptions(**options), SingleWorld())


def test_the_dummy_needs_no_files() -> None:
    assert isinstance(load("anything", predictor_name="dummy"), DummyModel)


def test_only_hugging_faces_models_are_of_their_predictor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(folder / "en_moe_lm_15b" / "model.pt")
    with pytest.raises(ConfigError, match="moe_15B is no Hugging Face model; use clmprompting"):
        load("moe_15B", predictor_name="clmpromptinghuggingface")


def test_kinds_are_told_by_files(tmp_path: Path) -> None:
    both, theirs = tmp_path / "both", tmp_path / "theirs"
    for path in (both / "config.json", both / "checkpoint_best.pt", theirs / "config.json"):
        touch(path)
    assert loading.is_hugging_face(str(theirs))
    assert loading.is_hugging_face("huggingface_org=name")
    assert loading.is_hugging_face("a/b.gguf")
    assert not loading.is_hugging_face(str(both))
    assert not loading.is_hugging_face(str(both / "checkpoint_best.pt"))


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_a_package_that_is_missing_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = touch(tmp_path / "model.gguf")
    is_there = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        if name in ("transformers", "gguf"):
            return None if name == missing else object()
        return is_there(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(MissingDependency, match=rf"{missing}: pip install .*\[huggingface\]"):
        load(str(path))


def test_the_files_of_any_kind_of_model_have_a_digest(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = EvaluationOptions()
    ours = touch(tmp_path / "a.pt")
    theirs = touch(tmp_path / "folder" / "config.json").parent
    weights = touch(theirs / "model.safetensors")
    for name, file in ((ours, ours), (theirs, weights)):
        before = loading.digest_of_files(str(name), options)
        file.write_text("others")
        assert before is not None
        assert loading.digest_of_files(str(name), options) not in (None, before)
    assert loading.digest_of_files(str(tmp_path / "none.pt"), options) is None


def test_options_that_hugging_faces_models_have_no_use_for(tmp_path: Path) -> None:
    touch(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="--moe-eval-capacity-token-fraction"):
        load(str(tmp_path), moe_eval_capacity_token_fraction=0.5)
    with pytest.raises(ConfigError, match="--fp16 needs a GPU"):
        load(str(tmp_path), fp16=True)


def test_a_model_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError, match="needs a path"):
        ModelConfig()
    with pytest.raises(ConfigError, match="kind 'x'"):
        replace(ModelConfig("a.pt"), kind="x")


def test_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    said = identity_of([one, two])
    assert [each["name"] for each in said["files"]] == ["a", "b"]
    assert said["files"][0]["size"] == 1 and len(said["sha256"]) == 64
    two.write_bytes(b"3")
    assert identity_of([one, two])["sha256"] != said["sha256"]
