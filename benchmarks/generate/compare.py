"""Sentences a second of beam search: flite-generate's generator and CTranslate2, the same weights.

    pip install ctranslate2
    python -m benchmarks.generate.compare --threads 2 --rounds 5 [--out FILE.json]

A transformer of the size of transformer_iwslt_de_en (6+6 layers, d 512, inner 1024, 10,000 symbols)
with random weights translates batches of 64 sentences of 25 words with beam 5; the length of the
outputs is forced, so both run the decoder 30 times. CTranslate2 runs once with all threads in one
translator and once with one thread in each of several; every contestant has a process of its own,
since two OpenMP runtimes in one slow each other down. That both compute the same is checked first,
sentence by sentence.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.timing import Apart, machine, ratios, record, take_turns
from fairseq_lite.config.core import GenerationConfig
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.generation.generator import SequenceGenerator
from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.transformer import TransformerModel

SYMBOLS, BATCH, WORDS, STEPS, BEAM = 10_000, 64, 25, 30, 5
KINDS = ("fp32", "bf16")


def make_model(dictionary: Dictionary) -> TransformerModel:
    task = SimpleNamespace(
        source_dictionary=dictionary,
        target_dictionary=dictionary,
        max_positions=lambda: (1024, 1024),
    )
    torch.manual_seed(1)
    cfg = TransformerConfig(
        encoder_ffn_embed_dim=1024,
        encoder_attention_heads=4,
        decoder_ffn_embed_dim=1024,
        decoder_attention_heads=4,
        share_all_embeddings=True,
    )
    return TransformerModel.build(cfg, task).eval()


def make_sources(dictionary: Dictionary) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(4, len(dictionary), (BATCH, WORDS), generator=generator)
    return torch.cat([words, torch.full((BATCH, 1), dictionary.eos())], dim=1)


def make_dictionary() -> Dictionary:
    dictionary = Dictionary()
    for i in range(SYMBOLS - 4):
        dictionary.add_symbol(f"w{i}")
    return dictionary


def ours(bf16: bool, threads: int, length: int) -> Callable[[], list[list[str]]]:
    """Our generator; outputs have `length` words, and the end symbol takes one more step."""
    torch.set_num_threads(threads)
    dictionary = make_dictionary()
    model = make_model(dictionary)
    if bf16:
        model = model.to(torch.bfloat16)
    generator = SequenceGenerator(
        [model], dictionary, GenerationConfig(beam=BEAM, min_len=length, max_len_b=length)
    )
    sources = make_sources(dictionary)
    lengths = torch.full((BATCH,), sources.size(1))
    sample = {"net_input": {"src_tokens": sources, "src_lengths": lengths}}

    def run() -> list[list[str]]:
        found = generator.generate(sample)
        return [[dictionary[i] for i in best.tokens.tolist()[:-1]] for best, *_ in found]

    return run


def theirs(folder: str, kind: str, inter: int, intra: int) -> Callable[[], list[list[str]]]:
    import ctranslate2

    translator = ctranslate2.Translator(
        folder, compute_type=kind, inter_threads=inter, intra_threads=intra
    )
    dictionary = make_dictionary()
    words = [[dictionary[i] for i in row] for row in make_sources(dictionary).tolist()]

    def run() -> list[list[str]]:
        found = translator.translate_batch(
            words,
            beam_size=BEAM,
            min_decoding_length=STEPS,
            max_decoding_length=STEPS,
            max_batch_size=BATCH // inter,
            return_scores=True,
        )
        return [result.hypotheses[0] for result in found]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-ctranslate2", action="store_true", help="time only ours")
    args = parser.parse_args()
    n = args.threads
    runs = {f"fairseq-lite {kind}": Apart(ours, kind == "bf16", n, STEPS - 1) for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        if not args.no_ctranslate2:
            from benchmarks.generate.ct2 import convert

            dictionary = make_dictionary()
            convert(make_model(dictionary), dictionary, Path(folder))
            for kind in ("float32", "int8"):
                for inter, intra in {(1, n), (n, 1)}:
                    runs[f"CTranslate2 {kind}, {inter} x {intra} threads"] = Apart(
                        theirs, folder, kind, inter, intra
                    )
        reference = ours(False, n, STEPS)()
        outputs = {name: run() for name, run in runs.items()}  # warm-up
        outputs["fairseq-lite bf16"] = ours(True, n, STEPS)()
        del outputs["fairseq-lite fp32"]
        equal = {
            name: sum(a == b for a, b in zip(texts, reference, strict=True))
            for name, texts in outputs.items()
        }
        seconds = take_turns(runs, args.rounds, warm_up=False)
        for run in runs.values():
            run.close()
    record(
        {
            "machine": machine(args.threads),
            "sentences_per_second": {
                name: round(BATCH / statistics.median(times), 2) for name, times in seconds.items()
            },
            f"outputs of {BATCH} that equal those of fairseq-lite fp32": equal,
            "times faster": {
                f"fairseq-lite {kind} than {name}": ratios(times, seconds[f"fairseq-lite {kind}"])
                for name, times in seconds.items()
                if name.startswith("CTranslate2")
                for kind in KINDS
            },
        },
        args.out,
    )


if __name__ == "__main__":
    main()
