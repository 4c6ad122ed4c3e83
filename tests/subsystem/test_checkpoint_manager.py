"""What a run writes and what it takes over, with a real task, model and backend."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.config.serial import load_yaml
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.optim.api import OPTIMIZERS, SCHEDULES
from fairseq_lite.parallel.api import BACKENDS
from fairseq_lite.parallel.world import SingleWorld
from fairseq_lite.tasks.api import build_task
from fairseq_lite.training.checkpoint import bundle, convert, inference, naming, parts, store
from fairseq_lite.training.checkpoint.manager import CheckpointManager, Restored, Saving
from tests.helpers.shared import shared_dir

MODEL = (
    "--arch transformer --encoder-embed-dim 8 --encoder-ffn-embed-dim 8 --encoder-layers 1 "
    "--encoder-attention-heads 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 "
    "--decoder-layers 1 --decoder-attention-heads 2 --share-all-embeddings"
)
REFERENCE = (
    "--arch transformer --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-layers 2 "
    "--encoder-attention-heads 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 "
    "--decoder-layers 2 --decoder-attention-heads 4 --share-all-embeddings"
)
KEYS = [
    *("args", "cfg", "model", "criterion", "optimizer_history", "task_state", "extra_state"),
    *("last_optimizer_state", "fairseq_lite"),
]
SECTIONS = (
    "_name common common_eval distributed_training dataset optimization checkpoint bmuf generation "
    "eval_lm interactive model task criterion optimizer lr_scheduler scoring bpe tokenizer ema"
).split()


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for lang in ("en", "de"):
        (folder / f"dict.{lang}.txt").write_text("a 3\nb 2\nc 1\nd 1\n")
    return folder


class Training:
    """The parts of a run around a manager, as the training loop makes them."""

    def __init__(self, data: Path, save_dir: Path, *flags: str, model: str = MODEL) -> None:
        argv = [str(data), "-s", "en", "-t", "de", *model.split(), "--optimizer", "adam"]
        argv += ["--max-tokens", "100", "--save-dir", str(save_dir), *flags]
        if "--criterion" not in flags:
            argv += ["--criterion", "label_smoothed_cross_entropy"]
        self.run: RunConfig = parse("flite-train", argv, load_builtins())
        self.task = build_task(self.run)
        world = SingleWorld()
        backend = BACKENDS.get("legacy_ddp").factory(self.run.ddp_backend.config, world)
        self.model = backend.wrap(lambda: self.task.build_model(self.run.model))
        self.criterion = self.task.build_criterion(self.run.criterion, False)
        self.optimizer = OPTIMIZERS.get("adam").factory(
            list(self.model.parameters()), self.run.optimizer.config, lr=1e-3
        )
        self.schedule = SCHEDULES.get("fixed").factory(
            self.run.lr_scheduler.config, self.run.optimization
        )
        self.manager = CheckpointManager(self.run, world, backend, self.task)
        self.folder = save_dir

    def update(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        self.optimizer.step()

    def saving(self, epoch=1, updates=10, end=False, val_loss=None, best=None, **more) -> Saving:
        iterator = {"version": 2, "epoch": epoch, "iterations_in_epoch": 5, "shuffle": True}
        if end:
            iterator |= {"epoch": epoch + 1, "iterations_in_epoch": 0}
        return Saving(
            epoch,
            updates,
            end,
            val_loss,
            best,
            self.model,
            self.optimizer,
            self.criterion,
            self.schedule,
            iterator,
            **more,
        )

    def load(self) -> Restored | None:
        return self.manager.load(self.model, self.optimizer, self.criterion)


@pytest.fixture
def saved(data, tmp_path) -> Training:
    """A run that has saved once, at epoch 3, update 70."""
    training = Training(data, tmp_path / "save")
    training.manager.prepare()
    training.update()
    saving = training.saving(
        3,
        70,
        val_loss=4.5,
        training_time=12.5,
        metrics=OrderedDict(train=[(10, "loss", "AverageMeter", {"sum": 1.0})]),
        extra={"early_stopping": {"runs": 2}, "rng": torch.arange(3)},
    )
    training.manager.save(saving)
    return training


def test_the_keys_are_fairseqs_and_the_values_plain(saved):
    state = torch.load(saved.folder / "checkpoint_best.pt", weights_only=True)
    assert list(state) == KEYS
    assert state["args"] is None and state["criterion"] is None and state["task_state"] == {}
    assert sorted(state["cfg"]) == sorted(SECTIONS)
    assert state["extra_state"] == {
        "train_iterator": {"version": 2, "epoch": 3, "iterations_in_epoch": 5, "shuffle": True},
        "val_loss": 4.5,
        "best": 4.5,
        "metrics": OrderedDict(train=[(10, "loss", "AverageMeter", {"sum": 1.0})]),
        "previous_training_time": 12.5,
    }
    assert state["optimizer_history"] == [
        {
            "criterion_name": "LabelSmoothedCrossEntropyCriterion",
            "optimizer_name": "FairseqAdam",
            "lr_scheduler_state": {"best": None},
            "num_updates": 70,
        }
    ]
    group = state["last_optimizer_state"]["param_groups"][0]
    assert list(group) == ["lr", "betas", "eps", "weight_decay", "amsgrad", "params"]
    assert set(state["last_optimizer_state"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["cfg"]["model"]["arch"] == state["cfg"]["model"]["_name"] == "transformer"
    assert state["cfg"]["task"]["_name"] == "translation"


def test_cfg_has_every_field_of_a_real_one(data, tmp_path):
    real = store.load(shared_dir("reference", "mt", "trained.pt"))["cfg"]
    ours = convert.to_cfg(Training(data, tmp_path, "--lr-scheduler", "inverse_sqrt").run)
    assert list(ours) == list(real)
    # Left out: a flag of another kind of Adam, and what fairseq's parser leaves in a Namespace.
    missing = {
        f"{name}.{field}"
        for name, section in real.items()
        if isinstance(section, dict)
        for field in set(section) - set(ours[name])
    }
    assert missing <= {"model.use_old_adam", "model.no_seed_provided", "optimizer.use_old_adam"}
    for name in ("task", "criterion", "checkpoint", "dataset"):  # fairseq checks some strictly
        assert set(ours[name]) == set(real[name]), name
    # A mapping and a pair are text where fairseq parses them.
    assert ours["optimizer"]["adam_betas"] == "(0.9, 0.999)"
    assert ours["checkpoint"]["optimizer_overrides"] == "{}"


def test_what_is_saved_is_restored(saved, data, caplog):
    caplog.set_level(logging.INFO)
    again = Training(data, saved.folder)
    restored = again.load()
    assert restored is not None
    assert (restored.num_updates, restored.epoch, restored.best) == (70, 3, 4.5)
    assert restored.train_iterator["iterations_in_epoch"] == 5
    assert restored.previous_training_time == 12.5
    assert restored.metrics["train"][0][1] == "loss"
    assert restored.extra["early_stopping"] == {"runs": 2}
    assert restored.extra["rng"].tolist() == [0, 1, 2]
    for a, b in zip(saved.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(
            saved.optimizer.state[a]["exp_avg_sq"], again.optimizer.state[b]["exp_avg_sq"]
        )
    last = saved.folder / "checkpoint_last.pt"
    assert f"Loaded checkpoint {last} (epoch 3 @ 70 updates)" in caplog.text
    # Each restart adds one entry to the history.
    again.manager.save(again.saving(3, 80))
    history = store.load(last)["optimizer_history"]
    assert [entry["num_updates"] for entry in history] == [70, 80]


def test_one_changed_byte_in_the_weights_is_noticed(saved, data):
    """Also though the header of the file has been read before."""
    file = saved.folder / "checkpoint_last.pt"
    name, weight = max(saved.model.state_dict().items(), key=lambda item: item[1].numel())
    content = bytearray(file.read_bytes())
    place = content.find(weight.numpy().tobytes())
    assert place > 0, name
    content[place] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        Training(data, saved.folder).load()


def test_nothing_to_restore_is_logged(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert Training(data, tmp_path / "new").load() is None
    assert f"No existing checkpoint found {tmp_path}/new/checkpoint_last.pt" in caplog.text


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model", "--continue-once"])
def test_a_named_file_that_does_not_exist_is_an_error(data, tmp_path, flag):
    training = Training(data, tmp_path / "new", flag, str(tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match=rf"{flag} .*none\.pt: no such checkpoint"):
        training.load()


def test_reset_flags(saved, data):
    last = str(saved.folder / "checkpoint_last.pt")

    def restore(*flags: str) -> Restored:
        restored = Training(data, saved.folder, "--restore-file", last, *flags).load()
        assert restored is not None
        return restored

    full = restore()
    assert full.schedule == {"best": None}
    fresh = restore("--reset-optimizer")
    assert (fresh.num_updates, fresh.schedule, fresh.best, fresh.extra) == (0, None, None, {})
    assert fresh.epoch == 3
    assert restore("--reset-lr-scheduler").schedule is None
    assert restore("--reset-lr-scheduler").num_updates == 70
    meters = restore("--reset-meters")
    assert meters.metrics is None and meters.best is None and meters.num_updates == 70
    data_again = restore("--reset-dataloader")
    assert data_again.train_iterator is None and data_again.epoch == 1


def test_finetune_only_when_there_is_no_last(saved, data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = str(saved.folder / "checkpoint_best.pt")
    tuned = Training(data, tmp_path / "tuned", "--finetune-from-model", source)
    restored = tuned.load()
    assert restored == dataclasses.replace(
        Restored(Path(source)), previous_training_time=restored.previous_training_time
    )
    tuned.manager.prepare()
    tuned.manager.save(tuned.saving(1, 5))
    again = Training(data, tmp_path / "tuned", "--finetune-from-model", source).load()
    assert f"--finetune-from-model {source} is not read" in caplog.text
    assert again.path.name == "checkpoint_last.pt" and again.num_updates == 5


def test_continue_once_takes_everything(saved, data, tmp_path):
    source = str(saved.folder / "checkpoint_best.pt")
    restored = Training(data, tmp_path / "next", "--continue-once", source).load()
    assert (restored.path, restored.num_updates) == (Path(source), 70)


def test_two_named_models_contradict(saved, data):
    last = str(saved.folder / "checkpoint_last.pt")
    both = Training(data, saved.folder, "--finetune-from-model", last, "--restore-file", last)
    with pytest.raises(ConfigError, match="leave one out"):
        both.load()


def test_another_criterion_is_refused_by_fairseqs_message(saved, data):
    other = Training(data, saved.folder, "--criterion", "cross_entropy")
    expected = r"Criterion does not match; please reset the optimizer \(--reset-optimizer\)\. "
    with pytest.raises(CheckpointError, match=expected + "Label.* vs CrossEntropyCriterion"):
        other.load()
    fresh = Training(data, saved.folder, "--criterion", "cross_entropy", "--reset-optimizer").load()
    assert fresh is not None and fresh.num_updates == 0


def test_optimizer_overrides(saved, data):
    training = Training(data, saved.folder, "--optimizer-overrides", '{"lr": 0.5}')
    training.load()
    assert training.optimizer.get_lr() == 0.5


def test_without_optimizer_state_updates_count_from_zero(data, tmp_path, caplog):
    first = Training(data, tmp_path / "s", "--no-save-optimizer-state")
    first.manager.prepare()
    first.manager.save(first.saving(1, 7))
    assert "last_optimizer_state" not in store.load(tmp_path / "s" / "checkpoint_last.pt")
    restored = Training(data, tmp_path / "s").load()
    assert restored.num_updates == 0
    assert "no optimizer state" in caplog.text


def test_a_run_of_saves_leaves_what_the_flags_say(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--keep-last-epochs", "2", "--save-interval-updates", "10"]
    training = Training(data, tmp_path / "s", *flags, "--keep-interval-updates", "1")
    training.manager.prepare()
    best = None
    for epoch, (middle, end) in enumerate([(5.0, 4.0), (3.0, 3.5), (3.2, 2.0)], start=1):
        for updates, value, at_end in ((epoch * 20 - 10, middle, False), (epoch * 20, end, True)):
            training.manager.save(training.saving(epoch, updates, at_end, value, best))
            best = naming.better_of(value, best, False)
    found = {p.name for p in (tmp_path / "s").glob("*.pt*")}
    assert found == {
        *("checkpoint2.pt", "checkpoint3.pt", "checkpoint_3_50.pt"),
        *("checkpoint_best.pt", "checkpoint_last.pt"),
    }
    folder = tmp_path / "s"
    same = [(folder / n).read_bytes() for n in ("checkpoint3.pt", "checkpoint_best.pt")]
    assert same[0] == same[1]
    assert (
        f"Saved checkpoint {folder}/checkpoint3.pt (epoch 3 @ 60 updates, score 2.0)" in caplog.text
    )


def test_the_folder_is_complete_before_training(data, tmp_path):
    training = Training(data, tmp_path / "s")
    training.manager.prepare()
    names = {p.name for p in (tmp_path / "s").iterdir()}
    assert names == {"config.yaml", "dict.en.txt", "dict.de.txt"}
    assert load_yaml(tmp_path / "s" / "config.yaml")["task"]["source_lang"] == "en"


def test_no_save_writes_nothing(data, tmp_path):
    training = Training(data, tmp_path / "s", "--no-save")
    training.manager.prepare()
    assert training.manager.save(training.saving(1, 1, True, 2.0)) is None
    assert not (tmp_path / "s").exists()


def test_an_unwritable_folder_is_an_error_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="--save-dir"):
        Training(data, tmp_path / "file" / "s").manager.prepare()


def test_writing_in_the_background_writes_the_state_of_the_save(data, tmp_path):
    training = Training(data, tmp_path / "s", "--write-checkpoints-asynchronously")
    training.manager.prepare()
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    training.manager.save(training.saving(1, 1))
    with torch.no_grad():
        for p in training.model.parameters():
            p.zero_()
    training.manager.close()
    stored = store.load(tmp_path / "s" / "checkpoint_last.pt")["model"]
    assert all(torch.equal(stored[k], v) for k, v in before.items())
    # A failure shows at the next call, and only once.
    training.manager.save(training.saving(1, 2))
    training.manager.close()
    shutil.rmtree(tmp_path / "s")
    training.manager.save(training.saving(1, 3))
    with pytest.raises(CheckpointError, match="cannot be written"):
        training.manager.close()
    training.manager.close()


def test_crash_pt_loads_and_never_hides_the_cause(saved, caplog):
    assert saved.manager.save_crash(saved.saving(3, 71)) == saved.folder / "crash.pt"
    assert store.load(saved.folder / "crash.pt")["optimizer_history"][-1]["num_updates"] == 71
    shutil.rmtree(saved.folder)
    assert saved.manager.save_crash(saved.saving(3, 71)) is None
    assert "crash.pt could not be written" in caplog.text


# -- loading for generation -----------------------------------------------------------------------


def test_one_file_moved_elsewhere_is_enough(saved, data, tmp_path):
    alone = tmp_path / "elsewhere" / "model.pt"
    alone.parent.mkdir()
    shutil.copy(saved.folder / "checkpoint_best.pt", alone)
    shutil.rmtree(data)
    shutil.rmtree(saved.folder)
    ensemble = inference.load_models(str(alone), load_builtins())
    assert list(ensemble.task.source_dictionary.symbols[4:8]) == ["a", "b", "c", "d"]
    for k, v in ensemble.models[0].state_dict().items():
        assert torch.equal(v, saved.model.state_dict()[k])
    assert not ensemble.models[0].training
    assert ensemble.configs[0].criterion.name == "label_smoothed_cross_entropy"


def test_an_ensemble_shares_its_task(saved):
    paths = f"{saved.folder}/checkpoint_best.pt:{saved.folder}/checkpoint_last.pt"
    ensemble = inference.load_models(paths, load_builtins(), task=saved.task)
    assert len(ensemble.models) == 2 and ensemble.task is saved.task


def test_a_dictionary_of_another_size_is_named(saved, data, tmp_path):
    with open(data / "dict.en.txt", "a") as f:
        f.write("e 1\n")
    with open(data / "dict.de.txt", "a") as f:
        f.write("e 1\n")
    other = Training(data, tmp_path / "other").task
    with pytest.raises(CheckpointError, match="8 source symbols.*dictionary.*has 9"):
        inference.load_models(f"{saved.folder}/checkpoint_best.pt", load_builtins(), task=other)


def test_overrides_reach_the_model_and_unknown_ones_are_named(saved):
    path = f"{saved.folder}/checkpoint_best.pt"
    ensemble = inference.load_models(
        path, load_builtins(), overrides={"dropout": 0.3, "no_decoder_final_norm": True}
    )
    assert ensemble.configs[0].model.config.dropout == 0.3
    with pytest.raises(ConfigError, match="encoder_layerdrop"):
        inference.load_models(path, load_builtins(), overrides={"encoder_layerdropp": 1})


def test_an_override_that_is_no_field_of_the_model_is_said_to_change_nothing(saved, caplog):
    path = f"{saved.folder}/checkpoint_best.pt"
    inference.load_models(path, load_builtins(), overrides={"beam": 4, "dropout": 0.3})
    (line,) = [m for m in caplog.messages if "model-overrides" in m]
    assert "'beam' has no effect" in line


def test_another_direction_than_in_training_is_noticed(saved, data, tmp_path, caplog):
    other = Training(data, tmp_path / "other", "-s", "de", "-t", "en").task
    path = f"{saved.folder}/checkpoint_best.pt"
    inference.load_models(path, load_builtins(), task=other)
    assert "was trained from en to de and is used from de to en" in caplog.text


def test_a_name_that_stands_in_the_save_dir_is_suggested(saved, data):
    again = Training(data, saved.folder, "--restore-file", "checkpoint_best.pt")
    with pytest.raises(CheckpointError, match=r"no such checkpoint; did you mean .*_best\.pt\?"):
        again.load()


def test_weights_of_another_shape_are_one_line(saved):
    path = f"{saved.folder}/checkpoint_best.pt"
    with pytest.raises(CheckpointError, match=r"checkpoint_best\.pt: .*layers\.1\."):
        inference.load_models(path, load_builtins(), overrides={"encoder_layers": 2})


def test_paths_that_are_not_files(saved):
    with pytest.raises(CheckpointError, match=r"is a folder; did you mean .*checkpoint_best\.pt"):
        inference.load_models(str(saved.folder), load_builtins())
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        inference.load_models(str(saved.folder / "x.pt"), load_builtins())
    with pytest.raises(ConfigError, match="--path"):
        inference.load_models("", load_builtins())


def test_refused_features_and_unknown_architectures_are_named(saved):
    state = store.load(saved.folder / "checkpoint_best.pt")
    for field, message in (
        ("adaptive_input", "--adaptive-input"),
        ("_name", "architecture lstm: is not known here: give the --user-dir"),
    ):
        changed = {
            **state,
            "cfg": {**state["cfg"], "model": {**state["cfg"]["model"], field: "lstm"}},
        }
        store.save(saved.folder / "odd.pt", changed)
        with pytest.raises(CheckpointError, match=message):
            inference.load_models(str(saved.folder / "odd.pt"), load_builtins())
    with pytest.raises(CheckpointError, match="neither cfg nor args"):
        convert.cfg_of({"model": {}}, "x.pt")


def test_a_real_checkpoint_of_fairseq_trains_on(tmp_path):
    """Restored, saved by us and restored again: weights and optimizer state are the same."""
    path = str(shared_dir("reference", "mt", "trained.pt"))
    data = shared_dir("reference", "mt", "data-bin")
    first = Training(data, tmp_path / "s", "--restore-file", path, model=REFERENCE)
    restored = first.load()
    assert (restored.num_updates, restored.epoch, restored.best) == (1250, 26, 5.546)
    assert restored.extra == {}
    first.manager.prepare()
    first.manager.save(first.saving(25, 1250, True))
    second = Training(data, tmp_path / "s", model=REFERENCE)
    assert second.load().num_updates == 1250
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(
            first.optimizer.state[a]["exp_avg"], second.optimizer.state[b]["exp_avg"]
        )


def test_a_real_checkpoint_of_fairseq_without_its_data(tmp_path):
    shutil.copy(shared_dir("reference", "mt", "trained.pt"), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="dictionaries"):
        inference.load_models(str(tmp_path / "model.pt"), load_builtins())
    for lang in ("en", "de"):  # as in fairseq's own archives
        shutil.copy(shared_dir("reference", "mt", "data-bin") / f"dict.{lang}.txt", tmp_path)
    ensemble = inference.load_models(str(tmp_path / "model.pt"), load_builtins())
    assert len(ensemble.task.source_dictionary) == 3072


def test_flat_args_of_old_fairseq(saved):
    """fairseq 0.10 and before: one flat namespace and no cfg."""
    state = store.load(saved.folder / "checkpoint_best.pt")
    flat = {k: v for k, v in state["cfg"]["model"].items() if k != "_name"}
    del flat["max_source_positions"], flat["max_target_positions"]
    flat |= {"left_pad_source": "True", "left_pad_target": "False", "max_positions": 77}
    config = convert.saved_config({"args": flat}, "old.pt", load_builtins())
    assert config.model.name == "transformer" and config.model.config.encoder_embed_dim == 8
    assert config.task.config.max_source_positions == 77
    assert config.task.config.left_pad_source is True
    assert config.criterion.name == "label_smoothed_cross_entropy"


def test_interpolations_are_looked_up_and_never_evaluated():
    cfg = {
        "optimization": {"lr": [0.1]},
        "optimizer": {"lr": "${optimization.lr}", "x": "${env:HOME}"},
    }
    read = convert.cfg_of({"cfg": cfg}, "x.pt")
    assert read["optimizer"]["lr"] == [0.1]
    assert read["optimizer"]["x"] == "${env:HOME}"


# -- what travels inside ---------------------------------------------------------------------------


def test_a_bundle_never_leaves_its_folder():
    evil = bundle.Bundle({"../../evil.txt": b"x"}).to_state()
    with pytest.raises(CheckpointError, match="not unpacked"):
        bundle.read({parts.OWN_KEY: {"bundle": evil}}, "evil.pt")


def test_a_model_of_subwords_travels_and_is_pointed_to(tmp_path, data):
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\na b\n")
    training = Training(data, tmp_path / "s", "--bpe", "subword_nmt", "--bpe-codes", str(codes))
    training.manager.prepare()
    assert (tmp_path / "s" / "codes").read_text() == codes.read_text()
    training.manager.save(training.saving())
    codes.unlink()
    shutil.rmtree(data)
    ensemble = inference.load_models(f"{tmp_path}/s/checkpoint_last.pt", load_builtins())
    config = ensemble.configs[0].bpe.config
    assert Path(config.bpe_codes).read_text() == "#version: 0.2\na b\n"


def test_parts_have_names_and_an_order(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    for part in ("model", "shard10", "shard2"):
        parts.part_path(path, part).write_bytes(b"")
    (tmp_path / "checkpoint_last-notes.pt").write_bytes(b"")
    assert list(parts.part_files(path)) == ["model", "shard2", "shard10"]


def averaged(training: Training, value: float) -> dict[str, torch.Tensor]:
    """Every weight `value`; but `version` says which names and layers the file has."""
    return {
        name: t.clone() if name.endswith("version") else torch.full_like(t, value)
        for name, t in training.model.state_dict().items()
    }


def all_are(average: dict[str, torch.Tensor], value: float) -> bool:
    return all(
        bool((tensor == value).all())
        for name, tensor in average.items()
        if not name.endswith("version")
    )


def test_average_and_loss_scale_stand_where_fairseq_has_them(data, tmp_path):
    training = Training(data, tmp_path / "save")
    training.manager.prepare()
    training.update()
    training.manager.save(training.saving(average=averaged(training, 2.0), loss_scale=64.0))
    state = torch.load(training.folder / "checkpoint_last.pt", weights_only=True)
    assert state["last_optimizer_state"]["loss_scale"] == 64.0
    assert set(state["extra_state"]["ema"]) == set(state["model"])

    other = Training(data, tmp_path / "save")
    average = averaged(other, 0.0)
    restored = other.manager.load(other.model, other.optimizer, other.criterion, average)
    assert restored.average and restored.loss_scale == 64.0
    assert all_are(average, 2.0)
    assert "ema" not in restored.extra


@pytest.mark.parametrize("kind", ["fp32", "older", "none", "cut"])
def test_averages_of_other_writers(kind, saved):
    path = saved.folder / "checkpoint_last.pt"
    state = store.load(path)
    half = {name: tensor.half() for name, tensor in averaged(saved, 3.0).items()}
    wide = {name: tensor.float() + 0.125 for name, tensor in half.items()}
    if kind == "fp32":
        state["extra_state"] |= {"ema": half, "ema_fp32_params": wide}
    elif kind == "older":
        state["fairseq_lite"]["extra"]["ema"] = {**wide, "_since": 1}
    elif kind == "cut":
        del half["decoder.embed_tokens.weight"]
        state["extra_state"]["ema"] = half
    store.save(path, state)
    average = averaged(saved, 0.0)

    def load() -> Restored:
        return saved.manager.load(saved.model, saved.optimizer, saved.criterion, average)

    if kind == "cut":
        with pytest.raises(CheckpointError, match="decoder.embed_tokens.weight is missing"):
            load()
        return
    restored = load()
    assert restored.average == (kind != "none")
    assert all_are(average, 0.0 if kind == "none" else 3.125)
    if kind == "older":
        assert restored.extra["ema_since"] == 1 and "ema" not in restored.extra
