"""An architecture: two recurrent networks, the second looking back at the first by attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

from fairseq_lite.config.flags import flag
from fairseq_lite.models.api import ARCHITECTURES, Model


@dataclass(frozen=True)
class AttentiveGRUConfig:
    hidden_size: int = flag(64, "width of embeddings and states")


@ARCHITECTURES.register("attentive_gru", config=AttentiveGRUConfig)
class AttentiveGRU(Model):
    def __init__(self, size, source, target):
        super().__init__()
        self.pad = source.pad()
        self.embed_source = nn.Embedding(len(source), size)
        self.embed_target = nn.Embedding(len(target), size)
        self.reader = nn.GRU(size, size, batch_first=True)
        self.writer = nn.GRU(size, size, batch_first=True)
        self.output = nn.Linear(size, len(target))

    @classmethod
    def build(cls, cfg, task):
        return cls(cfg.hidden_size, task.source_dictionary, task.target_dictionary)

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        memory, _ = self.reader(self.embed_source(src_tokens))
        states, _ = self.writer(self.embed_target(prev_output_tokens))
        found = attend(states, memory, memory, attn_mask=src_tokens.ne(self.pad)[:, None])
        return self.output(states + found), {}
