"""The layer against a loop over tokens, its parts against plain operations, with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_lite.models.config import TransformerConfig
from fairseq_lite.models.transformer_layers import Expert
from fairseq_lite.moe import experts as experts_module
from fairseq_lite.moe.experts import Experts, casts_kept
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions
from fairseq_lite.moe.products import evened, linear_by_expert, linear_grouped, stacked, uneven
from fairseq_lite.moe.rows import Places, combine, dispatch, permute

DIM, INNER = 8, 12


class Feed(nn.Module):
    """A feed-forward network with the two products that the fast path takes."""

    def __init__(self, bias: bool = True, norm: bool = False, inner: int = INNER) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, inner, bias=bias)
        self.fc2 = nn.Linear(inner, DIM, bias=bias)
        self.norm = nn.LayerNorm(inner) if norm else None

    def between(self, inner: Tensor) -> Tensor:
        inner = F.gelu(inner)
        return inner if self.norm is None else self.norm(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


class Other(nn.Module):
    """An expert of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "two products": Feed,
    "without bias": lambda: Feed(bias=False),
    "normalised": lambda: Feed(norm=True),
    "another": Other,
}


def make_layer(
    make: Callable[[], nn.Module] = Feed, experts: int = 4, top_k: Any = 2, **more: Any
) -> MoELayer:
    torch.manual_seed(0)
    options = RouterOptions(experts, top_k, second_policy="all", **more)
    layer = MoELayer(DIM, MoEOptions(every=1, router=options, ffn_dim=INNER), make, "layer")
    nn.init.normal_(layer.gate.wg.weight)
    return layer


def plain_layer(layer: MoELayer, x: Tensor, routed: Tensor | None = None) -> Tensor:
    """One token after another, each expert called by itself."""
    routing = layer.gate(x, routed)
    out = []
    for t in range(x.size(0)):
        total = 0.0 * x[t]
        for k in range(routing.experts.size(1)):
            if routing.kept is None or bool(routing.kept[t, k]):
                expert = layer.experts.get_submodule(str(int(routing.experts[t, k])))
                total = total + routing.weights[t, k] * expert(x[t : t + 1])[0]
        out.append(total)
    return torch.stack(out) if out else 0.0 * x


def run(
    layer: MoELayer, x: Tensor, function: Callable[..., Tensor], *args: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Output, gradient of the input and of all parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = function(layer, x, *args)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * towards).sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
    assert x.grad is not None
    return out.detach(), x.grad, grads


def assert_alike(got: Any, want: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got[0], want[0], **tolerance)
    torch.testing.assert_close(got[1], want[1], **tolerance)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        assert got[2][name] is not None, f"{name} has no gradient"
        expected = torch.zeros_like(got[2][name]) if grad is None else grad
        torch.testing.assert_close(got[2][name], expected, **tolerance, msg=partial(_of, name))


def _of(name: str, message: str) -> str:
    return f"{name}: {message}"


def ours(layer: MoELayer, x: Tensor, *args: Any) -> Tensor:
    return layer(x, *args)[0]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_a_loop_over_tokens(kind: str, top_k: int, factor: float | None, tokens: int) -> None:
    layer = make_layer(MAKERS[kind], top_k=top_k, capacity_factor=factor).double()
    x = torch.randn(tokens, DIM, dtype=torch.float64)
    assert_alike(run(layer, x, ours), run(layer, x, plain_layer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_masked_and_dropped_tokens_give_zeros(top_k: int) -> None:
    layer = make_layer(top_k=top_k, capacity_factor=0.25, mask_padding=True).double()
    x = torch.randn(3, 7, DIM, dtype=torch.float64)
    padding = torch.rand(3, 7) < 0.3
    out, report = layer(x, padding)
    routing = layer.gate(x.view(-1, DIM), ~padding.view(-1))
    assert routing.kept is not None
    gone = ~routing.kept.any(dim=1).view(3, 7)
    assert int(report.dropped.sum()) > 0
    assert int(gone.sum()) > int(padding.sum())
    assert torch.equal(out[gone], torch.zeros_like(out[gone]))
    assert bool((out[~gone] != 0).any(dim=1).all())
    flat = x.view(-1, DIM)
    want = run(layer, flat, plain_layer, ~padding.view(-1))
    assert_alike(run(layer, flat, ours, padding.view(-1)), want, rtol=1e-10, atol=1e-12)


def test_experts_without_rows_have_zero_gradients() -> None:
    for kind, make in MAKERS.items():
        layer = make_layer(make, top_k=1)
        with torch.no_grad():
            layer.gate.wg.weight[3] = 50.0
        x = torch.rand(5, DIM)
        _, _, grads = run(layer, x, ours)
        for name, grad in grads.items():
            assert grad is not None, f"{kind}: {name}"
            idle = name.startswith("experts.") and not name.startswith("experts.3.")
            assert bool((grad == 0).all()) == idle or name.startswith("gate"), f"{kind}: {name}"


@pytest.mark.parametrize("top_k", [1, 2])
def test_identical_experts_are_the_dense_network(top_k: int) -> None:
    layer = make_layer(top_k=top_k).double()
    for expert in layer.experts.children():
        expert.load_state_dict(layer.experts.get_submodule("0").state_dict())
    dense = copy.deepcopy(layer.experts.get_submodule("0"))
    x = torch.randn(30, DIM, dtype=torch.float64)
    out, _ = layer(x)
    weights = layer.gate(x).weights.sum(1, keepdim=True)
    torch.testing.assert_close(out, dense(x) * weights)
    if top_k == 2:
        torch.testing.assert_close(weights, torch.ones_like(weights))
    out.sum().backward()
    (dense(x) * weights.detach()).sum().backward()
    for name, p in dense.named_parameters():
        total = sum(e.get_parameter(name).grad for e in layer.experts.children())
        torch.testing.assert_close(total, p.grad, msg=name)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_close_to_the_loop(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(MAKERS[kind], gate_fp32=True)
    x = torch.randn(60, DIM)

    def narrow(layer: MoELayer, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            out = layer(x)[0]
        assert out.dtype == dtype
        return out.float()

    assert_alike(run(layer, x, narrow), run(layer, x, plain_layer), rtol=0.05, atol=0.05)
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_evaluation_does_not_depend_on_the_batch() -> None:
    layer = make_layer(jitter=0.3, capacity_factor=0.5).eval()
    x = torch.randn(4, 9, DIM)
    whole, _ = layer(x)
    torch.testing.assert_close(layer(x[1:2])[0], whole[1:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[2, 3])[0], whole[2, 3], rtol=1e-5, atol=1e-5)
    wide = torch.cat([x, torch.randn(4, 5, DIM)], dim=1)
    padding = torch.arange(14).expand(4, -1) >= 9
    padded, report = layer(wide, padding)
    torch.testing.assert_close(padded[:, :9], whole, rtol=1e-5, atol=1e-5)
    assert int(report.tokens) == 36


# -- the parts ------------------------------------------------------------------------------------


def random_places(tokens: int, choices: int, rows: int) -> Places:
    order = torch.randperm(tokens * choices, generator=torch.Generator().manual_seed(4))[:rows]
    return Places.of(order, tokens, choices)


@pytest.mark.parametrize(
    ("tokens", "choices", "rows"), [(5, 1, 5), (5, 2, 10), (5, 2, 6), (4, 1, 0)]
)
def test_gradients_of_dispatch_and_combine(tokens: int, choices: int, rows: int) -> None:
    places = random_places(tokens, choices, rows)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    taken = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, choices, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, places), (x,))
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, places), (taken, weights))
    token = places.choice // choices
    assert torch.equal(dispatch(x, places), x[token])
    want = torch.zeros(tokens, 3, dtype=torch.float64)
    want = want.index_add(0, token, taken * weights.flatten()[places.choice][:, None])
    torch.testing.assert_close(combine(taken, weights, places), want)


def test_a_bad_row_stays_with_its_token() -> None:
    places = random_places(4, 2, 5)
    rows = torch.randn(5, 3)
    rows[2] = float("nan")
    out = combine(rows, torch.rand(4, 2), places)
    spoilt = out.isnan().any(dim=1)
    assert spoilt.nonzero().flatten().tolist() == [int(places.token[2])]


def test_gradients_of_a_permutation() -> None:
    order = torch.tensor([2, 0, 3, 1])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, order.argsort()), (x,))


@pytest.mark.parametrize("counts", [[3, 0, 16, 17], [0, 0], [32]])
def test_gradients_of_gaps(counts: list[int]) -> None:
    x = torch.randn(sum(counts), 2, dtype=torch.float64, requires_grad=True)
    wide, sizes = evened(x, counts)
    assert [size - n for size, n in zip(sizes, counts, strict=True)] == [-n % 16 for n in counts]
    assert torch.equal(uneven(wide, counts, sizes), x)
    assert wide.count_nonzero() == x.count_nonzero()
    assert torch.autograd.gradcheck(lambda x: evened(x, counts)[0], (x,))
    inside = wide.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda wide: uneven(wide, counts, sizes), (inside,))


def linear_case(counts: list[int], bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(8, 16)] * len(counts) + [(8,)] * len(counts) * bias
    tensors = [torch.randn(sum(counts), 16), *(torch.randn(shape) for shape in shapes)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def by_expert(counts: list[int]) -> Callable[..., Tensor]:
    def function(rows: Tensor, *params: Tensor) -> Tensor:
        weights, biases = params[: len(counts)], params[len(counts) :]
        return linear_by_expert(rows, counts, params, weights, biases)

    return function


def grouped(counts: list[int], kept: bool) -> Callable[..., Tensor]:
    def function(rows: Tensor, *params: Tensor) -> Tensor:
        count = len(counts)
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
        weight = stacked(params[:count], rows.dtype) if kept else None
        bias = stacked(params[count:], rows.dtype) if kept and len(params) > count else None
        return linear_grouped(rows, ends, params, weight, bias)

    return function


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0], [4]])
def test_gradients_of_the_products(counts: list[int], bias: bool) -> None:
    tensors = linear_case(counts, bias)
    assert torch.autograd.gradcheck(by_expert(counts), tensors)
    weights, biases = tensors[1 : 1 + len(counts)], tensors[1 + len(counts) :] or [None] * 9
    parts = zip(tensors[0].split(counts), weights, biases, strict=False)
    want = torch.cat([F.linear(x, w, b) for x, w, b in parts])
    torch.testing.assert_close(by_expert(counts)(*tensors), want)


HAS_GROUPED = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has no grouped product"
)


@HAS_GROUPED
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 5], [16, 8]])
def test_the_grouped_product_is_that_of_each_expert(
    counts: list[int], bias: bool, dtype: torch.dtype, kept: bool
) -> None:
    results = []
    for function in (by_expert(counts), grouped(counts, kept)):
        torch.manual_seed(0)
        tensors = linear_case(counts, bias, dtype)
        out = function(*tensors)
        (out * torch.randn(out.shape).to(out)).sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.1 if dtype.itemsize == 2 else 1e-5)


def wide_experts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Experts:
    """Experts that run as on a GPU."""
    monkeypatch.setattr(experts_module, "takes_grouped_products", lambda *_: True)
    return Experts(3, lambda: Feed(inner=16), "some.layer").to(dtype)


@HAS_GROUPED
def test_grouped_products_keep_parameters_and_no_copies_for_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = wide_experts(monkeypatch, torch.bfloat16)
    params = list(experts.parameters())
    rows = torch.randn(7, DIM, dtype=torch.bfloat16, requires_grad=True)
    counts = torch.tensor([4, 0, 3])
    weights = {p.data_ptr() for p in params if p.dim() == 2}
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def gradients(between: Callable[[], None]) -> list[Tensor]:
        with casts_kept(experts), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = experts(rows, counts)
            assert experts._casts == {}
        between()
        return list(torch.autograd.grad(out.float().square().sum(), [rows, *params]))

    def freed_and_fetched() -> None:  # as sharding does it, in the same place
        values = [p.detach().clone() for p in params]
        sizes = [p.untyped_storage().size() for p in params]
        for p in params:
            p.untyped_storage().resize_(0)
        assert all(t.untyped_storage().size() == 0 for t in saved if t.data_ptr() in weights)
        for p, value, size in zip(params, values, sizes, strict=True):
            p.untyped_storage().resize_(size)
            p.data.copy_(value)

    want = gradients(lambda: None)
    assert weights <= {t.data_ptr() for t in saved}
    assert max(t.dim() for t in saved) == 2  # a stack would have three axes
    for got, expected in zip(gradients(freed_and_fetched), want, strict=True):
        assert torch.equal(got, expected)


@HAS_GROUPED
def test_grouped_products_make_copies_in_another_type_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = wide_experts(monkeypatch, torch.float32)
    calls = count_casts(monkeypatch)
    rows, counts = torch.randn(7, DIM), torch.tensor([4, 0, 3])

    def gradients() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = experts(rows, counts)
        return list(torch.autograd.grad(out.float().sum(), list(experts.parameters())))

    want = gradients()
    assert len(calls) == 5  # two weights, two biases; in backward the second weight
    with casts_kept(experts):
        for _ in range(2):
            for got, expected in zip(gradients(), want, strict=True):
                assert torch.equal(got, expected)
    assert len(calls) == 9


# -- how it is computed ---------------------------------------------------------------------------


def count_casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    cast = torch._foreach_copy_

    def counted(into: list[Tensor], source: list[Tensor]) -> None:
        calls.append(len(source))
        cast(into, source)

    monkeypatch.setattr(experts_module.torch, "_foreach_copy_", counted)
    return calls


def test_weights_are_cast_once_while_they_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_casts(monkeypatch)
    layer = make_layer()
    x = torch.randn(10, DIM)

    def step(times: int) -> Tensor:
        for _ in range(times):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = checkpoint(layer, x, use_reentrant=False)[0]
            out.float().sum().backward()
        return out.detach()

    with casts_kept(layer):
        step(3)
    assert len(calls) == 4  # two weights, two biases; not in the second run of the checkpoint
    before = step(1)
    assert len(calls) == 12  # here it is: in forward and again in backward
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.data.mul_(2.0)  # what no counter of changes notices
    with casts_kept(layer):
        assert not torch.equal(step(1), before)
    assert len(calls) == 16


def test_a_hook_on_an_expert_is_called() -> None:
    layer = make_layer()
    x = torch.randn(10, DIM)
    plain, _ = layer(x)
    seen: list[int] = []
    layer.experts.get_submodule("2").register_forward_hook(lambda m, args, out: seen.append(1))
    hooked, _ = layer(x)
    assert seen
    torch.testing.assert_close(hooked, plain)


def test_experts_draw_their_weights_again_as_at_first() -> None:
    torch.manual_seed(5)
    experts = Experts(3, Feed, "some.layer")
    first = copy.deepcopy(experts.state_dict())
    assert not torch.equal(first["0.fc1.weight"], first["1.fc1.weight"])
    with torch.no_grad():
        for p in experts.parameters():
            p.zero_()
    experts.reset_parameters()
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_the_transformers_expert_takes_the_fast_path() -> None:
    cfg = TransformerConfig(
        encoder_embed_dim=DIM, encoder_attention_heads=2, moe_freq=1, moe_expert_count=2
    )
    expert = Expert(cfg.encoder_stack(), "owner")
    assert experts_module._is_two_products(expert)
    assert experts_module._is_bare(expert)
    assert not experts_module._is_two_products(Other())
