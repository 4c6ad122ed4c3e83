"""Trained models from Python: no command line, no data folder.

    from fairseq_lite import hub

    translator = hub.load("checkpoints/checkpoint_best.pt")
    translator.translate("A man rides a horse.")
    translator.translate(["One.", "Two."], beam=4, lenpen=0.6)

    model = hub.load("lm/checkpoint_best.pt")
    model.score("It was a dark and stormy night.").perplexity
    model.sample("Once upon a time", sampling=True, sampling_topp=0.9, seed=3)
    answers = tuple(model.encode(word) for word in (" yes", " no"))
    model.score_branches([hub.Branches(model.encode("Is snow white?"), answers)])

A checkpoint carries its dictionaries and its segmentation model, so one file is enough. For one of
fairseq's they lie beside it: dict.txt, and encoder.json with vocab.bpe (GPT-2's), or
sentencepiece.bpe.model, or merges.txt with vocab.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import CommonConfig
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.generation.branches import Branches, BranchScores, Ranked
from fairseq_lite.hub.beside import with_segmentation_beside
from fairseq_lite.hub.language_model import LanguageModel, ScoredText
from fairseq_lite.hub.translator import Translator
from fairseq_lite.parallel.world import World
from fairseq_lite.plugins import import_user_dir
from fairseq_lite.tasks.language_modeling import LanguageModelingTask
from fairseq_lite.training.checkpoint.inference import load_models
from fairseq_lite.training.checkpoint.parts import readable_files

__all__ = [
    "BranchScores",
    "Branches",
    "LanguageModel",
    "Ranked",
    "ScoredText",
    "Translator",
    "load",
]


def load(
    path: str | Path | Sequence[str | Path],
    *,
    device: str | None = None,
    bf16: bool = False,
    fp16: bool = False,
    user_dir: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    world: World | None = None,
) -> Translator | LanguageModel:
    """Load a trained model: a `Translator`, or a `LanguageModel` if it was trained as one.

    Args:
        path: a checkpoint, several separated by colons or in a list (an ensemble), or a folder that
            holds checkpoint_best.pt or checkpoint_last.pt.
        device: "cpu" or "cuda"; by default CUDA where there is one.
        bf16: compute in bfloat16.
        fp16: compute in float16 (CUDA).
        user_dir: the plugin the model needs, as `--user-dir`.
        overrides: model fields to replace, as `--model-overrides`.
        world: the processes that load a language model together and share its experts and all
            work, as `fn` of `parallel.launch` gets it; each computes where the world says. None:
            this process alone.

    Raises:
        CheckpointError: no such file, damaged, or without its dictionaries.
        ConfigError: arguments that contradict each other.
    """
    if user_dir is not None:
        import_user_dir(user_dir)
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device {device!r}: expected 'cpu' or 'cuda'")
    if world is not None and device not in (None, world.device.type):
        raise ConfigError(f"device {device!r}: the world computes on {world.device}; leave it out")
    names = path.split(":") if isinstance(path, str) else path
    files = [names] if isinstance(names, Path) else [Path(name) for name in names]
    registries = load_builtins()
    paths = [_file(each) for each in files]
    ensemble = load_models(list(map(str, paths)), registries, overrides=overrides, world=world)
    ensemble = with_segmentation_beside(ensemble, paths[0].parent, registries)
    common = CommonConfig(cpu=device == "cpu", bf16=bf16, fp16=fp16)
    if isinstance(ensemble.task, LanguageModelingTask):
        return LanguageModel(ensemble, common, world)
    if world is not None and world.size > 1:
        raise ConfigError(
            "world: a translation model is used by one process here; flite-generate has several"
        )
    return Translator(ensemble, common)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        if readable_files(path / name):
            return path / name
    raise CheckpointError(f"{path}: holds neither checkpoint_best.pt nor checkpoint_last.pt")
