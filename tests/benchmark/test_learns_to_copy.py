"""It learns: copying and reversing have a perfect answer, which a small model must find."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.helpers.commands import flite
from tests.helpers.toy import ADAM, LETTERS, preprocess_args

MODEL = [
    *("--arch", "transformer", "--share-all-embeddings"),
    *("--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "128", "--encoder-layers", "2"),
    *("--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "128", "--decoder-layers", "2"),
    *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4"),
]
TRAINING = [
    *("--lr", "3e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "200"),
    *("--clip-norm", "1.0", "--max-tokens", "1000", "--max-update", "1500", "--seed", "1"),
    *("--no-epoch-checkpoints", "--log-format", "simple"),
]


def write(folder: Path, step: int) -> Path:
    """Sentences of letters, copied (step 1) or reversed (step -1); none occurs twice."""
    rng = random.Random(1)
    folder.mkdir()
    lines = sorted({tuple(rng.choices(LETTERS, k=rng.randrange(3, 11))) for _ in range(6400)})
    rng.shuffle(lines)
    parts = {"train": lines[:-400], "valid": lines[-400:-200], "test": lines[-200:]}
    for split, part in parts.items():
        for suffix, order in (("src", 1), ("tgt", step)):
            text = "".join(" ".join(line[::order]) + "\n" for line in part)
            (folder / f"{split}.{suffix}").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("task", "step"), [("copy", 1), ("reverse", -1)])
def test_learns(task, step, tmp_path, capfd):
    text, data, save = write(tmp_path / "text", step), tmp_path / "data-bin", tmp_path / "save"
    assert flite("preprocess", *preprocess_args(text, data)) == 0
    assert flite("train", data, *MODEL, *ADAM, *TRAINING, "--save-dir", save, "--cpu") == 0
    log = capfd.readouterr().out
    perplexity = float(re.findall(r"valid on 'valid' subset .*?ppl ([0-9.]+)", log)[-1])
    assert perplexity < 1.1

    best = save / "checkpoint_best.pt"
    assert flite("generate", data, "--path", best, "--max-len-b", 20, "--cpu", "--quiet") == 0
    last = capfd.readouterr().out.strip().splitlines()[-1]
    match = re.search(r"BLEU4 = ([0-9.]+)", last)
    assert match is not None, last
    assert float(match.group(1)) > 95
