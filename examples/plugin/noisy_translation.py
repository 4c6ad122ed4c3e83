"""A task: translation from a source in which some words are made unreadable while training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairseq_lite.config.flags import flag
from fairseq_lite.tasks.api import TASKS
from fairseq_lite.tasks.translation import TranslationConfig, TranslationTask


@dataclass(frozen=True)
class NoisyTranslationConfig(TranslationConfig):
    word_noise: float = flag(0.1, "share of source words replaced by <unk> while training")


@TASKS.register("noisy_translation", config=NoisyTranslationConfig)
class NoisyTranslation(TranslationTask):
    def train_step(self, sample, model, criterion):
        source, symbols = sample["net_input"]["src_tokens"], self.source_dictionary
        chosen = torch.rand(source.shape, device=source.device) < self.cfg.word_noise
        chosen &= (source != symbols.pad()) & (source != symbols.eos())
        noisy = source.masked_fill(chosen, symbols.unk())
        sample = {**sample, "net_input": {**sample["net_input"], "src_tokens": noisy}}
        return super().train_step(sample, model, criterion)
