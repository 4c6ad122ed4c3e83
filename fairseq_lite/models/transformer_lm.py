"""The decoder-only transformer: a language model with fairseq's names and numerics."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from torch import Tensor, nn

from fairseq_lite.errors import ConfigError
from fairseq_lite.models import presets
from fairseq_lite.models.api import ARCHITECTURES, ModelTask, NetOutput, StateDict
from fairseq_lite.models.layers import Embedding
from fairseq_lite.models.lm_config import TransformerLMConfig
from fairseq_lite.models.transformer import DecodingModel, TransformerDecoder
from fairseq_lite.models.upgrade import drop_old_final_norm, upgrade_names


@ARCHITECTURES.register("transformer_lm", config=TransformerLMConfig)
class TransformerLanguageModel(DecodingModel):
    """A stack of causal layers that predicts the next token."""

    def __init__(self, cfg: TransformerLMConfig, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.cfg = cfg
        self.decoder = decoder

    @classmethod
    def build(cls, cfg: TransformerLMConfig, task: ModelTask) -> TransformerLanguageModel:
        """Make a model with fresh weights.

        Its longest input is the one the config says, which is that of training where the config
        comes from a checkpoint; else the task's.

        Raises:
            ConfigError: the task has a source and a target.
        """
        theirs = task.max_positions()
        longest = cfg.max_target_positions or theirs
        if isinstance(theirs, tuple) or not isinstance(longest, int):
            raise ConfigError(
                "--arch transformer_lm* is a language model: use --task language_modeling, or"
                " --arch transformer for this task"
            )
        source, target = task.source_dictionary, task.target_dictionary
        share = cfg.share_decoder_input_output_embed
        stack = cfg.decoder_stack()
        embed = Embedding(len(source), stack.input_dim, source.pad())
        # A shared matrix scores every input symbol, also those that are no target.
        words = len(source) if share else len(target)
        return cls(cfg, cls.build_decoder(stack, embed, longest, words, share))

    def forward(  # type: ignore[override]
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        *,
        features_only: bool = False,
    ) -> NetOutput:
        """Score the next token at every position.

        Args:
            src_tokens: (B, T), padded on the right.
            src_lengths: not needed; padding is the future of every token.
            features_only: stop before the output projection.

        Returns:
            Logits (B, T, V), or features (B, T, D'), and a dict of extras.
        """
        out: NetOutput = self.decoder(src_tokens, features_only=features_only)
        return out

    def max_positions(self) -> int:
        return self.decoder.max_positions

    def layers_to_shard(self) -> list[nn.Module]:
        return self.decoder.layers_to_shard()

    def layers_to_compile(self) -> list[nn.Module]:
        return self.decoder.layers_to_compile()

    def tie_weights(self) -> None:
        if self.cfg.share_decoder_input_output_embed:
            self.decoder.output_projection.tie(self.decoder.embed_tokens)

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> StateDict:
        """Rename what older versions wrote; see `models/upgrade.py`.

        A checkpoint from before the final normalisation existed switches it off in this model.
        """
        new = upgrade_names(
            state,
            tied_output=self.cfg.share_decoder_input_output_embed,
            keep={"decoder": self.cfg.decoder_layers_to_keep},
        )
        if drop_old_final_norm(new, "decoder"):
            self.decoder.layer_norm = None
        return new


for _name, _overrides in presets.TRANSFORMER_LM.items():
    ARCHITECTURES.preset(_name, of="transformer_lm", **_overrides)


def _refuse(name: str, instead: str) -> None:
    @ARCHITECTURES.preset_function(name, of="transformer_lm")
    def refuse(namespace: SimpleNamespace) -> None:
        raise ConfigError(
            f"--arch {name}: adaptive embeddings and softmax are not built; use --arch {instead}"
            " with a subword vocabulary (--bpe sentencepiece)"
        )


for _name, _instead in presets.ADAPTIVE_LM.items():
    _refuse(_name, _instead)
