"""`--compile`: the layers compiled for training, the same numbers, and one line where it cannot be.

The compiler's front half does all the work that can go wrong here; the code it would generate takes
a minute to build, which `tests/benchmark/test_compiled.py` does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.config.core import Choice, CommonConfig, OptimizationConfig, RunConfig
from fairseq_lite.errors import ConfigError, TrainingError
from fairseq_lite.models.api import Model
from fairseq_lite.parallel.api import Machine
from fairseq_lite.parallel.fully_sharded.choice import FullyShardedConfig
from fairseq_lite.training import compilation
from fairseq_lite.training.compilation import compile_layers
from tests.helpers.generation import make_model, make_sample
from tests.unit.test_model_lm import make, tokens

PROCESSOR = Machine(environ={"CXX": "python"})  # something that is on the path


def run_of(compile: bool = True, backend: Any = None, cpu: bool = False) -> RunConfig:
    return RunConfig(
        command="flite-train",
        common=CommonConfig(cpu=cpu),
        optimization=OptimizationConfig(compile=compile),
        ddp_backend=Choice() if backend is None else Choice("fully_sharded", backend),
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def gradients(model: nn.Module, *inputs: Any, **more: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model.train()
    model(*inputs, **more)[0].square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_language_model_compiled_is_the_same() -> None:
    plain = make(scale_attn=True, scale_heads=True, scale_resids=True, decoder_layers=3)
    names = list(plain.state_dict())
    expected = [gradients(plain, tokens(2, n)) for n in (8, 8, 6, 5)]
    evaluated = plain.eval()(tokens(2, 7))[0]
    compile_layers(plain, backend="aot_eager")
    for n, grads in zip((8, 8, 6, 5), expected, strict=True):
        assert_alike(gradients(plain, tokens(2, n)), grads)
    # Three layers share a graph: one for the first shape, one for all others.
    assert graphs() == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(plain.eval()(tokens(2, 7))[0], evaluated)
    assert graphs() == 2  # evaluation is not compiled
    assert list(plain.state_dict()) == names


def test_what_is_around_experts_is_compiled() -> None:
    model = make(moe_freq=2, moe_expert_count=4, decoder_layers=4, moe_second_expert_policy="all")
    names = list(model.state_dict())
    expected = [gradients(model, tokens(2, n)) for n in (8, 6, 5)]
    compile_layers(model, backend="aot_eager")
    for n, grads in zip((8, 6, 5), expected, strict=True):
        assert_alike(gradients(model, tokens(2, n)), grads)
    assert graphs() > 0
    assert list(model.state_dict()) == names


def test_an_encoder_decoder_compiled_is_the_same() -> None:
    sample = make_sample([6, 4])["net_input"]
    model = make_model(dropout=0.0)
    expected = gradients(model, **sample)
    compile_layers(model, backend="eager")
    assert_alike(gradients(model, **sample), expected)
    assert graphs() == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_dropout_and_recomputation_are_compiled() -> None:
    model = make(dropout=0.3, attention_dropout=0.2, activation_dropout=0.1)
    compile_layers(model, backend="eager")
    once, again = (gradients(model, tokens(2, 8)) for _ in range(2))
    assert_alike(once, again)  # drawn from the seed
    assert not torch._dynamo.utils.counters["graph_break"]
    model.train()
    assert not torch.equal(model(tokens(2, 8))[0], model(tokens(2, 8))[0])
    checkpointed = make(
        dropout=0.3, attention_dropout=0.2, activation_dropout=0.1, checkpoint_activations=True
    )
    compile_layers(checkpointed, backend="eager")
    assert_alike(gradients(checkpointed, tokens(2, 8)), once)


# -- where it cannot work -----------------------------------------------------------------------


def test_it_is_off_unless_asked_for() -> None:
    assert not OptimizationConfig().compile
    assert compilation.reasons(run_of(compile=False), Machine(environ={"CXX": "none"})) == []
    assert compilation.reasons(run_of(), PROCESSOR) == []


def test_a_machine_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler .* no c--: install"):
        compilation.check(run_of(), Machine(environ={"CXX": "c--"}))
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    gpu = Machine(cuda_devices=1, environ={"CXX": "python"})
    with pytest.raises(ConfigError, match="needs triton on CUDA"):
        compilation.check(run_of(), gpu)
    compilation.check(run_of(cpu=True), gpu)


def test_fairscales_engine_is_refused() -> None:
    run = run_of(backend=FullyShardedConfig(fsdp_engine="fairscale"))
    with pytest.raises(ConfigError, match="use --fsdp-engine torch"):
        compilation.check(run, PROCESSOR)
    compilation.check(run_of(backend=FullyShardedConfig()), PROCESSOR)


def test_an_architecture_without_layers_is_named() -> None:
    class Odd(Model):
        pass

    with pytest.raises(ConfigError, match="--compile: Odd does not say what its layers are"):
        compile_layers(Odd())


def test_a_compiler_that_fails_is_one_line() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no luck\ntoday")

    model = make().train()
    compile_layers(model, backend=broken)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="^--compile: torch.compile failed .*no luck") as error:
        model(tokens(1, 4))
    assert "\n" not in str(error.value)
