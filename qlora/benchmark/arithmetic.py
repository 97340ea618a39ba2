"""The arithmetic of a training step, and the rate at which the GPU could do it."""

import torch
from transformers import AutoConfig

from qlora.data.batching import StepBatch, count_labels, count_tokens
from qlora.data.dataset import SampleEncoder, load_samples
from qlora.loading import load_tokenizer


def flops_per_token(model_path: str, data_path: str) -> float:
    """Operations of a training step for each token, with the share of label tokens of the first 2,000 samples."""
    samples = load_samples(data_path, SampleEncoder(load_tokenizer(model_path), "", 512, 1536))
    samples = StepBatch.collate(list(samples.select(range(min(2000, len(samples)))))).samples
    tokens, labels = count_tokens(samples), count_labels(samples)
    return AutoConfig.from_pretrained(model_path).training_flops(tokens, labels) / tokens


def matmul_rate(size: int = 8192, repeats: int = 50) -> float:
    """Floating-point operations per second of a product of two bf16 matrices [size, size], mean over `repeats`."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        left @ right
    end.record()
    torch.cuda.synchronize()
    rate = 2 * size**3 * repeats / (start.elapsed_time(end) / 1e3)
    del left, right
    torch.cuda.empty_cache()
    return rate
