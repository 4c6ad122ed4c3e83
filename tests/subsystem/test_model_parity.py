"""The reference's weights in our model: the same names, the same numbers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.transformer import TransformerModel
from fairseq_lite.training.checkpoint import store
from tests.helpers.shared import shared_dir

DIMS: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (
        ("embed_dim", 128), ("ffn_embed_dim", 256), ("layers", 2), ("attention_heads", 4),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Path:
    return shared_dir("reference", "mt")


@pytest.fixture(scope="module")
def words(reference: Path) -> Dictionary:
    return Dictionary.load(reference / "data-bin" / "dict.en.txt")


def build(words: Dictionary) -> TransformerModel:
    task = SimpleNamespace(
        source_dictionary=words, target_dictionary=words, max_positions=lambda: (1024, 1024)
    )
    return TransformerModel.build(TransformerConfig(share_all_embeddings=True, **DIMS), task)


@pytest.mark.parametrize("name", ["init.pt", "trained.pt"])
def test_reference_weights_fit_name_by_name(reference: Path, words: Dictionary, name: str) -> None:
    state = store.load(reference / name)
    model = build(words)
    model.load_weights(state["model"])
    assert list(model.state_dict()) == list(state["model"])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][key]), key


def test_optimizer_state_belongs_to_our_parameters_in_order(
    reference: Path, words: Dictionary
) -> None:
    states = store.load(reference / "trained.pt")["last_optimizer_state"]["state"]
    shapes = [tuple(p.shape) for p in build(words).parameters()]
    assert [tuple(states[i]["exp_avg"].shape) for i in range(len(states))] == shapes


def scored(reference: Path) -> dict[int, dict[str, str]]:
    records: dict[int, dict[str, str]] = {}
    text = (reference / "generate" / "gen_score_reference.txt").read_text(encoding="utf-8")
    for line in text.split("\n"):
        kind, _, rest = line.partition("\t")
        if kind[:2] in ("S-", "T-", "P-"):
            records.setdefault(int(kind[2:]), {})[kind[0]] = rest
    return records


def test_scores_of_the_references(reference: Path, words: Dictionary) -> None:
    model = build(words)
    model.load_weights(store.load(reference / "trained.pt")["model"])
    model.eval()
    records = list(scored(reference).values())
    assert len(records) == 200
    worst = 0.0
    for start in range(0, len(records), 20):
        some = records[start : start + 20]
        source = [torch.from_numpy(words.encode_line(r["S"])) for r in some]
        # An unknown word of the reference is printed as <<unk>>.
        target = [torch.from_numpy(words.encode_line(r["T"].replace("<<", "<").replace(">>", ">")))
                  for r in some]  # fmt: skip
        src, tgt = _padded(source, left=True), _padded(target, left=False)
        prev = torch.cat([torch.full((len(some), 1), words.eos()), tgt[:, :-1]], dim=1)
        with torch.no_grad():
            scores = model.get_normalized_probs(model(src, None, prev), log_probs=True)
        scores = scores.gather(2, tgt[:, :, None])[:, :, 0] / math.log(2)
        for row, y, record in zip(scores, target, some, strict=True):
            expected = torch.tensor([float(x) for x in record["P"].split()])
            worst = max(worst, float((row[: len(y)] - expected).abs().max()))
    assert worst < 1e-4


def _padded(rows: list[torch.Tensor], left: bool) -> torch.Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=1, padding_side=side
    )
