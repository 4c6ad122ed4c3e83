"""fairseq's own objects, read through the allow-list.

The classes are made up here under the names and with the pickled states of the real ones, so the
tests need neither fairseq nor OmegaConf.
"""

from __future__ import annotations

import argparse
import enum
import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest
import torch

from fairseq_lite.training.checkpoint import store
from tests.helpers.shared import shared_dir


class World:
    """Modules that exist only while a file is written."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def module(self, name: str) -> ModuleType:
        """A module and the packages above it."""
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            each = ".".join(parts[:i])
            if each not in sys.modules:
                self._monkeypatch.setitem(sys.modules, each, ModuleType(each))
        return sys.modules[name]

    def define(self, module: str, name: str) -> Any:
        """A class that pickles as `module.name`."""
        made = type(name, (), {"__module__": module, "__qualname__": name})
        setattr(self.module(module), name, made)
        return made

    def make(self, cls: type, **state: Any) -> Any:
        """An instance with a state, its constructor not called."""
        instance = cls.__new__(cls)
        instance.__dict__.update(state)
        return instance


@pytest.fixture
def omegaconf(monkeypatch):
    """A function from nested values to OmegaConf-like containers."""
    world = World(monkeypatch)
    metadata = world.define("omegaconf.base", "ContainerMetadata")
    node_meta = world.define("omegaconf.base", "Metadata")
    nodes = {
        int: world.define("omegaconf.nodes", "IntegerNode"),
        str: world.define("omegaconf.nodes", "StringNode"),
    }
    any_node = world.define("omegaconf.nodes", "AnyNode")
    mapping = world.define("omegaconf.dictconfig", "DictConfig")
    sequence = world.define("omegaconf.listconfig", "ListConfig")

    def wrap(value: Any, parent: Any = None) -> Any:
        if isinstance(value, (dict, list)):
            meta = world.make(
                metadata, ref_type=Any, object_type=dict, resolver_cache=defaultdict(dict), key=None
            )
            container = world.make(
                mapping if isinstance(value, dict) else sequence, _metadata=meta, _parent=parent
            )
            # The parent of every child is its container: the structure has cycles.
            if isinstance(value, dict):
                container._content = {k: wrap(v, container) for k, v in value.items()}
            else:
                container._content = [wrap(v, container) for v in value]
            return container
        meta = world.make(node_meta, ref_type=type(value), optional=True, flags={})
        return world.make(
            nodes.get(type(value), any_node), _metadata=meta, _parent=parent, _val=value
        )

    wrap.world = world
    return wrap


def test_omegaconf_containers_become_dicts_and_lists(omegaconf, tmp_path):
    values = {
        "model": {"_name": "transformer", "layers": 6, "lr": [0.1, None, "x"], "empty": {}},
        "lr": "${model.lr}",
    }
    torch.save({"cfg": omegaconf(values), "model": {}}, tmp_path / "a.pt")
    assert store.load(tmp_path / "a.pt")["cfg"] == values


def test_enums_configs_and_meters_of_fairseq(omegaconf, tmp_path):
    world = omegaconf.world
    choice = enum.Enum("LOG_FORMAT", {"json": "json"}, module="fairseq.dataclass.constants")
    world.module("fairseq.dataclass.constants").LOG_FORMAT = choice
    config = world.define("fairseq.dataclass.configs", "CommonConfig")
    state = {
        "args": argparse.Namespace(log_format=choice.json, nested=world.make(config, seed=3)),
        "kind": config,
    }
    torch.save(state, tmp_path / "a.pt")
    for name in [name for name in sys.modules if name.split(".")[0] == "fairseq"]:
        sys.modules.pop(name)
    loaded = store.load(tmp_path / "a.pt")
    assert loaded["args"] == {"log_format": "json", "nested": {"seed": 3}}
    assert "fairseq" not in sys.modules


@pytest.mark.parametrize("name", ["mt/init.pt", "mt/trained.pt", "lm/init.pt", "lm/trained.pt"])
def test_real_checkpoints_of_fairseq_load_and_survive_a_round_trip(name, tmp_path):
    path = shared_dir("reference", *name.split("/"))
    state = store.load(path)
    assert state["cfg"]["task"]["_name"] in ("translation", "language_modeling")
    assert isinstance(state["cfg"]["model"], dict)
    store.save(tmp_path / "again.pt", state)
    again = torch.load(tmp_path / "again.pt", weights_only=True)  # now without any allow-list
    assert list(again) == list(state)
    assert again["cfg"] == state["cfg"]
    assert again["model"].keys() == state["model"].keys()
    assert all(torch.equal(again["model"][k], v) for k, v in state["model"].items())
    # Tied embeddings stay one tensor, in memory and in the file.
    if "encoder.embed_tokens.weight" in again["model"]:
        tied = [again["model"][f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")]
        assert tied[0].data_ptr() == tied[1].data_ptr()


def test_the_numpy_metrics_of_a_real_checkpoint():
    state = store.load(shared_dir("reference", "mt", "trained.pt"))
    metrics = {key: meter for _, key, _, meter in state["extra_state"]["metrics"]["valid"]}
    assert metrics["_bleu_counts"]["sum"] == [29678, 13187, 6670, 3453]
    assert state["extra_state"]["best"] == 5.546
