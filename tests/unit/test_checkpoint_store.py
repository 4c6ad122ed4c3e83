"""Files: atomic writes, safe reads, and what is said when either cannot be done."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.errors import CheckpointError
from fairseq_lite.training.checkpoint import legacy, store

CANARY = Path("canary-has-run")


class Canary:
    """Would leave a file behind if anything executed it."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


class CanaryInBuild:
    """The same, hidden where an object's state is set."""

    def __reduce__(self):
        return argparse.Namespace, (), {"x": Canary()}


@pytest.mark.parametrize("stored", [Canary(), {"model": Canary()}, {"args": CanaryInBuild()}])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_canary_never_runs(tmp_path, monkeypatch, stored, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save(stored, "evil.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"evil\.pt.*system"):
        store.load("evil.pt")
    Path("plain.pt").write_bytes(pickle.dumps(stored, protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        store.load("plain.pt")
    assert not CANARY.exists()


def test_a_class_that_is_not_on_the_list_is_named(tmp_path):
    torch.save({"x": zipfile.ZipInfo()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"refers to zipfile\.ZipInfo"):
        store.load(tmp_path / "a.pt")


def test_objects_of_real_checkpoints_become_plain_values(tmp_path):
    counts = np.array([[1, 2], [3, 4]], order="F")
    state = {
        "args": argparse.Namespace(
            arch="transformer", lr=[0.1], path=Path("a/b"), f=np.float32(2.5)
        ),
        "counts": counts,
        "big": np.array([258], dtype=">i4"),
        "flag": np.bool_(True),
        "order": OrderedDict(a=torch.ones(2)),
    }
    torch.save(state, tmp_path / "a.pt")
    loaded = store.load(tmp_path / "a.pt")
    assert loaded["args"] == {"arch": "transformer", "lr": [0.1], "path": "a/b", "f": 2.5}
    assert loaded["counts"] == [[1, 2], [3, 4]]
    assert loaded["big"] == [258]
    assert loaded["flag"] is True
    assert isinstance(loaded["order"], OrderedDict)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # before Python 3.13, and of it
def test_paths_are_read_as_any_python_writes_them(module, tmp_path):
    a, b, name = (b"X" + struct.pack("<I", len(word)) + word for word in (b"a", b"b", b"path"))
    stored = f"c{module}\nPosixPath\n(".encode() + a + b + b"tR"
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}" + name + stored + b"s.")
        file.writestr("a/version", b"3\n")
        file.writestr("a/byteorder", b"little")
    assert store.load(tmp_path / "a.pt") == {"path": "a/b"}


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save({"x": np.array([{}], dtype=object)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="only numbers"):
        store.load(tmp_path / "a.pt")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_round_trip_of_plain_values(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "round-trip.pt"
    store.save(path, state)
    assert store.load(path) == state


def test_what_is_written_needs_no_allow_list_and_keeps_sharing(tmp_path):
    weight = torch.randn(4, 3)
    state = {"model": OrderedDict(a=weight, b=weight), "n": np.int64(3), "p": Path("x")}
    store.save(tmp_path / "a.pt", state)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["n"] == 3 and loaded["p"] == "x"
    assert torch.equal(loaded["model"]["a"], weight)
    assert loaded["model"]["a"].data_ptr() == loaded["model"]["b"].data_ptr()


def test_a_view_does_not_drag_its_whole_storage_along(tmp_path):
    store.save(tmp_path / "a.pt", {"x": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_a_value_that_cannot_be_read_safely_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Canary"):
        store.save(tmp_path / "a.pt", {"x": Canary()})
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_does_not_follow_its_original():
    weight = torch.ones(3)
    copy = store.snapshot({"a": weight, "b": [weight], "view": weight[:2]})
    weight.fill_(5)
    assert copy["a"].tolist() == [1, 1, 1]
    assert copy["view"].tolist() == [1, 1]
    assert copy["a"].data_ptr() == copy["b"][0].data_ptr()


@pytest.fixture
def whole(tmp_path) -> Path:
    path = tmp_path / "whole.pt"
    store.save(path, {"model": OrderedDict(a=torch.arange(5000.0)), "extra_state": {"x": 1}})
    return path


@given(share=st.floats(0.0, 0.999))
def test_a_file_cut_short_is_one_line(tmp_path_factory, share):
    folder = tmp_path_factory.getbasetemp()
    store.save(folder / "full.pt", {"model": OrderedDict(a=torch.arange(500.0))})
    data = (folder / "full.pt").read_bytes()
    (folder / "cut.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError) as caught:
        store.load(folder / "cut.pt")
    assert "cut.pt" in str(caught.value) and "cut short" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_changed_byte_in_the_weights_is_noticed(whole):
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    whole.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(whole)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04junk", b"\x80\x02N."])
def test_other_files_are_one_line(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        store.load(tmp_path / "a.pt")


def test_a_missing_file_and_a_lone_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        store.load(tmp_path / "none.pt")
    torch.save(torch.ones(2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        store.load(tmp_path / "a.pt")


def test_a_failing_write_leaves_the_previous_file_and_no_trace(whole, monkeypatch):
    before = whole.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left.*previous file.*intact"):
        store.save(whole, {"model": {}})
    assert whole.read_bytes() == before
    assert [p.name for p in whole.parent.iterdir()] == [whole.name]


def test_copies_are_byte_identical_and_separate(whole):
    copy = whole.with_name("copy.pt")
    store.copy_temporary(whole, copy)
    assert not copy.exists()
    store.commit(copy)
    assert copy.read_bytes() == whole.read_bytes()
    copy.write_bytes(b"changed in place")
    assert store.load(whole)["extra_state"] == {"x": 1}


def test_an_unwritable_folder_is_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="--save-dir"):
        store.check_writable(tmp_path / "file" / "below")
    store.check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_left_over_temporaries_are_removed(tmp_path):
    (tmp_path / "checkpoint_last.pt.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"not ours")
    store.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.tmp"]


def test_plain_refuses_what_has_no_plain_form():
    with pytest.raises(ValueError, match="object"):
        legacy.plain({"x": object()})


def test_views_of_one_tensor_stay_one():
    rows = torch.arange(12.0).view(6, 2)[1:3]
    copied = store.snapshot({"a": rows, "b": [rows.detach()], "c": rows[:0]})
    assert copied["a"].data_ptr() == copied["b"][0].data_ptr() != rows.data_ptr()
    assert copied["a"].untyped_storage().nbytes() == 16 and torch.equal(copied["a"], rows)
    assert copied["c"].untyped_storage().nbytes() == 0
