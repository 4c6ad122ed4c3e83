#!/usr/bin/env python3
"""A sweep over language models.

    scripts/sweep/sweep_lm.py -d data-bin -p first -t -1 -g 8 --local --lr 1e-3 5e-4 --dropout 0 0.1

Flags with several values are swept: a run for each combination. docs/sweeps.md says more.
"""

from __future__ import annotations

import argparse
from typing import Any

import parts
import sweep
from parts import key
from sweep import hyperparam


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model and its training").add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--arch", nargs="+", default=["transformer_lm_gpt"], metavar="NAME", help="architectures")
    add("--epg", type=int, default=0, metavar="N", help="experts a GPU (default: 0, dense)")
    add("--tps", type=int, default=512, metavar="N", help="tokens of a block (default: 512)")
    add("--break-mode", default="none", help="--sample-break-mode (default: none)")
    add("--bs", type=int, default=8, metavar="N", help="blocks in a batch (default: 8)")
    add("--uf", type=int, default=[1], **many, help="batches in an update (default: 1)")
    add("--opt", default="adam", help="optimizer (default: adam)")
    add("--lr", type=float, default=[5e-4], **many, help="learning rates (default: 5e-4)")
    add("--sched", choices=parts.SCHEDULES, default="inverse_sqrt", help="(default: inverse_sqrt)")
    add("--wu", type=int, default=[4000], **many, help="updates of warm-up (default: 4000)")
    add("--mu", type=int, default=50000, metavar="N", help="updates (default: 50000)")
    add("--dropout", type=float, default=[0.1], **many, help="(default: 0.1)")
    add("--wd", type=float, default=[0.01], **many, help="weight decay (default: 0.01)")
    add("--clip-norm", type=float, default=[0.0], **many, help="(default: 0, no clipping)")
    add("--train-seed", type=int, default=[1], **many, help="--seed of training (default: 1)")
    add("--ddp", default="legacy_ddp", metavar="NAME", help="--ddp-backend (default: legacy_ddp)")
    add("--li", type=int, default=25, metavar="N", help="log every N updates (default: 25)")
    add("--nw", type=int, default=1, metavar="N", help="--num-workers (default: 1)")
    add("--save-updates", type=int, default=1000, metavar="N", help="save and validate every N")
    parts.add_precision(parser)


def get_grid(args: argparse.Namespace) -> list[hyperparam]:
    parts.at_least(args, 1, "tps", "bs", "uf", "mu", "li", "save_updates")
    parts.at_least(args, 0, "wu", "nw")
    adam = [hyperparam("--adam-betas", "(0.9, 0.98)")] if args.opt == "adam" else []
    return [
        *parts.precision(args.precision),
        hyperparam("--task", "language_modeling"),
        hyperparam("--sample-break-mode", args.break_mode, save_dir_key=key("bm_")),
        hyperparam("--tokens-per-sample", args.tps, save_dir_key=key("tps")),
        hyperparam("--arch", args.arch, save_dir_key=str),
        hyperparam("--share-decoder-input-output-embed"),
        *parts.experts(parts.num_experts(args)),
        hyperparam("--ddp-backend", args.ddp, save_dir_key=str),
        hyperparam("--optimizer", args.opt, save_dir_key=str),
        *adam,
        hyperparam("--clip-norm", args.clip_norm, save_dir_key=key("cl")),
        hyperparam("--lr", args.lr, save_dir_key=key("lr")),
        *parts.schedule(args.sched, usual="inverse_sqrt", max_update=args.mu, warmup=args.wu),
        hyperparam("--dropout", args.dropout, save_dir_key=key("dr")),
        hyperparam("--weight-decay", args.wd, save_dir_key=key("wd")),
        hyperparam("--batch-size", args.bs, save_dir_key=key("ms")),
        hyperparam("--update-freq", args.uf, save_dir_key=key("uf")),
        hyperparam("--max-update", args.mu, save_dir_key=key("mu")),
        hyperparam("--seed", args.train_seed, save_dir_key=key("s")),
        hyperparam("--num-workers", args.nw),
        hyperparam("--save-interval-updates", args.save_updates),
        hyperparam("--keep-interval-updates", 1),
        hyperparam("--no-epoch-checkpoints"),
        hyperparam("--log-interval", args.li),
    ]


if __name__ == "__main__":
    sweep.main(get_grid, add_extra_options_func=add_options, about=__doc__)
