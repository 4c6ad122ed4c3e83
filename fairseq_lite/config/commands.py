"""The commands as data: which sections and which selectors each one takes."""

from __future__ import annotations

import dataclasses

from fairseq_lite.config import core


@dataclasses.dataclass(frozen=True)
class Selector:
    """A flag whose value names an entry of a registry.

    Attributes:
        section: the section of the `RunConfig` it fills, and the key of its registry.
        flag: its flag.
        help: what it selects.
        default: the name used when it is not typed; None for no entry.
        required: whether a command cannot go on without it.
        aliases: other spellings.
    """

    section: str
    flag: str
    help: str
    default: str | None = None
    required: bool = False
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line: its shared sections and its selectors.

    Attributes:
        name: the console command.
        fairseq_name: the name of fairseq's command in the table of fairseq's flags.
        about: one sentence for `--help`.
        sections: section name -> config.
        selectors: the registries it chooses from.
    """

    name: str
    fairseq_name: str
    about: str
    sections: dict[str, type]
    selectors: tuple[Selector, ...] = ()


_TASK = Selector("task", "--task", "what is learned", default="translation")
_SCORING = Selector("scoring", "--scoring", "how output is scored", default="bleu")
_BPE = Selector("bpe", "--bpe", "subword segmentation to undo on output (and do on raw input)")
_TOKENIZER = Selector("tokenizer", "--tokenizer", "tokenisation to undo on output")

_TRAIN = Command(
    "flite-train",
    "train",
    "Train a model on a data folder made by flite-preprocess.",
    {
        "common": core.CommonConfig,
        "distributed_training": core.DistributedTrainingConfig,
        "dataset": core.DatasetConfig,
        "optimization": core.OptimizationConfig,
        "checkpoint": core.CheckpointConfig,
        "ema": core.EMAConfig,
    },
    (
        _TASK,
        Selector("model", "--arch", "the model", required=True, aliases=("-a",)),
        Selector("criterion", "--criterion", "the loss", default="cross_entropy"),
        Selector("optimizer", "--optimizer", "the optimizer", required=True),
        Selector("lr_scheduler", "--lr-scheduler", "the learning-rate schedule", default="fixed"),
        Selector("ddp_backend", "--ddp-backend", "how the model is spread", default="legacy_ddp"),
        _BPE,
        _TOKENIZER,
    ),
)

_EVALUATION: dict[str, type] = {
    "common": core.CommonConfig,
    "common_eval": core.CommonEvalConfig,
    "dataset": core.DatasetConfig,
}

# Those that share a split among processes; flite-interactive reads one terminal.
_SHARED: dict[str, type] = {
    "common": core.CommonConfig,
    "common_eval": core.CommonEvalConfig,
    "distributed_training": core.DistributedTrainingConfig,
    "dataset": core.DatasetConfig,
}

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "flite-preprocess",
            "preprocess",
            "Make dictionaries and a binary data folder from text files.",
            {"common": core.CommonConfig, "preprocess": core.PreprocessConfig},
            (
                Selector("tokenizer", "--tokenizer", "tokenisation of the text, before --bpe"),
                Selector("bpe", "--bpe", "subword segmentation of the text"),
            ),
        ),
        _TRAIN,
        Command(
            "flite-generate",
            "generate",
            "Translate a split of a data folder, or go on from its beginnings, and score it.",
            {**_SHARED, "generation": core.GenerationConfig},
            (_TASK, _SCORING, _BPE, _TOKENIZER),
        ),
        Command(
            "flite-interactive",
            "interactive",
            "Translate lines from the terminal or a file, or go on from them.",
            {
                **_EVALUATION,
                "generation": core.GenerationConfig,
                "interactive": core.InteractiveConfig,
            },
            (_TASK, _BPE, _TOKENIZER),
        ),
        Command(
            "flite-validate",
            "validate",
            "Compute a checkpoint's loss on splits of a data folder.",
            dict(_SHARED),
            (_TASK, _BPE, _TOKENIZER),
        ),
        Command(
            "flite-eval-lm",
            "eval_lm",
            "Measure how well language models predict a split of a data folder.",
            {**_SHARED, "eval_lm": core.EvalLMConfig},
            (dataclasses.replace(_TASK, default="language_modeling"), _BPE, _TOKENIZER),
        ),
        Command(
            "flite-score",
            "score",
            "Score a file of hypotheses against a file of references.",
            {"score": core.ScoreConfig},
        ),
    )
}
