"""`--compile` together with `--ddp-backend fully_sharded`: gathering stays outside the graphs."""

from __future__ import annotations

import torch

from fairseq_lite.parallel.fully_sharded.choice import FullyShardedConfig
from fairseq_lite.parallel.fully_sharded.torch_engine import TorchSharded
from fairseq_lite.parallel.world import World
from fairseq_lite.training.compilation import compile_layers
from tests.helpers.distributed import run_distributed
from tests.unit.test_model_lm import SCALES, SMALL, TransformerLMConfig, build, tokens


def train(world: World, compiled: bool) -> tuple[list[float], int]:
    """Loss and gradient norm of two batches, and how many graphs were compiled."""
    torch.manual_seed(3)
    config = TransformerLMConfig(
        **SMALL, **SCALES, share_decoder_input_output_embed=True, min_params_to_wrap=0
    )
    backend = TorchSharded(FullyShardedConfig(), world)
    model = backend.wrap(lambda: build(config))
    if compiled:
        compile_layers(model, backend="eager")
    model.train()
    numbers: list[float] = []
    for step in range(2):
        with backend.accumulate(model, last=True):
            loss = model(tokens(2, 8, seed=10 * world.rank + step))[0].square().mean()
            backend.backward(model, loss)
        backend.reduce_gradients(model)
        numbers += [loss.item(), backend.grad_norm(model).item()]
        model.zero_grad()
    return numbers, int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def both(world: World) -> tuple[tuple[list[float], int], tuple[list[float], int]]:
    return train(world, False), train(world, True)


def test_compiled_layers_train_alike_on_shards() -> None:
    ranks = run_distributed(both, 2, timeout=110.0, heartbeat=100)
    for (expected, before), (got, after) in ranks:
        assert (before, after) == (0, 1)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert ranks[0][0] != ranks[1][0]  # they had data of their own
