"""flite-preprocess on plain text: any tokenizer, any number of workers, a folder that can move."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import Choice, PreprocessConfig, RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.data import preprocess, texts
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedDataset
from fairseq_lite.data.text import recorded
from fairseq_lite.data.text.api import build_bpe, build_codecs
from fairseq_lite.data.text.bpe import (
    BertConfig,
    Gpt2Config,
    SentencepieceConfig,
    SubwordNmtConfig,
)
from fairseq_lite.data.text.hf import HfTokenizerConfig
from fairseq_lite.data.text.segment import Segmentation
from fairseq_lite.data.text.tokenizers import MosesConfig
from fairseq_lite.errors import ConfigError, DataError, FliteError
from tests.helpers import texts as plain
from tests.helpers.commands import REPOSITORY, flite, flite_process
from tests.helpers.shared import shared_dir

LINES = plain.lines()
MOSES = Choice("moses", MosesConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text and tokenizers made of it."""
    made = tmp_path_factory.mktemp("plain")
    plain.write_lines(made / "head.txt", LINES)
    for split, part in (("train", LINES[:300]), ("valid", LINES[300:320])):
        plain.write_lines(made / f"{split}.en", part)
        plain.write_lines(made / f"{split}.zh", [" ".join(reversed(t.split())) for t in part])
    plain.byte_level(made / "bytes" / "tokenizer.json", LINES)
    plain.unigram(made / "chinese.json", plain.CHINESE)
    plain.wordpiece(made / "bert", plain.ENGLISH)
    plain.sentencepiece_model(made / "spm.model", plain.ENGLISH)
    (made / "codes").write_text("#version: 0.2\nt h\nth e</w>\no f</w>\n")
    return made


def hf(path: Path) -> Segmentation:
    return Segmentation(bpe=Choice("hf_tokenizer", HfTokenizerConfig(str(path))))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Preprocess, the text cut into parts for the workers however short it is."""
    for name in ("_MIN_SPAN", "_MIN_SEGMENTED"):
        monkeypatch.setattr(texts, name, 1)

    def go(segmentation: Segmentation | None, text: Path, name: str = "out", **options) -> Path:
        options = {"only_source": True, "destdir": str(tmp_path / name), **options}
        cfg = PreprocessConfig(**{"trainpref": str(text), **options})
        preprocess.run(cfg, segmentation=segmentation)
        return Path(cfg.destdir)

    return go


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the log, which names the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "preprocess.log"
    }


def items(path: Path) -> list[list[int]]:
    data = IndexedDataset(path)
    return [data[i].tolist() for i in range(len(data))]


def read_back(folder: Path, name: str = "train", dictionary: str = "dict.txt") -> list[str]:
    """The text of a split, from its ids and what the folder records."""
    symbols = Dictionary.load(folder / dictionary)
    subword = build_bpe(recorded.read(folder).bpe)
    return [subword.decode(symbols.string(ids)) for ids in items(folder / name)]


# -- the command of the guide ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "gpt2", "made"])
def test_the_seeds_command(folder, tmp_path, kind) -> None:
    tokenizer = folder / "bytes"
    if kind == "t5":
        tokenizer = shared_dir("data", "tokenizers", "t5_spm")
    elif kind == "gpt2":
        source = shared_dir("data", "tokenizers", "gpt2_bpe")
        tokenizer = plain.gpt2_folder(source, tmp_path / "gpt2")
    text, out = folder / "head.txt", tmp_path / "test-data-bin"
    done = flite_process(
        "preprocess",
        *("--only-source", "--trainpref", text, "--validpref", text, "--destdir", out),
        *("--workers", 4, "--bpe", "hf_tokenizer", "--hf-tokenizer", tokenizer),
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "400 lines segmented by --bpe hf_tokenizer" in done.stdout
    names = {"dict.txt", "preprocess.log", "segmentation", "segmentation.yaml"}
    names |= {f"{split}.{suffix}" for split in ("train", "valid") for suffix in ("bin", "idx")}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "train.bin").read_bytes() == (out / "valid.bin").read_bytes()
    if kind != "t5":  # whose model knows no Chinese and makes all whitespace one space
        assert read_back(out, "valid") == LINES


# -- every tokenizer, any number of workers --------------------------------------------------------


def _segmentation(name: str, folder: Path) -> Segmentation:
    codes, spm, vocab = (str(folder / n) for n in ("codes", "spm.model", "bert/vocab.txt"))
    return {
        "hf bytes": hf(folder / "bytes"),
        "hf chinese": hf(folder / "chinese.json"),
        "hf spm": hf(folder / "spm.model"),
        "moses hf": Segmentation(MOSES, hf(folder / "bert").bpe),
        "moses subword_nmt": Segmentation(MOSES, Choice("subword_nmt", SubwordNmtConfig(codes))),
        "sentencepiece": Segmentation(bpe=Choice("sentencepiece", SentencepieceConfig(spm))),
        "moses bert": Segmentation(MOSES, Choice("bert", BertConfig(bpe_vocab_file=vocab))),
        "characters": Segmentation(bpe=Choice("characters")),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("hf bytes", "hf chinese", "hf spm", "moses hf", "moses subword_nmt", "moses bert"),
        *("sentencepiece", "characters"),
    ],
)
def test_the_bytes_do_not_depend_on_the_workers(folder, run, name) -> None:
    if "subword_nmt" in name:
        pytest.importorskip("subword_nmt")
    segmentation = _segmentation(name, folder)
    numbers = (1, 2, 3) if name == "hf bytes" else (1, 3)
    one, *others = (run(segmentation, folder / "head.txt", str(n), workers=n) for n in numbers)
    for other in others:
        assert content(other) == content(one)
    # A line's ids are those it has by itself.
    dictionary = Dictionary.load(one / "dict.txt")
    found = recorded.read(one)
    encode, _ = build_codecs(found.tokenizer, found.bpe)
    for ids, line in zip(items(one / "train"), LINES, strict=True):
        assert ids == dictionary.encode_line(encode(line)).tolist(), line


def test_nothing_of_a_plain_run_changes(folder, run) -> None:
    out = run(None, folder / "head.txt", workers=2)
    assert {path.name for path in out.iterdir()} == {
        "dict.txt",
        "preprocess.log",
        "train.bin",
        "train.idx",
    }
    assert recorded.read(out) is None


def test_ids_are_observed_pieces_by_frequency(folder, run) -> None:
    out = run(hf(folder / "bytes"), folder / "head.txt", thresholdsrc=3, padding_factor=1)
    dictionary = Dictionary.load(out / "dict.txt")
    counts = dictionary.count[4:]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 3
    log = (out / "preprocess.log").read_text()
    assert "% replaced (by <unk>)" in log and " 0.0% replaced" not in log


def test_what_the_tokenizer_does_not_know_counts_as_replaced(run, tmp_path) -> None:
    tokenizer = plain.whole(tmp_path / "t.json", {"a": 0, "[UNK]": 1}, unknown="[UNK]")
    text = plain.write_lines(tmp_path / "text", ["aa", "日", "aaa日"])
    out = run(hf(tokenizer), text)
    assert "3 sents, 10 tokens, 20.0% replaced" in (out / "preprocess.log").read_text()


def test_whitespace_inside_pieces(run, tmp_path) -> None:
    letters = dict.fromkeys("a \u00a0\u3000\u2028\u0085\x1c\\u{}0123456789bcdef")
    tokenizer = plain.whole(tmp_path / "t.json", {c: n for n, c in enumerate(letters)})
    lines = ["a\u00a0a", " ", "\u3000\u2028 \u0085\x1c", "\\u0020", "", "\\u{} a"]
    out = run(hf(tokenizer), plain.write_lines(tmp_path / "text", lines), workers=3)
    assert read_back(out) == lines
    assert [len(ids) - 1 for ids in items(out / "train")] == [len(line) for line in lines]


# -- the tokenizer's own numbers -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "spm.model", "gpt2"])
def test_numbers_of_the_tokenizer(folder, run, kind) -> None:
    segmentation = hf(folder / kind)
    if kind == "gpt2":
        source = shared_dir("data", "tokenizers", "gpt2_bpe")
        config = Gpt2Config(str(source / "encoder.json"), str(source / "vocab.bpe"))
        segmentation = Segmentation(bpe=Choice("gpt2", config))
    out = run(segmentation, folder / "head.txt", dict_from_tokenizer=True, workers=2)
    dictionary = Dictionary.load(out / "dict.txt")
    subword = build_bpe(segmentation.bpe)
    size = len(subword.vocabulary())
    assert len(dictionary) % 8 == 0 and 0 <= len(dictionary) - size - 4 < 8
    assert dictionary.symbols[4 : size + 4] == list(subword.vocabulary())
    unknown = None if kind == "gpt2" else subword._engine.unknown
    for ids, numbers in zip(items(out / "train"), subword.numbers(LINES), strict=True):
        assert ids == [*(3 if n == unknown else n + 4 for n in numbers), 2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"thresholdsrc": 2}, "--thresholdsrc: --dict-from-tokenizer keeps every piece"),
        ({"nwordssrc": 9}, "--nwordssrc: --dict-from-tokenizer keeps every piece"),
        ({"srcdict": "d"}, "--srcdict and --dict-from-tokenizer: give one of them"),
    ],
)
def test_what_contradicts_it_is_refused(folder, run, options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        run(hf(folder / "bytes"), folder / "head.txt", dict_from_tokenizer=True, **options)


def test_it_needs_a_tokenizer_with_numbers(folder, run) -> None:
    text = folder / "head.txt"
    with pytest.raises(ConfigError, match="--dict-from-tokenizer needs the tokenizer: --bpe hf_"):
        run(None, text, dict_from_tokenizer=True)
    with pytest.raises(ConfigError, match="only --bpe hf_tokenizer, gpt2 and hf_byte_bpe number"):
        run(_segmentation("characters", folder), text, dict_from_tokenizer=True)


@pytest.mark.parametrize("whole", [True, False])
def test_two_languages_with_one_dictionary(folder, run, whole) -> None:
    out = run(
        hf(folder / "bytes"),
        folder / "train",
        only_source=False,
        source_lang="en",
        target_lang="zh",
        joined_dictionary=True,
        dict_from_tokenizer=whole,
        validpref=str(folder / "valid"),
        workers=2,
    )
    assert (out / "dict.en.txt").read_bytes() == (out / "dict.zh.txt").read_bytes()
    # The dictionary of what was observed knows the training text.
    for split in ("train", "valid") if whole else ("train",):
        for lang in ("en", "zh"):
            text = (folder / f"{split}.{lang}").read_bytes().decode().split("\n")[:-1]
            assert read_back(out, f"{split}.en-zh.{lang}", f"dict.{lang}.txt") == text


def test_raw_data_and_dictionaries_alone(folder, run) -> None:
    out = run(hf(folder / "bytes"), folder / "head.txt", dataset_impl="raw", workers=2)
    subword = build_bpe(hf(folder / "bytes").bpe)
    symbols = (out / "train").read_text(encoding="utf-8").split("\n")[:-1]
    assert [subword.decode(line) for line in symbols] == LINES
    alone = run(hf(folder / "bytes"), folder / "head.txt", "alone", dict_only=True)
    assert (alone / "dict.txt").read_bytes() == (out / "dict.txt").read_bytes()
    assert not (alone / "train.idx").exists() and (alone / recorded.FILE).exists()


# -- the record ------------------------------------------------------------------------------------


def test_a_folder_that_moved(folder, run, tmp_path) -> None:
    tokenizer = Path(shutil.copytree(folder / "bert", tmp_path / "tokenizer"))
    (tokenizer / "pytorch_model.bin").write_bytes(b"not part of the tokenizer")
    segmentation = Segmentation(MOSES, hf(tokenizer).bpe)
    out = run(segmentation, folder / "head.txt")
    assert yaml.safe_load((out / recorded.FILE).read_text()) == {
        "format": 1,
        "tokenizer": {"_name": "moses"},
        "bpe": {"_name": "hf_tokenizer"},
        "files": {"bpe.hf_tokenizer": "segmentation/hf_tokenizer"},
    }
    before = build_bpe(segmentation.bpe).encode_lines(LINES)
    shutil.rmtree(tokenizer)
    moved = Path(shutil.move(out, tmp_path / "elsewhere"))
    found = recorded.read(moved)
    assert found.tokenizer == MOSES
    assert build_bpe(found.bpe).encode_lines(LINES) == before
    copies = sorted(path.name for path in (moved / "segmentation" / "hf_tokenizer").iterdir())
    assert copies == ["vocab.txt"]


def _adopted(*words: object) -> RunConfig:
    registries = load_builtins()
    run = parse("flite-generate", [str(word) for word in words], registries)
    return recorded.adopt(run, registries)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_is_recorded_is_taken_up_unless_typed(folder, run, tmp_path, caplog) -> None:
    out = run(Segmentation(MOSES, hf(folder / "bytes").bpe), folder / "head.txt")
    with caplog.at_level(logging.WARNING):
        assert _adopted(out).tokenizer == MOSES
        assert _adopted(out).bpe == recorded.read(out).bpe
        # The same tokenizer from where it was, or not repeated at all, is no contradiction.
        original = _adopted(
            out, "--bpe", "hf_tokenizer", "--hf-tokenizer", folder / "bytes", "--tokenizer", "moses"
        )
        assert original.bpe.config.hf_tokenizer == str(folder / "bytes")
        assert _adopted(out, "--bpe", "hf_tokenizer").bpe == recorded.read(out).bpe
        plain_data = run(None, folder / "head.txt", "words")
        assert _adopted(plain_data).bpe == _adopted(plain_data).tokenizer == Choice()
        assert _warnings(caplog) == []
        other = _adopted(out, "--bpe", "characters")
        assert other.bpe.name == "characters" and other.tokenizer == MOSES
        spm = _adopted(out, "--bpe", "hf_tokenizer", "--hf-tokenizer", folder / "spm.model")
        assert spm.bpe.config.hf_tokenizer == str(folder / "spm.model")
        _adopted(f"{out}:{plain_data}")
    assert _warnings(caplog) == [
        f"--bpe characters counts, as it was typed; {out} was made with --bpe hf_tokenizer",
        f"--bpe hf_tokenizer counts, as it was typed; {out} was made with --bpe hf_tokenizer of "
        "other settings",
        f"{plain_data} is not segmented as {out} is (see their segmentation.yaml)",
    ]


def test_more_splits_for_a_folder(folder, run, tmp_path) -> None:
    """With --srcdict, the record beside the dictionary says how text is segmented."""
    out = run(hf(folder / "bytes"), folder / "head.txt")
    again = ["--only-source", "--srcdict", out / "dict.txt", "--destdir", out]
    assert flite("preprocess", *again, "--testpref", folder / "head.txt") == 0
    assert (out / "test.bin").read_bytes() == (out / "train.bin").read_bytes()
    assert read_back(out, "test") == LINES


def test_one_folder_is_segmented_in_one_way(folder, run) -> None:
    out = run(hf(folder / "bytes"), folder / "head.txt")
    (out / "dict.txt").unlink()
    before = content(out)
    for other, named in ((None, "nothing"), (hf(folder / "spm.model"), "--bpe hf_tokenizer")):
        with pytest.raises(DataError, match=f"segmented by --bpe hf_tokenizer, not by {named}"):
            run(other, folder / "head.txt")
    assert content(out) == before
    run(hf(folder / "bytes"), folder / "head.txt")  # the same again


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: (out / "segmentation.yaml").write_text("a: [1"), "cannot be read"),
        (lambda out: (out / "segmentation.yaml").write_text("[]"), "is not a record"),
        (lambda out: (out / "segmentation.yaml").write_text("format: 2"), "has format 2"),
        (
            lambda out: (out / "segmentation.yaml").write_text("format: 1\nbpe: {_name: mine}"),
            "--bpe mine: unknown subword segmentation",
        ),
        (
            lambda out: (out / "segmentation.yaml").write_text(
                "format: 1\nbpe: {_name: hf_tokenizer}\nfiles: {bpe.hf_tokenizer: ../x}"
            ),
            "not a file of this folder",
        ),
        (lambda out: shutil.rmtree(out / "segmentation"), "is missing; copy it here"),
        (lambda out: (out / "segmentation" / "codes").write_text("x"), "not a file of merges"),
    ],
)
def test_a_damaged_record_is_named_in_one_line(folder, run, damage, says) -> None:
    pytest.importorskip("subword_nmt")
    out = run(_segmentation("moses subword_nmt", folder), folder / "head.txt")
    damage(out)
    with pytest.raises(FliteError, match=says) as e:
        build_bpe(_adopted(out).bpe).encode("a")
    assert "\n" not in str(e.value)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_faults_are_named_with_their_line(folder, run, tmp_path, workers) -> None:
    lines = [b"line\r\n"] * 50 + [b"broken \xff here\n"] + [b"line\r"] * 50
    (tmp_path / "text").write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"text:51: not UTF-8 \(byte 0xff"):
        run(hf(folder / "bytes"), tmp_path / "text", workers=workers)
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "words.json"))
    plain.write_lines(tmp_path / "text", ["a"] * 70 + ["b"] + ["a"] * 70)
    with pytest.raises(DataError, match=r"text:71: cannot be segmented: WordLevel error") as e:
        run(hf(tmp_path / "words.json"), tmp_path / "text", workers=workers)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_cannot_be_used(folder, tmp_path, workers, capfd) -> None:
    (tmp_path / "cut.json").write_bytes((folder / "chinese.json").read_bytes()[:300])
    flags = ["--only-source", "--trainpref", folder / "head.txt", "--destdir", tmp_path / "out"]
    flags += ["--workers", workers, "--bpe", "hf_tokenizer"]
    for more, says in (
        ([], "--hf-tokenizer is needed"),
        (["--hf-tokenizer", tmp_path / "none"], "no such file or folder"),
        (["--hf-tokenizer", tmp_path / "cut.json"], "not a tokenizer that can be read"),
    ):
        assert flite("preprocess", *flags, *more) == 2
        error = capfd.readouterr().err
        assert error.startswith("flite-preprocess: error: ") and says in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_draws_are_not_for_disks(folder, run) -> None:
    cfg = SentencepieceConfig(str(folder / "spm.model"), sentencepiece_enable_sampling=True)
    with pytest.raises(ConfigError, match="--sentencepiece-enable-sampling: .* leave it out"):
        run(Segmentation(bpe=Choice("sentencepiece", cfg)), folder / "head.txt")


def test_text_that_leaves_no_trace_is_warned_of(run, tmp_path, caplog) -> None:
    tokenizer = plain.whole(tmp_path / "t.json", {"a": 0})
    run(hf(tokenizer), plain.write_lines(tmp_path / "text", ["ab"]))
    assert [m for m in caplog.messages if "leaves out what it does not know" in m]


def test_a_plugins_segmentation(folder, tmp_path) -> None:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "__init__.py").write_text(
        "from fairseq_lite.data.text.api import BPE, Subword\n"
        "print('imported')\n"
        "@BPE.register('halves')\n"
        "class Halves(Subword):\n"
        "    def encode(self, text): return f'{text[: len(text) // 2]} {text[len(text) // 2 :]}'\n"
        "    def decode(self, text): return text.replace(' ', '')\n"
    )
    text = plain.write_lines(tmp_path / "text", ["abcd", "efgh"] * 40000)
    flags = ["--only-source", "--trainpref", text, "--workers", 2, "--bpe", "halves"]
    for out in ("one", "two"):
        words = [*flags, "--destdir", tmp_path / out, "--user-dir", tmp_path / "plugin"]
        done = flite_process("preprocess", *words)
        assert done.returncode == 0, done.stderr
    symbols = Dictionary.load(tmp_path / "two" / "dict.txt").symbols[4:8]
    assert symbols == ["ab", "cd", "ef", "gh"]


def test_help_imports_no_tokenizers_library() -> None:
    """Nor PyTorch, to say which flags there are."""
    code = (
        "import sys\n"
        "from fairseq_lite_cli.preprocess import main\n"
        "try: main(['--bpe', 'hf_tokenizer', '--help'])\n"
        "except SystemExit: pass\n"
        "named = {'tokenizers', 'transformers', 'sacremoses', 'torch'} & set(sys.modules)\n"
        "assert not named, named\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--dict-from-tokenizer" in done.stdout and "--hf-tokenizer" in done.stdout


def test_the_whole_vocabulary_needs_no_training_text(folder, run) -> None:
    options = {"trainpref": None, "validpref": str(folder / "head.txt")}
    out = run(hf(folder / "bytes"), folder, dict_from_tokenizer=True, **options)
    assert read_back(out, "valid") == LINES and not (out / "train.idx").exists()
