"""Batch after batch through a generator: texts, alignments, and how fast it went."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.config.core import CommonConfig, GenerationConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.generation import alignment
from fairseq_lite.generation.evaluate import (
    AlignmentOptions,
    Generator,
    Output,
    Texts,
    Translated,
    prefix_of,
    render,
)
from fairseq_lite.models.api import Model
from fairseq_lite.moe.experts import casts_kept
from fairseq_lite.parallel.stream import worked
from fairseq_lite.parallel.world import SingleWorld, World

logger = logging.getLogger(__name__)

# fairseq's limit where a command line sets none.
DEFAULT_MAX_TOKENS = 12000


def place(
    models: Sequence[Model],
    common: CommonConfig,
    cfg: GenerationConfig,
    device: torch.device | None = None,
) -> torch.device:
    """Put models where they translate, in the precision asked for; returns the device.

    Args:
        models: in any place.
        common: the precision.
        cfg: dropout that is kept on.
        device: this rank's; None: a GPU where there is one and --cpu does not say otherwise.

    Raises:
        ConfigError: --fp16 without a GPU.
    """
    if device is None:
        found = torch.cuda.is_available() and not common.cpu
        device = torch.device("cuda" if found else "cpu")
    cuda = device.type == "cuda"
    dtype = torch.float32
    if common.bf16 or common.memory_efficient_bf16 or (common.amp and not cuda):
        dtype = torch.bfloat16
    elif common.fp16 or common.memory_efficient_fp16 or common.amp:
        if not cuda:
            raise ConfigError("--fp16 needs a GPU; on a CPU use --bf16")
        dtype = torch.float16
    for model in models:
        model.to(device=device, dtype=dtype).eval()
        if cfg.retain_dropout:
            model.retain_dropout(cfg.retain_dropout_modules)
    return device


@contextmanager
def unchanging(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, no weight of `models` changes: what they make of their weights is made once."""
    with ExitStack() as stack:
        for model in dict.fromkeys(models):
            stack.enter_context(casts_kept(model))
        yield


class Session:
    """A generator with everything around it.

    Args:
        generator: what finds the hypotheses.
        models: those it uses, for alignments.
        texts: how ids become text.
        cfg: the flags.
        device: where the models are.
        source_line: see `AlignmentOptions`.
    """

    def __init__(
        self,
        generator: Generator,
        models: Sequence[Model],
        texts: Texts,
        cfg: GenerationConfig,
        *,
        device: torch.device | str = "cpu",
        source_line: Callable[[int], str | None] = lambda n: None,
    ) -> None:
        self.generator = generator
        self.texts = texts
        self.cfg = cfg
        self.device = torch.device(device)
        self.options = AlignmentOptions(
            models,
            cfg.print_alignment,
            alignment.load_dictionary(cfg.replace_unk),
            source_line,
        )
        self._warned = False
        self.seconds = 0.0
        self.sentences = 0
        self.tokens = 0

    def translate(self, sample: dict[str, Any]) -> list[Translated]:
        """Translate a batch as the task's dataset collates it; results in the batch's order."""
        sample = _moved(sample, self.device)
        start = time.perf_counter()
        prefix = prefix_of(sample, self.cfg.prefix_size)
        results = self.generator.generate(sample, prefix)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.sentences += len(results)
        self.tokens += sum(len(found[0].tokens) for found in results if found)
        self._look_at_scores([found[0].score for found in results if found])
        return render(
            results,
            sample,
            self.texts,
            ignored=self.generator.ignored_symbols,
            nbest=self.cfg.nbest,
            options=self.options,
        )

    def _look_at_scores(self, scores: list[float]) -> None:
        """Say once that outputs mean nothing, as after a training that diverged."""
        if not self._warned and not all(map(math.isfinite, scores)):
            self._warned = True
            logger.warning(
                "a sentence has no output with a finite score: what is printed for such means"
                " nothing; the weights of the model may not be finite"
            )

    def untranslated(self, sample: dict[str, Any]) -> list[Translated]:
        """Records of sentences that are too long for the model: an empty output, score -inf."""
        empty = Output("", "", float("-inf"), [])
        found = render(
            [[] for _ in sample["id"]], sample, self.texts, ignored=self.generator.ignored_symbols
        )
        for one in found:
            one.outputs = [empty]
        return found

    def summary(self, world: World | None = None) -> str:
        """Sentences, tokens (end symbols included) and seconds of the search alone.

        Args:
            world: ranks that share the work, all of which call this; None: this process alone.
        """
        work = worked(
            SingleWorld() if world is None else world,
            {"sentences": self.sentences, "tokens": self.tokens},
            self.seconds,
        )
        return (
            f"Translated {work.counts['sentences']:,} sentences ({work.counts['tokens']:,} tokens)"
            f" in {work.seconds:.1f}s ({work.speeds['sentences']:.2f} sentences/s, "
            f"{work.speeds['tokens']:.2f} tokens/s)"
        )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return value
