#!/usr/bin/env bash
# Fetch and prepare WMT'16 German-English: steps 1 to 5 of README.md.
#
#     WORKSPACE=./workspace bash user_dir/prepare-wmt16ende.sh
#     WORKSPACE=./workspace bash user_dir/prepare-wmt16ende.sh --text FOLDER      # FOLDER/{train,test}.{de,en}: no network
#
# A download that was cut short goes on where it stopped. An archive is unpacked only when it is whole (gzip's own
# check), and its SHA-256 is that in $WORKSPACE/orig/sha256sums.txt: put the file there to demand certain archives;
# otherwise it is written with the first download, so that a later one cannot differ unseen. Training text: Europarl v7,
# Common Crawl and News Commentary v11; test: newstest2014. MIRROR=URL names a folder that has the archives, too. What becomes of the text is said in prepare.py; its options
# can be added, for example --vocab-size 8000.
set -euo pipefail

USER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORKSPACE=${WORKSPACE:-./workspace}
PYTHON=${PYTHON:-python}
ORIG=$WORKSPACE/orig
TEXT=$WORKSPACE/wmt16_en_de

fail() {
    echo "prepare-wmt16ende.sh: error: $*" >&2
    exit 2
}

if [[ "${1:-}" == --text ]]; then
    [[ -n "${2:-}" ]] || fail "--text needs the folder of train.de, train.en, test.de and test.en"
    exec "$PYTHON" "$USER_DIR/prepare.py" --train "$2/train" --test "$2/test" --langs de en --out "$TEXT" "${@:3}"
fi

URLS=(
    https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz
    https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz
    https://data.statmt.org/wmt16/translation-task/training-parallel-nc-v11.tgz
    https://www.statmt.org/wmt14/test-full.tgz
)
FILES=(
    'training/europarl-v7.de-en.*'
    'commoncrawl.de-en.*'
    'training-parallel-nc-v11/news-commentary-v11.de-en.*'
    'test-full/newstest2014-deen-*'
)
command -v curl >/dev/null || fail "curl is needed to fetch the data; or give --text FOLDER"
mkdir -p "$ORIG"

fetch() { # URL
    local name=${1##*/} sums=$ORIG/sha256sums.txt
    local url=${MIRROR:+$MIRROR/$name}
    url=${url:-$1}
    if [[ ! -f "$ORIG/$name" ]]; then
        echo "fetching $url"
        curl --fail --location --retry 5 --connect-timeout 30 --continue-at - --output "$ORIG/$name.part" "$url" ||
            fail "$url cannot be fetched: run this again to go on where it stopped, or give --text FOLDER"
        gzip --test "$ORIG/$name.part" 2>/dev/null || {
            rm -f "$ORIG/$name.part"
            fail "$name arrived damaged and was removed: run this again"
        }
        mv "$ORIG/$name.part" "$ORIG/$name"
    fi
    if grep -qs " $name\$" "$sums"; then
        (cd "$ORIG" && grep " $name\$" sha256sums.txt | sha256sum --check --quiet >/dev/null 2>&1) ||
            fail "$ORIG/$name is not the archive whose checksum is in $sums: remove the one that is wrong"
    else
        (cd "$ORIG" && sha256sum "$name" >>sha256sums.txt)
    fi
}

for i in "${!URLS[@]}"; do
    fetch "${URLS[$i]}"
    tar --extract --gzip --file "$ORIG/${URLS[$i]##*/}" --directory "$ORIG" --wildcards "${FILES[$i]}" ||
        fail "$ORIG/${URLS[$i]##*/}: does not contain ${FILES[$i]}"
done
# In the test set, de-en's source is German and its reference English.
cp "$ORIG/test-full/newstest2014-deen-src.de.sgm" "$ORIG/newstest2014.de.sgm"
cp "$ORIG/test-full/newstest2014-deen-ref.en.sgm" "$ORIG/newstest2014.en.sgm"

exec "$PYTHON" "$USER_DIR/prepare.py" \
    --train "$ORIG/training/europarl-v7.de-en" "$ORIG/commoncrawl.de-en" \
    "$ORIG/training-parallel-nc-v11/news-commentary-v11.de-en" \
    --test "$ORIG/newstest2014" --langs de en --out "$TEXT" "$@"
