#!/usr/bin/env bash
# BLEU of what flite-generate printed, on detokenised text, as the field reports it.
#
#     bash scripts/sacrebleu.sh wmt14/full de en gen.out
#     bash scripts/sacrebleu.sh --ref test.en de en gen.out         # without a network
#     bash scripts/sacrebleu.sh --detok moses wmt14/full de en gen.out
#
# The first word is one of sacrebleu's test sets (`sacrebleu --list`), which it fetches once. The languages are those of
# the translation: from de into en. The text is taken from the D- lines (detokenised by the command's --bpe and
# --tokenizer) where there are any, else from the H- lines; sentencepiece's pieces are put together. --detok moses
# undoes Moses' tokenisation, for data that was tokenised before it was cut into pieces.
set -euo pipefail

fail() {
    echo "sacrebleu.sh: error: $*" >&2
    exit 2
}

reference="" detok=none
while [[ "${1:-}" == --* ]]; do
    [[ $# -ge 2 ]] || fail "$1 needs a value"
    case "$1" in
        --ref) reference=$2 ;;
        --detok) detok=$2 ;;
        *) fail "unknown option $1; expected --ref FILE or --detok moses" ;;
    esac
    shift 2
done
if [[ -n "$reference" ]]; then set -- "" "$@"; fi
[[ $# -eq 4 ]] || fail "usage: bash scripts/sacrebleu.sh TESTSET SOURCE TARGET GEN_OUT, or --ref FILE in place of TESTSET"
testset=$1 source=$2 target=$3 output=$4
[[ -f "$output" ]] || fail "$output: no such file; expected the output of flite-generate"
[[ -z "$reference" || -f "$reference" ]] || fail "--ref $reference: no such file"
[[ "$detok" == none || "$detok" == moses ]] || fail "--detok $detok: expected moses or none"
python=${PYTHON:-python}

text=$(mktemp)
trap 'rm -f "$text" "$text.ref"' EXIT

# Sentences come in the order of their lengths; their numbers say where they belong.
kind=H
if grep -q '^D-[0-9]' "$output"; then kind=D; fi
grep "^$kind-[0-9]" "$output" | sed "s/^$kind-//" | LC_ALL=C sort -n -s -k1,1 | awk -F'\t' '!seen[$1]++ { print $3 }' >"$text" ||
    fail "$output: no line begins with H-; expected the output of flite-generate without --quiet"

if grep -q '▁' "$text"; then
    echo "sacrebleu.sh: pieces of words are put together (flite-generate --remove-bpe sentencepiece does it, too)" >&2
    sed -i.bak -e 's/ //g' -e 's/▁/ /g' -e 's/^ //' "$text" && rm -f "$text.bak"
elif grep -q '@@ ' "$text"; then
    fail "$output: pieces of words (@@) remain: translate again with --remove-bpe"
fi
if [[ "$detok" == moses ]]; then
    "$python" -m sacremoses -l "$target" -q detokenize <"$text" >"$text.ref" 2>/dev/null ||
        fail "--detok moses needs sacremoses: pip install sacremoses"
    mv "$text.ref" "$text"
fi

if [[ -z "$reference" ]]; then
    "$python" -m sacrebleu --test-set "$testset" --language-pair "$source-$target" --echo ref >"$text.ref" 2>"$text.why" || {
        why=$(grep -v '^\s*$' "$text.why" | tail -n 1)
        rm -f "$text.why"
        fail "the test set $testset $source-$target cannot be had (${why:-no reason given}): check its name and the network, or give --ref FILE"
    }
    rm -f "$text.why"
    reference=$text.ref
fi
lines=$(wc -l <"$text") wanted=$(wc -l <"$reference")
[[ $lines -eq $wanted ]] ||
    fail "$output has $((lines)) sentences, the reference $((wanted)): is it this test set, and from $source into $target?"
"$python" -m sacrebleu "$reference" --language-pair "$source-$target" --input "$text" --format text --width 2
