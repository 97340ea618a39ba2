"""The Triton kernels against the plain operations they stand for; without a GPU, in Triton's interpreter and fp32."""

import pytest

pytest.importorskip("triton", reason="no Triton here: the kernels are not tested")

import bitsandbytes
import torch

from chatglm import ChatGLMConfig, PackedRow
from chatglm import loss as plain_loss
from chatglm.attention_kernels import PackedAttention, rotate_in_place
from chatglm.loss_kernel import cross_entropy_in_place
from chatglm.packed_attention import attention_by_sample
from chatglm.rotary import ChatGLMRotaryEmbedding, apply_rotary
from qlora import lora_kernels, lora_products, nf4_kernels
from qlora.norm_kernel import layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [(35, 60), (3, 2), (70, 100), (1, 1), (130, 5), (10, 150), (4, 0)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("head_dim", "heads"), [(32, 2), (128, 1)])
def test_attention_kernel(head_dim, heads):
    row = PackedRow.of(LENGTHS)
    row = row.to(DEVICE)
    tokens, hidden = sum(map(sum, LENGTHS)), head_dim * heads
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig(hidden_size=hidden, num_attention_heads=heads)).to(DEVICE)
    tables = rotary(torch.randint(0, 99, (1, 2, tokens), device=DEVICE), torch.float32)
    projected = torch.randn(1, tokens, 3 * hidden, device=DEVICE, requires_grad=True)
    direction = torch.randn(1, tokens, hidden, device=DEVICE)

    expected = attention_by_sample(projected, tables, row, head_dim)
    (expected_grad,) = torch.autograd.grad((expected * direction).sum(), projected)
    flat = (table.reshape(-1, head_dim) for table in tables)
    output = PackedAttention.apply(projected[0] * 1.0, *flat, row.tiles, head_dim)[None]
    (grad,) = torch.autograd.grad((output * direction).sum(), projected)

    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-5)


def test_rotation_turns_queries_and_keys_and_can_be_undone():
    head_dim, heads, tokens = 32, 3, 7
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig(hidden_size=96, num_attention_heads=heads)).to(DEVICE)
    tables = rotary(torch.randint(0, 2000, (1, 2, tokens), device=DEVICE), torch.float32)
    projected = torch.randn(tokens, 3 * head_dim * heads, device=DEVICE)
    rotated = projected.clone()
    flat = [table.reshape(-1, head_dim) for table in tables]
    rotate_in_place(rotated, *flat, head_dim)

    query, key, value = projected[None].unflatten(-1, (heads, 3 * head_dim)).chunk(3, dim=-1)
    expected = torch.cat((apply_rotary(query, *tables), apply_rotary(key, *tables), value), dim=-1).flatten(2)[0]
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-5)
    rotate_in_place(rotated, *flat, head_dim, inverse=True)
    torch.testing.assert_close(rotated, projected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [100, 8192, 20000])
def test_loss_kernel(vocabulary):
    logits = torch.randn(5, vocabulary, device=DEVICE) * 5
    labels = torch.randint(0, vocabulary, (5,), device=DEVICE)
    gradient = logits.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(gradient, labels, reduction="none")
    losses.sum().backward()

    for function in (cross_entropy_in_place, plain_loss.cross_entropy_in_place):
        untouched, replaced = logits.clone(), logits.clone()
        torch.testing.assert_close(function(untouched, labels, gradient=False), losses.detach())
        torch.testing.assert_close(untouched, logits)
        torch.testing.assert_close(function(replaced, labels, gradient=True), losses.detach())
        torch.testing.assert_close(replaced, gradient.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "features", "rank"), [(75, 200, 4), (64, 256, 1), (33, 100, 24)])
def test_thin_products(tokens, features, rank):
    rows = torch.randn(tokens, features, device=DEVICE)
    thin = torch.randn(rank, features, device=DEVICE)
    low_rank = torch.randn(tokens, rank, device=DEVICE)
    close = {"atol": 1e-4, "rtol": 1e-4}
    expected = lora_products.down(rows, thin, 2.0, 0.0, 0)
    torch.testing.assert_close(lora_kernels.down(rows, thin, 2.0, 0.0, 0), expected, **close)
    expected = lora_products.outer(low_rank, rows, 2.0, 0.0, 0)
    torch.testing.assert_close(lora_kernels.outer(low_rank, rows, 2.0, 0.0, 0), expected, **close)
    added, expected = rows.clone(), rows.clone()
    lora_kernels.add_up(added, low_rank, thin, 2.0, 0.0, 0)
    lora_products.add_up(expected, low_rank, thin, 2.0, 0.0, 0)
    torch.testing.assert_close(added, expected, **close)


def test_dropout_is_the_same_mask_in_every_kernel():
    tokens, features, rank, dropout, seed = 60, 300, 4, 0.3, 2**31 - 5
    mask = torch.zeros(tokens, features, device=DEVICE)
    one = torch.ones(tokens, 1, device=DEVICE)
    lora_kernels.add_up(mask, one, torch.ones(1, features, device=DEVICE), 1.0, dropout, seed)
    kept = mask.bool()
    assert kept.float().mean().item() == pytest.approx(1 - dropout, abs=0.02)
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - dropout)))
    rows = torch.randn(tokens, features, device=DEVICE)
    thin = torch.randn(rank, features, device=DEVICE)
    low_rank = torch.randn(tokens, rank, device=DEVICE)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(lora_kernels.down(rows, thin, 1.0, dropout, seed), (rows * mask) @ thin.T, **close)
    torch.testing.assert_close(
        lora_kernels.outer(low_rank, rows, 1.0, dropout, seed), low_rank.T @ (rows * mask), **close
    )
    other = torch.zeros_like(mask)
    lora_kernels.add_up(other, one, torch.ones(1, features, device=DEVICE), 1.0, dropout, seed + 1)
    assert (other.bool() != kept).float().mean() > 0.2


@pytest.mark.parametrize("shape", [(6, 2048), (10, 1088), (96, 64)])
def test_dequantising_is_that_of_bitsandbytes_to_the_bit(shape):
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape, device=DEVICE), quant_type="nf4", compress_statistics=True
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4_kernels.dequantize(packed, state), expected)


def test_layer_norm_kernel():
    rows, weight, bias = torch.randn(3, 2, 100), torch.randn(100), torch.randn(100)
    rows, weight, bias = rows.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)
    expected = torch.nn.functional.layer_norm(rows, (100,), weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(rows, weight, bias, 1e-5), expected, atol=1e-5, rtol=1e-5)
