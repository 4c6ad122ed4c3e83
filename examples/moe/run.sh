#!/usr/bin/env bash
# Dense against a mixture of 8 experts, on Multi30k, German to English: data, both trainings, translations, BLEU, the table.
#
#     bash examples/moe/run.sh multi30k work/moe               # multi30k/{train,valid,test2016}.{de,en}
#
# Both models are trained for MINUTES minutes (5) by NUM_GPUS processes (2), by the recipe of user_dir/run.sh with the
# settings below. A token goes through one expert of the inner width of the dense block: equal active parameters.
# MOE_FLAGS are those of the run with experts (--no-drop-tokens), MORE those of both, for example "--log-interval 2".
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
if [[ $# -ne 2 ]]; then
    echo "run.sh: usage: bash examples/moe/run.sh TEXT WORK, with TEXT/{train,valid,test2016}.{de,en}" >&2
    exit 2
fi
TEXT=$1 WORK=$2
MINUTES=${MINUTES:-5}
NUM_GPUS=${NUM_GPUS:-2}
PRECISION=${PRECISION:---cpu}
PYTHON=${PYTHON:-python}
export NUM_GPUS PRECISION PYTHON NUM_EXPERTS=8 MAX_TOKENS=4096 UPDATE_FREQ=1 ARCH=transformer_ds_moe_tiny
export DATABIN=$WORK/databin
mkdir -p "$WORK"

if [[ ! -d "$DATABIN" ]]; then
    "$PYTHON" "$ROOT/user_dir/prepare.py" --train "$TEXT/train" --valid "$TEXT/valid" --test "$TEXT/test2016" \
        --langs de en --vocab-size 6000 --out "$WORK/text"
    "$PYTHON" -m fairseq_lite_cli.preprocess --source-lang de --target-lang en --joined-dictionary --destdir "$DATABIN" \
        --trainpref "$WORK/text/train" --validpref "$WORK/text/valid" --testpref "$WORK/text/test" --workers 2
fi

train() { # NAME MOE_MODE FLAGS…
    OUT_DIR=$WORK/$1 MOE_MODE=$2 bash "$ROOT/user_dir/run.sh" \
        --share-all-embeddings --lr 5e-3 --warmup-updates 400 --dropout 0.1 --clip-norm 1.0 \
        --stop-time-hours "$(awk "BEGIN { print $MINUTES / 60 }")" \
        --validate-interval-updates 100 --validate-interval 1000 --save-interval 1000 \
        --eval-bleu-args '{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}' --max-tokens-valid 8192 \
        --log-format json --log-interval 20 --log-file "$WORK/$1.log" --num-workers 0 "${@:3}"
}

translate() { # NAME
    # Of the model with experts this names all parts: checkpoint_best-shared.pt, checkpoint_best-expert0.pt, …
    local checkpoint
    checkpoint=$(echo "$WORK/$1"/checkpoints/*)/checkpoint_best.pt
    "$PYTHON" "$ROOT/user_dir/generate.py" "$DATABIN" --task translation_deepspeed -s de -t en \
        --path "$checkpoint" --max-tokens 8192 --cpu \
        --beam 4 --lenpen 0.6 --max-len-a 1.2 --max-len-b 10 --remove-bpe sentencepiece >"$WORK/$1.out"
    bash "$ROOT/scripts/sacrebleu.sh" --ref "$TEXT/test2016.en" de en "$WORK/$1.out" | tee "$WORK/$1.bleu"
}

read -r -a both <<<"${MORE:-}"
read -r -a experts <<<"${MOE_FLAGS---no-drop-tokens}"
train dense "" "${both[@]}"
train moe enc,dec "${experts[@]}" "${both[@]}"
translate dense
translate moe
"$PYTHON" "$HERE/table.py" --dense "$WORK/dense.log" --moe "$WORK/moe.log" --experts 8 \
    --test "$WORK/dense.bleu" "$WORK/moe.bleu" | tee "$WORK/table.md"
