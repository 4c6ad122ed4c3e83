"""Finding out which batch and which module broke a step, after it broke."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.errors import TrainingError
from fairseq_lite.parallel.local import local
from fairseq_lite.tasks.api import Sample

_IDS_SHOWN = 10


def describe_batch(sample: Sample | None) -> str:
    """The ids and the shape of a batch, short enough for an error message.

    >>> describe_batch({"id": torch.tensor([4, 2]), "net_input": {"src_tokens": torch.ones(2, 7)}})
    'ids 4 2 (source 2x7)'
    """
    if sample is None or "id" not in sample:
        return "no data on this rank"
    ids = torch.as_tensor(sample["id"]).flatten().tolist()
    text = "ids " + " ".join(str(i) for i in ids[:_IDS_SHOWN])
    if len(ids) > _IDS_SHOWN:
        text += f" … ({len(ids)} in all)"
    shapes = []
    net_input = sample.get("net_input", {})
    for label, tensor in (
        ("source", net_input.get("src_tokens")),
        ("target", sample.get("target")),
    ):
        if isinstance(tensor, Tensor):
            shapes.append(f"{label} {'x'.join(str(n) for n in tensor.shape)}")
    return f"{text} ({', '.join(shapes)})" if shapes else text


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run `forward` again and name the first thing in it that is not finite.

    Args:
        model: the model whose modules are watched; of weights spread over ranks, each rank looks at
            its own part.
        forward: runs the model on the batch in question.

    Returns:
        For example "the weight encoder.layers.0.fc1.weight" or "the output of decoder.layers.1";
        None when everything is finite, so the fault arose in the backward pass.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Infinities stand for masked positions in some outputs; a NaN is never meant.
            if not found and any(
                t.is_floating_point() and bool(torch.isnan(t).any()) for t in _tensors(output)
            ):
                found.append(f"the output of {name or type(module).__name__}")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(local(parameter)).all():
            return f"the weight {name}"
    return found[0] if found else None


@contextmanager
def explaining_failure(rank: int, sample: Sample | None) -> Iterator[None]:
    """Turn a lack of memory into an error that names the rank and the batch.

    Raises:
        TrainingError: the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"rank {rank}: out of memory on {describe_batch(sample)}: lower --max-tokens or "
            f"--batch-size ({str(error).splitlines()[0]})"
        ) from error
