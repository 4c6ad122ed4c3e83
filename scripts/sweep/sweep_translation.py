#!/usr/bin/env python3
r"""A sweep over translation models.

    scripts/sweep/sweep_translation.py -d data-bin -p deen -t -1 -g 8 --source-lang de \
        --target-lang en --arch transformer_iwslt_de_en --lr 5e-4 7e-4 --local

Flags with several values are swept: a run for each combination. docs/sweeps.md says more.
"""

from __future__ import annotations

import argparse
from typing import Any

import parts
import sweep
from parts import key
from sweep import hyperparam

_SHARED = {
    "all": "--share-all-embeddings",
    "decoder": "--share-decoder-input-output-embed",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model and its training").add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--task", default="translation", metavar="NAME", help="(default: translation)")
    add("--source-lang", metavar="LANG", help="source language (default: the data folder's)")
    add("--target-lang", metavar="LANG", help="target language (default: the data folder's)")
    add("--arch", nargs="+", default=["transformer"], metavar="NAME", help="architectures")
    add("--share", choices=(*_SHARED, "none"), default="all", help="embeddings (default: all)")
    add("--max-tokens", type=int, default=3584, metavar="N", help="in a batch (default: 3584)")
    add("--update-freq", type=int, default=[4], **many, help="batches in an update (default: 4)")
    add("--lr", type=float, default=[5e-4], **many, help="learning rates (default: 5e-4)")
    add("--warmup-updates", type=int, default=[4000], **many, help="(default: 4000)")
    add("--max-update", type=int, default=40000, metavar="N", help="(default: 40000)")
    add("--dropout", type=float, default=[0.3], **many, help="(default: 0.3)")
    add("--weight-decay", type=float, default=[0.0], **many, help="(default: 0)")
    add("--label-smoothing", type=float, default=[0.1], **many, help="(default: 0.1)")
    add("--clip-norm", type=float, default=[0.0], **many, help="(default: 0, no clipping)")
    add("--train-seed", type=int, default=[1], **many, help="--seed of training (default: 1)")
    add("--eval-bleu", action="store_true", help="keep the checkpoint with the best BLEU")
    add("--eval-bleu-args", default='{"beam": 5}', metavar="JSON", help="how BLEU is measured")
    add("--remove-bpe", metavar="NAME", help="the subwords to undo before BLEU")
    add("--finetune-from-model", metavar="FILE", help="the weights to start from")
    add("--ddp-backend", default="legacy_ddp", metavar="NAME", help="(default: legacy_ddp)")
    add("--li", type=int, default=100, metavar="N", help="log every N updates (default: 100)")
    parts.add_precision(parser)


def get_grid(args: argparse.Namespace) -> list[hyperparam]:
    parts.at_least(args, 1, "max_tokens", "update_freq", "max_update", "li")
    parts.at_least(args, 0, "warmup_updates")
    return [
        *parts.precision(args.precision),
        hyperparam("--task", args.task),
        *_optional("--source-lang", args.source_lang),
        *_optional("--target-lang", args.target_lang),
        hyperparam("--arch", args.arch, save_dir_key=str),
        *([hyperparam(_SHARED[args.share])] if args.share in _SHARED else []),
        hyperparam("--ddp-backend", args.ddp_backend),
        hyperparam("--optimizer", "adam", save_dir_key=str),
        hyperparam("--adam-betas", "(0.9, 0.98)"),
        hyperparam("--lr-scheduler", "inverse_sqrt"),
        hyperparam("--lr", args.lr, save_dir_key=key("lr")),
        hyperparam("--warmup-updates", args.warmup_updates, save_dir_key=key("wu")),
        hyperparam("--clip-norm", args.clip_norm, save_dir_key=key("cl")),
        hyperparam("--dropout", args.dropout, save_dir_key=key("dr")),
        hyperparam("--weight-decay", args.weight_decay, save_dir_key=key("wd")),
        hyperparam("--criterion", "label_smoothed_cross_entropy"),
        hyperparam("--label-smoothing", args.label_smoothing, save_dir_key=key("ls")),
        hyperparam("--max-tokens", args.max_tokens, save_dir_key=key("mt")),
        hyperparam("--update-freq", args.update_freq, save_dir_key=key("uf")),
        hyperparam("--max-update", args.max_update, save_dir_key=key("mu")),
        hyperparam("--seed", args.train_seed, save_dir_key=key("s")),
        *_optional("--finetune-from-model", args.finetune_from_model),
        *(_bleu(args) if args.eval_bleu else []),
        hyperparam("--no-epoch-checkpoints"),
        hyperparam("--log-interval", args.li),
    ]


def _optional(name: str, value: str | None) -> list[hyperparam]:
    return [] if value is None else [hyperparam(name, value)]


def _bleu(args: argparse.Namespace) -> list[hyperparam]:
    return [
        hyperparam("--eval-bleu"),
        hyperparam("--eval-bleu-args", args.eval_bleu_args),
        *_optional("--eval-bleu-remove-bpe", args.remove_bpe),
        hyperparam("--best-checkpoint-metric", "bleu"),
        hyperparam("--maximize-best-checkpoint-metric"),
    ]


if __name__ == "__main__":
    sweep.main(get_grid, add_extra_options_func=add_options, about=__doc__)
