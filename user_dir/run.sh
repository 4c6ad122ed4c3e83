#!/usr/bin/env bash
# Train a Transformer with DeepSpeed's experts on the data that prepare-wmt16ende.sh and flite-preprocess made.
#
#     WORKSPACE=./workspace NUM_GPUS=8 ARCH=transformer_ds_moe_vaswani_wmt_en_de_big bash user_dir/run.sh
#     NUM_GPUS=2 PRECISION=--cpu bash user_dir/run.sh --max-update 200           # two processes of a CPU
#     MOE_MODE= bash user_dir/run.sh                                             # the same, dense
#
# What is typed after the name is added to the command line. Variables:
#   WORKSPACE    where data and results are                 DATABIN      what flite-preprocess made
#   OUT_DIR      gets checkpoints/ and tb/                  ARCH         an architecture
#   NUM_GPUS     processes, all of which share one set of experts
#   NUM_EXPERTS  of a layer; NUM_GPUS divides it            MOE_MODE     enc, dec, or enc,dec; empty: no experts
#   MAX_TOKENS   tokens of a process in a batch             UPDATE_FREQ  batches of an update
#   PRECISION    --fp16, --bf16, or --cpu for float32 on a CPU
set -euo pipefail

USER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORKSPACE=${WORKSPACE:-./workspace}
DATABIN=${DATABIN:-$WORKSPACE/wmt16_en_de/databin}
OUT_DIR=${OUT_DIR:-$WORKSPACE/train_artifacts}
ARCH=${ARCH:-transformer_ds_moe_tiny}
NUM_GPUS=${NUM_GPUS:-8}
NUM_EXPERTS=${NUM_EXPERTS:-8}
MOE_MODE=${MOE_MODE-enc,dec}
PRECISION=${PRECISION:---fp16}

Config=(
    --ddp-backend legacy_ddp
    --task translation_deepspeed
    --deepspeed_moe "$MOE_MODE"
        --ep-world-size "$NUM_GPUS"
        --num-experts "$NUM_EXPERTS"
        --top-k 1
    --criterion model_and_base
        --loss-weights '{"base_crit": 1, "experts_gate_loss": 10}'
        --base-criterion label_smoothed_cross_entropy
        --base-criterion-config '{"label_smoothing": 0.1}'
)
RUN_NAME="moe_g${NUM_GPUS}_ep${NUM_GPUS}_ex${NUM_EXPERTS}_k1_${MOE_MODE//,/}"
if [[ -z "$MOE_MODE" ]]; then RUN_NAME="dense_g${NUM_GPUS}"; fi
SaveDir="$OUT_DIR/checkpoints/$ARCH-$RUN_NAME"

# The data is cut by sentencepiece: validation puts its pieces together, so that BLEU is of words.
"${PYTHON:-python}" "$USER_DIR/train.py" \
    "$DATABIN" \
    --seed 43821 \
    --user-dir "$USER_DIR" \
    --distributed-world-size "$NUM_GPUS" \
    "${Config[@]}" \
    "$PRECISION" \
    --arch "$ARCH" \
    -s de -t en \
    --reset-optimizer \
    --optimizer adam \
        --adam-betas '(0.9, 0.98)' \
        --clip-norm 0.0 \
    --lr 5e-4 \
        --dropout 0.3 \
        --weight-decay 0.0001 \
        --lr-scheduler inverse_sqrt \
        --warmup-updates 4000 \
    --max-update 300000 \
    --max-tokens-valid "${MAX_TOKENS:-8192}" \
    --max-tokens "${MAX_TOKENS:-8192}" \
        --update-freq "${UPDATE_FREQ:-16}" \
    --validate-interval-updates 20 \
    --eval-bleu \
        --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}' \
        --eval-bleu-remove-bpe sentencepiece \
        --eval-bleu-print-samples \
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric \
        --keep-last-epochs 1 \
        --save-interval-updates 100 \
        --keep-interval-updates 1 \
        --save-dir "$SaveDir" \
        --tensorboard-logdir "$OUT_DIR/tb/$ARCH-$RUN_NAME" \
    "$@"
