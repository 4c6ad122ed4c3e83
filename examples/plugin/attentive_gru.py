"""An architecture: two recurrent networks, the second looking back at the first by attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fairseq_lite.config.flags import flag
from fairseq_lite.models.api import ARCHITECTURES, EncoderOut, Model


@dataclass(frozen=True)
class AttentiveGRUConfig:
    hidden_size: int = flag(64, "width of embeddings and states")


@ARCHITECTURES.register("attentive_gru", config=AttentiveGRUConfig)
class AttentiveGRU(Model):
    def __init__(self, cfg, source, target):
        super().__init__()
        self.pad, size = source.pad(), cfg.hidden_size
        self.embed_source = nn.Embedding(len(source), size)
        self.embed_target = nn.Embedding(len(target), size)
        self.reader = nn.GRU(size, size, batch_first=True)
        self.writer = nn.GRU(size, size, batch_first=True)
        self.output = nn.Linear(size, len(target))

    @classmethod
    def build(cls, cfg, task):
        return cls(cfg, task.source_dictionary, task.target_dictionary)

    def encode(self, src_tokens, src_lengths=None):
        return EncoderOut(self.reader(self.embed_source(src_tokens))[0], src_tokens.eq(self.pad))

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        return self.decoder(prev_output_tokens, self.encode(src_tokens))

    def decoder(self, prev_output_tokens, encoder_out):
        memory, padding = encoder_out
        states, _ = self.writer(self.embed_target(prev_output_tokens))
        found = scaled_dot_product_attention(states, memory, memory, attn_mask=~padding[:, None])
        return self.output(states + found), {}
