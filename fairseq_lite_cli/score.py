"""flite-score: score a file of hypotheses against a file of references."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import ScoreConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.scoring.bleu import BleuScorer
from fairseq_lite.scoring.standard import SacrebleuConfig, SacrebleuScorer
from fairseq_lite_cli.entry import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, score, print."""
    run = parse("flite-score", sys.argv[1:] if argv is None else argv, load_builtins())
    cfg = run.score
    if cfg is None or cfg.ref is None:
        raise ConfigError("--ref is needed: the file of references")
    if cfg.sacrebleu and cfg.sentence_bleu:
        raise ConfigError("--sacrebleu scores a whole file: leave out --sentence-bleu")
    if cfg.sacrebleu and cfg.order != 4:
        raise ConfigError(f"--order {cfg.order}: --sacrebleu has 4 only")
    hypotheses, references = read(cfg.sys), read(cfg.ref)
    if len(hypotheses) != len(references):
        raise DataError(
            f"--sys {cfg.sys} has {len(hypotheses)} lines and --ref {cfg.ref} has"
            f" {len(references)}: each hypothesis needs its reference"
        )
    print(cfg)
    for line in results(cfg, hypotheses, references):
        print(line)


def results(cfg: ScoreConfig, hypotheses: list[str], references: list[str]) -> Iterator[str]:
    """The lines of scores."""
    if cfg.sacrebleu:
        scorer = SacrebleuScorer(SacrebleuConfig(sacrebleu_lowercase=cfg.ignore_case))
        for pair in zip(references, hypotheses, strict=True):
            scorer.add(*pair)
        yield scorer.result_string()
        yield f"signature: {scorer.signature}"
        return
    bleu = BleuScorer(order=cfg.order, ignore_case=cfg.ignore_case)
    for i, pair in enumerate(zip(references, hypotheses, strict=True)):
        if cfg.sentence_bleu:
            bleu.reset()
        bleu.add(*pair)
        if cfg.sentence_bleu:
            yield f"{i} {bleu.result_string()}"
    if not cfg.sentence_bleu:
        yield bleu.result_string()


def read(name: str) -> list[str]:
    """The lines of a file, or of standard input.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if name == "-":
            if sys.stdin is None:
                raise DataError("-: standard input is closed")
            return [line.rstrip("\n") for line in sys.stdin]
        with Path(name).open(encoding="utf-8") as file:
            # Not splitlines(), which would also break lines at U+2028 and its like.
            return [line.rstrip("\n") for line in file]
    except OSError as e:
        raise DataError(f"{name}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: is not UTF-8 ({e.reason} at byte {e.start})") from None


if __name__ == "__main__":
    sys.exit(run_command("flite-score", main))
