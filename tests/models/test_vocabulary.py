"""The chunked loss against whole logits: F.cross_entropy and autograd's logsumexp, in every precision and setting."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from coca_video.models import vocabulary
from coca_video.models.vocabulary import TokenLoss, VocabularyProjection, token_loss
from tests.ranks import on_ranks

TOKENS, WIDTH, VOCABULARY = 23, 16, 101


def make_inputs(dtype: torch.dtype = torch.float64, *, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets; logits have a deviation of 4, so that probabilities are far from even."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float = 0.0) -> Tensor:
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, targets, reduction="sum")
    return loss + z_loss_weight * logits.logsumexp(dim=-1).square().sum()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 64, None])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.03])
def test_equals_whole_logits_in_float64(chunk_rows: int | None, z_loss_weight: float) -> None:
    hidden, weight, targets = make_inputs()
    expected = plain_loss(hidden, weight, targets, z_loss_weight)
    expected_grads = torch.autograd.grad(0.7 * expected, (hidden, weight))
    loss = token_loss(hidden, weight=weight, targets=targets, z_loss_weight=z_loss_weight, chunk_rows=chunk_rows)
    grads = torch.autograd.grad(0.7 * loss.loss_sum, (hidden, weight))
    cross_entropy = plain_loss(hidden, weight, targets)
    torch.testing.assert_close(loss.loss_sum, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.cross_entropy_sum, cross_entropy.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)
    assert loss.count.dtype == torch.int64 and loss.count.item() == TOKENS
    assert not loss.cross_entropy_sum.requires_grad


def test_fp32_is_within_rounding_of_float64() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    whole = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = plain_loss(whole[0], whole[1], targets, 0.01)
    expected_grads = torch.autograd.grad(expected, whole)
    loss = token_loss(hidden, weight=weight, targets=targets, z_loss_weight=0.01, chunk_rows=4).loss_sum
    for actual, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected_grads, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted) < 1e-6
    assert relative_error(loss, expected) < 1e-6


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_elements", [1, 40 * WIDTH, vocabulary.BLOCK_ELEMENTS])
def test_bf16_autocast_errs_no_more_than_the_plain_way(
    hidden_dtype: torch.dtype, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", block_elements)
    hidden, weight, targets = make_inputs(torch.float32, tokens=200)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    whole = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = torch.autograd.grad(plain_loss(whole[0], whole[1], targets), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = plain_loss(hidden, weight, targets)
        ours = token_loss(hidden, weight=weight, targets=targets, chunk_rows=50).loss_sum
    plain_grads = torch.autograd.grad(plain, (hidden, weight))
    our_grads = torch.autograd.grad(ours, (hidden, weight))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)  # the same bf16 logits, then fp32
    for our, other, wanted in zip(our_grads, plain_grads, exact, strict=True):
        assert our.dtype == other.dtype
        # 1e-4 < the plain error < 1e-2 says that the products were bf16 in both
        assert 1e-4 < relative_error(our, wanted) < 1.1 * relative_error(other, wanted) < 1e-2


def test_bf16_weights_sum_their_gradient_in_fp32() -> None:
    """Adding 500 chunks in bf16, with its 8 bits, would lose most of them."""
    hidden, weight, targets = make_inputs(torch.bfloat16, tokens=500)
    whole = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    (exact,) = torch.autograd.grad(plain_loss(whole[0], whole[1], targets), whole[1:])
    loss = token_loss(hidden, weight=weight, targets=targets, chunk_rows=1).loss_sum
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden, weight))
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16
    assert relative_error(weight_grad, exact) < 5e-3


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, targets = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_loss(hidden, weight=weight, targets=targets).loss_sum
    torch.testing.assert_close(loss, plain_loss(hidden, weight, targets), rtol=1e-12, atol=0)


def test_dtypes_that_linear_would_refuse_are_refused() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=r"vocabulary's dtype torch.float32, got torch.bfloat16"):
        token_loss(hidden.bfloat16(), weight=weight, targets=targets)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets = make_inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(requires_grad=False)
    trained = weight if frozen == "hidden" else hidden
    (expected,) = torch.autograd.grad(plain_loss(hidden, weight, targets), trained)
    token_loss(hidden, weight=weight, targets=targets, chunk_rows=6).loss_sum.backward()
    torch.testing.assert_close(trained.grad, expected, rtol=1e-12, atol=1e-12)
    assert (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize(("needed", "products"), [("neither", 1), ("hidden", 2), ("weight", 2), ("both", 3)])
def test_only_the_products_that_are_needed_are_computed(needed: str, products: int) -> None:
    hidden, weight, targets = make_inputs()
    hidden.requires_grad_(needed in ("hidden", "both"))
    weight.requires_grad_(needed in ("weight", "both"))
    with FlopCounterMode(display=False) as counter:
        token_loss(hidden, weight=weight, targets=targets, chunk_rows=10)
    assert counter.get_total_flops() == products * 2 * TOKENS * WIDTH * VOCABULARY
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        token_loss(hidden, weight=weight, targets=targets, chunk_rows=10)
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * VOCABULARY


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    """exp(1e4) overflows in fp32, and 1e4 + 1 - 1e4 has lost three digits of the 1."""
    weight = torch.tensor([[1e4], [1e4 + 1], [-1e4]], requires_grad=True)
    hidden = torch.ones(2, 1, requires_grad=True)
    loss = token_loss(hidden, weight=weight, targets=torch.tensor([1, 0]))
    lower = math.log1p(math.exp(-1))  # -log of the higher word's probability; the lower one's is 1 more
    assert loss.cross_entropy_sum.item() == pytest.approx(2 * lower + 1, rel=1e-6)
    loss.loss_sum.backward()
    higher = 1 / (1 + math.exp(-1))
    expected = torch.tensor([2 * (1 - higher) - 1, 2 * higher - 1, 0])
    torch.testing.assert_close(weight.grad.flatten(), expected)


def test_an_empty_chunk_is_refused() -> None:
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match=r"at least 1 row; got chunk_rows=0"):
        token_loss(hidden, weight=weight, targets=targets, chunk_rows=0)


class Head(torch.nn.Module):
    """The loss of 20 tokens or some of them, through one layer before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mlp, self.vocabulary = torch.nn.Linear(8, 8), VocabularyProjection(8, vocab_size=51)
        self.double()

    def forward(self, rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(20, 8, generator=generator, dtype=torch.float64)
        targets = torch.randint(51, (20,), generator=generator)
        loss = self.vocabulary(self.mlp(features[rows]), targets=targets[rows], z_loss_weight=0.1)
        return loss.loss_sum / 20


def grads_on_a_rank(splits: tuple[int, ...]) -> list[list[Tensor]]:
    """For each split, the gradients where rank 0 has the first so many tokens and rank 1 the others."""
    found = []
    for split in splits:
        model = Head()
        for part in (model.vocabulary, model):
            fully_shard(part)
        (2 * model(slice(0, split) if torch.distributed.get_rank() == 0 else slice(split, 20))).backward()
        found.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    return found


@pytest.mark.slow  # starting two ranks takes seconds
def test_sharded_over_two_ranks_equals_one_process() -> None:
    """FSDP2 gathers the weight for the forward alone; a rank may have fewer tokens than the other, or none."""
    model = Head()
    expected = list(torch.autograd.grad(model(slice(0, 20)), tuple(model.parameters())))
    for of_rank in on_ranks(grads_on_a_rank, splits=(13, 20)):
        for grads in of_rank:
            torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_a_kept_graph_can_be_gone_through_again() -> None:
    hidden, weight, targets = make_inputs()
    expected = torch.autograd.grad(plain_loss(hidden, weight, targets, 0.1), (hidden, weight))
    loss = token_loss(hidden, weight=weight, targets=targets, z_loss_weight=0.1).loss_sum
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(-loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(first, tuple(3 * grad for grad in expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, tuple(-grad for grad in expected), rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = make_inputs()
    loss = token_loss(hidden, weight=weight, targets=targets).loss_sum
    with pytest.raises(ValueError, match="create_graph=True: use whole logits"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_no_tokens_give_zero_with_zero_gradients() -> None:
    hidden, weight, targets = make_inputs(torch.float32, tokens=0)
    loss = token_loss(hidden, weight=weight, targets=targets, z_loss_weight=0.1)
    loss.loss_sum.backward()
    assert [value.item() for value in loss] == [0, 0, 0]
    assert torch.equal(weight.grad, torch.zeros(VOCABULARY, WIDTH)) and hidden.grad.shape == (0, WIDTH)


def test_hand_computed_loss() -> None:
    """Logits 0, 0 and ln 2 for the target 2: p = 1/2, logsumexp = ln 4."""
    weight = torch.tensor([[0.0], [0.0], [2.0]]).log().clamp(min=0).requires_grad_()
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = token_loss(hidden, weight=weight, targets=torch.tensor([2]), z_loss_weight=0.5)
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(loss.cross_entropy_sum, log2)
    torch.testing.assert_close(loss.loss_sum, log2 + 0.5 * (2 * log2) ** 2)
    loss.loss_sum.backward()
    scale = 1 + 2 * log2  # d/dlogit of 0.5 lse^2 is lse * p
    torch.testing.assert_close(weight.grad.flatten(), scale * torch.tensor([0.25, 0.25, 0.5]) - torch.eye(3)[2])


def test_the_module_is_a_linear_layer_followed_by_the_loss() -> None:
    torch.manual_seed(0)
    module = VocabularyProjection(64, vocab_size=5000)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {"weight": (5000, 64)}
    assert module.weight.std().item() == pytest.approx(1 / 8, rel=0.01)  # 320,000 draws: a deviation of 0.13%
    hidden = torch.randn(2, 7, 64)
    torch.testing.assert_close(module.logits(hidden), hidden @ module.weight.T)
    targets = torch.randint(5000, (14,))
    loss = module(hidden.flatten(0, 1), targets=targets, z_loss_weight=0.2)
    assert isinstance(loss, TokenLoss)
    torch.testing.assert_close(loss.loss_sum, plain_loss(hidden.flatten(0, 1), module.weight, targets, 0.2))


COMPILED = """
import torch
from coca_video.models.vocabulary import VocabularyProjection

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.vocabulary = torch.nn.Linear(8, 8), VocabularyProjection(8, vocab_size=50)

    def forward(self, features, *, tokens, mask):
        loss = self.vocabulary(self.mlp(features)[mask], targets=tokens[mask], z_loss_weight=0.1)
        return loss.loss_sum / loss.count

torch.manual_seed(0)
model, features, tokens = Model(), torch.randn(3, 9, 8), torch.randint(50, (3, 9))
compiled = torch.compile(model, backend="aot_eager")
for kept in (0.5, 0.7):
    mask = torch.rand(3, 9) < kept
    grads = []
    for run in (model, compiled):
        loss = run(features, tokens=tokens, mask=mask)
        grads.append([loss, *torch.autograd.grad(loss, model.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
print("equal")
"""


@pytest.mark.slow  # starting the compiler takes 5 s
def test_equals_itself_inside_a_compiled_model() -> None:
    # jaxtyping's import hook, which the test run installs, is not what users compile with
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr
