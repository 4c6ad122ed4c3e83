"""train.py, generate.py, the preparation of text and the scoring script, on files made here."""

from __future__ import annotations

import hashlib
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fairseq_lite.errors import DataError
from fairseq_lite.parallel.api import Machine
from tests.helpers.commands import REPOSITORY
from tests.helpers.user_dir import USER_DIR, part

SCORE = REPOSITORY / "scripts" / "sacrebleu.sh"
PREPARE = USER_DIR / "prepare-wmt16ende.sh"


def bash(*words: object, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "no_proxy": "*"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", *(str(word) for word in words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# -- train.py and generate.py -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "machine", "size"),
    [
        (["--ep-world-size", "2"], Machine(), "2"),
        (["--ep-world-size=4", "--cpu"], Machine(cuda_devices=8), "4"),
        (["--ep-world-size", "2"], Machine(cuda_devices=2), None),
        (["--ep-world-size", "2"], Machine(environ={"RANK": "0", "WORLD_SIZE": "2"}), None),
        ([], Machine(), "1"),
        (["--ep-world-size", "0"], Machine(), None),
        (["--ep-world-size", "two"], Machine(), None),
    ],
)
def test_train_starts_as_many_processes_as_share_the_experts(typed, machine, size):
    words = part("train").completed(["data", *typed], machine)
    added = words[words.index("--distributed-world-size") + 1] if size else None
    assert added == size
    assert ("--distributed-world-size" in words) == (size is not None)
    assert words[words.index("--user-dir") + 1] == str(USER_DIR)


def test_what_is_typed_stays():
    typed = ["data", "--user-dir", "x", "--ep-world-size", "2", "--distributed-world-size", "4"]
    assert part("train").completed(typed, Machine()) == typed
    assert part("generate").completed(["data", "--user-dir=x"]) == ["data", "--user-dir=x"]
    assert part("generate").completed(["data"]) == ["data", "--user-dir", str(USER_DIR)]


# -- preparing text -----------------------------------------------------------------------------


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Training text in two files, of which one is compressed, and a test set."""
    german = [f"das  Haus\t{i % 7} {'ja ' * (i % 4)}" for i in range(300)]
    english = [f"the house {i % 7} {'yes ' * (i % 4)}" for i in range(300)]
    german[17] = " "
    english[40] = "far too long " * 30
    folder = tmp_path / "text"
    for lang, lines in (("de", german), ("en", english)):
        write(folder / f"one.{lang}", lines[:100])
        with lzma.open(folder / f"two.{lang}.xz", "wt", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines[100:]))
    write(folder / "test.de", ["das Haus", "", "ja ja ja ja ja ja ja"])
    write(folder / "test.en", ["the house", "no", "yes"])
    return folder


def prepare(text: Path, out: Path, *more: str) -> None:
    part("prepare").main(
        [
            *("--train", str(text / "one"), str(text / "two"), "--test", str(text / "test")),
            *("--out", str(out), "--vocab-size", "28", "--valid-every", "10", *more),
        ]
    )


def test_the_rules_of_preparation(text, tmp_path):
    out = tmp_path / "out"
    prepare(text, out)

    def read(name: str) -> list[str]:
        return (out / name).read_text(encoding="utf-8").splitlines()

    # every tenth line of all training text, the empty one never; the one that is too long goes
    assert len(read("raw/valid.de")) == len(read("raw/valid.en")) == 30
    assert len(read("raw/train.de")) == 300 - 30 - 1
    assert read("raw/valid.de")[0] == "das Haus 2 ja"
    for split in ("train", "valid"):
        pairs = list(zip(read(f"{split}.de"), read(f"{split}.en"), strict=True))
        for pair in pairs:
            short, long = sorted(len(side.split()) for side in pair)
            assert short >= 1
            assert long <= min(250, 1.5 * short)
        assert 0 < len(pairs) <= len(read(f"raw/{split}.de"))
    assert not any("far" in line.replace(" ", "") for line in read("train.en"))
    assert len(read("test.de")) == 3  # test data is never cleaned
    assert read("raw/test.en") == ["the house", "no", "yes"]
    assert read("train.en")[0].startswith("▁")


def test_validation_text_of_its_own_is_not_cleaned(text, tmp_path):
    write(text / "valid.de", ["das Haus", "ja ja ja ja ja ja ja ja"])
    write(text / "valid.en", ["the house", "yes"])
    prepare(text, tmp_path / "out", "--valid", str(text / "valid"))
    read = (tmp_path / "out" / "valid.en").read_text(encoding="utf-8").splitlines()
    assert len(read) == 2
    train = (tmp_path / "out" / "raw" / "train.en").read_text(encoding="utf-8").splitlines()
    assert len(train) == 299  # none is held out


def test_preparation_is_the_same_each_time(text, tmp_path):
    for name in ("a", "b"):
        prepare(text, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.[de][en]"))
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_sides_of_unequal_length_and_missing_files_are_refused(text, tmp_path):
    write(text / "one.de", ["ein Satz"])
    with pytest.raises(DataError, match="unequal numbers of lines"):
        prepare(text, tmp_path / "out")
    (text / "one.de").unlink()
    with pytest.raises(DataError, match=r"one\.de: no such file"):
        prepare(text, tmp_path / "out")


def test_sgml_and_cleaning_limits(tmp_path):
    write(tmp_path / "t.de.sgm", ['<doc id="1">', '<seg id="1">A &amp; B</seg>', "</doc>"])
    assert list(part("prepare").lines(str(tmp_path / "t"), "de")) == ["A & B"]
    limits = part("prepare").Limits(1, 250, 1.5)
    kept = [limits.keep(*pair) for pair in ((2, 3), (3, 2), (2, 4), (0, 1), (251, 250), (250, 250))]
    assert kept == [True, True, False, False, False, True]


class Mirror:
    """The archives of WMT in miniature, in a folder that curl reads as it reads a server."""

    TEXTS = (
        ("training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en.{}"),
        ("training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{}"),
        ("training-parallel-nc-v11.tgz", "training-parallel-nc-v11/news-commentary-v11.de-en.{}"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder / "mirror", folder / "workspace"
        self.folder.mkdir()
        for archive, name in self.TEXTS:
            sides = {"de": "das Haus {} ja", "en": "the house {} yes"}
            files = {
                name.format(lang): [text.format(i % 9) for i in range(120)]
                for lang, text in sides.items()
            }
            self._pack(archive, files)
        self._pack(
            "test-full.tgz",
            {
                "test-full/newstest2014-deen-src.de.sgm": ['<seg id="1">das Haus</seg>'],
                "test-full/newstest2014-deen-ref.en.sgm": ['<seg id="1">the house</seg>'],
            },
        )

    def _pack(self, archive: str, files: dict[str, list[str]]) -> None:
        with tarfile.open(self.folder / archive, "w:gz") as tar:
            for name, lines in files.items():
                path = self.folder / "unpacked" / name
                write(path, lines)
                tar.add(path, name)

    def fetch(self) -> subprocess.CompletedProcess[str]:
        return bash(
            *(PREPARE, "--vocab-size", "24", "--valid-every", "10"),
            WORKSPACE=self.workspace,
            MIRROR=self.folder.as_uri(),
        )


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(tmp_path)


def test_fetching_goes_on_where_it_stopped_and_notices_another_archive(mirror):
    name = "training-parallel-commoncrawl.tgz"
    whole = (mirror.folder / name).read_bytes()
    orig = mirror.workspace / "orig"
    orig.mkdir(parents=True)
    (orig / f"{name}.part").write_bytes(whole[: len(whole) // 2])
    first = mirror.fetch()
    assert first.returncode == 0, first.stderr
    assert (orig / name).read_bytes() == whole
    out = mirror.workspace / "wmt16_en_de"
    assert len((out / "raw" / "train.de").read_text().splitlines()) == 3 * 120 * 9 // 10
    assert (out / "raw" / "test.en").read_text() == "the house\n"
    sums = (orig / "sha256sums.txt").read_text()
    assert f"{hashlib.sha256(whole).hexdigest()}  {name}" in sums

    assert "fetching" not in mirror.fetch().stdout  # all is there
    (orig / name).write_bytes((mirror.folder / "test-full.tgz").read_bytes())
    refused = mirror.fetch()
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "is not the archive whose checksum" in refused.stderr


def test_a_damaged_or_absent_archive_is_refused_in_one_line(mirror):
    path = mirror.folder / "training-parallel-nc-v11.tgz"
    path.write_bytes(path.read_bytes()[:-20])
    damaged = mirror.fetch()
    assert damaged.returncode == 2
    assert "arrived damaged and was removed" in damaged.stderr.splitlines()[-1]
    path.unlink()
    absent = mirror.fetch()
    assert absent.returncode == 2
    assert "cannot be fetched: run this again" in absent.stderr.splitlines()[-1]


# -- scoring ------------------------------------------------------------------------------------

# As flite-generate prints them: in another order than the text's, several hypotheses of one.
OUTPUT = """\
S-1\tein Baum
T-1\ta tree
H-1\t-0.5\ta tree over there
H-1\t-0.9\tsome tree
S-0\tdas Haus
H-0\t-0.2\tthe old house on the hill
H-10\t-0.1\tten is the last of them
Generate test with beam=4: BLEU4 = 1.00
"""
REFERENCE = ["the old house on the hill", "a tree over there", "ten is the last of them"]


def score(folder: Path, output: str, *words: object) -> subprocess.CompletedProcess[str]:
    (folder / "gen.out").write_text(output, encoding="utf-8")
    write(folder / "ref.en", REFERENCE)
    return bash(SCORE, "--ref", folder / "ref.en", *words, "de", "en", folder / "gen.out")


def test_sentences_are_put_in_order_and_scored(tmp_path):
    scored = score(tmp_path, OUTPUT)
    assert scored.returncode == 0, scored.stderr
    assert "= 100.00 100.0/100.0" in scored.stdout
    assert scored.stderr == ""


def test_a_wrong_word_costs(tmp_path):
    scored = score(tmp_path, OUTPUT.replace("old house", "new house"))
    assert scored.returncode == 0
    assert "= 100.00" not in scored.stdout


def test_pieces_are_put_together(tmp_path):
    def cut(line: str) -> str:
        fields = line.split("\t")
        pieces = [f"▁{word[:2]} {word[2:]}".strip() for word in fields[-1].split()]
        return "\t".join([*fields[:-1], " ".join(pieces)])

    lines = OUTPUT.splitlines(keepends=True)
    output = "".join(cut(line) + "\n" if line.startswith("H-") else line for line in lines)
    assert "▁th e ▁ol d ▁ho use" in output
    scored = score(tmp_path, output)
    assert "= 100.00 100.0/100.0" not in score(tmp_path, output.replace("▁", "")).stdout
    assert "= 100.00 100.0/100.0" in scored.stdout, scored.stdout
    assert scored.stderr.count("\n") == 1


def test_detokenised_lines_win(tmp_path):
    lines = [line for line in OUTPUT.splitlines() if line.startswith("H-")]
    broken = OUTPUT.replace("house", "h o u s e") + "\n".join(
        line.replace("H-", "D-", 1) for line in lines
    )
    assert "= 100.00 100.0/100.0" in score(tmp_path, broken + "\n").stdout


def test_moses(tmp_path):
    write(tmp_path / "ref.en", ["It's here, isn't it?"])
    output = "H-0\t-0.1\tIt &apos;s here , isn &apos;t it ?\n"
    (tmp_path / "gen.out").write_text(output, encoding="utf-8")
    words = [SCORE, "--ref", tmp_path / "ref.en", "--detok", "moses", "de", "en"]
    scored = bash(*words, tmp_path / "gen.out")
    assert "= 100.00" in scored.stdout, scored.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["wmt14/full", "de", "en"], "usage"),
        (["wmt14/full", "de", "en", "nothing.out"], "no such file"),
        (["--reference", "x", "de", "en", "gen.out"], "unknown option --reference"),
        (["--detok", "penn", "wmt14/full", "de", "en", "gen.out"], "expected moses or none"),
        (["no-such-set", "de", "en", "gen.out"], "cannot be had"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(tmp_path, words, why):
    (tmp_path / "gen.out").write_text(OUTPUT, encoding="utf-8")
    words = [tmp_path / word if word == "gen.out" else word for word in words]
    refused = bash(SCORE, *words, SACREBLEU=tmp_path, HOME=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert why in refused.stderr


def test_another_number_of_sentences_is_refused(tmp_path):
    refused = score(tmp_path, OUTPUT.replace("H-10", "X-10"))
    assert refused.returncode == 2
    assert "has 2 sentences, the reference 3" in refused.stderr
