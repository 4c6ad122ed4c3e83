"""A run's configuration to and from the `cfg` (or older `args`) of a fairseq checkpoint.

One form serves both ways: what we write is a `cfg` fairseq's own loader builds its configuration
from, and what we read is that form again, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.config.fairseq_flags import REFUSED
from fairseq_lite.config.flags import coerce
from fairseq_lite.config.serial import plain
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.models.lm_config import TransformerLMConfig
from fairseq_lite.moe.flags import MoEConfig, is_moe_field
from fairseq_lite.registry import Registry, near
from fairseq_lite.tasks.language_modeling import LanguageModelingConfig
from fairseq_lite.training.checkpoint import fairseq_defaults, parts

logger = logging.getLogger(__name__)

# Features of fairseq's architectures and tasks that change the computation and are not built: a
# checkpoint that was trained with one would load into a model that computes something else.
_NOT_BUILT = (
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "base_layers",
    "char_inputs",
    "character_embeddings",
    "cross_self_attention",
    "decoder_xformers_att_config",
    "encoder_xformers_att_config",
    "future_target",
    "merge_src_tgt_embed",
    "no_cross_attention",
    "past_target",
    "quant_noise_pq",
    "quant_noise_scalar",
    "scale_attn",
    "scale_fc",
    "scale_heads",
    "scale_resids",
    "self_target",
)

# The selectors' sections, and the flat name of each in older checkpoints.
_CHOICES = {
    "model": "arch",
    "task": "task",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr_scheduler": "lr_scheduler",
    "scoring": "scoring",
    "bpe": "bpe",
    "tokenizer": "tokenizer",
}

# NormFormer's flags and the weights they make.
_SCALES = {
    "scale_attn": ".attn_ln.weight",
    "scale_fc": ".ffn_layernorm.weight",
    "scale_heads": ".c_attn",
    "scale_resids": ".w_resid",
}

# gshard's default of --moe-eval-capacity-token-fraction.
_GSHARD_CAPACITY = 0.25

_INTERPOLATION = re.compile(r"\$\{([A-Za-z0-9_.]+)\}")


# -- writing
# ------------------------------------------------------------------------------------------


def to_cfg(run: RunConfig) -> dict[str, Any]:
    """A run as fairseq's nested `cfg`: plain values only, every section present."""
    cfg: dict[str, Any] = {"_name": None}
    for name, defaults in fairseq_defaults.SECTIONS.items():
        if name != "ema":
            cfg[name] = _overlay(defaults, plain_section(run, name))
    cfg["distributed_training"]["ddp_backend"] = run.ddp_backend.name or "legacy_ddp"
    for name, known in (("max_tokens", "max_tokens_valid"), ("batch_size", "batch_size_valid")):
        if cfg["dataset"][known] is None:
            cfg["dataset"][known] = cfg["dataset"][name]
    lr = list(run.optimization.lr)
    cfg["model"] = {}  # keeps its place in the order
    cfg["task"] = _task(run)
    cfg["criterion"] = _entry(run.criterion, sentence_avg=run.optimization.sentence_avg)
    cfg["optimizer"] = _entry(run.optimizer, tpu=False, lr=lr)
    cfg["lr_scheduler"] = _entry(run.lr_scheduler, lr=lr)
    cfg["scoring"] = _entry(run.scoring, pad=1, eos=2, unk=3) or {
        "_name": "bleu",
        "pad": 1,
        "eos": 2,
        "unk": 3,
    }
    cfg["bpe"] = _entry(run.bpe)
    cfg["tokenizer"] = _entry(run.tokenizer)
    cfg["ema"] = _overlay(fairseq_defaults.SECTIONS["ema"], plain_section(run, "ema"))
    cfg["model"] = _model(run, cfg)
    return cfg


def plain_section(run: RunConfig, name: str) -> dict[str, Any]:
    """A shared section's fields, or nothing where we have no such section."""
    section = getattr(run, name, None)
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return {}
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}


def _overlay(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's fields with ours laid over them; fields it does not know are left out."""
    return {k: _like(k, values[k], d) if k in values else d for k, d in defaults.items()}


def _like(name: str, value: Any, default: Any = None) -> Any:
    """A value in the form fairseq gives that field."""
    if value is None:
        return default  # where we leave something to be found out, fairseq has a number
    if isinstance(value, Mapping):
        if not isinstance(default, str):
            return plain(value)
        # fairseq reads overrides as a Python literal and the rest as JSON.
        return repr(dict(value)) if name.endswith("overrides") else json.dumps(value)
    if isinstance(value, tuple):
        if name.endswith(("_betas", "_eps")):
            return str(value)
        if name.endswith("_to_keep"):
            return ",".join(str(v) for v in value)
        return list(value)
    return plain(value)


def _fields(choice: Choice) -> dict[str, Any]:
    return {f.name: getattr(choice.config, f.name) for f in dataclasses.fields(choice.config)}


def _entry(choice: Choice, **more: Any) -> dict[str, Any] | None:
    if choice.name is None:
        return None
    return {"_name": choice.name, **{k: _like(k, v) for k, v in _fields(choice).items()}, **more}


def _task(run: RunConfig) -> dict[str, Any] | None:
    choice = run.task
    defaults = fairseq_defaults.TASKS.get(choice.name or "")
    if defaults is None:
        return _entry(choice)
    # A task's section of fairseq's repeats what it reads of two others.
    shared = {**plain_section(run, "common"), **plain_section(run, "dataset")}
    return {"_name": choice.name, **_overlay(defaults, {**shared, **_fields(choice)})}


def _model(run: RunConfig, cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    if run.model.name is None:
        return None
    if isinstance(run.model.config, TransformerLMConfig):
        return _language_model(run)
    return _flat_model(run, cfg)


def _language_model(run: RunConfig) -> dict[str, Any]:
    """The model's fields, and those of its task that fairseq builds it from."""
    config = run.model.config
    own = _as_pruned({k: _like(k, v) for k, v in vars(config.resolved()).items()})
    own = _without_mixture(own, config)
    task = _fields(run.task)
    repeated = ("add_bos_token", "tokens_per_sample")
    longest = own.pop("max_target_positions")
    if longest is None and isinstance(run.task.config, LanguageModelingConfig):
        longest = run.task.config.longest_input()
    elif longest is None:  # of a plugin's task
        longest = task.get("max_target_positions") or task.get("tokens_per_sample")
    return {
        "_name": run.model.name,
        **fairseq_defaults.TRANSFORMER_LM,
        **own,
        **{name: task[name] for name in repeated if name in task},
        "max_target_positions": longest,
    }


def _flat_model(run: RunConfig, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The model's fields and, as fairseq keeps them there, every other flag, flat."""
    flat: dict[str, Any] = {}
    for name, section in cfg.items():
        if isinstance(section, Mapping) and name not in ("bmuf", "generation", "eval_lm", "model"):
            flat.update({k: v for k, v in section.items() if k != "_name"})
    for name, flat_name in _CHOICES.items():
        flat[flat_name] = cfg[name].get("_name") if cfg[name] else None
    own = {k: _like(k, v) for k, v in _fields(run.model).items()}
    own = _without_mixture(own, run.model.config)
    if "encoder_embed_dim" in own and "decoder_layers" in own:
        flat.update(fairseq_defaults.TRANSFORMER)
        own = _resolved(own)
    return {**flat, **own, "_name": run.model.name, "arch": run.model.name}


def _resolved(own: dict[str, Any]) -> dict[str, Any]:
    """Widths of the decoder that follow the encoder's, spelled out: fairseq does not take None."""
    result = _as_pruned(own)
    for name, source in (
        ("decoder_embed_dim", "encoder_embed_dim"),
        ("decoder_ffn_embed_dim", "encoder_ffn_embed_dim"),
        ("decoder_output_dim", "decoder_embed_dim"),
        ("decoder_input_dim", "decoder_embed_dim"),
    ):
        if result.get(name) is None:
            result[name] = result.get(source)
    if result.get("share_all_embeddings"):
        result["share_decoder_input_output_embed"] = True
    return result


def _without_mixture(own: dict[str, Any], config: Any) -> dict[str, Any]:
    """The fields that fairseq's main branch knows too, where no flag of mixtures of experts is set.

    Its dataclasses take no others.
    """
    if not isinstance(config, MoEConfig) or config.moe_fields_set():
        return own
    return {k: v for k, v in own.items() if not is_moe_field(k)}


def _as_pruned(own: Mapping[str, Any]) -> dict[str, Any]:
    """The depth the model has: fairseq would prune a pruned model's checkpoint once more."""
    result = dict(own)
    for side in ("encoder", "decoder"):
        keep = result.get(f"{side}_layers_to_keep")
        if keep:
            result[f"{side}_layers"] = len(keep.split(","))
            result[f"{side}_layers_to_keep"] = None
    return result


# -- reading
# ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """What a checkpoint says about the run that wrote it, in our terms.

    Attributes:
        path: the file.
        cfg: its `cfg`, upgraded: section -> plain values.
        model, task, criterion, bpe, tokenizer: the entries it used; a name of None where it has
            none, or (for all but the model) where the name is not one of ours.
        sentence_avg: whether gradients were divided by sentences.
    """

    path: Path
    cfg: Mapping[str, Any]
    model: Choice = Choice()
    task: Choice = Choice()
    criterion: Choice = Choice()
    bpe: Choice = Choice()
    tokenizer: Choice = Choice()
    sentence_avg: bool = False

    def run(self) -> RunConfig:
        """A run made of these entries, everything else at its default."""
        return RunConfig(
            command="",
            model=self.model,
            task=self.task,
            criterion=self.criterion,
            bpe=self.bpe,
            tokenizer=self.tokenizer,
        )


def saved_config(
    state: Mapping[str, Any],
    path: str | Path,
    registries: Mapping[str, Registry],
    overrides: Mapping[str, Any] | None = None,
) -> SavedConfig:
    """Read a checkpoint's configuration.

    Args:
        state: what `store.load` gave.
        path: the file, for messages.
        registries: section -> registry.
        overrides: `--model-overrides`: fields to replace, wherever they stand.

    Raises:
        CheckpointError: there is none; its architecture or a feature it was trained with is not
            built.
        ConfigError: an override names no field.
    """
    cfg = cfg_of(state, path)
    _forget_lost_scales(cfg, state.get("model"))
    if not parts.own(state):
        _as_gshard_computes(cfg)
    _override(cfg, overrides or {}, registries)
    _refuse_not_built(cfg, path, registries)
    choices = {
        name: _choice(registries[name], cfg.get(name) or {}, path, required=name == "model")
        for name in ("model", "task", "criterion", "bpe", "tokenizer")
    }
    known = {f.name for c in choices.values() for f in dataclasses.fields(c.config)}
    for name in sorted(set(overrides or {}) - known):
        logger.warning("--model-overrides: %r has no effect: no field of the model", name)
    sentence_avg = bool((cfg.get("optimization") or {}).get("sentence_avg"))
    return SavedConfig(Path(path), cfg, sentence_avg=sentence_avg, **choices)


def cfg_of(state: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint's `cfg`, or one made from the flat `args` of fairseq 0.10 and before.

    Raises:
        CheckpointError: it has neither.
    """
    if isinstance(state.get("cfg"), Mapping):
        nested = {k: dict(v) if isinstance(v, Mapping) else v for k, v in state["cfg"].items()}
        nested = _interpolate(nested, nested)
    elif isinstance(state.get("args"), Mapping):
        nested = _from_flat(state["args"])
    else:
        raise CheckpointError(
            f"{path}: has neither cfg nor args: it holds weights, but not how the model is built"
        )
    for name, flat_name in _CHOICES.items():
        section = nested.get(name)
        if isinstance(section, str):  # only the name was stored
            nested[name] = section = {"_name": section}
        if isinstance(section, dict) and not section.get("_name"):
            section["_name"] = section.get(flat_name)
    return _upgraded(nested)


def upgraded_state(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A loaded checkpoint with the counters that versions of fairseq before 0.6 kept elsewhere.

    Raises:
        CheckpointError: it holds no weights: it is not a checkpoint.
    """
    if not isinstance(state.get("model"), Mapping):
        raise CheckpointError(f"{path}: holds no model weights: not a checkpoint of fairseq's kind")
    if not state.get("optimizer_history"):
        state["optimizer_history"] = [
            {"criterion_name": "CrossEntropyCriterion", "best_loss": state.pop("best_loss", None)}
        ]
        if "optimizer" in state:
            state["last_optimizer_state"] = state.pop("optimizer")
    last = state["optimizer_history"][-1]
    if "optimizer" in last:
        state["last_optimizer_state"] = last["optimizer"]
        for entry in state["optimizer_history"]:
            entry.pop("optimizer", None)
    last.setdefault("optimizer_name", "FairseqNAG")
    if "lr_scheduler_state" not in last:
        last["lr_scheduler_state"] = {"best": last.pop("best_loss", None)}
    last.setdefault("num_updates", 0)
    extra = state.get("extra_state")
    if not isinstance(extra, dict):
        extra = {k: state.pop(k) for k in ("epoch", "batch_offset", "val_loss") if k in state}
        state["extra_state"] = extra
    if "train_iterator" not in extra and "epoch" in extra:
        extra["train_iterator"] = {
            "epoch": extra["epoch"],
            "iterations_in_epoch": extra.get("batch_offset", 0),
        }
    return state


def _from_flat(args: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {
        name: {k: args[k] for k in defaults if k in args and k != "_name"}
        for name, defaults in fairseq_defaults.SECTIONS.items()
    }
    for name, flat_name in _CHOICES.items():
        nested[name] = {**args, "_name": args.get(flat_name)}
    # Before tasks existed there was only translation.
    nested["task"]["_name"] = nested["task"]["_name"] or "translation"
    nested["criterion"]["_name"] = nested["criterion"]["_name"] or "cross_entropy"
    return nested


def _upgraded(cfg: dict[str, Any]) -> dict[str, Any]:
    """Older names of fields to those of today."""
    for section in (cfg.get("model"), cfg.get("task")):
        if not isinstance(section, dict):
            continue
        both = section.pop("max_positions", None)
        if isinstance(both, int):
            section.setdefault("max_source_positions", both)
            section.setdefault("max_target_positions", both)
        data = section.get("data")
        if isinstance(data, list):
            section["data"] = data[0] if data else None
        # Values that were text before they were switches.
        for side in ("left_pad_source", "left_pad_target"):
            if isinstance(section.get(side), str):
                section[side] = section[side].lower() == "true"
        # The older name of the dropout after the activation.
        if not section.get("activation_dropout") and section.get("relu_dropout"):
            section["activation_dropout"] = section["relu_dropout"]
    model = cfg.get("model")
    if isinstance(model, dict) and str(model.get("_name")).startswith("transformer_lm"):
        _upgrade_language_model(model)
    task = cfg.get("task")
    if isinstance(task, dict):
        if task.get("raw_text"):
            task["dataset_impl"] = "raw"
        elif task.get("lazy_load"):
            task["dataset_impl"] = "lazy"
    common = cfg.get("common_eval")
    if isinstance(common, dict) and "remove_bpe" in common:
        common.setdefault("post_process", common.pop("remove_bpe"))
    optimization = cfg.get("optimization")
    if isinstance(optimization, dict):
        if "min_lr" in optimization:
            optimization.setdefault("stop_min_lr", optimization.pop("min_lr"))
        if isinstance(optimization.get("lr"), (int, float)):
            optimization["lr"] = [optimization["lr"]]
    return cfg


def _upgrade_language_model(model: dict[str, Any]) -> None:
    # The longest input follows the length of the blocks where nothing else was said.
    if model.get("max_target_positions") is None:
        model["max_target_positions"] = model.get("tokens_per_sample")
    # Before the final normalisation could be chosen there was none.
    if "no_tie_adaptive_proj" in model:
        model["no_decoder_final_norm"] = True
    if "decoder_final_norm" in model:
        model["no_decoder_final_norm"] = not model["decoder_final_norm"]


def _interpolate(value: Any, root: Mapping[str, Any]) -> Any:
    """Replace values such as `${optimization.lr}` by what they point to; evaluate nothing."""
    if isinstance(value, dict):
        return {k: _interpolate(v, root) for k, v in value.items()}
    if isinstance(value, str):
        match = _INTERPOLATION.fullmatch(value)
        if match:
            target: Any = root
            for key in match.group(1).split("."):
                target = target.get(key) if isinstance(target, Mapping) else None
            return None if isinstance(target, str) and _INTERPOLATION.fullmatch(target) else target
    return value


def _forget_lost_scales(cfg: Mapping[str, Any], weights: object) -> None:
    """Switch off what fairseq did not build: it takes the flags and loses them before the layers.

    Its checkpoints then say `scale_attn` and hold a plain model.
    """
    model = cfg.get("model")
    if not isinstance(model, dict) or not isinstance(weights, Mapping):
        return
    for name, ending in _SCALES.items():
        if model.get(name) and not any(key.endswith(ending) for key in weights):
            model[name] = False


def _as_gshard_computes(cfg: Mapping[str, Any]) -> None:
    """Make the flags of a mixture of experts that fairseq's gshard wrote say what it computes.

    Its experts are as wide as other layers, whatever --moe-expert-ffn-dim says. Its default
    --moe-eval-capacity-token-fraction lets a sentence's result depend on its batch: here that has
    to be asked for.
    """
    model = cfg.get("model")
    if isinstance(model, dict):
        model.pop("moe_expert_ffn_dim", None)
        if model.get("moe_eval_capacity_token_fraction") == _GSHARD_CAPACITY:
            del model["moe_eval_capacity_token_fraction"]


def _override(
    cfg: dict[str, Any], overrides: Mapping[str, Any], registries: Mapping[str, Registry]
) -> None:
    """Set each field in every section that has it, as fairseq does."""
    for name, value in overrides.items():
        found = False
        for section in cfg.values():
            if isinstance(section, dict) and name in section:
                section[name], found = value, True
        model = cfg.get("model")
        if not found and isinstance(model, dict) and name in _names(model, registries):
            model[name], found = value, True
        if not found:
            known = {k for s in cfg.values() if isinstance(s, dict) for k in s}
            raise ConfigError(
                f"--model-overrides: the checkpoint has no field {name!r}{near(name, known)}"
            )


def _names(model: Mapping[str, Any], registries: Mapping[str, Registry]) -> set[str]:
    name = model.get("_name")
    if name not in registries["model"]:
        return set()
    return {f.name for f in dataclasses.fields(registries["model"].get(str(name)).config)}


def _refuse_not_built(
    cfg: Mapping[str, Any], path: str | Path, registries: Mapping[str, Registry]
) -> None:
    model = cfg.get("model")
    own = _names(model, registries) if isinstance(model, Mapping) else set()
    for section in (model, cfg.get("task")):
        if not isinstance(section, Mapping):
            continue
        for name in _NOT_BUILT:
            if section.get(name) and name not in own:
                flag = "--" + name.replace("_", "-")
                why = REFUSED.get(flag, "it is not built")
                raise CheckpointError(f"{path}: was trained with {flag} {section[name]}: {why}")


def _choice(
    registry: Registry, values: Mapping[str, Any], path: str | Path, *, required: bool
) -> Choice:
    name = values.get("_name")
    if name is None or (not required and name not in registry):
        if required:
            raise CheckpointError(
                f"{path}: does not say which architecture it is (no arch, no _name)"
            )
        return Choice()
    where = f"{path}: {registry.kind} {name}"
    if name not in registry:
        raise CheckpointError(
            f"{where}: is not known here: give the --user-dir it comes from, or the checkpoint is "
            "of an architecture that is not built"
        )
    try:
        entry = registry.get(str(name))
        explicit = {
            field: coerced
            for field in (f.name for f in dataclasses.fields(entry.config))
            if field in values
            for coerced in _coerced(entry.config, field, values[field], where)
        }
        return Choice(entry.name, entry.config(**{**entry.preset_values(explicit), **explicit}))
    except ConfigError as e:
        raise CheckpointError(str(e) if str(e).startswith(where) else f"{where}: {e}") from e


def _coerced(config: type, field: str, value: Any, where: str) -> Iterator[Any]:
    """The value as the field's type; nothing where a None means "the default"."""
    try:
        yield coerce(config, field, value, where)
    except ConfigError:
        if value is not None:
            raise
