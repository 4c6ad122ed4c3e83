"""Small models with random weights, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.lm_config import TransformerLMConfig
from fairseq_lite.models.transformer import TransformerModel
from fairseq_lite.models.transformer_lm import TransformerLanguageModel

PAD = 1
WORDS = "the a cat dog sat ran on mat snow and".split()


class Words:
    """A dictionary of `n` symbols, of which no test asks the names."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def pad(self) -> int:
        return PAD


class PlainModel(TransformerModel):
    """The same model behind a forward pass of its own, which generation must take as it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class PlainLanguageModel(TransformerLanguageModel):
    """The same language model behind a forward pass of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def make_dictionary() -> Dictionary:
    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    return dictionary


def make_model(
    seed: int = 11, kind: type[TransformerModel] = TransformerModel, **fields: Any
) -> TransformerModel:
    """A model whose random weights are large enough for decided, varied, ending outputs."""
    dictionary = make_dictionary()
    task = SimpleNamespace(
        source_dictionary=dictionary, target_dictionary=dictionary, max_positions=lambda: (64, 64)
    )
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("embed_dim", 16), ("ffn_embed_dim", 32), ("layers", 2), ("attention_heads", 2),
        )
    }  # fmt: skip
    torch.manual_seed(seed)
    model = kind.build(TransformerConfig(**{**sides, **fields}), task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(2.5)
        # Position counts for more than the last token, and the end symbol has a chance: without
        # this a random model repeats one word for ever.
        model.decoder.embed_tokens.weight.mul_(0.5)
        model.decoder.output_projection.weight[dictionary.eos()].mul_(2.0)
    return model.eval()


def make_language_model(
    seed: int = 1, kind: type[TransformerLanguageModel] = TransformerLanguageModel, **fields: Any
) -> TransformerLanguageModel:
    """As `make_model`, without an encoder."""
    dictionary = make_dictionary()
    task = SimpleNamespace(
        source_dictionary=dictionary, target_dictionary=dictionary, max_positions=lambda: 64
    )
    shape = {"embed_dim": 16, "input_dim": 16, "output_dim": 16, "ffn_embed_dim": 32}
    sizes = {f"decoder_{name}": n for name, n in shape.items()}
    torch.manual_seed(seed)
    config = TransformerLMConfig(
        **{**sizes, "decoder_layers": 2, "decoder_attention_heads": 2, **fields}
    )
    model = kind.build(config, task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(2.5)
        model.decoder.embed_tokens.weight.mul_(0.5)
        model.decoder.output_projection.weight[dictionary.eos()].mul_(2.0)
    return model.eval()


def make_prefixes(lengths: list[int], seed: int = 0, start: int = 2) -> dict[str, Any]:
    """Random prefixes of these lengths behind the start symbol, padded on the right."""
    dictionary = make_dictionary()
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((len(lengths), 1 + max(lengths)), dictionary.pad())
    source[:, 0] = start
    for row, n in zip(source, lengths, strict=True):
        words = (dictionary.nspecial, len(dictionary))
        row[1 : 1 + n] = torch.randint(*words, (n,), generator=generator)
    return {
        "id": torch.arange(len(lengths)),
        "net_input": {"src_tokens": source, "src_lengths": torch.tensor(lengths) + 1},
        "target": None,
    }


def make_sample(lengths: list[int], seed: int = 0, ids: list[int] | None = None) -> dict[str, Any]:
    """Random sources and targets of these lengths; sources padded on the left, longest first."""
    dictionary = make_dictionary()
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    source = torch.full((len(lengths), width), dictionary.pad())
    target = torch.full((len(lengths), width), dictionary.pad())
    for i, n in enumerate(lengths):
        for row, at in ((source[i], width - n), (target[i], 0)):
            row[at : at + n - 1] = torch.randint(
                dictionary.nspecial, len(dictionary), (n - 1,), generator=generator
            )
            row[at + n - 1] = dictionary.eos()
    prev = target.roll(1, dims=1)
    prev[:, 0] = dictionary.eos()
    prev[:, 1:][target[:, :-1] == dictionary.eos()] = dictionary.pad()
    return {
        "id": torch.tensor(list(range(len(lengths))) if ids is None else ids),
        "net_input": {
            "src_tokens": source,
            "src_lengths": torch.tensor(lengths),
            "prev_output_tokens": prev,
        },
        "target": target,
    }


def one_of(sample: dict[str, Any], i: int) -> dict[str, Any]:
    """Sentence i of a batch as a batch of its own, without padding."""
    n = int(sample["net_input"]["src_lengths"][i])
    inputs = sample["net_input"]
    return {
        "id": sample["id"][i : i + 1],
        "net_input": {
            "src_tokens": inputs["src_tokens"][i : i + 1, -n:],
            "src_lengths": inputs["src_lengths"][i : i + 1],
            "prev_output_tokens": inputs["prev_output_tokens"][i : i + 1, :n],
        },
        "target": sample["target"][i : i + 1, :n],
    }


def prefix_of(sample: dict[str, Any], i: int) -> dict[str, Any]:
    """Prefix i of a batch as a batch of its own, without padding."""
    inputs = sample["net_input"]
    n = int(inputs["src_lengths"][i])
    return {
        "id": sample["id"][i : i + 1],
        "net_input": {
            "src_tokens": inputs["src_tokens"][i : i + 1, :n],
            "src_lengths": inputs["src_lengths"][i : i + 1],
        },
        "target": None,
    }


def assert_same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Two lists of hypotheses, a list a sentence: the same tokens, the same scores."""
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        assert [h.tokens.tolist() for h in ours] == [h.tokens.tolist() for h in theirs]
        for x, y in zip(ours, theirs, strict=True):
            assert x.score == pytest.approx(y.score, abs=tolerance)
            assert torch.allclose(x.positional_scores, y.positional_scores, atol=tolerance)
