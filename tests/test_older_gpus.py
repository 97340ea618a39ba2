"""GPUs older than Ampere, with a stand-in for their compute capability: fp16, loss scaling, PyTorch's operations."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import add_random_lora

from chatglm import ChatGLMConfig
from glm_kernels import kernels_supported
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.layers.linear import lora_operations
from qlora.layers.replacement import replace_layers
from qlora.loading import check_fp8, choose_compute_dtype, load_quantized_model, name_what_older_gpus_lack
from qlora.training.memory_plan import Sizes
from qlora.training.training_args import set_precision

OLDER = [(7, 0), (7, 5)]  # V100; T4 and 2080 Ti


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request) -> SimpleNamespace:
    """A GPU of the parametrized compute capability; a stand-in for an activation on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=request.param[0]))
    return SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float16)


@pytest.mark.parametrize("gpu", OLDER, indirect=True)
def test_older_gpus_compute_in_fp16_with_a_scaled_loss(gpu):
    values = {}
    assert choose_compute_dtype(None) == set_precision(values, None) == torch.float16
    assert values == {"fp16": True, "bf16": False}


@pytest.mark.parametrize("gpu", OLDER, indirect=True)
def test_older_gpus_use_no_kernels_with_products_and_say_so(gpu, caplog):
    caplog.set_level(logging.INFO)
    assert not kernels_supported(gpu)
    assert lora_operations(gpu).__name__ == "glm_kernels.lora_reference"
    name_what_older_gpus_lack(torch.float16)
    (record,) = caplog.records
    assert record.getMessage().startswith("A Test GPU, compute capability 7.") and record.levelname == "INFO"
    name_what_older_gpus_lack(torch.bfloat16)
    assert "has no bf16 and emulates it: choose fp16" in caplog.text


@pytest.mark.parametrize("gpu", [(8, 0)], indirect=True)
def test_ampere_computes_in_bf16_with_all_kernels(gpu, caplog):
    pytest.importorskip("triton")
    caplog.set_level(logging.INFO)
    assert choose_compute_dtype(None) == torch.bfloat16
    assert kernels_supported(gpu) and lora_operations(gpu).__name__ == "glm_kernels.lora"
    name_what_older_gpus_lack(torch.bfloat16)
    assert not caplog.records


@pytest.mark.parametrize("gpu", [(7, 5), (8, 0), (8, 6)], indirect=True)
def test_gpus_without_8_bit_products_are_refused(gpu):
    with pytest.raises(ValueError, match=r"^A Test GPU has compute capability \d\.\d; .* fp8 needs 8\.9 \(Ada\)"):
        check_fp8(ChatGLMConfig())


@pytest.mark.parametrize("gpu", [(8, 9), (9, 0), (12, 0)], indirect=True)
def test_gpus_with_8_bit_products(gpu):
    check_fp8(ChatGLMConfig())
    with pytest.raises(ValueError, match="multiples of 16; those of dense_h_to_4h, dense_4h_to_h are not"):
        check_fp8(ChatGLMConfig(inner_hidden_size=1000))


@pytest.mark.parametrize(
    ("targets", "width"),
    # Bytes a token, beside two gradients of the hidden width. query_key_value: its output's gradient [3C] in fp32.
    # dense_4h_to_h: its input [4C] after dropout, in fp16 and in fp32.
    [([], 0), (["query_key_value"], 3 * 4096 * 4), (["query_key_value", "dense_4h_to_h"], 16384 * 6)],
)
def test_memory_plan_counts_copies_of_the_operations_without_kernels(targets, width):
    with_kernels, without = (
        Sizes(ChatGLMConfig(), 2, 0, 0, frozenset(targets), rank=4, has_kernels=kernels) for kernels in (True, False)
    )
    assert (with_kernels.copied_bytes, without.copied_bytes) == (0, 2 * 2 * 4096 + width)
    for working in (Sizes.mlp_working_bytes, Sizes.attention_working_bytes):
        assert working(without, 1000, False) - working(with_kernels, 1000, False) == 1000 * without.copied_bytes
    in_fp32 = dataclasses.replace(without, bytes_per_number=4)
    assert in_fp32.copied_bytes == 2 * 4 * 4096  # nothing has to be converted


def test_gradients_in_fp16_without_kernels_are_close_to_fp32(golden_folder):
    ids = [25, 50, 228, 507, 508, 129, 52, 509]
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = add_random_lora(load_quantized_model(str(golden_folder), dtype))
        replace_layers(model, for_training=True)
        batch = StepBatch.collate([{"input_ids": ids, "labels": [-100] * 5 + ids[5:]}])
        loss = model.train()(**PaddingFreeCollator(model.config)(batch.samples)).loss
        (loss * 1024).backward()  # as the Trainer scales it
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]) / 1024)
    exact, found = gradients
    assert (found - exact).norm() < 0.02 * exact.norm()  # fp16 has 11 bits: 0.0005 for each operation
