"""flite-eval-lm and generation with the language model that fairseq was measured on."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from fairseq_lite.data import context
from fairseq_lite.data.monolingual import Examples
from fairseq_lite.generation.likelihood import TargetScorer
from tests.helpers.commands import flite
from tests.helpers.shared import shared_dir

# What fairseq's eval_lm printed, with --tokens-per-sample 128 --batch-size 4.
EXPECTED = {
    "blocks": ([], "6.4679", "88.52"),
    "context": (["--context-window", "32"], "6.4701", "88.65"),
    "sentences": (["--sample-break-mode", "eos"], "6.4366", "86.62"),
}


@pytest.fixture(scope="module")
def lm():
    return shared_dir("reference", "lm")


@pytest.fixture
def messages(lm, capfd):
    """Run a command on the reference data; what it printed, without times and names."""

    def run(*args, command="eval_lm", path=None, status=0):
        path = lm / "trained.pt" if path is None else path
        words = [lm / "data-bin", "--path", path, "--gen-subset", "test", "--cpu", *args]
        assert flite(command, *words) == status
        captured = capfd.readouterr()
        if status:
            return [line for line in captured.err.splitlines() if "error:" in line]
        return [line.split(" | ", 3)[-1] for line in captured.out.splitlines()]

    return run


def result(lines):
    return re.fullmatch(r"Loss \(base 2\): (.*), Perplexity: (.*)", lines[-1]).groups()


@pytest.mark.parametrize(("options", "loss", "perplexity"), EXPECTED.values(), ids=EXPECTED)
def test_the_same_as_fairseq(messages, options, loss, perplexity):
    lines = messages("--batch-size", "4", "--required-batch-size-multiple", "1", *options)
    assert result(lines) == (loss, perplexity)
    assert re.fullmatch(r"Evaluated 8,045 tokens in .*s \(.* tokens/s\)", lines[-2])


@pytest.mark.parametrize("name", ["context", "sentences"])
def test_batches_and_slices_change_nothing(messages, name):
    options, loss, perplexity = EXPECTED[name]
    options = [*options, "--max-tokens", "3000", "--softmax-batch", "77"]
    assert result(messages(*options)) == (loss, perplexity)


def test_bugs_would_be_noticed(messages, monkeypatch):
    options, loss, _ = EXPECTED["context"]

    def scored_context(self, indices):
        found = read(self, indices)
        return Examples(found.source, np.roll(found.source, -1), found.sizes)

    read = context.ContextWindow.read
    monkeypatch.setattr(context.ContextWindow, "read", scored_context)
    assert abs(float(result(messages(*options))[0]) - float(loss)) > 1e-3
    monkeypatch.undo()

    score = TargetScorer.score
    shifted = lambda self, inputs, target: score(self, inputs, target.roll(1, 1))  # noqa: E731
    monkeypatch.setattr(TargetScorer, "score", shifted)
    assert abs(float(result(messages())[0]) - float(EXPECTED["blocks"][1])) > 1e-3


def test_shards_and_the_first_batches_are_parts_of_the_whole(messages):
    shards = [messages("--num-shards", "2", "--shard-id", n, "--batch-size", "4") for n in (0, 1)]
    tokens = [int(re.match(r"Evaluated ([\d,]*)", s[-2])[1].replace(",", "")) for s in shards]
    losses = [float(result(lines)[0]) for lines in shards]
    assert sum(tokens) == 8045
    mean = sum(t * x for t, x in zip(tokens, losses, strict=True)) / 8045
    assert mean == pytest.approx(6.4679, abs=2e-4)
    few = messages("--max-valid-steps", "2", "--batch-size", "4", "--max-tokens", "1024")
    assert 0 < int(re.match(r"Evaluated ([\d,]*)", few[-2])[1].replace(",", "")) <= 8 * 128


def test_words_statistics_files_and_json(messages, tmp_path):
    flags = ["--output-word-probs", "--output-word-stats", "--results-path", tmp_path]
    lines = messages("--sample-break-mode", "eos", "--log-format", "json", *flags)
    written = (tmp_path / "eval_lm-test.txt").read_text("utf-8").splitlines()
    found = json.loads(lines[-1])
    assert found["tokens"] == 8045
    assert f"Loss (base 2): {found['loss']:.4f}, Perplexity: {found['perplexity']:.2f}" in lines
    probs = [line for line in written if re.match(r"\d+ ", line)]
    assert len(probs) == 300
    values = [float(x) for line in probs for x in re.findall(r"\[(-[\d.]+)\]", line)]
    assert len(values) == 8045
    assert -sum(values) / 8045 / np.log(2) == pytest.approx(6.4366, abs=1e-4)
    stats = [line.split("\t") for line in written if line.count("\t") == 5 and "[" not in line]
    assert sum(int(fields[1]) for fields in stats) == 8045
    assert sum(float(fields[2]) for fields in stats) == pytest.approx(sum(values), abs=0.05)
    assert [int(f[1]) for f in stats] == sorted((int(f[1]) for f in stats), reverse=True)
    assert written[-1] == "Loss (base 2): 6.4366, Perplexity: 86.62"
    assert all(line in lines for line in written)


def test_words_of_the_text(messages, lm):
    text = (lm / "text" / "test.txt").read_text("utf-8")
    *_, words, loss = messages("--tokenizer", "space")
    assert loss == "Loss (base 2): 6.4679, Perplexity: 88.52"
    count, size = re.search(r"\(([\d,]*) words\).*\(([\d,]*) bytes\)", words).groups()
    assert int(count.replace(",", "")) == len(text.split())
    assert 0 < int(size.replace(",", "")) < len(text.encode())  # <unk> for what is not known
    value = float(re.search(r"perplexity: ([\d.]*)", words)[1])
    assert value == pytest.approx(2 ** (6.4679 * 8045 / len(text.split())), rel=1e-3)


def test_ensembles_and_bf16(messages, lm):
    path = f"{lm / 'trained.pt'}:{lm / 'trained.pt'}"
    few = ["--max-valid-steps", "2", "--batch-size", "4"]
    plain, double = messages(*few), messages(*few, path=path)
    assert result(plain) == result(double)
    mixed = messages(*few, path=f"{lm / 'trained.pt'}:{lm / 'init.pt'}")
    assert result(mixed) != result(plain)
    half = float(result(messages(*few, "--bf16"))[0])
    assert half == pytest.approx(float(result(plain)[0]), abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens-per-sample", "256"], "type --tokens-per-sample 128 or less"),
        (["--context-window", "128"], "--context-window 128 leaves no room"),
        (["--softmax-batch", "0"], "--softmax-batch 0: expected 1 or more"),
        (["--gen-subset", "nix"], "no split 'nix'"),
        (["--remove-bpe", "letter"], "--post-process letter: flite-eval-lm joins"),
        (["--task", "translation"], "flite-eval-lm measures language models"),
        (["--path", ""], "--path is needed"),
        (["--fp16"], "--fp16 needs a GPU"),
    ],
)
def test_one_line_for_what_cannot_work(messages, options, message):
    (error,) = messages(*options, status=2)
    assert message in error


# -- generation -----------------------------------------------------------------------------------

SENTENCES = ["--task", "language_modeling", "--sample-break-mode", "eos"]


def records(lines):
    found = {}
    for line in lines:
        name, *fields = line.split("\t")
        if name[1:2] == "-":
            found.setdefault(name[0], {}).setdefault(int(name[2:]), fields)
    return found


def test_generation_goes_on_from_prefixes(messages, lm):
    options = [*SENTENCES, "--prefix-size", "4", "--max-len-b", "14", "--beam", "3"]
    lines = messages(*options, "--max-tokens", "3000", command="generate")
    found = records(lines)
    assert lines[-1].startswith("Generate test with beam=3: BLEU4 = ")
    assert sorted(found["H"]) == list(range(300))
    part = ["--batch-size", "1", "--num-shards", "6"]
    alone = records(messages(*options, *part, command="generate"))
    for number, (score, text) in alone["H"].items():
        assert found["H"][number][1] == text
        assert float(found["H"][number][0]) == pytest.approx(float(score), abs=1e-5)
    for number, (score, text) in found["H"].items():
        start = found["S"][number][0].split()[:4]
        assert text.split()[: len(start)] == start
        positional = [float(x) for x in found["P"][number][0].split()]
        assert sum(positional) / len(positional) == pytest.approx(float(score), abs=1e-4)
    # What the scorer says of whole sentences is what flite-eval-lm says of them.
    scored = records(messages(*SENTENCES, "--score-reference", command="generate"))
    bits = [float(x) for fields in scored["P"].values() for x in fields[0].split()]
    assert len(bits) == 8045
    assert -sum(bits) / 8045 == pytest.approx(6.4366, abs=1e-4)


def test_interactive_continues_lines_in_order(lm, capfd, tmp_path):
    lines = (lm / "text" / "test.txt").read_text("utf-8").split("\n")[:7]
    starts = [" ".join(line.split()[: 2 + i]) for i, line in enumerate(lines)] + [""]
    (tmp_path / "in").write_text("\n".join(starts) + "\n", "utf-8")
    words = [lm / "data-bin", *SENTENCES[:2], "--path", lm / "trained.pt", "--cpu", "--nbest", "2"]
    words += ["--input", tmp_path / "in", "--max-len-b", "14", "--beam", "2"]
    scores = []
    for extra in ([], ["--buffer-size", "8", "--batch-size", "8"]):
        assert flite("interactive", *words, *extra) == 0
        out = capfd.readouterr().out.splitlines()
        order = [int(line.split("\t")[0][2:]) for line in out if line.startswith("H-")]
        assert order == [i for i in range(8) for _ in range(2)]
        found = records(out)
        for i, start in enumerate(starts):
            source = found["S"][i][0]
            assert len(source.split()) == len(start.split())
            assert found["H"][i][1].startswith(source)
        scores.append([float(found["H"][i][0]) for i in range(8)])
    assert np.isfinite(scores).all()
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
