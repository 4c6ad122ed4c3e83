"""Plain text, and tokenizers of several kinds made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Whitespace of all kinds, nothing at all, other scripts, symbols that mean something.
NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\u00a0no-break\u3000ideographic\u2028separator\u0085next\x1cfile",
    "zero\u200bwidth \ufeff joiner\u200d",
    "中文没有空格，标点也不同。",
    "日本語のテキスト mixed with English",
    "naïve café e\u0301 ﬁ Ｆｕｌｌ",
    "emoji 👩‍👩‍👧 and 𝒻ancy 𓀀",
    "<s> </s> <pad> <unk> madeupword0000 [CLS] <|endoftext|>",
    "back\\slash \\u0020 \\u{} \\u{7} \\\\u0041",
    "@@ ## ▁ Ġ |",
    "\x00\x01 control",
    "a" * 700,
]

ENGLISH = [
    "The quick brown fox jumps over the lazy dog.",
    "It was the best of times, it was the worst of times.",
    "Call me Ishmael; some years ago, never mind how long precisely.",
    "All happy families are alike, every unhappy family is unhappy in its own way.",
]
CHINESE = [
    "道可道，非常道。名可名，非常名。",
    "天地不仁，以万物为刍狗。",
    "学而时习之，不亦说乎？",
    "有朋自远方来，不亦乐乎？ Friends come from afar.",
]


def lines(count: int = 400) -> list[str]:
    """Lines of plain text, English and Chinese, some of them nasty; always the same ones."""
    plain = ENGLISH + CHINESE
    found = [f"{plain[n % len(plain)]} {plain[n * 7 % len(plain)]} {n}" for n in range(count)]
    step = max(count // len(NASTY), 1)
    for n, line in enumerate(NASTY):
        if n * step < count:
            found[n * step] = line
    return found


def write_lines(path: Path, text: list[str]) -> Path:
    """Write lines, each ended by LF."""
    path.write_bytes("".join(line + "\n" for line in text).encode())
    return path


def byte_level(path: Path, text: list[str], prefix_space: bool = False) -> Path:
    """A tokenizer.json of byte-level BPE with special symbols, a template and a limit of length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=40)
    return _saved(tokenizer, path)


def unigram(path: Path, text: list[str]) -> Path:
    """A tokenizer.json of a unigram model with an unknown symbol, as T5's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>", "<extra_id_0>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return _saved(tokenizer, path)


def whole(path: Path, vocab: dict[str, int], unknown: str | None = None) -> Path:
    """A tokenizer.json of BPE without merges, over whole lines: a piece a character."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    return _saved(tokenizer, path)


def wordpiece(folder: Path, text: list[str]) -> Path:
    """A folder with BERT's vocab.txt, which is lower-cased by default."""
    words = sorted({word for line in text for word in line.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    vocab += [word for word in words if len(word) > 1 and word.isalpha()]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return folder


def sentencepiece_model(path: Path, text: list[str], **options: Any) -> Path:
    """A sentencepiece model."""
    import sentencepiece

    options = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, **options}
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=out, **options
        )
    return path


def gpt2_folder(source: Path, folder: Path) -> Path:
    """fairseq's GPT-2 files under Hugging Face's names."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_bytes((source / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
    return folder


def _saved(tokenizer: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    json.loads(path.read_text(encoding="utf-8"))
    return path
