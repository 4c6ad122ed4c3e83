r"""Models by name: where their files lie, and what is said of them when nothing else is.

The names are those of published models, and of the tiny ones that tests train. Their files lie in
the folder that FLITE_MODELS names (`models` where it names none), each where `path` says:

    FLITE_MODELS=/data/models
    /data/models/en_dense_lm_125m/model.pt        # --model-name 125M_gpt3_setting

FLITE_MODELS may also name a YAML or JSON file of one's own models, with paths from its folder on:

    ours_300m:
      path: ours/300m/checkpoint_best.pt
      groups: [ours]
      options: {train_sep: "\n"}
    someone_elses: {path: someone/else, kind: huggingface}

A bare path needs none of this.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.registry import near

VARIABLE = "FLITE_MODELS"
DEFAULT_FOLDER = Path("models")

FLITE, HUGGING_FACE, NONE = "fairseq-lite", "huggingface", "none"
KINDS = (FLITE, HUGGING_FACE, NONE)

# `huggingface_<org>=<name>` names a model in Hugging Face's cache.
CACHED = "huggingface_"

# A checkpoint of a model: its name, and how many updates it has.
_STEP = re.compile(r"(?P<base>.+)__step(?P<updates>\d{8})")
_UPDATES = re.compile(r"checkpoint_\d+_(?P<updates>\d+)\.pt")


@dataclass(frozen=True)
class ModelConfig:
    """A model.

    Attributes:
        path: its checkpoint, or a folder of checkpoints; of Hugging Face's a folder, a `.gguf`
            file, or `huggingface_<org>=<name>` in its cache. A mixture of experts goes by the name
            without `-rank-N` and `-shared`. Of several, between colons, the probabilities are
            averaged.
        kind: "fairseq-lite" (fairseq's checkpoints as well), "huggingface", or "none" for a
            predictor that asks no model; None: as its files say.
        groups: names of several models that it belongs to.
        user_dir: a folder of plugins that it needs.
        overrides: fields of the model that are replaced.
        start: the symbol texts begin with, where the model knows several.
        options: values of gpt3_eval's flags where nothing else is typed.
        enabled: whether groups have it.
    """

    path: str = ""
    kind: str | None = None
    groups: tuple[str, ...] = ()
    user_dir: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError(f"kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        if not self.path and self.kind != NONE:
            raise ConfigError("a model needs a path")


def _dense(name: str, *groups: str) -> ModelConfig:
    return ModelConfig(f"en_dense_lm_{name}/model.pt", groups=("dense", *groups))


def _moe(name: str) -> ModelConfig:
    return ModelConfig(f"en_moe_lm_{name}/model.pt", groups=("moe",))


def _multilingual(path: str, kind: str = "multilingual_dense") -> ModelConfig:
    return ModelConfig(path, groups=("multilingual", kind))


def _without_files(predictor: str) -> ModelConfig:
    return ModelConfig(kind=NONE, groups=("dummy",), options={"predictor_name": predictor})


# Dense and mixture-of-experts models of fairseq's examples/moe_lm, XGLM of its examples/xglm, and
# the names that guides of its branches use for others of the same kind. The folders are those that
# the published archives unpack into.
SHIPPED: Mapping[str, ModelConfig] = {
    "125M_gpt3_setting": _dense("125m", "gpt3_setting"),
    "355M_gpt3_setting": _dense("355m", "gpt3_setting"),
    "1.3B_gpt3_setting": _dense("1_3b", "gpt3_setting"),
    "2.7B_gpt3_setting": _dense("2_7b", "gpt3_setting"),
    "6.7B_gpt3_setting": _dense("6_7b", "gpt3_setting"),
    "13B_gpt3_setting": _dense("13b", "gpt3_setting"),
    "6.7B_gpt3_setting_1024ctx": _dense("6_7b_1024ctx"),
    "175B": _dense("175b"),
    "moe_15B": _moe("15b"),
    "moe_52B": _moe("52b"),
    "moe_207B": _moe("207b"),
    "moe_523B": _moe("523b"),
    "moe_1.1T": _moe("1_1t"),
    "xglm_564M": _multilingual("xglm.564M/model.pt"),
    "xglm_1.7B": _multilingual("xglm.1.7B/model.pt"),
    "xglm_2.9B": _multilingual("xglm.2.9B/model.pt"),
    "xglm_4.5B": _multilingual("xglm.4.5B/model.pt"),
    "xglm_7.5B": _multilingual("xglm.7.5B/model.pt"),
    "dense_lang16": _multilingual("dense_lang16/model.pt"),
    "moe_128exp_lang16": _multilingual("moe_128exp_lang16/model.pt", "multilingual_moe"),
    "tiny_125m": ModelConfig("tiny_125m/checkpoint_eval.pt", groups=("tiny",)),
    "tiny_moe": ModelConfig("tiny_moe/checkpoint_eval.pt", groups=("tiny",)),
    "tiny_multi_moe": ModelConfig("tiny_multi_8e/checkpoint_eval.pt", groups=("tiny",)),
    "random": _without_files("random"),
    "majority": _without_files("majorityclass"),
    "dummy": _without_files("dummy"),
}


# -- names ----------------------------------------------------------------------------------------


def all_configs() -> dict[str, ModelConfig]:
    """Every model that has a name; one's own replace those that ship.

    Raises:
        ConfigError: the file of FLITE_MODELS cannot be read or says something else.
    """
    return {**SHIPPED, **_own()}


def get_model_names() -> list[str]:
    """The names of all models."""
    return sorted(all_configs())


def get_model_config_groups() -> dict[str, dict[str, ModelConfig]]:
    """Group -> name -> model; those that are not enabled are in none."""
    found: dict[str, dict[str, ModelConfig]] = {}
    for name, config in all_configs().items():
        for group in config.groups if config.enabled else ():
            found.setdefault(group, {})[name] = config
    return found


def get_model_config(name: str) -> ModelConfig | None:
    """What a name stands for; None for one that is not known: a path, or a mistake.

    `NAME__step00001000` is the checkpoint of update 1000 in the folder of NAME's files.

    Raises:
        CheckpointError: there is no checkpoint of that update.
        ConfigError: see `all_configs`.
    """
    known = all_configs()
    if name in known:
        return known[name]
    match = _STEP.fullmatch(name)
    if match is None or match["base"] not in known:
        return None
    config = known[match["base"]]
    return dataclasses.replace(config, path=str(at_update(config, name, int(match["updates"]))))


def options_of(name: str) -> Mapping[str, Any]:
    """The flags that a model's name implies, where it is known; reads no model."""
    match = _STEP.fullmatch(name)
    known = all_configs()
    found = known.get(name) or (known.get(match["base"]) if match else None)
    return {} if found is None else found.options


def suggestion(name: str) -> str:
    """A clause with the nearest names."""
    return near(name, get_model_names())


# -- files ----------------------------------------------------------------------------------------


def models_folder() -> Path:
    """What paths of models start from."""
    given = os.environ.get(VARIABLE)
    if not given:
        return DEFAULT_FOLDER
    path = Path(given).expanduser()
    return path if path.is_dir() else path.parent


def path_of(config: ModelConfig) -> str:
    """A model's path, or several between colons, from the folder of models on."""
    if config.path.startswith(CACHED):
        return config.path
    folder = models_folder()
    return ":".join(str(folder / Path(each).expanduser()) for each in config.path.split(":"))


def user_dir_of(config: ModelConfig) -> str | None:
    """A model's folder of plugins, from the folder of models on."""
    return None if config.user_dir is None else str(models_folder() / config.user_dir)


def get_model_checkpoint_names(base: str) -> list[str]:
    """`NAME__step00001000` for every checkpoint that training wrote beside NAME's, in order.

    Raises:
        ConfigError: no such name.
    """
    config = all_configs().get(base)
    if config is None:
        raise ConfigError(f"{base}: no such model{suggestion(base)}")
    return [f"{base}__step{updates:08d}" for updates in _updates(path_of(config))]


def at_update(config: ModelConfig, name: str, updates: int) -> Path:
    """The checkpoint of an update, `checkpoint_EPOCH_UPDATE.pt`, in the folder of a model.

    Args:
        config: the model.
        name: what it is called in messages.
        updates: how many.

    Raises:
        CheckpointError: there is none.
    """
    return checkpoint_at(path_of(config), name, updates)


def checkpoint_at(path: str, name: str, updates: int) -> Path:
    """As `at_update`, for a path."""
    found = _updates(path)
    if updates in found:
        return found[updates]
    own = _updates_of(path)
    if own == updates:
        return Path(path)
    there = f"there are checkpoints of updates {', '.join(map(str, found))}"
    if not found:
        there = "no file there is called so"
    if own is not None:
        there += f", and {path} is of update {own}"
    raise CheckpointError(
        f"--num-training-updates {updates}: --model-name {name}: {_folder(path)} has no"
        f" checkpoint_EPOCH_{updates}.pt; {there}"
    )


def _updates_of(path: str) -> int | None:
    """The number of updates of one checkpoint that is named itself; None where it says nothing."""
    from fairseq_lite.training.checkpoint import store
    from fairseq_lite.training.checkpoint.parts import readable_files

    files = list(readable_files(Path(path)).values())
    if not files or Path(path).is_dir():
        return None
    history = store.load(files[0], verify=False, mapped=True).get("optimizer_history")
    return history[-1].get("num_updates") if history else None


def _folder(path: str) -> Path:
    first = Path(path.split(":")[0])
    return first if first.is_dir() else first.parent


def _updates(path: str) -> dict[int, Path]:
    """Updates that a folder has checkpoints of, in order."""
    from fairseq_lite.training.checkpoint.parts import whole_names

    folder = _folder(path)
    if not folder.is_dir():
        return {}
    names = whole_names(each.name for each in folder.iterdir())
    found = {int(m["updates"]): folder / n for n in names if (m := _UPDATES.fullmatch(n))}
    return dict(sorted(found.items()))


def check_model_paths(names: Iterable[str] | None = None) -> list[str]:
    """A line for every model whose files are not where they should be.

    Args:
        names: of models; None: all.

    Raises:
        ConfigError: no such name.
    """
    found = []
    for name in get_model_names() if names is None else names:
        config = get_model_config(name)
        if config is None:
            raise ConfigError(f"{name}: no such model{suggestion(name)}")
        missing = missing_files(config)
        if missing:
            found.append(f"{name}: expected {missing}")
    return found


def missing_files(config: ModelConfig) -> str | None:
    """The first of a model's paths that is not there."""
    if config.kind == NONE or config.path.startswith(CACHED):
        return None
    from fairseq_lite.training.checkpoint.parts import readable_files

    for each in path_of(config).split(":"):
        path = Path(each)
        if not path.exists() and not readable_files(path):
            return each
    return None


# -- one's own ------------------------------------------------------------------------------------


def _own() -> dict[str, ModelConfig]:
    """The models of the file that FLITE_MODELS names, if it names one."""
    given = os.environ.get(VARIABLE)
    if not given or Path(given).expanduser().is_dir():
        return {}
    path = Path(given).expanduser()
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"{VARIABLE}={given}: {e.strerror}; expected a folder of models, or a YAML or JSON file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"{VARIABLE}={given}: is neither YAML nor JSON: {reason}") from None
    if not isinstance(said, Mapping):
        raise ConfigError(f"{VARIABLE}={given}: expected names with their models")
    return {str(name): _read(values, f"{path}: {name}") for name, values in said.items()}


def _read(values: Any, where: str) -> ModelConfig:
    """A model as a file describes it: its path alone, or its fields."""
    if isinstance(values, str):
        values = {"path": values}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a path, or fields as path: and kind:")
    fields = [each.name for each in dataclasses.fields(ModelConfig)]
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: no field {key!r}; it has {', '.join(fields)}")
        kinds: dict[str, Any] = {
            "groups": list, "overrides": Mapping, "options": Mapping, "enabled": bool
        }  # fmt: skip
        if value is not None and not isinstance(value, kinds.get(key, str)):
            raise ConfigError(f"{where}: {key}: {value!r} is of another kind than expected")
    given = {key: value for key, value in values.items() if value is not None}
    if "groups" in given:
        given["groups"] = tuple(map(str, given["groups"]))
    try:
        return ModelConfig(**given)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
