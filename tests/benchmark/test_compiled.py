"""`--compile` with the code it really generates. Opt-in: a minute or more of compiling."""

from __future__ import annotations

import os

import pytest
import torch

from fairseq_lite.parallel.api import Machine
from fairseq_lite.training import compilation
from fairseq_lite.training.compilation import compile_layers
from tests.unit.test_compilation import assert_alike, gradients, run_of
from tests.unit.test_model_lm import make, tokens


@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_generated_code_gives_the_same_gradients(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    machine = Machine(torch.cuda.device_count() if device == "cuda" else 0, dict(os.environ))
    for reason in compilation.reasons(run_of(cpu=device == "cpu"), machine):
        pytest.skip(reason)
    torch._dynamo.reset()
    model = make(scale_attn=True, scale_resids=True).to(device)
    expected = gradients(model, tokens(2, 8).to(device))
    compile_layers(model)
    assert_alike(gradients(model, tokens(2, 8).to(device)), expected)
    dropped = make(dropout=0.3, attention_dropout=0.1).to(device)
    compile_layers(dropped)
    once, again = (gradients(dropped, tokens(2, 8).to(device)) for _ in range(2))
    assert_alike(once, again)
