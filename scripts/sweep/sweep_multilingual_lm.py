#!/usr/bin/env python3
r"""A sweep over language models of several languages, mixtures of experts by default.

    MU=10 scripts/sweep/sweep_multilingual_lm.py -n 1 -g 8 -d data-bin --local -t 1 -p tiny_multi \
        --checkpoints-dir checkpoints

The default is a tiny model for tests; --model-size takes others. The variables MU, LR, WU, BS, UF
and TPS give other defaults to the flags of these names. docs/sweeps.md says more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import parts
import sweep
from parts import key
from sweep import hyperparam

from fairseq_lite.errors import ConfigError
from fairseq_lite.tasks.multilingual_language_modeling import find_languages

N = TypeVar("N", int, float)
_SCHEDULE = "polynomial_decay"


@dataclass(frozen=True)
class Size:
    """A size of model, with what goes with it where nothing is typed.

    Attributes:
        arch: the architecture.
        lr: learning rate.
        batch: blocks in a batch.
        alpha: exponent of the languages' shares: below 1 favours small languages.
        shape: layers, width and heads; None for the architecture's.
    """

    arch: str
    lr: float
    batch: int
    alpha: float = 0.3
    shape: tuple[int, int, int] | None = None


# The tiny one is that of gshard's guide, alpha included. The others have the shapes and the rates
# of Brown et al. 2020, table 2.1.
SIZES = {
    "tiny": Size("transformer_lm_gpt2_tiny", lr=0.002, batch=2, alpha=3.0),
    "125M": Size("transformer_lm_gpt", lr=6e-4, batch=8, shape=(12, 768, 12)),
    "355M": Size("transformer_lm_gpt", lr=3e-4, batch=8, shape=(24, 1024, 16)),
    "1.3B": Size("transformer_lm_gpt", lr=2e-4, batch=4, shape=(24, 2048, 32)),
    "2.7B": Size("transformer_lm_gpt", lr=1.6e-4, batch=4, shape=(32, 2560, 32)),
    "6.7B": Size("transformer_lm_gpt", lr=1.2e-4, batch=2, shape=(32, 4096, 32)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model and its training").add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--model-size", choices=SIZES, default="tiny", help="(default: tiny)")
    add("--arch", metavar="NAME", help="the architecture, in place of the size's")
    add("--langs", default="", help="languages with commas (default: all of the data folder)")
    add(
        "--multilang-sampling-alpha",
        type=float,
        nargs="+",
        metavar="X",
        help="exponent of the languages' shares (default: 0.3; with tiny 3.0)",
    )
    add("--epg", type=int, default=1, metavar="N", help="experts a GPU (default: 1); 0: dense")
    add("--tps", type=int, default=_variable(int, "TPS", 1024), metavar="N", help="(default: 1024)")
    add("--bs", type=int, default=_variable(int, "BS", None), metavar="N", help="blocks in a batch")
    add("--uf", type=int, default=_variable(int, "UF", 1), metavar="N", help="batches in an update")
    add("--batch-tokens", type=int, metavar="N", help="tokens in an update, in place of --uf")
    add("--lr", type=float, default=_variable(float, "LR", None), **many, help="learning rates")
    add("--wu", type=int, default=[_variable(int, "WU", 2000)], **many, help="(default: 2000)")
    add("--mu", type=int, default=_variable(int, "MU", 50000), metavar="N", help="(default: 50000)")
    add("--dropout", type=float, default=[0.0], **many, help="(default: 0)")
    add("--wd", type=float, default=[0.0], **many, help="weight decay (default: 0)")
    add("--clip-norm", type=float, default=[0.0], **many, help="(default: 0, no clipping)")
    add("--train-seed", type=int, default=[1], **many, help="--seed of training (default: 1)")
    add("--ddp", default="fully_sharded", metavar="NAME", help="(default: fully_sharded)")
    add("--li", type=int, default=10, metavar="N", help="log every N updates (default: 10)")
    add("--nw", type=int, default=1, metavar="N", help="--num-workers (default: 1)")
    add("--save-updates", type=int, default=1000, metavar="N", help="save and validate every N")
    parts.add_precision(parser, "me_fp16")


def _variable(kind: Callable[[str], N], name: str, otherwise: N | None) -> N | None:
    """A default from the environment.

    Raises:
        ConfigError: it is no number.
    """
    text = os.environ.get(name)
    if text is None:
        return otherwise
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"the variable {name}={text}: expected a number") from None


def get_grid(args: argparse.Namespace) -> list[hyperparam]:
    parts.at_least(args, 1, "tps", "bs", "uf", "batch_tokens", "mu", "li", "save_updates")
    parts.at_least(args, 0, "wu", "nw")
    size = SIZES[args.model_size]
    arch = args.arch or size.arch
    batch = size.batch if args.bs is None else args.bs
    return [
        *parts.precision(args.precision),
        hyperparam("--task", "multilingual_language_modeling"),
        hyperparam("--sample-break-mode", "none", save_dir_key=key("bm_")),
        hyperparam("--tokens-per-sample", args.tps, save_dir_key=key("tps")),
        hyperparam(
            "--multilang-sampling-alpha",
            args.multilang_sampling_alpha or size.alpha,
            save_dir_key=key("samplealpha"),
        ),
        hyperparam("--langs", ",".join(_languages(args)), save_dir_key=_num_languages),
        hyperparam("--arch", arch, save_dir_key=str),
        *(_shape(size) if args.arch is None else []),
        *parts.experts(parts.num_experts(args)),
        hyperparam("--share-decoder-input-output-embed", save_dir_key=lambda _: "share"),
        hyperparam("--ddp-backend", args.ddp),
        hyperparam("--optimizer", "adam", save_dir_key=str),
        hyperparam("--adam-betas", "(0.9, 0.98)", save_dir_key=lambda _: "b2_0.98"),
        hyperparam("--adam-eps", 1e-8, save_dir_key=key("eps")),
        hyperparam("--clip-norm", args.clip_norm, save_dir_key=key("cl")),
        hyperparam("--lr", _rates(args, size), save_dir_key=key("lr")),
        *parts.schedule(_SCHEDULE, usual=_SCHEDULE, max_update=args.mu, warmup=args.wu),
        hyperparam("--dropout", args.dropout, save_dir_key=key("dr")),
        hyperparam("--attention-dropout", 0.0, save_dir_key=key("atdr")),
        hyperparam("--weight-decay", args.wd, save_dir_key=key("wd")),
        hyperparam("--batch-size", batch, save_dir_key=key("ms")),
        hyperparam("--update-freq", _update_freq(args, batch), save_dir_key=key("uf")),
        hyperparam("--max-update", args.mu, save_dir_key=key("mu")),
        hyperparam("--seed", args.train_seed, save_dir_key=key("s")),
        hyperparam("--num-workers", args.nw),
        hyperparam("--save-interval-updates", args.save_updates),
        hyperparam("--keep-interval-updates", 1),
        hyperparam("--no-epoch-checkpoints"),
        hyperparam("--log-interval", args.li),
    ]


def _languages(args: argparse.Namespace) -> list[str]:
    if args.langs:
        return sorted({name.strip() for name in args.langs.split(",") if name.strip()})
    if args.data is None:
        raise ConfigError("-d is missing: the data folder, with a folder for each language")
    folder = Path(args.data.split(":")[0])
    if not folder.is_dir():
        raise ConfigError(f"-d {args.data}: no folder {folder}")
    return find_languages(folder, "")


def _num_languages(names: str) -> str:
    return f"nlangs_{len(names.split(','))}"


def _rates(args: argparse.Namespace, size: Size) -> list[float]:
    if args.lr is None:
        return [size.lr]
    return args.lr if isinstance(args.lr, list) else [args.lr]  # typed, or the variable's


def _shape(size: Size) -> list[hyperparam]:
    if size.shape is None:
        return []
    layers, width, heads = size.shape
    return [
        hyperparam("--decoder-layers", layers, save_dir_key=key("nlay")),
        hyperparam("--decoder-embed-dim", width, save_dir_key=key("emb")),
        hyperparam("--decoder-ffn-embed-dim", 4 * width),
        hyperparam("--decoder-attention-heads", heads),
    ]


def _update_freq(args: argparse.Namespace, batch: int) -> int:
    if args.batch_tokens is None:
        return int(args.uf)
    return parts.update_freq(
        "--batch-tokens",
        args.batch_tokens,
        batch=batch * args.tps,
        num_gpus=args.num_gpus * args.num_nodes,
        unit="tokens",
    )


if __name__ == "__main__":
    sweep.main(get_grid, add_extra_options_func=add_options, about=__doc__)
