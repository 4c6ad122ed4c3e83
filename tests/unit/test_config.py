"""Flags, the three passes, precedence, YAML: what the user types becomes one frozen RunConfig."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config import core, serial
from fairseq_lite.config.fairseq_flags import COMING, FAIRSEQ_FLAGS, NO_EFFECT, REFUSED
from fairseq_lite.config.flags import flag, to_argv
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError, PluginError
from fairseq_lite.registry import NoConfig, Registry


@dataclass(frozen=True)
class TaskConfig:
    data: str = flag("", "data folder", positional=True)
    source_lang: str | None = flag(None, "source", aliases=("-s",))
    args: dict[str, Any] = flag({}, "JSON")
    left_pad_source: bool = flag(True, "pad left")
    unit: str | None = flag(None, "optional value", const="@@ ")


@dataclass(frozen=True)
class ModelConfig:
    dim: int = flag(512, "width")
    depth: int = flag(6, "layers")
    norm: bool = flag(False, "normalise first")
    kind: Literal["a", "b"] = flag("a", "kind")


@dataclass(frozen=True)
class AdamConfig:
    adam_betas: tuple[float, ...] = flag((0.9, 0.999), "betas")


@dataclass(frozen=True)
class SmoothConfig:
    label_smoothing: float = flag(0.0, "smoothing")


def build(*_args: Any, **_kw: Any) -> None:
    """Stands for a factory."""


def make_registries() -> dict[str, Registry]:
    kinds = {
        "task": "--task",
        "model": "--arch",
        "criterion": "--criterion",
        "optimizer": "--optimizer",
        "lr_scheduler": "--lr-scheduler",
        "ddp_backend": "--ddp-backend",
        "scoring": "--scoring",
        "bpe": "--bpe",
        "tokenizer": "--tokenizer",
    }
    made = {k: Registry(k, f) for k, f in kinds.items()}
    made["task"].register("translation", config=TaskConfig)(build)
    made["model"].register("net", config=ModelConfig)(build)
    made["model"].preset("net_big", of="net", dim=1024)
    made["criterion"].register("cross_entropy")(build)
    made["criterion"].register("smooth", config=SmoothConfig)(build)
    made["optimizer"].register("adam", config=AdamConfig)(build)
    made["lr_scheduler"].register("fixed")(build)
    made["ddp_backend"].register("legacy_ddp")(build)
    made["scoring"].register("bleu")(build)

    @made["model"].preset_function("net_follow", of="net")
    def follow(args: Any) -> None:
        args.dim = getattr(args, "dim", 64)
        args.depth = getattr(args, "depth", args.dim // 32)

    return made


BASE = ["data-bin", "--arch", "net", "--optimizer", "adam"]


def run(*words: str, base: list[str] | None = None) -> core.RunConfig:
    return parse("flite-train", [*(BASE if base is None else base), *words], make_registries())


def test_defaults_preset_and_command_line():
    assert run().model.config.dim == 512
    assert run(base=["d", "-a", "net_big", "--optimizer", "adam"]).model.config.dim == 1024
    typed = run("--dim", "512", base=["d", "-a", "net_big", "--optimizer", "adam"])
    assert typed.model.config.dim == 512  # a typed value wins even when it equals the default


def test_yaml_lies_between_preset_and_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("arch: net_big\noptimizer: adam\ndim: 7\nmodel: {depth: 3, _name: net_big}\n")
    base = ["d", "--config", str(path)]
    assert run(base=base).model.config == ModelConfig(dim=7, depth=3)
    assert run("--dim", "1024", base=base).model.config.dim == 1024


def test_preset_function_sees_what_the_user_set():
    base = ["d", "--arch", "net_follow", "--optimizer", "adam"]
    assert run(base=base).model.config == ModelConfig(dim=64, depth=2)
    assert run("--dim", "320", base=base).model.config == ModelConfig(dim=320, depth=10)


def test_preset_with_an_unknown_field_fails_at_registration():
    with pytest.raises(PluginError, match="'dimm'.*did you mean dim"):
        make_registries()["model"].preset("bad", of="net", dimm=3)


def test_name_taken_is_refused_but_importing_again_is_not():
    registries = make_registries()
    registries["task"].register("translation", config=TaskConfig)(build)
    with pytest.raises(PluginError, match="already registered"):
        registries["task"].register("translation")(lambda: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lable-smoothing", "0.1"], "unknown flag --lable-smoothing"),
        (["--label-smoothing", "0.1"], "belongs to --criterion smooth; you chose --criterion cro"),
        (["--arch", "nett"], "--arch nett: unknown.*did you mean net"),
        (["--max-tokens", "many"], "--max-tokens.*'many'"),
        (["--args", '{"beam" 4}'], "column 9"),
        (["--kind", "c"], "expected one of a, b"),
        (["--fp16", "--bf16"], "--fp16 and --bf16 contradict"),
        (["--tpu"], "--tpu: TPUs are not supported"),
        (["--num-shards", "0"], "--num-shards 0: expected 1 or more"),
        (["--num-workers", "-1"], "--num-workers -1: expected 0 or more"),
        (["--max-valid-steps", "0"], "--max-valid-steps 0: expected 1 or more"),
        (["--save-interval", "0"], "--save-interval 0: expected 1 or more"),
        (["--lr", "-1"], "--lr -1.0: expected 0 or more"),
        (["--ema-decay", "1.9"], "--ema-decay 1.9: expected a number from 0 to 1"),
        (["--continue-once", "a.pt", "--restore-file", "b.pt"], "--continue-once and --restore-f"),
        (["--max-tok", "3"], "unknown flag --max-tok.*--max-tokens"),
        (["surplus"], "unexpected argument 'surplus'"),
    ],
)
def test_errors_say_what_to_type(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag_name", "commands"),
    [
        ("--is-moe", "flite-generate, .*flite-eval-lm"),
        ("--retain-dropout", "flite-generate, flite-interactive"),
    ],
)
def test_flags_of_other_commands_are_said_to_be_theirs(flag_name, commands):
    line = f"^{flag_name} is no flag of flite-train, but of {commands}"
    argv = ["d", "--arch", "transformer", "--optimizer", "sgd", flag_name]
    with pytest.raises(ConfigError, match=line):
        parse("flite-train", argv, load_builtins())


def test_missing_selector_and_data_are_named():
    with pytest.raises(ConfigError, match="--optimizer is needed; one of: adam"):
        run(base=["d", "--arch", "net"])
    with pytest.raises(ConfigError, match="data argument is missing"):
        run(base=["--arch", "net", "--optimizer", "adam"])


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_what_asks_about_the_command_needs_nothing_else(word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("flite-train", [word], load_builtins())
    assert ended.value.code == 0
    assert "fairseq-lite" in capsys.readouterr().out or word == "--help"


def test_no_effect_flags_warn(caplog):
    run("--empty-cache-freq", "3")
    assert "--empty-cache-freq has no effect" in caplog.text


def test_flags_of_a_command_fairseq_ignored_there_warn(caplog):
    parse("flite-generate", ["data-bin", "--save-dir", "x"], make_registries())
    assert "--save-dir has no effect: flite-generate does not use it" in caplog.text


def test_two_owners_of_one_flag():
    registries = make_registries()

    @dataclass(frozen=True)
    class Clash:
        lr: float = flag(0.1, "a second owner")

    registries["criterion"].register("clash", config=Clash)(build)
    with pytest.raises(ConfigError, match="--lr is declared by .* and again by --criterion clash"):
        parse("flite-train", [*BASE, "--criterion", "clash"], registries)


def test_types_from_text():
    got = run("--adam-betas", "(0.9, 0.98)", "--update-freq", "2,1", "--args", "{'a': 1}")
    assert got.optimizer.config.adam_betas == (0.9, 0.98)
    assert got.optimization.update_freq == (2, 1)
    assert got.task.config.args == {"a": 1}
    assert run("--unit").task.config.unit == "@@ "
    assert run("--left-pad-source", "False").task.config.left_pad_source is False
    assert run("--max-update", "1e3").optimization.max_update == 1000


def test_effective_config_reloads_to_the_same_run(tmp_path):
    first = run("--dim", "8", "--lr", "1e-3", "--args", '{"x": [1, 2]}', "--update-freq", "4")
    path = tmp_path / "config.yaml"
    serial.save_yaml(first, path)
    assert parse("flite-train", ["--config", str(path)], make_registries()) == first
    assert serial.from_plain(yaml.safe_load(path.read_text()), make_registries()) == first


def test_yaml_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max_tokenz: 4\n")
    with pytest.raises(ConfigError, match="unknown key 'max_tokenz'.*max_tokens"):
        run("--config", str(path))


@given(
    st.builds(
        ModelConfig,
        dim=st.integers(1, 10**6),
        depth=st.integers(0, 99),
        norm=st.booleans(),
        kind=st.sampled_from(["a", "b"]),
    )
)
def test_flags_to_config_to_flags_is_identity(config):
    assert run(*to_argv(config)).model.config == config


def test_the_tables_of_fairseqs_flags_are_consistent():
    assert not set(REFUSED) & set(NO_EFFECT)
    for table in (REFUSED, NO_EFFECT, COMING):
        assert set(table) <= set(FAIRSEQ_FLAGS)


def test_every_section_has_help_for_every_flag():
    for field in dataclasses.fields(core.RunConfig):
        config = field.default if field.default is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(config) and not isinstance(config, core.Choice):
            for each in dataclasses.fields(config):
                assert each.metadata["flag"].help, each.name


def test_registering_a_config_that_is_not_frozen_is_refused():
    @dataclass
    class Loose:
        x: int = 1

    with pytest.raises(PluginError, match="frozen dataclass"):
        Registry("task", "--task").register("t", config=Loose)(build)
    assert dataclasses.fields(NoConfig) == ()


def test_a_prefix_has_no_negative_size():
    with pytest.raises(ConfigError, match="--prefix-size -1: expected 0 or more"):
        core.GenerationConfig(prefix_size=-1)
