"""Files beside a checkpoint that carries none, as fairseq's own archives have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fairseq_lite.config.core import Choice
from fairseq_lite.registry import Registry
from fairseq_lite.training.checkpoint.inference import Ensemble

# Segmentation -> its fields, and what the files they name are called.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"},
    "sentencepiece": {"sentencepiece_model": "sentencepiece.bpe.model"},
    "hf_byte_bpe": {"bpe_merges": "merges.txt", "bpe_vocab": "vocab.json"},
}


def with_segmentation_beside(
    ensemble: Ensemble, folder: Path, registries: Mapping[str, Registry]
) -> Ensemble:
    """Have models that carry no files segment text with those that lie beside them.

    What such a checkpoint says of its segmentation names files of the machine it was trained on, or
    says nothing: its data was segmented beforehand.

    Args:
        ensemble: what `load_models` gave.
        folder: of the first checkpoint.
        registries: section -> registry.
    """
    if ensemble.folder is not None:
        return ensemble
    first, *others = ensemble.configs
    names = [first.bpe.name] if first.bpe.name in _NAMES else list(_NAMES)
    for name in names:
        files = {field: folder / file for field, file in _NAMES[str(name)].items()}
        if all(file.is_file() for file in files.values()):
            kind = registries["bpe"].get(str(name)).config
            said = vars(first.bpe.config) if first.bpe.name == name else {}
            config = kind(**{**said, **{field: str(file) for field, file in files.items()}})
            bpe = Choice(str(name), config)
            return dataclasses.replace(
                ensemble, configs=[dataclasses.replace(first, bpe=bpe), *others]
            )
    return ensemble
