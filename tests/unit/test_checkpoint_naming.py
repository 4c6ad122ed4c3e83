"""Names that are written, and names that retention removes."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.config.core import CheckpointConfig
from fairseq_lite.training.checkpoint import naming
from fairseq_lite.training.checkpoint.naming import Moment, names_to_remove, names_to_write

CFG = CheckpointConfig()


def cfg(**changes) -> CheckpointConfig:
    return dataclasses.replace(CFG, **changes)


def test_end_of_epoch_with_a_better_score():
    assert names_to_write(CFG, Moment(3, 700, True, 4.5, 5.0)) == [
        "checkpoint3.pt",
        "checkpoint_best.pt",
        "checkpoint_last.pt",
    ]


def test_a_worse_score_is_not_best_and_a_tie_is():
    assert "checkpoint_best.pt" not in names_to_write(CFG, Moment(3, 700, True, 5.1, 5.0))
    assert "checkpoint_best.pt" in names_to_write(CFG, Moment(3, 700, True, 5.0, 5.0))
    up = cfg(maximize_best_checkpoint_metric=True)
    assert "checkpoint_best.pt" in names_to_write(up, Moment(3, 700, True, 5.1, 5.0))
    assert "checkpoint_best.pt" not in names_to_write(up, Moment(3, 700, True, 4.9, 5.0))


def test_middle_of_an_epoch():
    every = cfg(save_interval_updates=100)
    assert names_to_write(every, Moment(2, 300, False)) == [
        "checkpoint_2_300.pt",
        "checkpoint_last.pt",
    ]
    # A stop by --max-update off the interval: only best, if validated, and last.
    assert names_to_write(every, Moment(2, 350, False, 4.0, None)) == [
        "checkpoint_best.pt",
        "checkpoint_last.pt",
    ]
    # At an epoch's end the interval name is never used.
    assert names_to_write(every, Moment(2, 300, True))[0] == "checkpoint2.pt"


def test_flags_that_leave_names_out():
    moment = Moment(4, 400, True, 1.0, 2.0)
    assert names_to_write(cfg(no_save=True), moment) == []
    assert "checkpoint4.pt" not in names_to_write(cfg(no_epoch_checkpoints=True), moment)
    assert "checkpoint4.pt" not in names_to_write(cfg(save_interval=3), moment)
    assert "checkpoint_last.pt" not in names_to_write(cfg(no_last_checkpoints=True), moment)
    assert names_to_write(cfg(checkpoint_suffix="-x"), moment) == [
        "checkpoint4-x.pt",
        "checkpoint_best-x.pt",
        "checkpoint_last-x.pt",
    ]


def test_best_of_several_has_the_value_and_a_digit_in_its_name():
    five = cfg(
        keep_best_checkpoints=5, best_checkpoint_metric="bleu", maximize_best_checkpoint_metric=True
    )
    name = naming.best_name(five, Moment(1, 10, True, 81.74, None))
    assert name.startswith("checkpoint.best_bleu_81.740") and name.endswith(".pt")
    assert 0 <= int(name[len("checkpoint.best_bleu_81.740") : -3]) < 5


def test_the_worst_of_the_best_makes_room():
    two = cfg(keep_best_checkpoints=2)
    kept = ["checkpoint.best_loss_5.0001.pt", "checkpoint.best_loss_4.0000.pt"]
    assert not any(".best_" in n for n in names_to_write(two, Moment(3, 9, True, 6.0, 4.0), kept))
    (new,) = [n for n in names_to_write(two, Moment(3, 9, True, 4.5, 4.0), kept) if ".best_" in n]
    assert names_to_remove(two, [*kept, new], end_of_epoch=True) == [kept[0]]


def test_until_there_are_k_best_every_validated_one_is_kept():
    names = names_to_write(
        cfg(keep_best_checkpoints=2),
        Moment(2, 9, True, 6.0, 4.0),
        ["checkpoint.best_loss_4.0000.pt"],
    )
    assert any(name.startswith("checkpoint.best_loss_6.000") for name in names)


def test_keep_interval_updates_and_its_pattern():
    existing = [f"checkpoint_1_{u}.pt" for u in range(100, 1100, 100)] + ["checkpoint_last.pt"]
    keep = cfg(keep_interval_updates=2)
    assert set(names_to_remove(keep, existing, end_of_epoch=False)) == {
        f"checkpoint_1_{u}.pt" for u in range(100, 900, 100)
    }
    assert names_to_remove(keep, existing, end_of_epoch=True) == []
    pattern = cfg(keep_interval_updates=2, keep_interval_updates_pattern=500)
    removed = names_to_remove(pattern, existing, end_of_epoch=False)
    assert "checkpoint_1_500.pt" not in removed and "checkpoint_1_1000.pt" not in removed
    assert set(removed) == {f"checkpoint_1_{u}.pt" for u in (100, 200, 300, 400, 600, 700)}


EPOCHS = st.lists(st.integers(1, 500), unique=True, max_size=30)


@given(EPOCHS, st.integers(1, 10))
def test_keep_last_epochs_keeps_the_newest_and_touches_nothing_else(epochs, keep):
    others = ["checkpoint_last.pt", "checkpoint_best.pt", "checkpoint_3_100.pt", "notes1.pt"]
    existing = [f"checkpoint{e}.pt" for e in epochs] + others
    removed = names_to_remove(cfg(keep_last_epochs=keep), existing, end_of_epoch=True)
    left = sorted(e for e in epochs if f"checkpoint{e}.pt" not in removed)
    assert left == sorted(epochs)[-keep:]
    assert not set(removed) & set(others)


@given(
    st.lists(st.floats(0.0, 100.0, allow_nan=False), min_size=1, max_size=25),
    st.integers(1, 6),
    st.booleans(),
)
def test_a_whole_run_keeps_the_k_best(values, keep, maximize):
    """Save by save, as the manager does it: what is left are the K best values seen."""
    config = cfg(keep_best_checkpoints=keep, maximize_best_checkpoint_metric=maximize)
    folder: set[str] = set()
    best = None
    for update, value in enumerate(values, start=1):
        value = round(value, 3)
        moment = Moment(update, update, True, value, best)
        best = naming.better_of(value, best, maximize)
        folder |= set(names_to_write(config, moment, folder))
        folder -= set(names_to_remove(config, folder, end_of_epoch=True))
    left = sorted(float(n.rsplit("_", 1)[1][:-3]) for n in folder if ".best_" in n)
    assert len(left) <= keep
    ranked = sorted({round(v, 3) for v in values}, reverse=maximize)
    # Equal values may share a name, and the tie digit is below the third decimal.
    assert abs((max(left) if maximize else min(left)) - ranked[0]) < 1.1e-3
    assert "checkpoint_last.pt" in folder and "checkpoint_best.pt" in folder


@given(st.integers(1, 50), st.integers(0, 5000), st.booleans())
def test_names_are_distinct_and_the_last_one_comes_last(epoch, updates, end):
    names = names_to_write(
        cfg(save_interval_updates=7, keep_best_checkpoints=3),
        Moment(epoch, updates, end, 1.5, 1.5),
    )
    assert len(set(names)) == len(names)
    assert names[-1] == "checkpoint_last.pt"


def test_suffixes_go_before_the_extension():
    assert naming.with_suffix("a/checkpoint_last.pt", "-shard0") == "a/checkpoint_last-shard0.pt"
    assert naming.with_suffix("model", "-x") == "model-x"
    assert naming.with_suffix("model.pt", "") == "model.pt"
