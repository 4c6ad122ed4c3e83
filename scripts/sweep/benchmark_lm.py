#!/usr/bin/env python3
r"""How fast a language model trains, and how well: one run of a given size.

    scripts/sweep/benchmark_lm.py -g 8 -t 1 -n 1 --dl 2 --embed-dim 256 --bs 4 --li 50 --epg 0 --mu 100 \
        --nw 0 -p tiny --checkpoints-dir checkpoints --opt adam --ddp no_c10d --local

Without -d the data are random tokens, made for it. docs/sweeps.md says more.
"""  # noqa: E501

from __future__ import annotations

import argparse
from pathlib import Path

import parts
import sweep
from parts import key
from random_tokens import make_random_tokens
from sweep import hyperparam

from fairseq_lite.errors import ConfigError

_HEAD_WIDTH = 64
_DICT_SIZE = 49996  # of fairseq's dummy_lm
# Epochs of random tokens begin again after so many updates, as the files would grow with --mu.
_MOST_UPDATES = 32
_RESETS = ("dataloader", "lr-scheduler", "meters", "optimizer")
# Flags of the original that flite-train cannot do, and what to type.
_REFUSED = {
    "stable": "the stable embedding of bitsandbytes is not built; leave it out",
    "alibi": "ALiBi is not built; positions are learned, leave it out",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add("--dl", type=int, default=12, metavar="N", help="layers (default: 12)")
    add("--embed-dim", type=int, default=768, metavar="N", help="width (default: 768)")
    add("--nh", type=int, metavar="N", help=f"heads (default: width / {_HEAD_WIDTH}, at least 1)")
    add("--act", default="gelu", metavar="NAME", help="--activation-fn (default: gelu)")
    add("--dropout", type=float, default=0.0, metavar="X", help="(default: 0)")
    add("--alibi", action="store_true", help="not built")
    add("--stable", action="store_true", help="not built")
    for part in ("attn", "fc", "heads"):
        add(f"--scale-{part}", action="store_true", help="NormFormer's, as in flite-train")
    add("--epg", type=int, default=0, metavar="N", help="experts a GPU (default: 0, dense)")
    add(
        "--cap",
        type=float,
        metavar="X",
        help="--moe-eval-capacity-token-fraction (default: -1, as in training)",
    )
    add("--bpr", action="store_true", help="--moe-batch-prioritized-routing")
    _add_training(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("its training").add_argument
    add("--ebs", type=int, default=512, metavar="N", help="blocks in an update (default: 512)")
    add("--bs", type=int, default=2, metavar="N", help="blocks in a batch (default: 2)")
    add("--tps", type=int, default=1024, metavar="N", help="tokens of a block (default: 1024)")
    add("--mu", type=int, default=100, metavar="N", help="updates (default: 100)")
    add("--wu", type=int, default=500, metavar="N", help="of them warm-up (default: 500)")
    add("--lr", type=float, default=3e-4, metavar="X", help="(default: 3e-4)")
    add("--sched", choices=parts.SCHEDULES, default="polynomial_decay", help="of learning rates")
    add(
        "--opt",
        choices=("adam", "adam16", "adam8bit", "adafactor"),
        default="adam",
        help="optimizer; adam16 is --opt adam --fp16-adam",
    )
    add("--fp16-adam", action="store_true", help="--fp16-adam-stats: Adam's means in float16")
    add("--ddp", default="fully_sharded", metavar="NAME", help="(default: fully_sharded)")
    add("--ss", action="store_true", help="--use-sharded-state")
    add("--ckpt", action="store_true", help="--checkpoint-activations")
    add("--nw", type=int, default=1, metavar="N", help="--num-workers (default: 1)")
    add("--li", type=int, default=1, metavar="N", help="log every N updates (default: 1)")
    add("--no-save", action="store_true", help="write no checkpoints")
    add("--save-updates", type=int, default=5000, metavar="N", help="save and validate every N")
    add("--rf", metavar="FILE", help="--restore-file")
    add("--reset", action="store_true", help="of what is restored, take the weights only")
    add("--reset-lr", action="store_true", help="--reset-lr-scheduler")
    add("--dict-size", type=int, metavar="N", help="symbols of the random tokens, without -d")
    parts.add_precision(parser)


def get_grid(args: argparse.Namespace) -> list[hyperparam]:
    _check(args)
    if args.data is None:
        args.data = str(_random_data(args))
    count = parts.num_experts(args)
    usual = max(1, args.embed_dim // _HEAD_WIDTH)
    heads = args.nh or usual
    return [
        *parts.precision(args.precision),
        hyperparam("--task", "language_modeling"),
        hyperparam("--sample-break-mode", "none"),
        hyperparam("--tokens-per-sample", args.tps, save_dir_key=key("tps")),
        hyperparam("--arch", "transformer_lm_gpt"),
        hyperparam("--decoder-layers", args.dl, save_dir_key=key("dl")),
        hyperparam("--decoder-embed-dim", args.embed_dim, save_dir_key=key("d")),
        hyperparam("--decoder-ffn-embed-dim", 4 * args.embed_dim),
        hyperparam("--decoder-attention-heads", heads, save_dir_key=parts.unless(usual, "nh")),
        hyperparam("--decoder-learned-pos"),
        hyperparam("--share-decoder-input-output-embed"),
        hyperparam("--activation-fn", args.act, save_dir_key=str),
        hyperparam("--dropout", args.dropout, save_dir_key=key("dr")),
        hyperparam("--attention-dropout", args.dropout),
        *_switches(args, "scale_attn", "scale_fc", "scale_heads"),
        *parts.experts(
            count,
            eval_fraction=-1.0 if args.cap is None else args.cap,
            count_key=lambda _: f"epg{args.epg}",
        ),
        *([hyperparam("--moe-batch-prioritized-routing", save_dir_key=_as("bpr"))] * args.bpr),
        hyperparam("--ddp-backend", args.ddp, save_dir_key=str),
        *([hyperparam("--use-sharded-state", save_dir_key=_as("ss"))] * args.ss),
        *([hyperparam("--checkpoint-activations", save_dir_key=_as("ckpt"))] * args.ckpt),
        *_optimizer(args),
        hyperparam("--clip-norm", 0.1 if count else 1.0),
        hyperparam("--lr", args.lr, save_dir_key=key("lr")),
        *parts.schedule(args.sched, usual="polynomial_decay", max_update=args.mu, warmup=[args.wu]),
        hyperparam("--batch-size", args.bs, save_dir_key=key("bs")),
        hyperparam("--update-freq", _update_freq(args), save_dir_key=lambda _: f"ebs{args.ebs}"),
        hyperparam("--max-update", args.mu, save_dir_key=key("mu")),
        hyperparam("--seed", 1),
        hyperparam("--num-workers", args.nw),
        hyperparam("--log-interval", args.li),
        *_saving(args),
    ]


def _check(args: argparse.Namespace) -> None:
    parts.at_least(args, 1, "dl", "embed_dim", "nh", "dict_size", "ebs", "bs", "tps", "mu", "li")
    parts.at_least(args, 0, "wu", "nw")
    if not args.no_save:
        parts.at_least(args, 1, "save_updates")
    for name, why in _REFUSED.items():
        if getattr(args, name):
            raise ConfigError(f"--{name}: {why}")
    if args.opt == "adam8bit":
        raise ConfigError(
            "--opt adam8bit: bitsandbytes is not used; --opt adam16 --ddp legacy_ddp halves Adam's "
            "state, --ddp fully_sharded divides it by the GPUs"
        )
    if args.fp16_adam and args.opt not in ("adam", "adam16"):
        raise ConfigError(f"--fp16-adam: of --opt adam; --opt {args.opt} keeps no such means")
    whole = "--fp16-adam" if args.fp16_adam else f"--opt {args.opt}"
    spread = args.ddp == "fully_sharded" and args.num_gpus * args.num_nodes > 1
    if whole != "--opt adam" and spread:
        raise ConfigError(
            f"{whole} looks at whole matrices, which --ddp fully_sharded takes apart: add "
            "--ddp legacy_ddp"
        )
    if args.ss and args.ddp != "fully_sharded":
        raise ConfigError(f"--ss is of --ddp fully_sharded, and this is --ddp {args.ddp}")
    for flag, typed in (("--bpr", args.bpr), ("--cap", args.cap is not None)):
        if typed and not args.epg:
            raise ConfigError(f"{flag} is about experts: add --epg N, the experts a GPU")
    if args.dict_size is not None and args.data is not None:
        raise ConfigError("--dict-size is of random tokens, and -d gives others: leave one out")
    if args.embed_dim % (args.nh or 1):
        raise ConfigError(f"--nh {args.nh}: does not divide --embed-dim {args.embed_dim}")


def _as(word: str) -> parts.Key:
    return lambda _: word


def _switches(args: argparse.Namespace, *names: str) -> list[hyperparam]:
    return [
        hyperparam(f"--{name.replace('_', '-')}", save_dir_key=_as(name.replace("scale_", "sc_")))
        for name in names
        if getattr(args, name)
    ]


def _optimizer(args: argparse.Namespace) -> list[hyperparam]:
    if args.opt == "adafactor":
        return [hyperparam("--optimizer", "adafactor", save_dir_key=str)]
    half = args.opt == "adam16" or args.fp16_adam
    return [
        hyperparam("--optimizer", "adam", save_dir_key=_as("adam16" if half else "adam")),
        *([hyperparam("--fp16-adam-stats")] * half),
        hyperparam("--adam-betas", "(0.9, 0.98)"),
    ]


def _update_freq(args: argparse.Namespace) -> int:
    num_gpus = args.num_gpus * args.num_nodes
    return parts.update_freq("--ebs", args.ebs, batch=args.bs, num_gpus=num_gpus, unit="blocks")


def _saving(args: argparse.Namespace) -> list[hyperparam]:
    flags = [
        hyperparam("--save-interval-updates", args.save_updates),
        hyperparam("--keep-interval-updates", 1),
        hyperparam("--no-epoch-checkpoints"),
    ]
    if args.no_save:
        flags = [hyperparam("--no-save")]
    if args.rf is not None:
        flags.append(hyperparam("--restore-file", args.rf))
    resets = _RESETS if args.reset else ("lr-scheduler",) if args.reset_lr else ()
    return flags + [hyperparam(f"--reset-{what}") for what in resets]


def _random_data(args: argparse.Namespace) -> Path:
    """Where the random tokens of a benchmark of this shape lie."""
    size = args.dict_size or _DICT_SIZE
    blocks = args.ebs * min(args.mu, _MOST_UPDATES)
    return Path(args.checkpoints_dir, f"random-tokens.v{size}.{blocks}x{args.tps}")


def make_data(args: argparse.Namespace) -> None:
    """Make the random tokens, where no data folder was given and none are there."""
    folder = _random_data(args)
    if args.data != str(folder) or folder.is_dir():
        return
    print(f"no -d: the data are random tokens, in {folder}", flush=True)
    make_random_tokens(
        folder,
        symbols=args.dict_size or _DICT_SIZE,
        train=args.ebs * min(args.mu, _MOST_UPDATES) * args.tps,
        valid=args.bs * args.num_gpus * args.num_nodes * args.tps,
        line=args.tps,
    )


if __name__ == "__main__":
    sweep.main(get_grid, add_extra_options_func=add_options, prepare=make_data, about=__doc__)
