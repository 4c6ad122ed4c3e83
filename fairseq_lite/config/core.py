"""The configuration every command shares: one frozen dataclass for each of fairseq's sections.

Section and field names are fairseq's, because they are also the keys of a checkpoint's `cfg`. A
value that one entry owns (a task, an architecture, a criterion, …) is not here but in its config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.registry import NoConfig

LogFormat = Literal["json", "none", "simple", "tqdm"]


@dataclass(frozen=True)
class CommonConfig:
    """Logging, precision, seed and plugins: every command takes these."""

    no_progress_bar: bool = flag(False, "log plain lines instead of a progress bar")
    log_interval: int = flag(100, "log progress every N updates (or batches)")
    log_format: LogFormat | None = flag(None, "how progress is logged; tqdm on a terminal")
    log_file: str | None = flag(None, "also append the log to this file")
    tensorboard_logdir: str | None = flag(None, "write TensorBoard events to this folder")
    wandb_project: str | None = flag(
        None, "log to this Weights & Biases project (pip install wandb)"
    )
    seed: int = flag(1, "seed of initialisation, data order and dropout")
    cpu: bool = flag(False, "use the CPU even where a GPU is present")
    bf16: bool = flag(False, "compute in bfloat16, with float32 master weights in training")
    memory_efficient_bf16: bool = flag(
        False, "as --bf16: the master weights are the only copy of the parameters here"
    )
    fp16: bool = flag(
        False, "compute in float16 with a dynamic loss scale; on a CPU --bf16 is faster"
    )
    memory_efficient_fp16: bool = flag(
        False, "as --fp16: the master weights are the only copy of the parameters here"
    )
    fp16_init_scale: int = flag(128, "initial loss scale of --fp16")
    fp16_scale_window: int | None = flag(
        None, "updates without overflow before the loss scale doubles"
    )
    fp16_scale_tolerance: float = flag(
        0.0, "share of updates that may overflow before the loss scale is lowered"
    )
    min_loss_scale: float = flag(0.0001, "stop with an error when the loss scale falls below this")
    threshold_loss_scale: float | None = flag(None, "never lower the loss scale below this")
    amp: bool = flag(False, "automatic mixed precision: bfloat16 on a CPU, float16 on CUDA")
    amp_init_scale: int = flag(128, "initial loss scale of --amp")
    amp_scale_window: int | None = flag(None, "as --fp16-scale-window, for --amp")
    user_dir: str | None = flag(None, "folder of a plugin to import before anything else")
    profile: bool = flag(False, "write a PyTorch profile of a few updates beside the checkpoints")

    def __post_init__(self) -> None:
        fp16 = self.fp16 or self.memory_efficient_fp16
        bf16 = self.bf16 or self.memory_efficient_bf16
        if fp16 and bf16:
            raise ConfigError("--fp16 and --bf16 contradict each other: choose one")
        if self.amp and (fp16 or bf16):
            raise ConfigError("--amp contradicts --fp16 and --bf16: choose one")
        if self.log_interval < 1:
            raise ConfigError(f"--log-interval {self.log_interval}: expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: expected 0 or more")


def _check_shard_count(count: int) -> None:
    if count < 1:
        raise ConfigError(f"--checkpoint-shard-count {count}: expected 1 or more")


@dataclass(frozen=True)
class CommonEvalConfig:
    """What every command that reads a trained model takes."""

    path: str | None = flag(None, "the model: FILE.pt, or several with colons for an ensemble")
    post_process: str | None = flag(
        None,
        "undo the segmentation of the text before printing and scoring: a marker such as '@@ ', "
        "or subword_nmt, sentencepiece, wordpiece, letter, _EOW, silence",
        aliases=("--remove-bpe",),
        const="@@ ",
    )
    quiet: bool = flag(False, "print only the final line")
    model_overrides: dict[str, Any] = flag(
        {}, 'JSON of model fields to replace at loading, e.g. {"encoder_layerdrop": 0.2}'
    )
    results_path: str | None = flag(None, "write the output to files in this folder")
    checkpoint_suffix: str = flag("", "suffix of the names in --path, such as -shard0")
    checkpoint_shard_count: int = flag(
        1, "shards a checkpoint must have (1: as many as there are; they are found by themselves)"
    )
    is_moe: bool = flag(
        False, "refuse a model without experts; checkpoints say by themselves what they hold"
    )

    def __post_init__(self) -> None:
        _check_shard_count(self.checkpoint_shard_count)


@dataclass(frozen=True)
class DistributedTrainingConfig:
    """How many processes, where, and how they find each other."""

    distributed_world_size: int | None = flag(
        None, "processes altogether (default: one a GPU, or one on a CPU)"
    )
    distributed_num_procs: int | None = flag(
        None, "processes on this machine (default: as many as needed)"
    )
    distributed_rank: int = flag(0, "rank of the first process on this machine")
    distributed_backend: str | None = flag(
        None, "nccl or gloo (default: nccl on CUDA, gloo on a CPU)", choices=("nccl", "gloo")
    )
    distributed_init_method: str | None = flag(
        None, "where rank 0 listens, e.g. tcp://host:29500, when no launcher says so"
    )
    distributed_port: int = flag(-1, "port of rank 0 under Slurm")
    distributed_no_spawn: bool = flag(False, "one process only, even with several GPUs")
    heartbeat_timeout: int = flag(-1, "seconds of silence after which a rank counts as dead")

    def __post_init__(self) -> None:
        size = self.distributed_world_size
        if size is not None and size < 1:
            raise ConfigError(f"--distributed-world-size {size}: expected 1 or more")


@dataclass(frozen=True)
class DatasetConfig:
    """Batches and splits."""

    num_workers: int = flag(1, "background workers that prepare batches; 0 for none")
    skip_invalid_size_inputs_valid_test: bool = flag(
        False, "leave out valid and test examples that are too long instead of stopping"
    )
    max_tokens: int | None = flag(None, "tokens in a batch, padding included")
    batch_size: int | None = flag(None, "examples in a batch", aliases=("--max-sentences",))
    required_batch_size_multiple: int = flag(8, "batch sizes are below N or a multiple of N")
    required_seq_len_multiple: int = flag(1, "pad sequences to a multiple of N")
    dataset_impl: str | None = flag(
        None, "format of the data files", choices=("mmap", "raw", "cached", "lazy")
    )
    train_subset: str = flag("train", "split to train on")
    valid_subset: str = flag("valid", "comma-separated splits to validate on")
    combine_valid_subsets: bool = flag(
        False, "validate on all valid* splits together", aliases=("--combine-val",)
    )
    ignore_unused_valid_subsets: bool = flag(
        False, "do not stop when the data folder has valid splits that are not used"
    )
    validate_interval: int = flag(1, "validate every N epochs")
    validate_interval_updates: int = flag(0, "validate every N updates")
    validate_after_updates: int = flag(0, "do not validate before N updates")
    fixed_validation_seed: int | None = flag(None, "seed used in validation")
    disable_validation: bool = flag(False, "never validate")
    max_tokens_valid: int | None = flag(None, "as --max-tokens, for validation")
    batch_size_valid: int | None = flag(
        None, "as --batch-size, for validation", aliases=("--max-sentences-valid",)
    )
    max_valid_steps: int | None = flag(
        None, "validate on the first N batches only", aliases=("--nval",)
    )
    gen_subset: str = flag("test", "split to generate from or evaluate")
    num_shards: int = flag(1, "cut the split into N shards")
    shard_id: int = flag(0, "the shard to work on")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "max_tokens_valid", "batch_size_valid"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        for name in ("num_shards", "max_valid_steps", "validate_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        if "," in self.gen_subset:
            first = self.gen_subset.split(",")[0]
            raise ConfigError(
                f"--gen-subset {self.gen_subset}: expected one split, for example --gen-subset "
                f"{first}; run the command once for each"
            )
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers {self.num_workers}: expected 0 or more")
        if self.required_batch_size_multiple < 1 or self.required_seq_len_multiple < 1:
            raise ConfigError("--required-*-multiple: expected 1 or more")
        if not 0 <= self.shard_id < self.num_shards:
            raise ConfigError(
                f"--shard-id {self.shard_id}: expected 0 to {self.num_shards - 1}, "
                f"as --num-shards is {self.num_shards}"
            )


@dataclass(frozen=True)
class OptimizationConfig:
    """When to stop, how large a step, how gradients are summed."""

    max_epoch: int = flag(0, "stop after N epochs; 0: no limit")
    max_update: int = flag(0, "stop after N updates; 0: no limit")
    stop_time_hours: float = flag(0.0, "stop after this many hours, earlier runs included")
    clip_norm: float = flag(0.0, "largest norm of the gradient; 0: no clipping")
    sentence_avg: bool = flag(False, "divide gradients by sentences instead of tokens")
    update_freq: tuple[int, ...] = flag((1,), "batches in an update; N,M,… sets it by epoch")
    lr: tuple[float, ...] = flag((0.25,), "learning rate; X,Y,… sets it by epoch (fixed)")
    stop_min_lr: float = flag(-1.0, "stop when the learning rate falls to this")
    skip_remainder_batch: bool = flag(
        False, "leave out the last update of an epoch when it has fewer batches"
    )
    compile: bool = flag(
        False, "train the layers through torch.compile: minutes of compiling, then faster on CUDA"
    )

    def __post_init__(self) -> None:
        if not self.update_freq or min(self.update_freq) < 1:
            raise ConfigError(f"--update-freq {self.update_freq}: expected numbers of 1 or more")
        if not self.lr:
            raise ConfigError("--lr: expected a number, or several with commas")
        if min(self.lr) < 0:
            raise ConfigError(f"--lr {','.join(map(str, self.lr))}: expected 0 or more")
        for name in ("max_epoch", "max_update"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: expected 0 (no limit) or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    save_dir: str = flag("checkpoints", "folder of the checkpoints")
    restore_file: str = flag("checkpoint_last.pt", "checkpoint to start from")
    continue_once: str | None = flag(None, "start from this one when no last checkpoint exists")
    finetune_from_model: str | None = flag(
        None, "take the weights, and nothing else, from this one when no last checkpoint exists"
    )
    reset_dataloader: bool = flag(False, "start the data anew")
    reset_lr_scheduler: bool = flag(False, "start the learning-rate schedule anew")
    reset_meters: bool = flag(False, "start the meters anew")
    reset_optimizer: bool = flag(False, "start the optimizer anew")
    optimizer_overrides: dict[str, Any] = flag(
        {}, "JSON of optimizer values to replace when loading its state"
    )
    save_interval: int = flag(1, "save every N epochs")
    save_interval_updates: int = flag(0, "save (and validate) every N updates")
    keep_interval_updates: int = flag(-1, "keep the last N of --save-interval-updates")
    keep_interval_updates_pattern: int = flag(
        -1, "with --keep-interval-updates, keep also those at a multiple of N"
    )
    keep_last_epochs: int = flag(-1, "keep the last N epoch checkpoints")
    keep_best_checkpoints: int = flag(-1, "keep the N best checkpoints")
    no_save: bool = flag(False, "save nothing")
    no_epoch_checkpoints: bool = flag(False, "save only the last and best checkpoints")
    no_last_checkpoints: bool = flag(False, "do not save checkpoint_last.pt")
    no_save_optimizer_state: bool = flag(False, "save no optimizer state")
    best_checkpoint_metric: str = flag("loss", "metric that decides which checkpoint is best")
    maximize_best_checkpoint_metric: bool = flag(False, "the largest value is best")
    patience: int = flag(-1, "stop when the metric has not improved for N validations")
    checkpoint_suffix: str = flag("", "suffix of checkpoint names")
    checkpoint_shard_count: int = flag(
        1, "shards the checkpoint to restore must have (1: as many as there are)"
    )
    write_checkpoints_asynchronously: bool = flag(
        False, "write checkpoints in the background", aliases=("--save-async",)
    )

    def __post_init__(self) -> None:
        if self.finetune_from_model is not None and (
            self.reset_optimizer
            or self.reset_lr_scheduler
            or self.reset_meters
            or self.reset_dataloader
        ):
            raise ConfigError(
                "--finetune-from-model takes only the weights: leave out the --reset-* flags"
            )
        if self.continue_once is not None and (
            self.finetune_from_model is not None or self.restore_file != "checkpoint_last.pt"
        ):
            other = (
                "--restore-file" if self.finetune_from_model is None else "--finetune-from-model"
            )
            raise ConfigError(f"--continue-once and {other} both name a model: leave one out")
        if self.save_interval < 1:
            raise ConfigError(f"--save-interval {self.save_interval}: expected 1 or more")
        if self.no_save and self.save_interval_updates:
            raise ConfigError("--no-save contradicts --save-interval-updates: leave one out")
        _check_shard_count(self.checkpoint_shard_count)
        if self.patience == 0 or self.patience < -1:
            raise ConfigError(f"--patience {self.patience}: expected -1 (off), or 1 or more")


@dataclass(frozen=True)
class GenerationConfig:
    """Search: beam, sampling, lengths, what is printed."""

    beam: int = flag(5, "beam size")
    nbest: int = flag(1, "hypotheses printed for each sentence")
    max_len_a: float = flag(0.0, "longest output: a times the source length, plus b")
    max_len_b: int = flag(200, "longest output: a times the source length, plus b")
    min_len: int = flag(1, "shortest output")
    match_source_len: bool = flag(False, "outputs are as long as their sources")
    unnormalized: bool = flag(False, "compare hypotheses by their plain sums")
    no_early_stop: bool = flag(False, "search on until the longest length")
    lenpen: float = flag(1.0, "length penalty: <1 favours short, >1 long outputs")
    unkpen: float = flag(0.0, "unknown-word penalty: <0 gives more, >0 fewer")
    replace_unk: str | None = flag(
        None,
        "replace unknown words by the aligned source word, or through a dictionary file",
        const="@@",
    )
    sacrebleu: bool = flag(False, "as --scoring sacrebleu")
    score_reference: bool = flag(False, "score the reference translation instead of searching")
    prefix_size: int = flag(0, "start each output with the first N tokens of the reference")
    no_repeat_ngram_size: int = flag(0, "no n-gram of this size occurs twice in an output")
    sampling: bool = flag(False, "sample instead of beam search")
    sampling_topk: int = flag(-1, "sample among the K likeliest tokens")
    sampling_topp: float = flag(-1.0, "sample among the likeliest tokens of total probability P")
    temperature: float = flag(1.0, "divide the logits by this")
    diverse_beam_groups: int = flag(-1, "groups of diverse beam search")
    diverse_beam_strength: float = flag(0.5, "penalty between the groups")
    diversity_rate: float = flag(-1.0, "penalty among siblings in diverse siblings search")
    print_alignment: str | None = flag(
        None, "print the alignment from attention", choices=("hard", "soft"), const="hard"
    )
    retain_dropout: bool = flag(False, "keep dropout on while generating")
    retain_dropout_modules: tuple[str, ...] | None = flag(
        None, "keep dropout on in modules of these class names only"
    )
    eos_token: str | None = flag(None, "the symbol that ends an output instead of </s>")
    lm_path: str | None = flag(
        None, "add a language model over the same dictionary to every step: FILE.pt"
    )
    lm_weight: float = flag(1.0, "what --lm-path's log-probabilities are multiplied with")

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ConfigError(f"--beam {self.beam}: expected 1 or more")
        if self.nbest < 1 or self.nbest > self.beam:
            raise ConfigError(f"--nbest {self.nbest}: expected 1 to --beam {self.beam}")
        if self.prefix_size < 0:
            raise ConfigError(f"--prefix-size {self.prefix_size}: expected 0 or more")
        if self.temperature <= 0:
            raise ConfigError(f"--temperature {self.temperature}: expected more than 0")
        if not self.sampling and (self.sampling_topk > 0 or self.sampling_topp > 0):
            raise ConfigError("--sampling-topk and --sampling-topp need --sampling")
        if self.sampling_topp > 1:
            raise ConfigError(f"--sampling-topp {self.sampling_topp}: expected 1 or less")
        if self.sampling and self.nbest != self.beam and self.nbest != 1:
            raise ConfigError(f"--sampling: --nbest must be 1 or --beam {self.beam}")
        if self.diverse_beam_groups > 0 and self.beam % self.diverse_beam_groups:
            raise ConfigError(
                f"--diverse-beam-groups {self.diverse_beam_groups} must divide --beam {self.beam}"
            )


@dataclass(frozen=True)
class InteractiveConfig:
    """Reading sentences from a file or the terminal."""

    buffer_size: int = flag(0, "read this many sentences before translating them")
    input: str = flag("-", "file to read from; - for the terminal")


@dataclass(frozen=True)
class EvalLMConfig:
    """Measuring a language model."""

    output_word_probs: bool = flag(False, "print every word with its log-probability")
    output_word_stats: bool = flag(False, "print how often each word occurs, and how likely it is")
    context_window: int = flag(
        0, "let every block read N tokens before it, which are not scored; it is that much shorter"
    )
    softmax_batch: int | None = flag(
        None, "compute logits of at most N tokens at a time; the results are the same"
    )

    def __post_init__(self) -> None:
        if self.context_window < 0:
            raise ConfigError(f"--context-window {self.context_window}: expected 0 or more")
        if self.softmax_batch is not None and self.softmax_batch < 1:
            raise ConfigError(f"--softmax-batch {self.softmax_batch}: expected 1 or more")


@dataclass(frozen=True)
class EMAConfig:
    """An exponential moving average of the weights."""

    store_ema: bool = flag(False, "keep a moving average of the weights in the checkpoints")
    ema_decay: float = flag(0.9999, "decay of the average")
    ema_start_update: int = flag(0, "start the average at this update")
    ema_seed_model: str | None = flag(None, "checkpoint to start the average from")
    ema_update_freq: int = flag(1, "renew the average every N updates")
    ema_fp32: bool = flag(False, "keep the average in float32 when the weights are not")

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(f"--ema-decay {self.ema_decay}: expected a number from 0 to 1")
        if self.ema_update_freq < 1:
            raise ConfigError(f"--ema-update-freq {self.ema_update_freq}: expected 1 or more")


@dataclass(frozen=True)
class PreprocessConfig:
    """From text files to a data folder."""

    source_lang: str | None = flag(None, "source language", aliases=("-s",))
    target_lang: str | None = flag(None, "target language", aliases=("-t",))
    trainpref: str | None = flag(None, "prefix of the training text")
    validpref: str | None = flag(None, "comma-separated prefixes of the validation texts")
    testpref: str | None = flag(None, "comma-separated prefixes of the test texts")
    align_suffix: str | None = flag(None, "suffix of the alignment files beside the texts")
    destdir: str = flag("data-bin", "folder to write")
    thresholdtgt: int = flag(0, "map target words seen fewer times to <unk>")
    thresholdsrc: int = flag(0, "map source words seen fewer times to <unk>")
    tgtdict: str | None = flag(None, "use this target dictionary")
    srcdict: str | None = flag(None, "use this source dictionary")
    nwordstgt: int = flag(-1, "size of the target dictionary, the four specials included")
    nwordssrc: int = flag(-1, "size of the source dictionary, the four specials included")
    alignfile: str | None = flag(None, "alignment of the training text, to make a dictionary of")
    dataset_impl: str = flag("mmap", "format to write", choices=("mmap", "raw"))
    joined_dictionary: bool = flag(False, "one dictionary for both languages")
    only_source: bool = flag(False, "there is only a source side")
    padding_factor: int = flag(8, "pad the dictionary to a multiple of N; 1: do not pad")
    workers: int = flag(1, "processes")
    dict_only: bool = flag(False, "make the dictionaries and stop")
    dict_from_tokenizer: bool = flag(
        False, "the dictionary is the vocabulary of --bpe in its own order, after the four specials"
    )

    def __post_init__(self) -> None:
        if self.dict_from_tokenizer:
            self._check_whole_vocabulary()
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: expected 1 or more")
        if self.joined_dictionary and self.srcdict and self.tgtdict:
            raise ConfigError("--joined-dictionary: give --srcdict or --tgtdict, not both")
        if not self.only_source and not self.target_lang:
            raise ConfigError("--target-lang is needed; or --only-source for one side only")
        if not self.only_source and not self.source_lang:
            raise ConfigError("--source-lang is needed")
        if self.source_lang and self.source_lang == self.target_lang:
            raise ConfigError("--source-lang and --target-lang are the same")
        given = self.trainpref or self.srcdict or self.dict_from_tokenizer
        if not given or (
            not self.only_source
            and not (self.trainpref or self.tgtdict or self.srcdict or self.dict_from_tokenizer)
        ):
            raise ConfigError("--trainpref is needed to make a dictionary; or give --srcdict")

    def _check_whole_vocabulary(self) -> None:
        for name in ("thresholdsrc", "thresholdtgt", "nwordssrc", "nwordstgt"):
            if getattr(self, name) > 0:
                raise ConfigError(
                    f"--{name}: --dict-from-tokenizer keeps every piece, or numbers would shift; "
                    "leave one of them out"
                )
        for name in ("srcdict", "tgtdict"):
            if getattr(self, name):
                raise ConfigError(f"--{name} and --dict-from-tokenizer: give one of them")


@dataclass(frozen=True)
class ScoreConfig:
    """Scoring a file of hypotheses against a file of references."""

    sys: str = flag("-", "file of hypotheses; - for standard input", aliases=("-s",))
    ref: str | None = flag(None, "file of references", aliases=("-r",))
    order: int = flag(4, "largest n-gram order", aliases=("-o",))
    ignore_case: bool = flag(False, "compare in lower case")
    sacrebleu: bool = flag(False, "score detokenised text with sacrebleu")
    sentence_bleu: bool = flag(False, "one score a line")


@dataclass(frozen=True)
class Choice:
    """The entry a selector chose and its configuration; name None when nothing was chosen."""

    name: str | None = None
    config: Any = NoConfig()


@dataclass(frozen=True)
class RunConfig:
    """Everything one run needs, frozen. Sections a command does not use keep their defaults."""

    command: str
    common: CommonConfig = CommonConfig()
    common_eval: CommonEvalConfig = dataclasses.field(default_factory=CommonEvalConfig)
    distributed_training: DistributedTrainingConfig = DistributedTrainingConfig()
    dataset: DatasetConfig = DatasetConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    generation: GenerationConfig = GenerationConfig()
    interactive: InteractiveConfig = InteractiveConfig()
    eval_lm: EvalLMConfig = EvalLMConfig()
    ema: EMAConfig = EMAConfig()
    preprocess: PreprocessConfig | None = None
    score: ScoreConfig | None = None
    task: Choice = Choice()
    model: Choice = Choice()
    criterion: Choice = Choice()
    optimizer: Choice = Choice()
    lr_scheduler: Choice = Choice()
    ddp_backend: Choice = Choice()
    scoring: Choice = Choice()
    bpe: Choice = Choice()
    tokenizer: Choice = Choice()
