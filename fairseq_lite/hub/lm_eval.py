"""Language models for lm-evaluation-harness: `lm_eval --model fairseq_lite --model_args path=...`.

Needs `pip install 'fairseq-lite[lm-eval]'`; what makes the command know the name is in
`fairseq_lite.lm_eval_hook`, and how to use all this in docs/lm-evaluation-harness.md.

The harness asks for three things. Continuations of contexts are scored a context at a time, so that
the options of a question share what is computed of it. Whole texts are scored in the harness's own
windows. Outputs are generated up to the first of some strings.

A text begins with the model's start symbol, whatever the harness puts in front of it, and still
does when a context is cut from the left.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fairseq_lite import hub
from fairseq_lite.errors import ConfigError, DataError, FliteError, MissingDependency
from fairseq_lite.hub.led import LedModel
from fairseq_lite.hub.lm_eval_args import GenerationArgs, ModelArgs

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise MissingDependency(
        "lm-evaluation-harness is needed: pip install 'fairseq-lite[lm-eval]'"
    ) from None

# Requests between two steps of the progress bar; what --use_cache has is whole up to the last one.
_PORTION = 1024
# Texts whose ids are kept: the options of a question have its context in common.
_TEXTS = 4096

# As `_loglikelihood_tokens` gets them: context and continuation, the ids of both.
Request = tuple[tuple[str, str], list[int], list[int]]


@functools.cache
def tell_in_one_line() -> None:
    """Let the harness's own command end in one line after a user's error, as our commands do.

    It lets every error through to Python, which prints all calls in front of it. Other programs
    that use the harness are left as they are.
    """
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.stem
    if name not in ("lm_eval", "lm-eval"):
        return
    usual = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FliteError):
            print(f"{name}: error: {error}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = told


class FairseqLiteLM(TemplateLM):
    """A language model of ours, as the harness sees one.

    Args:
        given: see `ModelArgs`.

    Raises:
        ConfigError: an argument that is not known or out of range, or a model that translates.
        CheckpointError: no such file, or damaged.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        tell_in_one_line()
        args = ModelArgs.of(given)
        self.led = LedModel(
            args.path,
            device=args.model_device(),
            bf16=args.bf16,
            fp16=args.fp16,
            user_dir=args.user_dir,
            overrides=args.model_overrides(),
        )
        model = self.led.model
        self.args, self.model = args, model
        self._device = model.device
        longest = model.max_tokens + 1
        self.max_length: int = longest if args.max_length is None else args.max_length
        if not 2 <= self.max_length <= longest:
            raise ConfigError(f"max_length={self.max_length}: this model takes 2 to {longest}")
        self.max_tokens = args.tokens_in_batch(self.max_length)
        self._start = model.start_token(args.start)
        self._encoded = functools.lru_cache(maxsize=_TEXTS)(
            lambda text: model.encode(text).tolist()
        )

    # -- what the harness asks about the model ---------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.model.dictionary.eos()

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with."""
        return self._start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text; with the start symbol only where that is asked for."""
        ids: list[int] = self._encoded(string)
        return [self.prefix_token_id, *ids] if add_special_tokens else list(ids)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """The text of ids."""
        return self.model.decode(list(tokens))

    def get_model_info(self) -> dict[str, Any]:
        """What is written beside the results."""
        return {
            "model_dtype": str(next(self.model.models[0].parameters()).dtype),
            "model_max_length": self.max_length,
            "model_max_tokens": self.max_tokens,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refused: these models know no roles.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("--apply_chat_template: this model has no template; leave it out")

    # -- scores ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        Raises:
            DataError: a continuation adds no token to its context, or is longer than the model
                takes.
        """
        found: list[tuple[float, bool]] = []
        for part in self._portions(requests, "loglikelihood", disable_tqdm):
            asked = [self._fitted(*request) for request in part]
            scores = self._score(asked, self.prefix_token_id)
            for (texts, _, _), score in zip(part, scores, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, score)
            found += scores
        return found

    def _fitted(
        self, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A context without its start symbol, cut from the left until both fit, and the rest."""
        if not continuation:
            raise DataError(
                f"a continuation that adds no token to its context: {texts[1]!r} behind"
                f" {texts[0][-40:]!r}; the task's options must differ from what stands before them"
            )
        # The start symbol takes one place, and the last token is not read.
        room = self.max_length - len(continuation)
        if room < 0:
            raise DataError(
                f"a continuation of {len(continuation)} tokens, where the model takes"
                f" {self.max_length}: {texts[1][:40]!r}"
            )
        if context[:1] == [self.prefix_token_id]:
            context = context[1:]
        return tuple(context[max(0, len(context) - room) :]), tuple(continuation)

    def _score(
        self, asked: Sequence[tuple[Sequence[int], Sequence[int]]], start: int
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities of continuations, and whether each is the greedy one.

        Args:
            asked: context and continuation of each.
            start: the id that stands in front of every context.
        """
        places: dict[Sequence[int], list[int]] = {}
        for i, (context, _) in enumerate(asked):
            places.setdefault(context, []).append(i)
        branches = [
            hub.Branches(_ids(context), tuple(_ids(asked[i][1]) for i in where))
            for context, where in places.items()
        ]
        results = self.led.ask("score_branches", branches, max_tokens=self.max_tokens, start=start)
        found = [(0.0, True)] * len(asked)
        for where, result in zip(places.values(), results, strict=True):
            for i, scores, greedy in zip(where, result.continuations, result.greedy, strict=True):
                found[i] = (float(scores.sum(dtype=np.float64)), bool(greedy))
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts in the harness's windows, each token once.

        The first window of a text begins with the start symbol, each later one with the token in
        front of it, which then stands in its place.
        """
        totals: list[float] = []
        for part in self._portions(requests, "loglikelihood_rolling", disable_tqdm):
            texts = [request.args[0] for request in part]
            # Windows by what they begin with: one call scores those that begin alike.
            windows: dict[int, list[tuple[int, list[int], list[int]]]] = {}
            for i, text in enumerate(texts):
                for context, rest in self._windows(text):
                    windows.setdefault(context[0], []).append((i, context[1:], rest))
            sums = [0.0] * len(texts)
            for first, group in windows.items():
                scores = self._score([(tuple(c), tuple(r)) for _, c, r in group], first)
                for (i, _, _), (score, _) in zip(group, scores, strict=True):
                    sums[i] += score
            for text, total in zip(texts, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals += sums
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """The windows of a text: what is read, its first token in the start symbol's place."""
        windows = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return map(make_disjoint_window, windows)

    # -- outputs ---------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate outputs; a context that leaves no room for one is cut from the left.

        Raises:
            ConfigError: an argument of generation that is unknown, or longer outputs than inputs.
        """
        found = [""] * len(requests)
        groups: dict[GenerationArgs, list[int]] = {}
        for i, request in enumerate(requests):
            args = GenerationArgs.of(request.args[1], self.args.max_gen_toks)
            groups.setdefault(args, []).append(i)
        # Drawn tokens follow the harness's --seed, and differ from portion to portion.
        seed = torch.initial_seed() % 2**40
        for args, where in groups.items():
            for part in self._portions(where, "generate_until", disable_tqdm):
                prompts = [self._prompt(requests[i].args[0], args) for i in part]
                texts = self.led.ask(
                    "complete",
                    prompts,
                    until=args.until,
                    max_new_tokens=args.max_new_tokens,
                    seed=seed,
                    start=self.args.start,
                    **dict(args.options),
                )
                seed += 1
                for i, text in zip(part, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    found[i] = text
        return found

    def _prompt(self, context: str, args: GenerationArgs) -> Any:
        room = self.max_length - 1 - args.max_new_tokens
        if room < 0:
            raise ConfigError(
                f"outputs of {args.max_new_tokens} tokens do not fit into the model's"
                f" {self.max_length}: lower --gen_kwargs max_gen_toks=N"
            )
        ids = self.tok_encode(context)
        return _ids(ids[max(0, len(ids) - room) :])

    def _portions(self, requests: Sequence[Any], name: str, quiet: bool) -> Iterator[Sequence[Any]]:
        """Requests a thousand at a time, behind a progress bar."""
        with tqdm(total=len(requests), desc=f"Running {name} requests", disable=quiet) as bar:
            for first in range(0, len(requests), _PORTION):
                part = requests[first : first + _PORTION]
                yield part
                bar.update(len(part))


def _ids(tokens: Iterable[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(list(tokens), dtype=np.int64)
