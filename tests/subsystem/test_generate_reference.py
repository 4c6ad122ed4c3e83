"""flite-generate against what fairseq printed for the same checkpoint and data."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import defaultdict

import pytest

from tests.helpers.commands import flite
from tests.helpers.shared import shared_dir

COMMON = (
    "--source-lang en --target-lang de --gen-subset test --required-batch-size-multiple 1 "
    "--max-len-a 1.2 --max-len-b 10 --beam 5 --cpu"
).split()


@pytest.fixture(scope="module")
def mt():
    return shared_dir("reference", "mt")


@pytest.fixture
def generate(mt, capfd):
    """Run the command on the reference data; its output lines."""

    def run(*args, path=None, status=0):
        path = mt / "trained.pt" if path is None else path
        assert flite("generate", mt / "data-bin", *COMMON, "--path", path, *args) == status
        return capfd.readouterr().out.splitlines()

    return run


def records(lines):
    """{letter: {id: fields}} of the lines of sentences; the first of several wins."""
    found = defaultdict(dict)
    for line in lines:
        name, *fields = line.split("\t")
        if name[1:2] == "-":
            found[name[0]].setdefault(int(name[2:]), fields)
    return found


# A part of the split, where a test compares our own outputs with each other.
PART = ("--batch-size", "16", "--num-shards", "4")


def numbers(fields):
    return [float(x) for x in fields[0].split()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gen_beam5.txt", ["--remove-bpe", "--scoring", "sacrebleu"]),
        ("gen_prefix2.txt", ["--remove-bpe", "--prefix-size", "2"]),
        ("gen_score_reference.txt", ["--score-reference"]),
    ],
    ids=["beam", "prefix", "score-reference"],
)
def test_the_same_as_fairseq(mt, generate, name, options):
    theirs = (mt / "generate" / name).read_text(encoding="utf-8").splitlines()
    ours = generate("--batch-size", "16", *options)
    assert len(ours) == len(theirs)
    assert [line.split("\t")[0] for line in ours] == [line.split("\t")[0] for line in theirs]
    a, b = records(ours), records(theirs)
    assert a["S"] == b["S"]
    assert a["T"] == b["T"]
    for i in b["H"]:
        assert a["H"][i][1] == b["H"][i][1]
        assert a["D"][i][1] == b["D"][i][1]
        assert float(a["H"][i][0]) == pytest.approx(float(b["H"][i][0]), abs=1e-4)
        # Printed with four decimals: one unit of the last place is rounding.
        assert numbers(a["P"][i]) == pytest.approx(numbers(b["P"][i]), abs=1.01e-4)
    assert ours[-1] == theirs[-1]


def test_scores_are_printed_as_fairseq_prints_them(generate):
    found = records(generate(*PART, "--remove-bpe"))
    for i, (score, _) in found["H"].items():
        assert score == repr(float(score))
        values = numbers(found["P"][i])
        assert sum(values) / len(values) == pytest.approx(float(score), abs=1e-4)


def test_batches_do_not_change_translations(generate):
    options = ["--remove-bpe", "--max-len-a", "0", "--max-len-b", "40", "--beam", "3"]
    expected = records(generate("--batch-size", "64", *options))
    found = records(generate("--batch-size", "1", "--num-shards", "4", *options))
    assert len(found["H"]) == 50
    for i, (score, text) in found["H"].items():
        assert expected["H"][i][1] == text
        assert float(score) == pytest.approx(float(expected["H"][i][0]), abs=1e-5)


def test_the_sacrebleu_command_gives_the_same_number(generate, tmp_path):
    lines = generate("--batch-size", "64", "--remove-bpe", "--scoring", "sacrebleu")
    found = records(lines)
    order = sorted(found["D"])
    (tmp_path / "hyp").write_text("".join(found["D"][i][1] + "\n" for i in order), "utf-8")
    (tmp_path / "ref").write_text("".join(found["T"][i][0] + "\n" for i in order), "utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-b", "-w", "2"]
    out = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert lines[-1].startswith(f"Generate test with beam=5: BLEU = {float(out.stdout):.2f} ")


def test_every_line_has_a_record_in_shards_and_nbest(generate):
    shards = [
        records(generate("--max-tokens", "500", "--num-shards", "2", "--shard-id", str(i)))
        for i in (0, 1)
    ]
    assert sorted([*shards[0]["H"], *shards[1]["H"]]) == list(range(200))
    lines = generate("--max-tokens", "3000", "--nbest", "3")
    for letter in "HDP":
        assert sum(line.startswith(letter + "-") for line in lines) == 600


def test_sentences_that_are_too_long_keep_their_place(generate):
    short = ["--max-tokens", "3000", "--remove-bpe", "--max-source-positions", "20"]
    generate(*short, status=2)
    found = records(generate(*short, "--skip-invalid-size-inputs-valid-test"))
    assert sorted(found["H"]) == list(range(200))
    empty = [i for i, fields in found["H"].items() if fields == ["-inf", ""]]
    assert 0 < len(empty) < 100


def test_results_path_and_quiet(generate, tmp_path):
    folder = tmp_path / "a" / "b"
    assert generate("--max-tokens", "3000", "--results-path", folder) == []
    written = (folder / "generate-test.txt").read_text("utf-8").splitlines()
    assert len(written) == 1001
    assert generate("--max-tokens", "3000", "--quiet") == written[-1:]


def test_bf16_translates_alike(generate):
    options = ["--max-tokens", "3000", "--remove-bpe", "--scoring", "sacrebleu", "--quiet"]
    plain, half = (
        float(generate(*options, *extra)[0].split("BLEU = ")[1].split()[0])
        for extra in ([], ["--bf16"])
    )
    assert half == pytest.approx(plain, abs=1.0)


def test_an_ensemble_of_one_model_twice_is_that_model(mt, generate):
    path = mt / "trained.pt"
    single = records(generate(*PART))
    double = records(generate(*PART, path=f"{path}:{path}"))
    for i, (score, text) in single["H"].items():
        assert double["H"][i][1] == text
        assert float(double["H"][i][0]) == pytest.approx(float(score), abs=1e-5)


def test_alignments_and_unknown_words(generate):
    found = records(generate(*PART, "--print-alignment"))
    for i, (pairs,) in found["A"].items():
        source, target = len(found["S"][i][0].split()), len(found["H"][i][1].split())
        split = [pair.split("-") for pair in pairs.split()]
        assert [int(t) for _, t in split] == list(range(target))
        assert all(0 <= int(s) < source for s, _ in split)
    soft = records(generate(*PART, "--print-alignment", "soft"))
    for i, (rows,) in soft["A"].items():
        values = [[float(x) for x in row.split(",")] for row in rows.split()]
        assert len(values) == len(numbers(soft["P"][i]))
        assert all(math.isclose(sum(row), 1.0, abs_tol=1e-3) for row in values)
    forced = records(generate(*PART, "--unkpen=-3", "--replace-unk"))
    assert not any("<unk>" in text for _, text in forced["H"].values())


def test_interactive_gives_what_generate_gives(mt, generate, capfd, tmp_path):
    expected = records(generate("--max-tokens", "3000", "--remove-bpe", "--max-len-a", "0"))
    text = tmp_path / "in.txt"
    lines = (mt / "text" / "test.en").read_text("utf-8").split("\n")[:10]
    text.write_text("\n".join(lines) + "\n", "utf-8")
    args = "-s en -t de --remove-bpe --max-len-b 10 --beam 5 --buffer-size 4 --batch-size 3 --cpu"
    status = flite(
        "interactive", mt / "data-bin", "--path", mt / "trained.pt", "--input", text, *args.split()
    )
    assert status == 0
    out = capfd.readouterr().out.splitlines()
    assert [int(line.split("\t")[0][2:]) for line in out if line.startswith("H-")] == list(
        range(10)
    )
    found = records(out)
    for i in range(10):
        assert found["S"][i] == expected["S"][i]
        assert found["H"][i][1] == expected["H"][i][1]
        assert found["W"][i][1] == "seconds"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampling", "--diverse-beam-groups", "5"], "different ways to search"),
        (["--min-len", "500"], "--min-len 500 is more than the longest output allowed"),
        (["--fp16"], "--fp16 needs a GPU"),
        (["--eos-token", "nix"], "--eos-token nix"),
        (["--replace-unk", "no-such-file"], "no-such-file"),
        (["--gen-subset", "nix"], "nix"),
        (["--scoring", "nix"], "--scoring nix"),
    ],
)
def test_one_line_for_what_cannot_work(mt, capfd, args, message):
    words = [mt / "data-bin", *COMMON, "--path", mt / "trained.pt", "--max-tokens", "3000", *args]
    assert flite("generate", *words) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
