"""fairseq's flags as facts: which command takes them, and why some are refused or change nothing.

The parser uses this table for flags no section or chosen entry owns. A flag that changed nothing in
fairseq's command (`--optimizer` of fairseq-generate), or changes nothing here, is accepted with a
warning; one that would change results is refused with a line that says what to use.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class FairseqFlag:
    """One flag of fairseq's.

    Attributes:
        names: its spellings.
        kind: how it is typed: "switch", "value" or "optional" (with or without a value).
        commands: the commands of fairseq that take it.
    """

    names: tuple[str, ...]
    kind: str
    commands: frozenset[str]


# Flags refused: why, and what to use instead.
REFUSED: dict[str, str] = {
    "--adaptive-input": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--adaptive-input-cutoff": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--adaptive-input-factor": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--adaptive-softmax-cutoff": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--adaptive-softmax-dropout": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--adaptive-softmax-factor": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--aim-repo": (
        "this tracker is not built; use --tensorboard-logdir or --log-format json --log-file FILE"
    ),
    "--aim-run-hash": (
        "this tracker is not built; use --tensorboard-logdir or --log-format json --log-file FILE"
    ),
    "--azureml-logging": (
        "this tracker is not built; use --tensorboard-logdir or --log-format json --log-file FILE"
    ),
    "--base-layers": (
        "BASE layers are not built; use mixtures of experts: --moe-freq 2 --moe-expert-count 8 "
        "--criterion moe_cross_entropy"
    ),
    "--base-shuffle": (
        "BASE layers are not built; use mixtures of experts: --moe-freq 2 --moe-expert-count 8 "
        "--criterion moe_cross_entropy"
    ),
    "--base-sublayers": (
        "BASE layers are not built; use mixtures of experts: --moe-freq 2 --moe-expert-count 8 "
        "--criterion moe_cross_entropy"
    ),
    "--baseline-model": (
        "a second model in the criterion is not built; evaluate both models and compare their logs"
    ),
    "--baseline-model-langs": (
        "a second model in the criterion is not built; evaluate both models and compare their logs"
    ),
    "--beam-mt": (
        "noisy-channel reranking with a second model is not built; use --nbest and "
        "rescore its output with --score-reference"
    ),
    "--char-embedder-highway-layers": (
        "character embeddings are not built; use --bpe characters or a subword vocabulary"
    ),
    "--char-inputs": (
        "character embeddings are not built; use --bpe characters or a subword vocabulary"
    ),
    "--character-embedding-dim": (
        "character embeddings are not built; use --bpe characters or a subword vocabulary"
    ),
    "--character-embeddings": (
        "character embeddings are not built; use --bpe characters or a subword vocabulary"
    ),
    "--character-filters": (
        "character embeddings are not built; use --bpe characters or a subword vocabulary"
    ),
    "--cross-self-attention": "this variant of attention is not built; leave the flag out",
    "--curriculum": "this order of the data is not built; leave it out",
    "--decoder-embed-path": (
        "text embeddings cannot be loaded; start from a checkpoint with --finetune-from-model"
    ),
    "--decoder-xformers-att-config": (
        "xFormers is not used; attention runs through PyTorch's scaled_dot_product_attention"
    ),
    "--decoding-format": "non-autoregressive decoding is not built; use beam search (--beam)",
    "--dummy-a2a": "tokens always go to their experts; --profile shows what their way costs",
    "--dynamic-groups": (
        "the composite optimizer is not built; use one optimizer (--optimizer adam)"
    ),
    "--encoder-embed-path": (
        "text embeddings cannot be loaded; start from a checkpoint with --finetune-from-model"
    ),
    "--encoder-xformers-att-config": (
        "xFormers is not used; attention runs through PyTorch's scaled_dot_product_attention"
    ),
    "--export": "TorchScript export is not built; leave it out",
    "--future-target": "only the next token is predicted; leave it out",
    "--grouped-shuffling": "this order of the data is not built; leave it out",
    "--groups": "the composite optimizer is not built; use one optimizer (--optimizer adam)",
    "--iter-decode-eos-penalty": (
        "non-autoregressive decoding is not built; use beam search (--beam)"
    ),
    "--iter-decode-force-max-iter": (
        "non-autoregressive decoding is not built; use beam search (--beam)"
    ),
    "--iter-decode-max-iter": "non-autoregressive decoding is not built; use beam search (--beam)",
    "--iter-decode-with-beam": "non-autoregressive decoding is not built; use beam search (--beam)",
    "--iter-decode-with-external-reranker": (
        "non-autoregressive decoding is not built; use beam search (--beam)"
    ),
    "--lang-to-offline-shard-ratio": (
        "offline shards by language are not built; use --multilang-sampling-alpha"
    ),
    "--lenpen-mt": (
        "noisy-channel reranking with a second model is not built; use --nbest and "
        "rescore its output with --score-reference"
    ),
    "--localsgd-frequency": (
        "delayed averaging of workers is not built; use --ddp-backend legacy_ddp with a "
        "larger --update-freq"
    ),
    "--max-len-a-mt": (
        "noisy-channel reranking with a second model is not built; use --nbest and "
        "rescore its output with --score-reference"
    ),
    "--max-len-b-mt": (
        "noisy-channel reranking with a second model is not built; use --nbest and "
        "rescore its output with --score-reference"
    ),
    "--merge-src-tgt-embed": "this variant of attention is not built; leave the flag out",
    "--model-parallel-size": "tensor parallelism is not built; use --ddp-backend fully_sharded",
    "--no-save-optimizer-state-on-training-finished": (
        "not built; use --no-save-optimizer-state, or scripts/remove_opt_state.py when it is done"
    ),
    "--no-cross-attention": "this variant of attention is not built; leave the flag out",
    "--on-cpu-convert-precision": "belongs to TPUs, which are not supported; leave it out",
    "--past-target": "only the next token is predicted; leave it out",
    "--pipeline-balance": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-checkpoint": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-chunks": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-decoder-balance": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-decoder-devices": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-devices": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-encoder-balance": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-encoder-devices": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--pipeline-model-parallel": (
        "pipeline parallelism is not built; use --ddp-backend fully_sharded for models "
        "larger than one device"
    ),
    "--plasma-path": (
        "Plasma is not used; data is memory-mapped and shared between processes anyway"
    ),
    "--print-step": "non-autoregressive decoding is not built; use beam search (--beam)",
    "--quant-noise-pq": (
        "quantisation in training is not built; train in --bf16 and quantise the exported model"
    ),
    "--quant-noise-pq-block-size": (
        "quantisation in training is not built; train in --bf16 and quantise the exported model"
    ),
    "--quant-noise-scalar": (
        "quantisation in training is not built; train in --bf16 and quantise the exported model"
    ),
    "--quantization-config-path": (
        "quantisation in training is not built; train in --bf16 and quantise the exported model"
    ),
    "--retain-iter-history": "non-autoregressive decoding is not built; use beam search (--beam)",
    "--self-target": "only the next token is predicted; leave it out",
    "--slowmo-base-algorithm": (
        "delayed averaging of workers is not built; use --ddp-backend legacy_ddp with a "
        "larger --update-freq"
    ),
    "--slowmo-momentum": (
        "delayed averaging of workers is not built; use --ddp-backend legacy_ddp with a "
        "larger --update-freq"
    ),
    "--tie-adaptive-proj": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--tie-adaptive-weights": (
        "adaptive embeddings and softmax are not built; a subword vocabulary (--bpe "
        "sentencepiece) serves the same end"
    ),
    "--tpu": "TPUs are not supported; use a CPU or CUDA",
    "--use-bmuf": (
        "delayed averaging of workers is not built; use --ddp-backend legacy_ddp with a "
        "larger --update-freq"
    ),
    "--use-plasma-view": (
        "Plasma is not used; data is memory-mapped and shared between processes anyway"
    ),
    "--zero-sharding": "use --ddp-backend fully_sharded, which shards the optimizer state as well",
}

# Flags that change nothing here, accepted with a warning: why.
NO_EFFECT: dict[str, str] = {
    "--all-gather-list-size": "statistics are summed in one collective of any size",
    "--amp-batch-retries": "an overflowing batch is skipped on all ranks together",
    "--broadcast-buffers": "no model here has buffers that differ between ranks",
    "--bucket-cap-mb": "gradients are reduced in buckets of a fixed size",
    "--data-buffer-size": "batches are prepared as far ahead as the workers allow",
    "--ddp-comm-hook": "gradients are reduced in their own precision",
    "--debug-param-names": "errors name parameters anyway",
    "--device-id": "the launcher assigns devices",
    "--empty-cache-freq": "the allocator keeps its cache",
    "--fast-stat-sync": "statistics always take one collective",
    "--find-unused-parameters": "parameters without a gradient are always allowed",
    "--fix-batches-to-gpus": "batches are always dealt out deterministically",
    "--fp16-no-flatten-grads": "gradients are never flattened into one tensor",
    "--gradient-as-bucket-view": "there is no second copy of the gradients",
    "--load-checkpoint-on-all-dp-ranks": "every rank gets the state it needs",
    "--no-beamable-mm": "encoder states are never copied for the beams",
    "--no-seed-provided": "the seed is always --seed",
    "--not-fsdp-flatten-parameters": "parameters are sharded one by one",
    "--num-workers-valid": "validation reads with --num-workers",
    "--nprocs-per-node": "use --distributed-world-size",
    "--record-a2a-perf-stats": "--profile shows what the exchange of tokens costs",
    "--reset-logging": "logging is set up once",
    "--suppress-crashes": "errors are never swallowed",
    "--update-epoch-batch-itr": "batches are built once and shuffled by epoch",
    "--update-ordered-indices-seed": "the order follows the seed and the epoch",
    "--use-old-adam": "there is one Adam, with fairseq's formula",
}

# Of flite-interactive only; the other commands take these flags.
_ONE_PROCESS = "a terminal is read by one process; use flite-generate for several"

# fairseq's flags that come with a later capability: refused until then.
COMING: dict[str, str] = {
    "--constraints": (
        "constrained search comes later; flite-generate --prefix-size forces a beginning"
    ),
    "--load-alignments": "training on alignments comes later; leave it out",
    "--distributed-backend": _ONE_PROCESS,
    "--distributed-init-method": _ONE_PROCESS,
    "--distributed-no-spawn": _ONE_PROCESS,
    "--distributed-num-procs": _ONE_PROCESS,
    "--distributed-port": _ONE_PROCESS,
    "--distributed-rank": _ONE_PROCESS,
    "--distributed-world-size": _ONE_PROCESS,
}

# Flags of fairseq before 0.12, which recipes still have: what became of them.
FORMER: dict[str, str] = {
    "--lazy-load": "data is always mapped into memory; leave it out",
    "--min-lr": "where training stops is --stop-min-lr now",
    "--output-format": "the format of data is --dataset-impl now",
    "--raw-text": "plain files are --dataset-impl raw now",
}

# Of training with --ddp-backend fully_sharded.
_SHARDING = frozenset(
    "--cpu-offload --fp32-reduce-scatter --no-reshard-after-forward --use-sharded-state".split()
)

# The special ids of fairseq's BLEU, which these commands of its can be told and never compute.
_SCORED_IDS = frozenset({"--eos", "--pad", "--unk"})

# Flags fairseq's command takes and never reads: accepted there with a warning.
IDLE: dict[str, frozenset[str]] = {
    "preprocess": frozenset(
        """
        --criterion --lr-scheduler --optimizer --scoring --task --wandb-project
        """.split()
    ),
    "train": frozenset(
        """
        --sacrebleu-char-level --sacrebleu-lowercase --sacrebleu-tokenizer --scoring
        """.split()
    )
    | _SCORED_IDS,
    "generate": frozenset(
        """
        --best-checkpoint-metric --continue-once --criterion --ddp-backend
        --finetune-from-model --force-anneal --keep-best-checkpoints
        --keep-interval-updates --keep-interval-updates-pattern --keep-last-epochs
        --lr-scheduler --lr-shrink --maximize-best-checkpoint-metric --no-epoch-checkpoints
        --no-last-checkpoints --no-save --no-save-optimizer-state --optimizer
        --optimizer-overrides --patience --reset-dataloader --reset-lr-scheduler
        --reset-meters --reset-optimizer --restore-file --save-dir --save-interval
        --save-interval-updates --wandb-project --warmup-updates
        --write-checkpoints-asynchronously
        """.split()
    )
    | _SHARDING,
    "validate": frozenset(
        """
        --criterion --ddp-backend --force-anneal --lr-scheduler
        --lr-shrink --optimizer --scoring --wandb-project --warmup-updates
        """.split()
    )
    | _SCORED_IDS
    | _SHARDING,
}
IDLE["interactive"] = IDLE["generate"] | {"--scoring", "--heartbeat-timeout"} | _SCORED_IDS
IDLE["eval_lm"] = IDLE["validate"]

# name[,alias…] kind command…
_ROWS = """
--activation-dropout value train
--activation-fn value train
--adadelta-eps value entry
--adadelta-rho value entry
--adafactor-eps value entry
--adam-betas value train
--adam-eps value train
--adamax-betas value entry
--adamax-eps value entry
--adaptive-input switch train
--adaptive-input-cutoff value train
--adaptive-input-factor value train
--adaptive-softmax-cutoff value train
--adaptive-softmax-dropout value train
--adaptive-softmax-factor value train
--add-bos-token switch eval_lm train
--aim-repo value eval_lm generate interactive preprocess train validate
--aim-run-hash value eval_lm generate interactive preprocess train validate
--align-suffix value preprocess
--alignfile value preprocess
--all-gather-list-size value eval_lm generate interactive preprocess train validate
--amp switch eval_lm generate interactive preprocess train validate
--amp-batch-retries value eval_lm generate interactive preprocess train validate
--amp-init-scale value eval_lm generate interactive preprocess train validate
--amp-scale-window value eval_lm generate interactive preprocess train validate
--anneal-eps switch entry
--arch,-a value train
--attention-dropout value train
--azureml-logging switch eval_lm generate interactive preprocess train validate
--base-layers value train
--base-shuffle value train
--base-sublayers value train
--baseline-model value train
--baseline-model-langs value train
--batch-size,--max-sentences value eval_lm generate interactive train validate
--batch-size-valid,--max-sentences-valid value eval_lm generate interactive train validate
--beam value generate interactive
--beam-mt value generate interactive
--best-checkpoint-metric value generate interactive train
--beta1 value entry
--bf16 switch eval_lm generate interactive preprocess train validate
--bpe value eval_lm generate interactive preprocess train validate
--broadcast-buffers switch eval_lm generate interactive train validate
--bucket-cap-mb value eval_lm generate interactive train validate
--buffer-size value interactive
--char-embedder-highway-layers value train
--char-inputs switch train
--character-embedding-dim value train
--character-embeddings switch train
--character-filters value train
--checkpoint-activations switch train
--checkpoint-shard-count value generate interactive train
--checkpoint-suffix value generate interactive train
--clip-norm value train
--clip-threshold value entry
--combine-valid-subsets,--combine-val switch eval_lm generate interactive train validate
--constraints optional generate interactive
--context-window value eval_lm
--continue-once value generate interactive train
--cpu switch eval_lm generate interactive preprocess train validate
--cpu-offload switch eval_lm generate interactive train validate
--criterion value eval_lm generate interactive preprocess train validate
--cross-self-attention switch train
--curriculum value eval_lm generate interactive train validate
--data-buffer-size value eval_lm generate interactive train validate
--dataset-impl value eval_lm generate interactive preprocess train validate
--ddp-backend value eval_lm generate interactive train validate
--ddp-comm-hook value eval_lm generate interactive train validate
--debug-param-names switch train
--decay-rate value entry
--decay-steps value entry
--decoder-attention-heads value train
--decoder-embed-dim value train
--decoder-embed-path value train
--decoder-ffn-embed-dim value train
--decoder-input-dim value train
--decoder-layerdrop value train
--decoder-layers value train
--decoder-layers-to-keep value train
--decoder-learned-pos switch train
--decoder-normalize-before switch train
--decoder-output-dim value train
--decoder-xformers-att-config value train
--decoding-format value generate interactive
--destdir value preprocess
--device-id,--local_rank value eval_lm generate interactive train validate
--dict-only switch preprocess
--disable-validation switch eval_lm generate interactive train validate
--distributed-backend value eval_lm generate interactive train validate
--distributed-init-method value eval_lm generate interactive train validate
--distributed-no-spawn switch eval_lm generate interactive train validate
--distributed-num-procs value eval_lm generate interactive train validate
--distributed-port value eval_lm generate interactive train validate
--distributed-rank value eval_lm generate interactive train validate
--distributed-world-size value eval_lm generate interactive train validate
--diverse-beam-groups value generate interactive
--diverse-beam-strength value generate interactive
--diversity-rate value generate interactive
--dropout value train
--dummy-a2a switch train
--dynamic-groups switch entry
--ema-decay value train
--ema-fp32 switch train
--ema-seed-model value train
--ema-start-update value train
--ema-update-freq value train
--empty-cache-freq value eval_lm generate interactive preprocess train validate
--encoder-attention-heads value train
--encoder-embed-dim value train
--encoder-embed-path value train
--encoder-ffn-embed-dim value train
--encoder-layerdrop value train
--encoder-layers value train
--encoder-layers-to-keep value train
--encoder-learned-pos switch train
--encoder-normalize-before switch train
--encoder-xformers-att-config value train
--end-learning-rate value train
--eos value eval_lm interactive train validate
--eos-token value generate interactive
--eval-bleu switch generate interactive train validate
--eval-bleu-args value generate interactive train validate
--eval-bleu-detok value generate interactive train validate
--eval-bleu-detok-args value generate interactive train validate
--eval-bleu-print-samples switch generate interactive train validate
--eval-bleu-remove-bpe optional generate interactive train validate
--eval-tokenized-bleu switch generate interactive train validate
--export switch train
--fast-stat-sync switch eval_lm generate interactive train validate
--final-lr-scale value entry
--find-unused-parameters switch eval_lm generate interactive train validate
--finetune-from-model value generate interactive train
--fix-batches-to-gpus switch eval_lm generate interactive train validate
--fixed-validation-seed value eval_lm generate interactive train validate
--force-anneal value eval_lm generate interactive train validate
--fp16 switch eval_lm generate interactive preprocess train validate
--fp16-adam-stats switch train
--fp16-init-scale value eval_lm generate interactive preprocess train validate
--fp16-no-flatten-grads switch eval_lm generate interactive preprocess train validate
--fp16-scale-tolerance value eval_lm generate interactive preprocess train validate
--fp16-scale-window value eval_lm generate interactive preprocess train validate
--fp32-reduce-scatter switch eval_lm generate interactive train validate
--future-target switch eval_lm train
--gen-subset value eval_lm generate interactive train validate
--gradient-as-bucket-view switch eval_lm generate interactive train validate
--grouped-shuffling switch eval_lm generate interactive train validate
--groups value entry
--heartbeat-timeout value eval_lm generate interactive train validate
--hold-steps value entry
--ignore-prefix-size value train
--ignore-unused-valid-subsets switch eval_lm generate interactive train validate
--init-lr-scale value entry
--input value interactive
--iter-decode-eos-penalty value generate interactive
--iter-decode-force-max-iter switch generate interactive
--iter-decode-max-iter value generate interactive
--iter-decode-with-beam value generate interactive
--iter-decode-with-external-reranker switch generate interactive
--joined-dictionary switch preprocess
--keep-best-checkpoints value generate interactive train
--keep-interval-updates value generate interactive train
--keep-interval-updates-pattern value generate interactive train
--keep-last-epochs value generate interactive train
--label-smoothing value train
--lamb-betas value entry
--lamb-eps value entry
--lang-to-offline-shard-ratio value train
--langs value train
--layernorm-embedding switch train
--left-pad-source switch generate interactive train validate
--left-pad-target switch generate interactive train validate
--lenpen value generate interactive
--lenpen-mt value generate interactive
--lm-path value generate interactive
--lm-weight value generate interactive
--load-alignments switch generate interactive train validate
--load-checkpoint-on-all-dp-ranks switch generate interactive train
--localsgd-frequency value eval_lm generate interactive train validate
--log-file value eval_lm generate interactive preprocess train validate
--log-format value eval_lm generate interactive preprocess train validate
--log-interval value eval_lm generate interactive preprocess train validate
--lr value train
--lr-patience value entry
--lr-period-updates value entry
--lr-scheduler value eval_lm generate interactive preprocess train validate
--lr-shrink value eval_lm generate interactive validate
--lr-threshold value entry
--match-source-len switch generate interactive
--max-epoch value train
--max-len-a value generate interactive
--max-len-a-mt value generate interactive
--max-len-b value generate interactive
--max-len-b-mt value generate interactive
--max-lr value entry
--max-source-positions value generate interactive train validate
--max-target-positions value eval_lm generate interactive train validate
--max-tokens value eval_lm generate interactive train validate
--max-tokens-valid value eval_lm generate interactive train validate
--max-update value train
--max-valid-steps,--nval value eval_lm generate interactive train validate
--maximize-best-checkpoint-metric switch generate interactive train
--memory-efficient-bf16 switch eval_lm generate interactive preprocess train validate
--memory-efficient-fp16 switch eval_lm generate interactive preprocess train validate
--merge-src-tgt-embed switch train
--min-len value generate interactive
--min-loss-scale value eval_lm generate interactive preprocess train validate
--min-lr value entry
--min-params-to-wrap value train
--model-overrides value eval_lm generate interactive validate
--model-parallel-size value eval_lm generate interactive preprocess train validate
--momentum value entry
--moses-no-dash-splits switch generate train
--moses-no-escape switch generate train
--multilang-sampling-alpha value train
--nbest value generate interactive
--no-beamable-mm switch generate interactive
--no-bias-correction switch entry
--no-cross-attention switch train
--no-decoder-final-norm switch train
--no-early-stop switch generate interactive
--no-epoch-checkpoints switch generate interactive train
--no-last-checkpoints switch generate interactive train
--no-progress-bar switch eval_lm generate interactive preprocess train validate
--no-repeat-ngram-size value generate interactive
--no-reshard-after-forward switch eval_lm generate interactive train validate
--no-save switch generate interactive train
--no-save-optimizer-state switch generate interactive train
--no-save-optimizer-state-on-training-finished switch train
--no-scale-embedding switch train
--no-seed-provided switch generate interactive
--no-token-positional-embeddings switch train
--not-fsdp-flatten-parameters switch eval_lm generate interactive train validate
--nprocs-per-node value eval_lm generate interactive train validate
--num-batch-buckets value generate interactive train validate
--num-shards value eval_lm generate interactive train validate
--num-workers value eval_lm generate interactive train validate
--num-workers-valid value train
--nwordssrc value preprocess
--nwordstgt value preprocess
--offload-activations switch train
--on-cpu-convert-precision switch eval_lm generate interactive preprocess train validate
--only-source switch preprocess
--optimizer value eval_lm generate interactive preprocess train validate
--optimizer-overrides value generate interactive train
--output-dictionary-size value eval_lm train
--output-word-probs switch eval_lm
--output-word-stats switch eval_lm
--pad value eval_lm interactive train validate
--pad-to-fixed-bsz switch eval_lm train
--pad-to-fixed-length switch eval_lm train
--padding-factor value preprocess
--past-target switch eval_lm train
--path value eval_lm generate interactive validate
--patience value generate interactive train
--phase-ratio value entry
--pipeline-balance value eval_lm generate interactive train validate
--pipeline-checkpoint value eval_lm generate interactive train validate
--pipeline-chunks value eval_lm generate interactive train validate
--pipeline-decoder-balance value eval_lm generate interactive train validate
--pipeline-decoder-devices value eval_lm generate interactive train validate
--pipeline-devices value eval_lm generate interactive train validate
--pipeline-encoder-balance value eval_lm generate interactive train validate
--pipeline-encoder-devices value eval_lm generate interactive train validate
--pipeline-model-parallel switch eval_lm generate interactive train validate
--plasma-path value eval_lm generate interactive preprocess train validate
--post-process,--remove-bpe optional eval_lm generate interactive validate
--power value train
--prefix-size value generate interactive
--print-alignment optional generate interactive
--print-step switch generate interactive
--profile switch eval_lm generate interactive preprocess train validate
--quant-noise-pq value train
--quant-noise-pq-block-size value train
--quant-noise-scalar value train
--quantization-config-path value eval_lm generate interactive preprocess train validate
--quiet switch eval_lm generate interactive validate
--record-a2a-perf-stats switch train
--relative-step switch entry
--relu-dropout value train
--replace-unk optional generate interactive
--report-accuracy switch train
--required-batch-size-multiple value eval_lm generate interactive train validate
--required-seq-len-multiple value eval_lm generate interactive train validate
--reset-dataloader switch generate interactive train
--reset-logging switch eval_lm generate interactive preprocess train validate
--reset-lr-scheduler switch generate interactive train
--reset-meters switch generate interactive train
--reset-optimizer switch generate interactive train
--restore-file value generate interactive train
--results-path value eval_lm generate interactive validate
--retain-dropout switch generate interactive
--retain-dropout-modules value generate interactive
--retain-iter-history switch generate interactive
--sacrebleu switch generate interactive
--sacrebleu-char-level switch generate train
--sacrebleu-lowercase switch generate train
--sacrebleu-tokenizer value generate train
--sample-break-mode value eval_lm train
--sampling switch generate interactive
--sampling-topk value generate interactive
--sampling-topp value generate interactive
--save-dir value generate interactive train
--save-interval value generate interactive train
--save-interval-updates value generate interactive train
--scale-attn switch train
--scale-fc switch train
--scale-heads switch train
--scale-parameter switch entry
--scale-resids switch train
--score-reference switch generate interactive
--scoring value eval_lm generate interactive preprocess train validate
--seed value eval_lm generate interactive preprocess train validate
--self-target switch eval_lm train
--sentence-avg switch train
--sentencepiece-alpha value generate interactive train
--sentencepiece-enable-sampling switch generate interactive train
--sentencepiece-model value generate interactive train
--shard-id value eval_lm generate interactive train validate
--share-all-embeddings switch train
--share-decoder-input-output-embed switch train
--shorten-data-split-list value eval_lm train
--shorten-method value eval_lm train
--shrink-min switch entry
--skip-invalid-size-inputs-valid-test switch eval_lm generate interactive train validate
--skip-remainder-batch switch train
--slowmo-base-algorithm value eval_lm generate interactive train validate
--slowmo-momentum value eval_lm generate interactive train validate
--softmax-batch value eval_lm
--source-lang,-s value generate interactive preprocess train validate
--srcdict value preprocess
--stop-min-lr value train
--stop-time-hours value train
--store-ema switch train
--suppress-crashes switch eval_lm generate interactive preprocess train validate
--t-mult value entry
--target-lang,-t value generate interactive preprocess train validate
--task value eval_lm generate interactive preprocess train validate
--temperature value generate interactive
--tensorboard-logdir value eval_lm generate interactive preprocess train validate
--testpref value preprocess
--tgtdict value preprocess
--threshold-loss-scale value eval_lm generate interactive preprocess train validate
--thresholdsrc value preprocess
--thresholdtgt value preprocess
--tie-adaptive-proj switch train
--tie-adaptive-weights switch train
--tokenizer value eval_lm generate interactive preprocess train validate
--tokens-per-sample value eval_lm train
--total-num-update value train
--tpu switch eval_lm generate interactive preprocess train validate
--train-subset value eval_lm generate interactive train validate
--trainpref value preprocess
--truncate-source switch generate interactive train validate
--unk value eval_lm interactive train validate
--unkpen value generate interactive
--unnormalized switch generate interactive
--update-epoch-batch-itr value eval_lm generate interactive train validate
--update-freq value train
--update-ordered-indices-seed switch eval_lm generate interactive train validate
--upsample-primary value generate interactive train validate
--use-bmuf switch train
--use-old-adam switch train
--use-plasma-view switch eval_lm generate interactive preprocess train validate
--use-sharded-state switch eval_lm generate interactive train validate
--user-dir value eval_lm generate interactive preprocess train validate
--valid-subset value eval_lm generate interactive train validate
--validate-after-updates value eval_lm generate interactive train validate
--validate-interval value eval_lm generate interactive train validate
--validate-interval-updates value eval_lm generate interactive train validate
--validpref value preprocess
--wandb-project value eval_lm generate interactive preprocess train validate
--warmup-init switch entry
--warmup-init-lr value train
--warmup-steps value entry
--warmup-updates value eval_lm generate interactive train validate
--weight-decay value train
--workers value preprocess
--write-checkpoints-asynchronously,--save-async switch generate interactive train
--zero-sharding value eval_lm generate interactive train validate
"""


def _read(rows: str) -> dict[str, FairseqFlag]:
    table: dict[str, FairseqFlag] = {}
    for line in rows.strip().splitlines():
        names, kind, *commands = line.split()
        each = FairseqFlag(tuple(names.split(",")), kind, frozenset(commands))
        table.update(dict.fromkeys(each.names, each))
    return table


FAIRSEQ_FLAGS: dict[str, FairseqFlag] = _read(_ROWS)
