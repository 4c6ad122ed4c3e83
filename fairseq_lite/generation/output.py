"""The lines fairseq's generation prints: S, T, H, D, P and A, separated by tabs."""

from __future__ import annotations

from collections.abc import Iterator

from fairseq_lite.generation.evaluate import Output, Translated


def source_lines(one: Translated) -> Iterator[str]:
    """The S and T lines."""
    if one.source_text is not None:
        yield f"S-{one.id}\t{one.source_text}"
    if one.reference_text is not None:
        yield f"T-{one.id}\t{one.reference_text}"


def output_lines(number: int, output: Output) -> Iterator[str]:
    """The H, D, P and A lines of one output."""
    yield f"H-{number}\t{output.score}\t{output.text}"
    yield f"D-{number}\t{output.score}\t{output.detokenised}"
    yield f"P-{number}\t" + " ".join(f"{score:.4f}" for score in output.positional_scores)
    if output.alignment is not None:
        yield f"A-{number}\t{output.alignment}"


def lines(one: Translated) -> Iterator[str]:
    """Everything flite-generate prints of a sentence."""
    yield from source_lines(one)
    for output in one.outputs:
        yield from output_lines(one.id, output)
