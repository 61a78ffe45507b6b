"""The folded single-query pooler against LayerNorm + torch's MultiheadAttention with the same weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from coca_video.models.pooler import AttentionalPooler
from coca_video.models.pooler_fold import folded_pool

BATCH, TOKENS, WIDTH, HEADS = 3, 37, 48, 4


class Reference(nn.Module):
    """The ordinary pooler, out of torch's own parts, holding a pooler's weights."""

    def __init__(self, pooler: AttentionalPooler) -> None:
        super().__init__()
        pooler = copy.deepcopy(pooler)
        attention = pooler.attention
        self.query, self.norm_query, self.norm_context = pooler.query, pooler.norm_query, pooler.norm_context
        self.norm_out = pooler.norm_out
        dim, context_dim = attention.q_proj.in_features, attention.k_proj.in_features
        dtype = attention.q_proj.weight.dtype
        self.mha = nn.MultiheadAttention(
            dim, attention.num_heads, kdim=context_dim, vdim=context_dim, batch_first=True, dtype=dtype
        )
        with torch.no_grad():
            if self.mha.in_proj_weight is None:
                self.mha.q_proj_weight.copy_(attention.q_proj.weight)
                self.mha.k_proj_weight.copy_(attention.k_proj.weight)
                self.mha.v_proj_weight.copy_(attention.v_proj.weight)
            else:
                self.mha.in_proj_weight.copy_(
                    torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
                )
            self.mha.in_proj_bias.copy_(
                torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias])
            )
            self.mha.out_proj.weight.copy_(attention.out_proj.weight)
            self.mha.out_proj.bias.copy_(attention.out_proj.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        query = self.norm_query(self.query).expand(len(tokens), -1, -1)
        context = self.norm_context(tokens)
        ignored = None if mask is None else ~mask
        return self.norm_out(self.mha(query, context, context, key_padding_mask=ignored, need_weights=False)[0])

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the names of the pooler's state dict."""
        found = {name: parameter.grad for name, parameter in self.named_parameters() if not name.startswith("mha")}
        if self.mha.in_proj_weight is None:
            weights = (self.mha.q_proj_weight.grad, self.mha.k_proj_weight.grad, self.mha.v_proj_weight.grad)
        else:
            weights = self.mha.in_proj_weight.grad.chunk(3)
        for name, weight, bias in zip("qkv", weights, self.mha.in_proj_bias.grad.chunk(3), strict=True):
            found[f"attention.{name}_proj.weight"], found[f"attention.{name}_proj.bias"] = weight, bias
        found["attention.out_proj.weight"] = self.mha.out_proj.weight.grad
        found["attention.out_proj.bias"] = self.mha.out_proj.bias.grad
        return found


def make_pooler(*, dtype: torch.dtype, context_dim: int = WIDTH, num_queries: int = 1) -> AttentionalPooler:
    """Weights all away from their initial ones and zeros, so that no term of the algebra can hide."""
    torch.manual_seed(0)
    pooler = AttentionalPooler(WIDTH, num_heads=HEADS, num_queries=num_queries, context_dim=context_dim)
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return pooler.to(dtype)


def make_tokens(*, dtype: torch.dtype, context_dim: int = WIDTH, mean: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(BATCH, TOKENS, 1, generator=generator, dtype=torch.float64) + 0.5
    shift = torch.randn(BATCH, TOKENS, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(BATCH, TOKENS, context_dim, generator=generator, dtype=torch.float64)
    return (noise * scale + mean * (1 + shift)).to(dtype)


def make_mask() -> Tensor:
    lengths = torch.tensor([TOKENS, 1, TOKENS // 2])
    return torch.arange(TOKENS).expand(BATCH, -1) < lengths[:, None]


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, relative to the reference's largest value where that is above one."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("trainable_tokens", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("context_dim", [WIDTH, 32])
@pytest.mark.parametrize("mean", [0.3, 1e3], ids=["centred", "large-mean"])
def test_float64_outputs_and_all_gradients(masked: bool, trainable_tokens: bool, context_dim: int, mean: float) -> None:
    pooler = make_pooler(dtype=torch.float64, context_dim=context_dim)
    reference = Reference(pooler)
    mask = make_mask() if masked else None
    tokens = make_tokens(dtype=torch.float64, context_dim=context_dim, mean=mean)
    ours_in, theirs_in = (tokens.clone().requires_grad_(trainable_tokens) for _ in range(2))
    ours, theirs = pooler(ours_in, mask=mask), reference(theirs_in, mask)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()

    assert largest_difference(ours, theirs) <= 1e-10
    expected = reference.gradients()
    assert set(expected) == {name for name, _ in pooler.named_parameters()}
    for name, parameter in pooler.named_parameters():
        assert parameter.grad is not None, name
        assert largest_difference(parameter.grad, expected[name]) <= 1e-10, name
    assert torch.count_nonzero(pooler.attention.k_proj.bias.grad) == 0  # exactly: no rounding noise to step along
    if trainable_tokens:
        assert theirs_in.grad.abs().max() > 0 and largest_difference(ours_in.grad, theirs_in.grad) <= 1e-10


@pytest.mark.parametrize("mean", [0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 300.0, 1e4])
@pytest.mark.parametrize("trainable_tokens", [False, True], ids=["frozen", "trainable"])
def test_fp32_outputs_and_all_gradients_against_float64(mean: float, trainable_tokens: bool) -> None:
    """Against the float64 reference on the same fp32 tokens, also where their mean dwarfs their deviation."""
    pooler = make_pooler(dtype=torch.float32)
    tokens = make_tokens(dtype=torch.float32, mean=mean)
    reference = Reference(pooler).double()
    ours_in = tokens.clone().requires_grad_(trainable_tokens)
    theirs_in = tokens.double().requires_grad_(trainable_tokens)
    ours, exact = pooler(ours_in, mask=make_mask()), reference(theirs_in, make_mask())
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    (exact * weight.double()).sum().backward()
    assert largest_difference(ours.double(), exact) <= 1e-5
    expected = reference.gradients()
    for name, parameter in pooler.named_parameters():
        assert largest_difference(parameter.grad.double(), expected[name]) <= 1e-5, name
    if trainable_tokens:
        assert largest_difference(ours_in.grad.double(), theirs_in.grad) <= 1e-5


def test_large_mean_needs_centring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the centring the bound above is missed, so the test above does test it."""
    monkeypatch.setattr("coca_video.models.pooler_fold.MAX_MEAN_SQUARE_OVER_VARIANCE", float("inf"))
    pooler = make_pooler(dtype=torch.float32)
    tokens = make_tokens(dtype=torch.float32, mean=1e4)
    exact = Reference(pooler.double())(tokens.double(), make_mask()).detach()
    assert largest_difference(pooler.float()(tokens, mask=make_mask()).double(), exact) > 1e-3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_bf16_tokens_within_bound(autocast: bool, mean: float, sharpness: float) -> None:
    """bf16 tokens, fp32 weights, against float64 on the same tokens: within twice the ordinary path's error, and 2%."""
    torch.manual_seed(0)
    pooler = AttentionalPooler(256, num_heads=4, num_queries=1)
    tokens = (torch.randn(2, 1500, 256) + mean * torch.randn(2, 1500, 1)).bfloat16()
    with torch.no_grad():
        pooler.attention.q_proj.weight.mul_(sharpness)
        exact = Reference(pooler.double())(tokens.double(), None)
        pooler = pooler.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ordinary = pooler.norm_out(pooler.attend(tokens))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            folded = pooler(tokens)
    errors = [float((out.double() - exact).norm() / exact.norm()) for out in (folded, ordinary)]
    assert errors[0] <= 2 * errors[1] and errors[0] <= 0.02


@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_pooler_of_bf16_weights(num_queries: int) -> None:
    """As a model cast to bf16 calls it; the bound is what three roundings of bf16 leave."""
    pooler = make_pooler(dtype=torch.float32, num_queries=num_queries)
    tokens = make_tokens(dtype=torch.bfloat16)
    exact = Reference(pooler.double())(tokens.double(), make_mask()).detach()
    out = pooler.bfloat16()(tokens, mask=make_mask())
    assert out.dtype == torch.bfloat16
    assert float((out.detach().double() - exact).norm() / exact.norm()) <= 0.03


def test_many_queries_equal_torch() -> None:
    pooler = make_pooler(dtype=torch.float64, num_queries=5, context_dim=32)
    tokens = make_tokens(dtype=torch.float64, context_dim=32)
    out = pooler(tokens, mask=make_mask())
    assert out.shape == (BATCH, 5, WIDTH)
    assert largest_difference(out, Reference(pooler)(tokens, make_mask())) <= 1e-10


def test_keys_and_values_are_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pooler = make_pooler(dtype=torch.float64)
    expected = pooler(make_tokens(dtype=torch.float64))
    for unused in (pooler.attention, pooler.attention.k_proj, pooler.attention.v_proj, pooler.norm_context):
        monkeypatch.setattr(unused, "forward", None)
    assert torch.equal(pooler(make_tokens(dtype=torch.float64)), expected)


def fold(tokens: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """The fold with what makes it exact: a query and an output without their means over features."""
    pooled = folded_pool(tokens, query=query - query.mean(dim=-1, keepdim=True), mask=mask, eps=1e-5)
    return pooled - pooled.mean(dim=-1, keepdim=True)


def make_fold_inputs(*, mean: float) -> tuple[Tensor, Tensor]:
    """Small tokens and folded queries in float64 that want their gradients."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) + mean
    query = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return tokens.requires_grad_(), query.requires_grad_()


@pytest.mark.parametrize("mean", [0.4, 50.0], ids=["as-they-are", "centred"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_fold_gradients_equal_finite_differences(masked: bool, mean: float) -> None:
    tokens, query = make_fold_inputs(mean=mean)
    mask = torch.tensor([[True, False, True, True, False], [True, True, False, False, False]]) if masked else None
    assert torch.autograd.gradcheck(fold, (tokens, query, mask))
    if mask is not None:
        (grad,) = torch.autograd.grad(fold(tokens, query, mask).square().sum(), tokens)
        assert torch.count_nonzero(grad[~mask]) == 0 and (grad[mask].abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["tokens", "query"])
def test_fold_gives_the_gradient_of_one_side_alone(wanted: tuple[bool, bool]) -> None:
    inputs = make_fold_inputs(mean=0.4)
    both = torch.autograd.grad(fold(*inputs, None).square().sum(), inputs)
    alone = [value.detach().requires_grad_(needed) for value, needed in zip(inputs, wanted, strict=True)]
    fold(*alone, None).square().sum().backward()
    for value, needed, expected in zip(alone, wanted, both, strict=True):
        assert torch.equal(value.grad, expected) if needed else value.grad is None


@pytest.mark.parametrize("trainable_tokens", [False, True], ids=["frozen", "trainable"])
def test_fold_saves_the_tokens_once_and_little_else(trainable_tokens: bool) -> None:
    """Attention and inverse deviations; for the tokens' gradient also the query, scores and means."""
    tokens, query = make_fold_inputs(mean=0.4)
    (batch, length, _), heads = tokens.shape, len(query)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        folded_pool(tokens.detach().requires_grad_(trainable_tokens), query=query, mask=None, eps=1e-5)
    expected = [tokens.numel(), batch * length, batch * heads * length]
    assert saved == expected + [query.numel(), batch * length, batch * heads * length] * trainable_tokens


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_fold_of_mean_free_tokens_takes_their_variance(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Equal to the fold of the raw tokens, gradients by query and tokens too, with no statistics computed."""
    tokens, query = make_fold_inputs(mean=0.4)
    mask = torch.tensor([[True, False, True, True, False], [True, True, False, False, False]]) if masked else None
    variance = tokens.detach().var(dim=-1, correction=0)
    centred = (tokens.detach() - tokens.detach().mean(dim=-1, keepdim=True)).requires_grad_()
    raw = fold(tokens, query, mask)
    expected = torch.autograd.grad(raw.square().sum(), (tokens, query))
    monkeypatch.setattr("coca_video.models.pooler_fold._row_statistics", None)
    free_query = query - query.mean(dim=-1, keepdim=True)
    pooled = folded_pool(centred, query=free_query, mask=mask, eps=1e-5, variance=variance)
    pooled = pooled - pooled.mean(dim=-1, keepdim=True)
    found = torch.autograd.grad(pooled.square().sum(), (centred, query))
    for ours, theirs in zip((pooled, *found), (raw, *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_fold_gradients_are_not_rounded_by_an_autocast_around_the_backward() -> None:
    inputs = [value.detach().float().requires_grad_() for value in make_fold_inputs(mean=0.4)]
    pooled = folded_pool(inputs[0], query=inputs[1], mask=None, eps=1e-5)
    pull = torch.linspace(-1, 1, pooled.numel()).view_as(pooled)
    expected = torch.autograd.grad(pooled, inputs, pull, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(pooled, inputs, pull)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_bf16_tokens_gradient_within_bound(mean: float, sharpness: float) -> None:
    """As for the output: against float64, within twice the ordinary path's error under bf16 autocast, and 3%."""
    torch.manual_seed(0)
    pooler = AttentionalPooler(256, num_heads=4, num_queries=1)
    tokens = (torch.randn(2, 500, 256) + mean * torch.randn(2, 500, 1)).bfloat16()
    pull = torch.randn(2, 1, 256)
    with torch.no_grad():
        pooler.attention.q_proj.weight.mul_(sharpness)

    def tokens_gradient(pooled: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad(pooled, leaf, pull.to(pooled.dtype))[0].double()

    leaf, exact_leaf = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    exact = tokens_gradient(Reference(pooler.double())(exact_leaf, None), exact_leaf)
    pooler = pooler.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded, ordinary = pooler(leaf), pooler.norm_out(pooler.attend(leaf))
    errors = [float((tokens_gradient(out, leaf) - exact).norm() / exact.norm()) for out in (folded, ordinary)]
    assert errors[0] <= 2 * errors[1] and errors[0] <= 0.03


def test_a_second_derivative_is_refused() -> None:
    pooler = make_pooler(dtype=torch.float64)
    tokens = make_tokens(dtype=torch.float64).requires_grad_()
    loss = pooler(tokens).square().sum()
    with pytest.raises(ValueError, match="create_graph=True: use its method attend"):
        torch.autograd.grad(loss, tokens, create_graph=True)


def test_without_gradients_the_output_is_the_same() -> None:
    pooler, tokens = make_pooler(dtype=torch.float64), make_tokens(dtype=torch.float64)
    expected = pooler(tokens.clone().requires_grad_(), mask=make_mask()).detach()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(pooler(tokens, mask=make_mask()), expected)
