"""Our language models under lm-evaluation-harness, and what it finds of the same model elsewhere.

The reference is a model that transformers runs and the harness's own adapter asks: OPT is fairseq's
transformer, so its weights can be ours.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

from fairseq_lite import hub
from fairseq_lite.errors import CheckpointError, ConfigError, DataError
from tests.helpers import harness
from tests.helpers.commands import flite
from tests.helpers.distributed import run_distributed

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM, hash_args

from fairseq_lite.hub import lm_eval
from fairseq_lite.hub.lm_eval import FairseqLiteLM
from fairseq_lite_cli import lm_eval as command

WORDS = "the old man went down to sea and saw a ship with white sails far out on water".split()
POSITIONS = 24
SHAPE = "embed-dim 16 input-dim 16 output-dim 16 ffn-embed-dim 32 layers 2 attention-heads 2"
# What makes the model one that OPT can be: learned positions and no factor before them.
LIKE_OPT = ["--decoder-learned-pos", "--no-scale-embedding", "--decoder-normalize-before"]
# Kinds of checkpoints: updates, and further flags of flite-train.
KINDS = {
    "dense": [40],
    "sharded": [5, "--ddp-backend", "fully_sharded", "--use-sharded-state"],
    "moe": [5, "--moe-freq", 1, "--moe-expert-count", 3, "--criterion", "moe_cross_entropy"],
}


def sentence(rng: random.Random, low: int, high: int) -> str:
    """Mostly each word's own successors, so that there is something to be learned."""
    found = [rng.randrange(len(WORDS))]
    for _ in range(rng.randint(low, high) - 1):
        found.append((found[-1] * 2 + rng.choice((1, 1, 1, 2, 5))) % len(WORDS))
    return " ".join(WORDS[i] for i in found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of words, trained for a moment."""
    folder = tmp_path_factory.mktemp("harness")
    rng = random.Random(3)
    text = "\n".join(sentence(rng, 4, 20) for _ in range(200)) + "\n"
    (folder / "train.txt").write_text(text, "utf-8")
    words = ["--only-source", "--trainpref", folder / "train.txt", "--destdir", folder / "data"]
    assert flite("preprocess", *words) == 0
    pairs = SHAPE.split()
    shape = [w for k, v in zip(pairs[::2], pairs[1::2], strict=True) for w in (f"--decoder-{k}", v)]
    options = ["--task", "language_modeling", "--arch", "transformer_lm", *shape, *LIKE_OPT]
    options += ["--share-decoder-input-output-embed", "--tokens-per-sample", POSITIONS]
    options += ["--sample-break-mode", "eos", "--max-tokens", 800, "--optimizer", "adam"]
    options += ["--lr", "2e-2", "--disable-validation", "--cpu", "--no-epoch-checkpoints"]
    for kind, (updates, *more) in KINDS.items():
        words = [*options, *more, "--max-update", updates, "--save-dir", folder / kind]
        assert flite("train", folder / "data", *words) == 0
    return folder


@pytest.fixture(scope="module")
def model(run) -> hub.LanguageModel:
    return hub.load(run / "dense" / "checkpoint_last.pt", device="cpu")


@pytest.fixture(scope="module")
def adapter(run):
    return FairseqLiteLM(path=str(run / "dense" / "checkpoint_last.pt"), device="cpu")


@pytest.fixture(scope="module")
def opt(run, model) -> dict:
    """Arguments of the harness's `hf` for the same model as transformers has it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="the harness's own adapter needs accelerate")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    (ours,) = model.models
    symbols, folder = [model.dictionary[i] for i in range(len(model.dictionary))], run / "opt"
    config = transformers.OPTConfig(
        vocab_size=len(symbols),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    theirs = transformers.OPTForCausalLM(config)
    weights = {
        "model." + name.replace("decoder.layer_norm", "decoder.final_layer_norm"): value
        for name, value in ours.state_dict().items()
        if name in _weights(theirs)
    }
    missing = theirs.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    theirs.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}


def _weights(theirs) -> set[str]:
    """Names of ours that theirs has."""
    names = {name.removeprefix("model.") for name in theirs.state_dict()}
    return {n.replace("decoder.final_layer_norm", "decoder.layer_norm") for n in names}


# -- against transformers and the harness's own adapter --------------------------------------------


@pytest.fixture(scope="module")
def tasks(model, tmp_path_factory) -> Path:
    """One task of each kind that the harness has."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(5)

    def options(low: int, high: int) -> list[str]:
        return [sentence(rng, low, high) for _ in range(3)]

    rows = [
        {"query": sentence(rng, 2, 9), "choices": options(1, 6), "gold": i % 3} for i in range(12)
    ]
    # Some options are what the model itself would say.
    own = model.complete([model.encode(row["query"]) for row in rows], max_new_tokens=3)
    for row, text in zip(rows, own, strict=True):
        row["choices"][1] = text.strip() or row["choices"][1]
    harness.write_task(folder, "choices", rows)
    empty = [{"query": "", "choices": options(3, 12), "gold": 0} for _ in range(4)]
    harness.write_task(folder, "empty", empty)
    partial = [
        {"context_options": options(2, 8), "continuation": sentence(rng, 1, 5), "gold": i % 3}
        for i in range(6)
    ]
    harness.write_task(folder, "contexts", partial, harness.CONTEXTS)
    texts = [{"text": sentence(rng, n, n)} for n in (1, 20, 23, 24, 25, 47, 60, 100)]
    harness.write_task(folder, "texts", texts, harness.TEXTS)
    prompts = [sentence(rng, n, n) for n in (1, 3, 9, 14, 15)]
    whole = model.complete([model.encode(text) for text in prompts], max_new_tokens=8)
    (often, _), *_ = Counter(word for text in whole for word in text.split()[1:]).most_common()
    generation = {"until": [often], "max_gen_toks": 8, "do_sample": False}
    answers = [{"text": text, "answer": "ship"} for text in prompts]
    harness.write_task(
        folder, "answers", answers, {**harness.ANSWERS, "generation_kwargs": generation}
    )
    return folder


def equal(ours: harness.Evaluated, theirs: harness.Evaluated, tolerance: float = 1e-4) -> None:
    """The same of everything, row for row."""
    for mine, other in zip(ours.samples, theirs.samples, strict=True):
        assert mine.pairs == other.pairs
        assert mine.log_probs == pytest.approx(other.log_probs, abs=tolerance)
        assert mine.greedy == other.greedy
        assert mine.metrics == pytest.approx(other.metrics, abs=tolerance)
    assert ours.metrics == pytest.approx(theirs.metrics, abs=tolerance)


KINDS_OF_TASKS = ["choices", "empty", "contexts", "answers"]


@pytest.fixture(scope="module")
def theirs(tasks, opt) -> dict[str, harness.Evaluated]:
    """What the harness finds with transformers."""
    given = {**opt, "add_bos_token": True}
    return harness.evaluate(tasks, KINDS_OF_TASKS, "hf", given, batch_size=4)


def test_scores_are_those_of_transformers(tasks, adapter, theirs):
    ours = harness.evaluate(tasks, KINDS_OF_TASKS, adapter)
    for name in KINDS_OF_TASKS[:3]:
        equal(ours[name], theirs[name])
    found = [greedy for name in ours for s in ours[name].samples for greedy in s.greedy]
    assert len(found) == 66 and any(found) and not all(found)
    outputs = [sample.output.split() for sample in ours["answers"].samples]
    assert outputs == [sample.output.split() for sample in theirs["answers"].samples]
    assert any(outputs) and any(len(output) < 7 for output in outputs)  # the string ended it


@pytest.mark.parametrize("broken", ["start", "shifted", "greedy"])
def test_a_wrong_adapter_is_found_out(broken, tasks, adapter, theirs, monkeypatch):
    def shifted(*args):
        context, continuation = fitted(*args)
        return context[1:], continuation

    fitted, scored = adapter._fitted, adapter._score
    if broken == "start":
        monkeypatch.setattr(adapter, "_start", adapter.model.start_token("sea"))
    elif broken == "shifted":
        monkeypatch.setattr(adapter, "_fitted", shifted)
    else:
        monkeypatch.setattr(adapter, "_score", lambda *a: [(s, False) for s, _ in scored(*a)])
    ours = harness.evaluate(tasks, ["choices"], adapter)["choices"]
    with pytest.raises(AssertionError):
        equal(ours, theirs["choices"])


def test_windows_of_whole_texts_are_the_harness_own(tasks, adapter, opt):
    # With it, the harness's adapter scores the start symbol as a token of the text.
    theirs = harness.evaluate(tasks, ["texts"], "hf", {**opt, "add_bos_token": False})["texts"]
    ours = harness.evaluate(tasks, ["texts"], adapter)["texts"]
    equal(ours, theirs)
    assert ours.metrics["word_perplexity"] > 2


# -- our own kinds of checkpoints, and what is refused ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint(kind, run, tasks):
    path = run / kind / "checkpoint_last.pt"
    assert path.exists() == (kind == "dense")
    lm = FairseqLiteLM(path=str(path.parent), device="cpu", batch_size="auto")
    found = harness.evaluate(tasks, ["contexts", "choices"], lm)
    model = hub.load(path, device="cpu")
    for sample in [s for name in found for s in found[name].samples]:
        contexts, texts = zip(*sample.pairs, strict=True)
        plain = model.score(list(texts), list(contexts))
        assert sample.log_probs == pytest.approx([one.total for one in plain], abs=1e-4)
    assert lm.get_model_info()["model_dtype"] == "torch.float32"


@pytest.fixture
def asked(rng_seed: int = 9):
    """Requests as the harness makes them, some of them longer than the model takes."""
    rng = random.Random(rng_seed)
    contexts = [sentence(rng, n, n) for n in (1, 10, 23, 24, 40)] + [""]
    return [(context, " " + sentence(rng, 1, 4)) for context in contexts * 4]


def requests(pairs, kind: str = "loglikelihood"):
    return [Instance(kind, {}, args if isinstance(args, tuple) else (args,), 0) for args in pairs]


@pytest.mark.parametrize("given", [{"batch_size": 64}, {"max_tokens": 1}, {"batch_size": "auto"}])
def test_scores_do_not_depend_on_batches_or_order(given, run, adapter, asked):
    other = FairseqLiteLM(path=str(run / "dense"), device="cpu", **given)
    expected = adapter.loglikelihood(requests(asked), disable_tqdm=True)
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    found = other.loglikelihood(requests(asked[i] for i in order), disable_tqdm=True)
    for i, (score, greedy) in zip(order, found, strict=True):
        assert (score, greedy) == (pytest.approx(expected[i][0], abs=1e-5), expected[i][1])


def test_long_contexts_lose_their_beginning(adapter, model, run, asked):
    """What is left is behind the start symbol and, with the continuation, as long as can be."""
    short = FairseqLiteLM(path=str(run / "dense"), device="cpu", max_length=12)
    for lm, room in ((adapter, POSITIONS), (short, 12)):
        for (context, text), (score, _) in zip(
            asked, lm.loglikelihood(requests(asked), disable_tqdm=True), strict=True
        ):
            ids, rest = model.encode(context), model.encode(text)
            ids = ids[max(0, len(ids) + len(rest) - room) :]
            (plain,) = model.score_branches([hub.Branches(ids, (rest,))])
            assert score == pytest.approx(float(plain.continuations[0].sum()), abs=1e-5)
    long = sentence(random.Random(2), POSITIONS, POSITIONS)
    ((score, _),) = adapter.loglikelihood(requests([("the sea", " " + long)]), disable_tqdm=True)
    (window,) = adapter.loglikelihood_rolling(requests([long]), disable_tqdm=True)
    assert score == pytest.approx(window, abs=1e-4)  # the model takes it, and nothing before it


def test_the_start_symbol(run, model):
    lm = FairseqLiteLM(path=str(run / "dense"), device="cpu", start="sea")
    ((score, _),) = lm.loglikelihood(requests([("the old", " man")]), disable_tqdm=True)
    assert score == pytest.approx(model.score(" man", "the old", start="sea").total, abs=1e-5)
    assert score != pytest.approx(model.score(" man", "the old").total, abs=1e-3)
    # Neither what the harness puts before an empty context nor what a text begins with comes twice.
    empty, given = lm.loglikelihood(requests([("", "the man"), ("sea", " the man")]), True)
    assert empty == given
    assert lm.tok_encode("man", add_special_tokens=True) == [
        lm.prefix_token_id,
        *lm.tok_encode("man"),
    ]
    assert lm.tok_decode(lm.tok_encode("the old man")) == "the old man"


def test_what_is_drawn_follows_the_seed(adapter):
    given = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    asked = requests([("the old man", given)] * 3 + [("a ship", given)], "generate_until")
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(adapter.generate_until(asked, disable_tqdm=True))
    assert found[0] == found[1] != found[2]
    assert len(set(found[0][:3])) == 3  # repeats of a request are not the same output


def test_outputs_of_a_search(adapter, model):
    given = {"until": ["zzz"], "max_gen_toks": 6, "num_beams": 3}
    asked = requests([("the old man", given)], "generate_until")
    expected = model.complete([model.encode("the old man")], max_new_tokens=6, beam=3)
    assert adapter.generate_until(asked, disable_tqdm=True) == expected
    asked = requests([("a", {**given, "length_penalty": 2.0})], "generate_until")
    with pytest.raises(ConfigError, match="length_penalty: not known"):
        adapter.generate_until(asked, disable_tqdm=True)


def test_answers_are_kept_as_they_come(adapter, tmp_path, monkeypatch):
    """`--use_cache`: what a run has found before it was interrupted is not asked again."""
    monkeypatch.setattr(lm_eval, "_PORTION", 2)
    cached = CachingLM(adapter, str(tmp_path / "answers.db"))
    pairs = [("the old man", " went"), ("a ship", " with"), ("the", " sea"), ("the", " ")]
    with pytest.raises(DataError, match="adds no token to its context: ' ' behind 'the'"):
        cached.loglikelihood(requests(pairs))
    kept = {hash_args("loglikelihood", pair) in cached.dbdict for pair in pairs[:2]}
    assert kept == {True} and hash_args("loglikelihood", pairs[2]) not in cached.dbdict
    cached.loglikelihood(requests(pairs[:3]))
    monkeypatch.setattr(adapter.model, "score_branches", None)
    assert len(cached.loglikelihood(requests(pairs[:3]))) == 3
    adapter.set_cache_hook(CacheHook(None))


def test_what_is_refused_is_refused_in_a_line(adapter, run):
    path = str(run / "dense")
    for given, said in (
        ({"max_length": POSITIONS + 1}, "max_length=25: this model takes 2 to 24"),
        ({"max_length": 1}, "max_length=1"),
        ({"start": "<de>"}, "<de>"),
        ({"device": "cuda:1"}, "device 'cuda:1': .* CUDA_VISIBLE_DEVICES"),
        ({"overrides": "x"}, "expected a JSON object"),
    ):
        with pytest.raises(ConfigError, match=said):
            FairseqLiteLM(**{"path": path, "device": "cpu", **given})
    with pytest.raises(CheckpointError):
        FairseqLiteLM(path=str(run / "nothing.pt"))
    long = " sea" * (POSITIONS + 1)
    with pytest.raises(DataError, match="a continuation of 25 tokens, where the model takes 24"):
        adapter.loglikelihood(requests([("the", long)]), disable_tqdm=True)
    with pytest.raises(ConfigError, match="256 tokens do not fit into the model's 24: lower --gen"):
        adapter.generate_until(requests([("the", {"until": "."})], "generate_until"), True)
    with pytest.raises(ConfigError, match="--apply_chat_template"):
        adapter.apply_chat_template([{"role": "user", "content": "the"}])


# -- the commands ---------------------------------------------------------------------------------


def results_of(folder: Path) -> dict:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text("utf-8"))


def command_line(path: Path, tasks: Path, out: Path, *more: str) -> list[str]:
    words = ["--model", "fairseq_lite", "--model_args", f"path={path}", "--device", "cpu"]
    words += ["--tasks", "choices", "--include_path", str(tasks), "--output_path", str(out)]
    return [*words, "--batch_size", "4", *more]


def test_our_command_is_the_harness_with_our_model(run, tasks, adapter, tmp_path, capsys):
    expected = harness.evaluate(tasks, ["choices"], adapter)["choices"]
    with harness.offline(tmp_path, scan=False):
        assert flite("lm_eval", *command_line(run / "dense", tasks, tmp_path / "out")) == 0
        found = results_of(tmp_path / "out")
        assert found["results"]["choices"]["acc,none"] == pytest.approx(expected.accuracy)
        assert found["config"]["model"] == "fairseq_lite"
        assert found["config"]["model_max_tokens"] == 4 * POSITIONS
        assert "|choices|" in capsys.readouterr().out
        words = command_line(run / "dense", tasks, tmp_path, "--model_args", "path=nothing.pt")
        assert flite("lm_eval", *words) == 2
        assert "error: --path nothing.pt" in capsys.readouterr().err.splitlines()[-1]


def _on_a_rank(world, words: tuple[str, ...], folder: Path) -> None:
    with harness.offline(folder / str(world.rank), scan=False):
        command.evaluate(words, world)


def test_several_processes_share_the_work(run, tasks, tmp_path):
    """Rank 0 runs the harness; experts are spread, and the others do as it says."""
    lm = FairseqLiteLM(path=str(run / "moe"), device="cpu")
    expected = harness.evaluate(tasks, ["choices", "answers"], lm)
    words = command_line(run / "moe", tasks, tmp_path / "out", "--tasks", "choices,answers")
    run_distributed(_on_a_rank, 2, (*words, "--log_samples"), tmp_path)
    found = results_of(tmp_path / "out")["results"]
    assert found["choices"]["acc,none"] == pytest.approx(expected["choices"].accuracy)
    for name in expected:
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row, sample in zip(rows, expected[name].samples, strict=True):
            answers = [answer[0] for answer in row["resps"]]
            if name == "answers":
                assert answers == [sample.output]
            else:
                scores = [float(score) for score, _ in answers]
                assert scores == pytest.approx(sample.log_probs, abs=1e-4)


def test_what_of_the_arguments_is_ours():
    words = ["run", "--model_args", "path=a", "bf16=True", "--device=cpu", "--limit", "3"]
    assert command.split(words) == (None, "cpu", tuple(words))
    given = command.split([*words, "--distributed-world-size", "2"])
    assert given == (2, "cpu", tuple(words))
    with pytest.raises(ConfigError, match="--distributed-world-size 0: expected 1 or more"):
        command.split(["--distributed-world-size", "0"])


# The harness's own command, which does not read its thousands of tasks first.
STOCK = """
import functools
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


def test_the_stock_command_knows_the_model(run, tasks, adapter, tmp_path):
    found = (each.entry_points for each in distributions(name="fairseq-lite"))
    if not any(one.group == "torch.backends" for points in found for one in points):
        pytest.skip("fairseq-lite is not installed with its entry points: pip install -e .")
    expected = harness.evaluate(tasks, ["choices"], adapter)["choices"]
    words = [sys.executable, "-c", STOCK, *command_line(run / "dense", tasks, tmp_path / "out")]
    with harness.offline(tmp_path):
        done = subprocess.run(words, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = results_of(tmp_path / "out")["results"]["choices"]
    assert found["acc,none"] == pytest.approx(expected.accuracy)


@pytest.mark.parametrize(
    ("program", "line"),
    [("bin/lm_eval", "lm_eval: error: no\n"), ("bin/lm-eval", "lm-eval: error: no\n"),
     ("lm_eval/__main__.py", "lm_eval: error: no\n"), ("notebook", "usual")],
)  # fmt: skip
def test_a_user_s_error_ends_the_stock_command_in_one_line(program, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("usual", end="", file=sys.stderr))
    lm_eval.tell_in_one_line.__wrapped__()
    sys.excepthook(ConfigError, ConfigError("no"), None)
    assert capsys.readouterr().err == line
    sys.excepthook(ValueError, ValueError("no"), None)
    assert capsys.readouterr().err == "usual"
