"""The sweeps that ship: every command they generate is one of flite-train's; the guides' run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedDataset
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.training.assembly import check
from tests.helpers import sweeps
from tests.helpers.languages import write_languages

BASE = ("-p", "x", "-t", "-1", "-g", "8", "-d", "data-bin")
# The function of gshard's guide, but for --local, which stands for its cluster.
TRAIN_125M = (
    *("-g", "8", "-t", "1", "-n", "1", "--dl", "2", "--embed-dim", "256"),
    *("--bs", "4", "--li", "50", "--epg", "0", "--mu", "100"),
    *("--constraint", "volta32gb", "--partition", "learnaccel"),
    *("--resume-failed", "--nw", "0", "-p", "tiny"),
    *("--checkpoints-dir", "ED", "--opt", "adam"),
    *("--ddp", "no_c10d"),
)


def parsed(script: str, *words: object) -> list[RunConfig]:
    """What flite-train makes of each command of a sweep."""
    runs = sweeps.runs_of(sweeps.script(script), *words)
    return [parse("flite-train", run.arguments, load_builtins()) for run in runs]


def one(script: str, *words: object) -> RunConfig:
    (run,) = parsed(script, *BASE, *words)
    return run


def refused(script: str, *words: object) -> str:
    """The line with which a command line is refused."""
    with pytest.raises((ConfigError, DataError)) as error:
        sweeps.runs_of(sweeps.script(script), *BASE, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- benchmark_lm -------------------------------------------------------------------------------


def test_the_benchmark_of_the_guide():
    (run,) = parsed("benchmark_lm", *TRAIN_125M)
    model: Any = run.model.config
    assert (model.decoder_layers, model.decoder_embed_dim, model.decoder_ffn_embed_dim) == (
        *(2, 256, 1024),
    )
    assert model.decoder_attention_heads == 4
    assert run.distributed_training.distributed_world_size == 8
    assert (run.dataset.batch_size, run.optimization.update_freq) == (4, (16,))
    assert 4 * 16 * 8 == 512, "the default of --ebs"
    assert (run.optimization.max_update, run.common.log_interval) == (100, 50)
    assert (run.dataset.num_workers, run.optimizer.name) == (0, "adam")
    assert run.ddp_backend.name == "no_c10d"
    assert (run.optimization.clip_norm, run.criterion.name) == (1.0, "cross_entropy")
    assert run.common.fp16


def test_the_name_of_a_benchmark_says_what_was_measured():
    (run,) = sweeps.runs_of(sweeps.script("benchmark_lm"), *TRAIN_125M)
    assert run.name == (
        "tiny.fp16.tps1024.dl2.d256.gelu.dr0.0.no_c10d.adam.lr0.0003.wu500.bs4.ebs512.mu100.ngpu8"
    )
    assert run.save_dir == Path("ED", run.name)


def test_what_is_unusual_enters_the_name():
    module, words = sweeps.script("benchmark_lm"), (*TRAIN_125M, "--sched", "cosine", "--nh", "2")
    (run,) = sweeps.runs_of(module, *words)
    assert ".d256.nh2.gelu." in run.name and ".lr0.0003.cosine.wu500." in run.name


# What is typed -> where it arrives.
@pytest.mark.parametrize(
    ("words", "section", "values"),
    [
        ("--dl 3", "model", {"decoder_layers": 3}),
        ("--embed-dim 128", "model", {"decoder_embed_dim": 128, "decoder_attention_heads": 2}),
        ("--nh 6", "model", {"decoder_attention_heads": 6}),
        ("--act relu", "model", {"activation_fn": "relu"}),
        ("--dropout 0.2", "model", {"dropout": 0.2, "attention_dropout": 0.2}),
        ("--scale-attn", "model", {"scale_attn": True}),
        ("--scale-fc", "model", {"scale_fc": True}),
        ("--scale-heads", "model", {"scale_heads": True}),
        ("--ckpt", "model", {"checkpoint_activations": True}),
        ("--epg 2", "model", {"moe_expert_count": 16, "moe_freq": 2}),
        ("--epg 1 --cap 0.05", "model", {"moe_eval_capacity_token_fraction": 0.05}),
        ("--epg 1", "model", {"moe_eval_capacity_token_fraction": -1.0}),
        ("--epg 1 --bpr", "model", {"moe_batch_prioritized_routing": True}),
        (
            "--epg 1",
            "criterion",
            {"moe_gate_loss_wt": 0.01, "moe_gate_loss_combine_method": "sum"},
        ),
        ("--epg 1", "optimization", {"clip_norm": 0.1}),
        ("--ebs 64 --bs 4", "optimization", {"update_freq": (2,)}),
        ("--lr 1e-3", "optimization", {"lr": (1e-3,)}),
        ("--tps 128", "task", {"tokens_per_sample": 128}),
        ("--wu 7", "lr_scheduler", {"warmup_updates": 7, "total_num_update": 100.0}),
        ("--opt adam16 --ddp c10d", "optimizer", {"fp16_adam_stats": True}),
        ("--fp16-adam -g 1", "optimizer", {"fp16_adam_stats": True}),
        ("--ss", "ddp_backend", {"use_sharded_state": True}),
        ("--no-save", "checkpoint", {"no_save": True}),
        ("--save-updates 9", "checkpoint", {"save_interval_updates": 9}),
        ("--rf a.pt", "checkpoint", {"restore_file": "a.pt"}),
        ("--reset-lr", "checkpoint", {"reset_lr_scheduler": True, "reset_optimizer": False}),
        (
            "--reset",
            "checkpoint",
            {f"reset_{what}": True for what in ("dataloader", "lr_scheduler", "optimizer")},
        ),
        ("--precision bf16", "common", {"bf16": True, "fp16": False}),
        ("--precision fp32", "common", {"bf16": False, "fp16": False}),
    ],
)
def test_flags_of_the_benchmark_arrive(words, section, values):
    part: Any = getattr(one("benchmark_lm", *words.split()), section)
    config = getattr(part, "config", part)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize("ddp", ["fully_sharded", "legacy_ddp", "no_c10d", "c10d", "pytorch_ddp"])
@pytest.mark.parametrize("sched", ["polynomial_decay", "inverse_sqrt", "cosine", "fixed"])
@pytest.mark.parametrize(
    "more", ["", "--epg 1 --bpr --no-save", "--scale-fc --ckpt --reset --rf a.pt"]
)
def test_combinations_are_what_flite_train_takes(ddp, sched, more):
    for run in parsed("benchmark_lm", *BASE, "--ddp", ddp, "--sched", sched, *more.split()):
        check(run)


@pytest.mark.parametrize("words", ["--opt adafactor", "--opt adam16", "--fp16-adam --epg 1"])
def test_optimizers_that_look_at_whole_matrices(words):
    for more in ("--ddp legacy_ddp", "-g 1 --epg 0"):
        check(one("benchmark_lm", *words.split(), *more.split()))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--stable", "--stable: .* is not built; leave it out"),
        ("--alibi", "--alibi: ALiBi is not built"),
        ("--opt adam8bit", "--opt adam8bit: bitsandbytes is not used; --opt adam16"),
        ("--opt adafactor", "--opt adafactor looks at whole matrices.* add --ddp legacy_ddp"),
        ("--opt adam16", "--opt adam16 looks at whole matrices"),
        ("--fp16-adam", "--fp16-adam looks at whole matrices"),
        ("--opt adafactor --ddp c10d --fp16-adam", "--fp16-adam: of --opt adam"),
        ("--ss --ddp c10d", "--ss is of --ddp fully_sharded"),
        ("--bpr", "--bpr is about experts: add --epg"),
        ("--cap 0.5", "--cap is about experts: add --epg"),
        ("--epg 1 -g 1", "--epg 1 on 1 GPU.*: expected 2 experts"),
        ("--epg -1", "--epg -1 on 8 GPU"),
        ("--ebs 100 --bs 4", "--ebs 100: 8 .* take 32 blocks at a time; choose 96 or 128"),
        ("--bs 128", "--ebs 512: 8 .* take 1024 blocks at a time; choose 1024,"),
        ("--dict-size 9", "--dict-size is of random tokens"),
        ("--nh 0", "--nh 0: expected 1 or more"),
        ("--nh 5", "--nh 5: does not divide --embed-dim 768"),
    ],
)
def test_what_the_benchmark_refuses(words, line):
    assert re.search(line, refused("benchmark_lm", *words.split()))


_NONE = {
    "sweep_lm": "tps bs uf mu li save-updates",
    "benchmark_lm": "dl embed-dim nh ebs bs tps mu li save-updates dict-size",
    "sweep_multilingual_lm": "tps bs uf batch-tokens mu li save-updates",
    "sweep_translation": "max-tokens update-freq max-update li",
}
_NEGATIVE = {
    "sweep_lm": "wu nw",
    "benchmark_lm": "wu nw",
    "sweep_multilingual_lm": "wu nw",
    "sweep_translation": "warmup-updates",
}


@pytest.mark.parametrize("script", sorted(_NONE))
def test_numbers_that_cannot_train_are_refused_as_they_were_typed(script):
    for names, number, least in ((_NONE, 0, 1), (_NEGATIVE, -1, 0)):
        for name in names[script].split():
            line = refused(script, f"--{name}", number)
            assert line == f"--{name} {number}: expected {least} or more"


def test_of_several_numbers_each_counts():
    assert refused("sweep_lm", "--uf", 3, 0) == "--uf 0: expected 1 or more"
    assert refused("sweep_translation", "--update-freq", 3, -2).startswith("--update-freq -2: ")


def test_random_tokens_where_no_data_are_given(tmp_path):
    module = sweeps.script("benchmark_lm")
    words = ["-p", "x", "-t", "1", "-g", "2", "--checkpoints-dir", tmp_path / "out"]
    words += ["--ebs", "8", "--tps", "16", "--mu", "5", "--dict-size", "40"]
    args = sweeps.options_of(module, *words)
    (run,) = sweeps.grid.runs_of(module.get_grid, None, args)
    folder = Path(run.arguments[0])
    assert not folder.exists(), "asking for the runs makes nothing"
    module.make_data(args)
    dictionary = Dictionary.load(folder / "dict.txt")
    train, valid = IndexedDataset(folder / "train"), IndexedDataset(folder / "valid")
    assert len(dictionary) == 44
    assert sum(train.sizes) == 8 * 16 * 5 and sum(valid.sizes) == 2 * 2 * 16
    tokens = np.concatenate([train[i] for i in range(len(train))])
    assert all(train[i][-1] == dictionary.eos() for i in range(len(train)))
    words_only = tokens[tokens != dictionary.eos()]
    assert words_only.min() == 4 and words_only.max() <= 43, "no special symbol among the words"
    assert (words_only == 4).sum() > (words_only == 8).sum() > 0, "some are frequent"
    before = (folder / "train.bin").stat().st_mtime_ns
    module.make_data(args)
    assert (folder / "train.bin").stat().st_mtime_ns == before, "what is there is used"


# -- sweep_lm -----------------------------------------------------------------------------------


def test_several_values_are_swept():
    words = ["--lr", "1e-3", "5e-4", "--dropout", "0", "0.1", "--wu", "10", "--bs", "3"]
    words += ["--arch", "transformer_lm_gpt2_tiny", "transformer_lm_gpt"]
    runs = parsed("sweep_lm", *BASE, *words)
    found = {(r.model.name, r.optimization.lr, r.model.config.dropout) for r in runs}  # type: ignore[union-attr]
    assert len(runs) == len(found) == 8
    for run in runs:
        check(run)


@pytest.mark.parametrize(
    "words",
    [
        "--precision bf16 --ddp fully_sharded --epg 2",
        "--sched polynomial_decay --opt adafactor --clip-norm 0.5 1",
        "--sched cosine --uf 1 2 --wd 0 0.1 --train-seed 1 2",
        "--break-mode eos --tps 64 --precision fp32",
    ],
)
def test_combinations_of_sweep_lm(words):
    for run in parsed("sweep_lm", *BASE, *words.split()):
        check(run)


# -- sweep_multilingual_lm ----------------------------------------------------------------------


@pytest.fixture
def languages(tmp_path):
    return write_languages(tmp_path / "data", {"de": 3}, valid=2)


def test_the_name_is_that_of_the_guide(languages, monkeypatch):
    monkeypatch.setenv("MU", "10")
    words = ["-n", "1", "-g", "8", "-d", languages, "--local", "-t", "1", "-p", "tiny_multi"]
    words += ["--checkpoints-dir", "out"]
    (run,) = sweeps.runs_of(sweeps.script("sweep_multilingual_lm"), *words)
    assert run.name == (
        "tiny_multi.me_fp16.bm_none.tps1024.samplealpha3.0.nlangs_1.transformer_lm_gpt2_tiny."
        "moe_w0.01.all.share.adam.b2_0.98.eps1e-08.cl0.0.lr0.002.wu2000.dr0.0.atdr0.0.wd0.0.ms2."
        "uf1.mu10.s1.ngpu8"
    )
    config = parse("flite-train", run.arguments, load_builtins())
    check(config)
    model: Any = config.model.config
    assert model.moe_expert_count == 8, "one a GPU: tiny_multi_8e"
    assert config.optimization.max_update == 10


def test_variables_give_defaults_and_flags_win(monkeypatch):
    for name, value in {
        "MU": "9",
        "LR": "0.5",
        "WU": "3",
        "BS": "5",
        "UF": "4",
        "TPS": "8",
    }.items():
        monkeypatch.setenv(name, value)
    run = one("sweep_multilingual_lm", "--langs", "de,en", "--mu", "7")
    assert run.optimization.max_update == 7
    assert run.optimization.lr == (0.5,) and run.optimization.update_freq == (4,)
    assert run.dataset.batch_size == 5
    scheduler: Any = run.lr_scheduler.config
    task: Any = run.task.config
    assert scheduler.warmup_updates == 3
    assert (task.tokens_per_sample, task.langs) == (8, "de,en")
    monkeypatch.setenv("LR", "fast")
    assert "the variable LR=fast: expected a number" in refused("sweep_multilingual_lm")


@pytest.mark.parametrize("size", ["tiny", "125M", "355M", "1.3B", "2.7B", "6.7B"])
def test_sizes(size):
    words = ["--langs", "de,en", "--model-size", size, "--batch-tokens", 2**20]
    run = one("sweep_multilingual_lm", *words)
    check(run)
    tokens = 8 * run.dataset.batch_size * run.optimization.update_freq[0] * 1024  # type: ignore[operator]
    assert tokens == 2**20


def test_dense_and_swept():
    words = ["--langs", "de,en", "--epg", "0", "--multilang-sampling-alpha", "0.3", "0.7"]
    runs = parsed("sweep_multilingual_lm", *BASE, *words, "--lr", "1e-3", "2e-3")
    assert len(runs) == 4
    assert {run.criterion.name for run in runs} == {"cross_entropy"}


def test_what_the_multilingual_sweep_refuses(tmp_path):
    line = refused("sweep_multilingual_lm", "--langs", "de", "--batch-tokens", "100000")
    assert re.search("--batch-tokens 100000: 8 .* take 16384 tokens at a time; choose 98304", line)
    assert str(tmp_path / "none") in refused("sweep_multilingual_lm", "-d", tmp_path / "none")


# -- sweep_translation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--source-lang de --target-lang en --lr 5e-4 7e-4 --dropout 0.1 0.3",
        "--arch transformer_iwslt_de_en transformer_tiny --share decoder --precision bf16",
        "--eval-bleu --remove-bpe sentencepiece --finetune-from-model a.pt",
        "--share none --ddp-backend fully_sharded --label-smoothing 0 0.1 --max-update 10",
    ],
)
def test_combinations_of_sweep_translation(words):
    for run in parsed("sweep_translation", *BASE, *words.split()):
        check(run)
        assert run.checkpoint.maximize_best_checkpoint_metric == ("--eval-bleu" in words)


# -- all of them --------------------------------------------------------------------------------

SCRIPTS = ("benchmark_lm", "sweep_lm", "sweep_multilingual_lm", "sweep_translation")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_executed(name):
    path = sweeps.FOLDER / f"{name}.py"
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env python3\n")


def test_an_error_is_one_line_and_status_2():
    words = [sys.executable, str(sweeps.FOLDER / "sweep_lm.py"), "-p", "x", "-g", "8", "-t", "0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "sweep_lm.py: error: -t 0: expected a number of runs, or -1 for all"
    ]


def test_a_script_in_fairseqs_style(tmp_path, monkeypatch, capsys):
    own = tmp_path / "sweep_own.py"
    own.write_text(
        "import sweep\n"
        "from sweep import hyperparam\n\n\n"
        "def get_grid(args):\n"
        '    """Its --arch is given by the script."""\n'
        "    return [\n"
        '        hyperparam("--fp16", save_dir_key=lambda val: "fp16"),\n'
        '        hyperparam("--task", "language_modeling"),\n'
        '        hyperparam("--arch", args.arch, save_dir_key=lambda val: val),\n'
        '        hyperparam("--optimizer", "adam", save_dir_key=lambda val: val),\n'
        '        hyperparam("--adam-betas", "(0.9, 0.98)", save_dir_key=lambda val: "b0.9,0.98"),\n'
        '        hyperparam("--lr", [5e-4], save_dir_key=lambda val: f"lr{val}"),\n'
        '        hyperparam("--max-tokens", 2048),\n'
        "    ]\n\n\n"
        "def add_extra_options_func(parser):\n"
        '    parser.add_argument("--arch", default="transformer_lm_gpt")\n\n\n'
        "def postprocess_hyperparams(args, config):\n"
        '    config["--lr"].current_value = 1e-4\n\n\n'
        "sweep.main(get_grid, postprocess_hyperparams, add_extra_options_func)\n"
    )
    words = ["-p", "p", "-t", "-1", "-g", "1", "-d", "x", "--dry-run", "--local"]
    monkeypatch.setattr(sys, "argv", [str(own), *words])
    runpy.run_path(str(own), run_name="__main__")
    printed = capsys.readouterr().out
    assert "[1/1] p.fp16.transformer_lm_gpt.adam.b0.9_0.98.lr0.0001.ngpu1: starts" in printed
