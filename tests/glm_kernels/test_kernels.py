"""Each Triton kernel, compared with the PyTorch reference that its file names; in fp32, by Triton's interpreter."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="no Triton here: the kernels are not tested")

import bitsandbytes
import torch

from chatglm import ChatGLMConfig, PackedSequences
from chatglm.fused_residual import FusedResidualNorm
from chatglm.modeling_chatglm import ResidualNorm
from chatglm.packed_attention import attention_by_sample
from chatglm.rotary import ChatGLMRotaryEmbedding, apply_rotary, split_and_rotate
from chatglm2 import ChatGLM2Config
from chatglm2 import packed_attention as grouped_attention
from chatglm2 import rotary as pair_rotary
from chatglm2.activation import gated_activation
from chatglm2.fused_norm import FusedRMSNorm, FusedSublayerNorm
from chatglm2.modeling_chatglm2 import SublayerNorm
from glm_kernels import fp8, fp8_reference, lora, lora_reference, nf4
from glm_kernels.attention import GroupedPackedAttention, PackedAttention
from glm_kernels.cross_entropy import cross_entropy_in_place
from glm_kernels.decode_attention import decode_attention
from glm_kernels.layer_norm import layer_norm, residual_norm_grad
from glm_kernels.rms_norm import rms_norm
from glm_kernels.rotary import rotate_in_place, rotate_pairs_in_place
from glm_kernels.swiglu import swiglu, swiglu_grad
from glm_shared import loss as plain_loss

LENGTHS = [(130, 5), (35, 60), (1, 1), (10, 150), (4, 0)]  # of prompts and answers; a tile has 128 tokens


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("head_dim", "heads", "lengths"), [(32, 2, LENGTHS), (128, 1, LENGTHS[:2])])
def test_attention_kernel(head_dim, heads, lengths):
    row = PackedSequences.from_lengths(lengths)
    tokens, hidden = sum(map(sum, lengths)), head_dim * heads
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig(hidden_size=hidden, num_attention_heads=heads))
    tables = rotary(torch.randint(0, 99, (1, 2, tokens)), torch.float32)
    projected = torch.randn(1, tokens, 3 * hidden, requires_grad=True)
    direction = torch.randn(1, tokens, hidden)

    expected = attention_by_sample(projected, tables, row, head_dim)
    (expected_grad,) = torch.autograd.grad((expected * direction).sum(), projected)
    flat = (table.reshape(-1, head_dim) for table in tables)
    output = PackedAttention.apply(projected[0] * 1.0, *flat, row.tiles, head_dim)[None]
    (grad,) = torch.autograd.grad((output * direction).sum(), projected)

    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-5)


def test_rotation_of_queries_and_keys():
    head_dim, heads, tokens = 32, 3, 7
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig(hidden_size=96, num_attention_heads=heads))
    tables = rotary(torch.randint(0, 2000, (1, 2, tokens)), torch.float32)
    projected = torch.randn(tokens, 3 * head_dim * heads)
    rotated = projected.clone()
    flat = [table.reshape(-1, head_dim) for table in tables]
    rotate_in_place(rotated, *flat, head_dim)

    query, key, value = projected[None].unflatten(-1, (heads, 3 * head_dim)).chunk(3, dim=-1)
    expected = torch.cat((apply_rotary(query, *tables), apply_rotary(key, *tables), value), dim=-1).flatten(2)[0]
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [100, 8192, 20000])
def test_loss_kernel(vocabulary):
    logits = torch.randn(5, vocabulary) * 5
    labels = torch.randint(0, vocabulary, (5,))
    labels[3] = -100  # does not count
    gradient = logits.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(gradient, labels, reduction="none")
    losses.sum().backward()

    for function in (cross_entropy_in_place, plain_loss.cross_entropy_in_place):
        untouched, replaced = logits.clone(), logits.clone()
        torch.testing.assert_close(function(untouched, labels, gradient=False), losses.detach())
        torch.testing.assert_close(untouched, logits)
        torch.testing.assert_close(function(replaced, labels, gradient=True), losses.detach())
        torch.testing.assert_close(replaced, gradient.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "features", "rank"), [(75, 200, 4), (64, 256, 1), (33, 100, 24), (40, 90, 150)])
@pytest.mark.parametrize("transposed", [False, True])  # A, and B.T
def test_lora_products(tokens, features, rank, transposed):
    x = torch.randn(tokens, features)
    weight = torch.randn(rank, features)
    weight = weight.T.contiguous().T if transposed else weight
    low_rank = torch.randn(tokens, rank)
    close = {"atol": 1e-4, "rtol": 1e-4}
    expected = lora_reference.lora_down(x, weight, 2.0, None)
    torch.testing.assert_close(lora.lora_down(x, weight, 2.0, None), expected, **close)
    expected = lora_reference.lora_weight_grad(low_rank, x, 2.0, None)
    torch.testing.assert_close(lora.lora_weight_grad(low_rank, x, 2.0, None), expected, **close)
    added, expected = x.clone(), x.clone()
    lora.lora_up_add(added, low_rank, weight, 2.0, None)
    lora_reference.lora_up_add(expected, low_rank, weight, 2.0, None)
    torch.testing.assert_close(added, expected, **close)


def test_dropout_is_the_same_mask_in_every_kernel():
    tokens, features, rank, probability = 60, 300, 4, 0.3
    dropout = lora.Dropout(probability, torch.tensor([2**30], dtype=torch.int32), layer=27)
    next_layer = dropout._replace(layer=28)
    mask = torch.zeros(tokens, features)
    one = torch.ones(tokens, 1)
    lora.lora_up_add(mask, one, torch.ones(1, features), 1.0, dropout)
    is_kept = mask.bool()
    assert is_kept.float().mean().item() == pytest.approx(1 - probability, abs=0.02)
    torch.testing.assert_close(mask[is_kept], torch.full_like(mask[is_kept], 1 / (1 - probability)))
    x = torch.randn(tokens, features)
    weight = torch.randn(rank, features)
    low_rank = torch.randn(tokens, rank)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(lora.lora_down(x, weight, 1.0, dropout), (x * mask) @ weight.T, **close)
    torch.testing.assert_close(lora.lora_weight_grad(low_rank, x, 1.0, dropout), low_rank.T @ (x * mask), **close)
    other = torch.zeros_like(mask)
    lora.lora_up_add(other, one, torch.ones(1, features), 1.0, next_layer)
    # Kept elements are independent of their neighbours, and of the same elements in the next layer.
    for one_mask, other_mask in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask, other)):
        correlation = torch.corrcoef(torch.stack((one_mask.flatten(), other_mask.flatten())))[0, 1]
        assert abs(correlation) < 0.04  # five standard deviations


@pytest.mark.parametrize("shape", [(6, 2048), (10, 1088), (96, 64), (40, 1024)])  # (40, 1024) has two second scales
def test_dequantized_weights_equal_those_of_bitsandbytes(shape):
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape), quant_type="nf4", compress_statistics=True
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantize(packed, state), expected)


# Triton's interpreter does not round to 8 bits as a GPU does: these numbers need no rounding.


def test_quantized_rows():
    x = (torch.rand(5, 100) * 400 + 0.02).to(torch.float8_e4m3fn).float()
    x[:, 7] = -448
    x[3] = 0
    powers = 2.0 ** torch.tensor([0, -20, 40, 3, -3])[:, None]
    quantized, scales = fp8.quantize_rows(x * powers)
    assert torch.equal(quantized.float(), x)
    assert torch.equal(scales[x.any(1)], powers[x.any(1)])
    assert torch.equal(scales, fp8_reference.row_scales(x * powers))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(200, 192), (16, 64)])
def test_weights_in_8_bits(shape, transposed):
    rows, columns = shape
    blocks = rows * columns // 64
    packed = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8)
    table = torch.arange(256, dtype=torch.float32).remainder(3).exp2()
    nested = SimpleNamespace(code=table, absmax=torch.tensor([1.0, 2.0, 4.0]))
    codes = torch.cat((torch.arange(8.0, 16), -torch.arange(8.0, 16)))
    scale_codes = torch.randint(256, (blocks,), dtype=torch.uint8)
    state = SimpleNamespace(shape=shape, code=codes, absmax=scale_codes, state2=nested, offset=torch.zeros(()))

    pairs = torch.stack((packed >> 4, packed & 15), dim=-1).view(blocks, 64).long()
    scales = table[scale_codes.long()] * nested.absmax[torch.arange(blocks) // 256]
    weight = (codes[pairs] * scales[:, None]).view(shape)
    powers = 2.0 ** torch.randint(0, 5, (columns if transposed else rows, 1))
    found = fp8.quantize_weight(packed, state, powers, transposed)
    assert found.is_contiguous()
    assert torch.equal(found.float() * powers, weight.T if transposed else weight)


def test_layer_norm_and_its_gradient_with_the_residual():
    norm = torch.nn.LayerNorm(100)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 2, 100, requires_grad=True)
    branch_grad, sum_grad = torch.randn(2, 3, 2, 100)
    normed = norm(x)
    (expected,) = torch.autograd.grad(normed, x, branch_grad + 1.5 * sum_grad)
    x = x.detach()
    torch.testing.assert_close(layer_norm(x, norm), normed, atol=1e-5, rtol=1e-5)
    found = residual_norm_grad(x, norm, branch_grad, sum_grad, 1.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_residual_norm():
    norm = ResidualNorm(64).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    matrix = torch.randn(64, 64)
    x, direction = torch.randn(2, 1, 7, 64)
    x.requires_grad_()
    results = []
    for each in (norm, FusedResidualNorm(norm)):
        normed, residual = each(x)
        results.append(each.add_residual(normed.sin() @ matrix, residual))
    grads = [torch.autograd.grad((result * direction).sum(), x)[0] for result in results]
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("past", [0, 1, 128, 300, [300, 0, 65]])  # one cache position for all rows, or one a row
def test_decoding_step_of_attention(past):
    B, H, S, D = 3, 2, 310, 32
    rotary = ChatGLMRotaryEmbedding(ChatGLMConfig(hidden_size=H * D, num_attention_heads=H))
    tables = rotary(torch.randint(0, 99, (B, 2, 1)), torch.float32)
    projected = torch.randn(B, 1, 3 * H * D)
    keys, values = torch.randn(2, B, H, S, D)
    visible = torch.rand(B, S) < 0.8

    query, key, value = split_and_rotate(projected, *tables, D)
    expected_keys, expected_values = keys.clone(), values.clone()
    position = torch.tensor(past).expand(B)
    expected_keys[range(B), :, position], expected_values[range(B), :, position] = key[:, 0], value[:, 0]
    mask = visible & (torch.arange(S) < position[:, None]) | (torch.arange(S) == position[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), expected_keys, expected_values, attn_mask=mask[:, None, None]
    )
    flat = (table.reshape(-1, D) for table in tables)
    found = decode_attention(projected[:, 0], *flat, keys, values, visible, torch.tensor(past))
    torch.testing.assert_close(found, expected[:, :, 0].flatten(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(keys, expected_keys)
    torch.testing.assert_close(values, expected_values)


def pair_tables(head_dim: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pair_rotary.ChatGLM2RotaryEmbedding(ChatGLM2Config(kv_channels=head_dim))(positions, torch.float32)


@pytest.mark.parametrize(
    ("heads", "groups", "lengths"),
    [(8, 1, [(0, 70), (0, 1), (0, 130)]), (4, 2, [(35, 60), (3, 2)])],  # causal, and with contexts
)
def test_attention_kernel_of_grouped_queries(heads, groups, lengths, head_dim=16):
    row = PackedSequences.from_lengths(lengths)
    row = row.fill_up(len(row.tiles) + 2)
    tokens, width = sum(map(sum, lengths)), (heads + 2 * groups) * head_dim
    tables = pair_tables(head_dim, torch.randint(0, 99, (1, tokens)))
    projected = torch.randn(1, tokens, width, requires_grad=True)
    direction = torch.randn(1, tokens, heads * head_dim)

    expected = grouped_attention.attention_by_sample(projected, tables, row, heads, groups)
    (expected_grad,) = torch.autograd.grad((expected * direction).sum(), projected)
    flat = (table[0, :, 0] for table in tables)
    output = GroupedPackedAttention.apply(projected[0] * 1.0, *flat, row.tiles, heads, groups)[None]
    (grad,) = torch.autograd.grad((output * direction).sum(), projected)

    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=5e-5, rtol=1e-5)


def test_rotation_of_pairs_and_its_inverse():
    heads, groups, head_dim, tokens = 6, 2, 32, 7
    tables = pair_tables(head_dim, torch.randint(0, 2000, (1, tokens)))
    projected = torch.randn(tokens, (heads + 2 * groups) * head_dim)
    rotated = projected.clone()
    flat = [table[0, :, 0] for table in tables]
    rotate_pairs_in_place(rotated, *flat, heads, groups)

    states = pair_rotary.split_and_rotate(projected[None].requires_grad_(), *tables, heads, groups)
    torch.testing.assert_close(rotated, torch.cat(states, dim=2).flatten(2)[0], atol=1e-6, rtol=1e-5)
    rotate_pairs_in_place(rotated, *flat, heads, groups, inverse=True)
    torch.testing.assert_close(rotated, projected, atol=1e-6, rtol=1e-5)


def test_rms_norm_and_its_gradient_with_the_residual():
    norm = SublayerNorm(100, 1e-5).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    matrix = torch.randn(100, 100)
    x, direction = torch.randn(2, 3, 7, 100)
    x.requires_grad_()
    results = []
    for each in (norm, FusedSublayerNorm(norm)):
        normed, residual = each(x)
        results.append(each.add_residual(normed.sin() @ matrix, residual))
    grads = [torch.autograd.grad((result * direction).sum(), x)[0] for result in results]
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-5)
    results = [norm.normalize(x), FusedRMSNorm(norm)(x)]
    grads = [torch.autograd.grad((result * direction).sum(), x)[0] for result in results]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rms_norm(x.detach(), norm.weight, norm.eps), results[0].detach())


@pytest.mark.parametrize("features", [3, 1024, 1500])
def test_gated_activation(features):
    x = torch.randn(2, 5, 2 * features, requires_grad=True)
    direction = torch.randn(2, 5, features)
    gate, up = x.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    (expected_grad,) = torch.autograd.grad((expected * direction).sum(), x)
    torch.testing.assert_close(swiglu(x.detach()), expected.detach())
    torch.testing.assert_close(swiglu_grad(x.detach(), direction), expected_grad)
    plain = gated_activation(x)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(torch.autograd.grad((plain * direction).sum(), x)[0], expected_grad)


@pytest.mark.parametrize("past", [0, 1, 300, [300, 0, 65]])  # one cache position for all rows, or one a row
def test_decoding_step_of_grouped_queries(past):
    B, H, G, S, D = 3, 4, 2, 310, 32
    tables = pair_tables(D, torch.randint(0, 99, (B, 1)))
    projected = torch.randn(B, 1, (H + 2 * G) * D)
    keys, values = torch.randn(2, B, G, S, D)
    visible = torch.rand(B, S) < 0.8

    query, key, value = pair_rotary.split_and_rotate(projected, *tables, H, G)
    expected_keys, expected_values = keys.clone(), values.clone()
    position = torch.tensor(past).expand(B)
    expected_keys[range(B), :, position], expected_values[range(B), :, position] = key[:, 0], value[:, 0]
    mask = visible & (torch.arange(S) < position[:, None]) | (torch.arange(S) == position[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), expected_keys, expected_values, attn_mask=mask[:, None, None], enable_gqa=True
    )
    flat = (table[:, 0, 0] for table in tables)
    found = decode_attention(projected[:, 0], *flat, keys, values, visible, torch.tensor(past), by_head=False)
    torch.testing.assert_close(found, expected[:, :, 0].flatten(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(keys, expected_keys)
    torch.testing.assert_close(values, expected_values)
