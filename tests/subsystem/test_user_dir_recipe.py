"""The recipe as a user types it, from a copy of the folder: from text to BLEU.

The commands are those of DeepSpeed's example for fairseq, word for word but for the name of the
tools, an end (`--max-update`) and small numbers where the original says hours.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY
from tests.helpers.user_dir import USER_DIR, needs_deepspeed

pytestmark = [pytest.mark.timeout(300), needs_deepspeed]

PREPROCESS = r"""
TEXT="${WORKSPACE?}/wmt16_en_de"
DATABIN="${WORKSPACE}/wmt16_en_de/databin"
mkdir -p "$DATABIN"
flite-preprocess \
    --source-lang en --target-lang de \
    --trainpref "$TEXT/train" \
    --validpref "$TEXT/valid" \
    --testpref  "$TEXT/test" \
    --destdir   "${DATABIN}" \
    --nwordssrc 32768 --nwordstgt 32768 \
    --joined-dictionary \
    --workers 2
"""

CONFIG = r"""
    DATABIN="${WORKSPACE}/wmt16_en_de/databin"
    NUM_GPUS=${NUM_GPUS:-8}
    NUM_EXPERTS=${NUM_EXPERTS:-8}
    MOE_MODE=${MOE_MODE:-enc,dec}
    Config=(
        --ddp-backend=legacy_ddp
        --task 'translation_deepspeed'
        --deepspeed_moe "$MOE_MODE"
            --ep-world-size $NUM_GPUS
            --num-experts   $NUM_EXPERTS
            --top-k 1
        --criterion 'model_and_base'
            --loss-weights '{"base_crit": 1, "experts_gate_loss": 10}'
            --base-criterion 'label_smoothed_cross_entropy'
            --base-criterion-config '{"label_smoothing": 0.1}'
    )
    RUN_NAME="moe_g${NUM_GPUS}_ep${NUM_GPUS}_ex${NUM_EXPERTS}_k1_${MOE_MODE//,/}"
    OUT_DIR="${WORKSPACE:-"."}/train_artifacts"
    ARCH='transformer_ds_moe_tiny'
    SaveDir="${OUT_DIR?}/checkpoints/${ARCH}-${RUN_NAME}"
"""

TRAIN = (
    CONFIG
    + r"""
    python "${USER_DIR?}/train.py" \
        "${DATABIN?}" \
        --seed 43821 \
        --user-dir "$USER_DIR" \
                                    "${Config[@]}" \
        --fp16 \
        --arch $ARCH \
        -s 'de' -t 'en' \
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
            --scoring sacrebleu \
            --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}' \
            --eval-bleu-detok moses \
            --eval-bleu-remove-bpe \
            --eval-bleu-print-samples \
        --best-checkpoint-metric bleu --maximize-best-checkpoint-metric \
            --keep-last-epochs 1 \
            --save-interval-updates 100 \
            --keep-interval-updates 1 \
            --save-dir "${SaveDir}" \
            --tensorboard-logdir "${OUT_DIR?}/tb/${ARCH}-${RUN_NAME}" \
        --max-update 3 --log-format json --log-interval 1
"""
)

GENERATE = (
    CONFIG
    + r"""
LatestCheckpoint="${SaveDir}/checkpoint_last.pt"
python "${USER_DIR?}/generate.py" \
    "${DATABIN?}" \
    --seed 43821 \
    --user-dir "$USER_DIR" \
    --path "${LatestCheckpoint}" \
    --max-tokens-valid "${MAX_TOKENS:-8192}" \
    --save-dir "${SaveDir}" \
    --tensorboard-logdir "${OUT_DIR?}/tb/${ARCH}-${RUN_NAME}" \
    --beam 4 --lenpen 0.6 --remove-bpe > gen.out
"""
)

GENERATE_ON_TWO = GENERATE.replace("> gen.out", "--distributed-world-size 2 --cpu > two.out")


class Shell:
    """Runs the recipe's commands in a folder of its own, away from the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugin = Path(shutil.copytree(USER_DIR, folder / "x", ignore=_caches))
        self.workspace = folder / "workspace"

    def run(self, command: str, **variables: object) -> subprocess.CompletedProcess[str]:
        environment = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WORKSPACE": str(self.workspace),
            "USER_DIR": str(self.plugin),
            **{name: str(value) for name, value in variables.items()},
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=environment,
            timeout=250,
            capture_output=True,
            text=True,
        )


def _caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]


def write_pairs(folder: Path, sizes: dict[str, int]) -> Path:
    """Short sentences of a few made-up words, and each word's counterpart."""
    folder.mkdir()
    rng = random.Random(1)
    words = {
        "haus": "house",
        "baum": "tree",
        "hund": "dog",
        "rot": "red",
        "alt": "old",
        "und": "and",
    }
    for split, size in sizes.items():
        lines = [rng.choices(list(words), k=rng.randrange(2, 7)) for _ in range(size)]
        for lang, text in (("de", lines), ("en", [[words[w] for w in line] for line in lines])):
            path = folder / f"{split}.{lang}"
            path.write_text("".join(" ".join(line) + "\n" for line in text), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A copy of the plugin, and data prepared by its own scripts."""
    folder = tmp_path_factory.mktemp("recipe")
    made = Shell(folder)
    text = write_pairs(folder / "text", {"train": 400, "test": 12})
    prepared = made.run(
        f"bash $USER_DIR/prepare-wmt16ende.sh --text {text} --vocab-size 28 --valid-every 20"
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "valid: 20 pairs" in prepared.stdout
    preprocessed = made.run(PREPROCESS)
    assert preprocessed.returncode == 0, preprocessed.stderr
    return made


def test_the_recipes_commands_run_as_written(shell):
    trained = shell.run(TRAIN, NUM_GPUS=2, MAX_TOKENS=400, UPDATE_FREQ=1)
    assert trained.returncode == 0, trained.stderr
    for name in ("loss_label_smoothed_cross_entropy", "loss_experts_gate_loss", "valid_bleu"):
        assert f'"{name}"' in trained.stdout or f'"train_{name}"' in trained.stdout, name
    assert "training on 2 devices" in trained.stdout
    run = "transformer_ds_moe_tiny-moe_g2_ep2_ex8_k1_encdec"
    assert (shell.workspace / "train_artifacts" / "tb" / run).is_dir()

    translated = shell.run(GENERATE, NUM_GPUS=2)
    assert translated.returncode == 0, translated.stderr
    output = (shell.folder / "gen.out").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("H-") for line in output) == 12
    assert all(line[:2] in ("S-", "T-", "H-", "D-", "P-", "Ge") for line in output), output
    # The folder was made from en to de; the model says that it translates from de.
    wanted = (shell.workspace / "wmt16_en_de" / "test.en").read_text(encoding="utf-8").splitlines()
    targets = {line.split("\t")[0]: line.split("\t")[1] for line in output if line[:2] == "T-"}
    assert targets == {f"T-{i}": line for i, line in enumerate(wanted)}
    for flag in ("--save-dir", "--tensorboard-logdir", "--max-tokens-valid"):
        assert f"{flag} has no effect" in translated.stderr

    # Each process has half of the experts, and translates half of the sentences.
    together = shell.run(GENERATE_ON_TWO, NUM_GPUS=2)
    assert together.returncode == 0, together.stderr
    assert (shell.folder / "two.out").read_text(encoding="utf-8").splitlines() == output

    reference = shell.folder / "text" / "test.en"
    script = REPOSITORY / "scripts" / "sacrebleu.sh"
    scored = shell.run(f"bash {script} --ref {reference} de en gen.out")
    assert scored.returncode == 0, scored.stderr
    assert "BLEU" in scored.stdout


@pytest.mark.parametrize("mode", ["enc,dec", ""])
def test_run_sh(shell, mode, tmp_path):
    words = "--max-update 2 --log-format json --log-interval 1 --cpu"
    trained = shell.run(
        f"bash $USER_DIR/run.sh {words}",
        MOE_MODE=mode,
        NUM_GPUS=1,
        NUM_EXPERTS=4,
        PRECISION="--bf16",
        OUT_DIR=tmp_path,
        MAX_TOKENS=400,
        UPDATE_FREQ=1,
    )
    assert trained.returncode == 0, trained.stderr
    assert ("(experts): Experts(" in trained.stdout) == bool(mode)
    assert "pieces of words" not in trained.stdout, "run.sh puts the pieces together"
