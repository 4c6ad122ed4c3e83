"""What cannot be done with experts is said in one line, before any process starts."""

from __future__ import annotations

from typing import Any

import pytest

from fairseq_lite.builtins import load_builtins
from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.parse import parse
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import Machine
from fairseq_lite.training.assembly import check
from tests.helpers.toy import ADAM, TINY_MODEL

EXPERTS = ["--moe-freq", "1", "--moe-expert-count", "3", "--criterion", "moe_cross_entropy"]
CPU = Machine()


def reasons(ranks: int, *flags: str, backend: str = "legacy_ddp") -> list[str]:
    words = ["data", "--cpu", *TINY_MODEL, *ADAM, *EXPERTS, "--ddp-backend", backend, *flags]
    run: RunConfig = parse(
        "flite-train", [*words, "--distributed-world-size", str(ranks)], load_builtins()
    )
    chosen: Any = load_builtins()["ddp_backend"].get(backend).factory
    found: list[str] = chosen.reasons(run, CPU)
    return found


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded", "pytorch_ddp", "no_c10d"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_any_number_of_ranks(ranks: int, backend: str) -> None:
    assert reasons(ranks, backend=backend) == []


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "sgd", "nag", "adamax", "adagrad"])
def test_rules_for_whole_parameters_see_whole_experts(optimizer: str) -> None:
    assert reasons(2, "--optimizer", optimizer, "--lr", "0.1") == []


def test_a_rule_that_takes_a_norm_of_its_own() -> None:
    """Each process would clip by other gradients, and shared parameters drift apart."""
    assert reasons(1, "--optimizer", "lamb") == []
    assert reasons(2, "--optimizer", "lamb") == [
        "--optimizer lamb clips by the gradients of one process, and experts are spread over 2: "
        "use --optimizer adam"
    ]


def test_a_rule_for_whole_parameters_does_not_see_parts_of_them() -> None:
    (reason,) = reasons(2, "--optimizer", "adafactor", backend="fully_sharded")
    assert reason.startswith("--optimizer adafactor looks at whole parameters")


@pytest.mark.parametrize("arch", ["transformer_tiny", "transformer_lm"])
def test_experts_that_take_no_token_of_any_batch(arch: str) -> None:
    words = ["data", "--cpu", "--arch", arch, *ADAM, "--moe-freq", "2", "--moe-expert-count", "3"]
    words += [] if arch == "transformer_tiny" else ["--task", "language_modeling"]

    def try_out(*more: str) -> None:
        check(parse("flite-train", [*words, *more], load_builtins()))

    # Of 100 tokens an expert's even share is 34, rounded up.
    with pytest.raises(ConfigError, match="no token of 100, .*: expected 0.0295 or more, or 0 for"):
        try_out("--max-tokens", "100", "--moe-capacity-factor", "0.029")
    try_out("--max-tokens", "100", "--moe-capacity-factor", "0.0295")
    try_out("--max-tokens", "100", "--moe-capacity-factor", "0")
    try_out("--batch-size", "2", "--moe-capacity-factor", "0.001")  # how long sentences are?


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        ("--moe-capacity-factor 0.5", "75.0%"),
        ("--moe-capacity-factor 0.01 --moe-top1-expert", "99.0%"),
        ("--moe-capacity-factor 1", None),
        ("--moe-capacity-factor 0.5 --moe-top1-expert", None),
        ("--moe-capacity-factor 0", None),
    ],
)
def test_what_is_always_dropped_is_said(flags: str, share: str | None, caplog: Any) -> None:
    reasons(1, *flags.split())
    said = [line for line in caplog.messages if "--moe-capacity-factor" in line]
    assert len(said) == (share is not None)
    assert share is None or f"turn away at least {share} of all choices" in said[0]
