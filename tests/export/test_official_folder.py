"""qlora/export/official_folder.py: a model loaded from a 4-bit folder is bit-equal to the one that was written."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import add_random_lora
from peft import get_peft_model_state_dict

from chatglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from qlora.adapter import add_lora
from qlora.checkpoint import check_checkpoint
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.export.official_folder import write_quantized
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model, load_tokenizer

IDS = [25, 50, 228, 507, 508, 129, 52, 509]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def model(golden_folder: Path) -> ChatGLMForConditionalGeneration:
    return load_quantized_model(str(golden_folder), torch.float32)


@pytest.fixture
def quantized_folder(model, tokenizer, tmp_path) -> Path:
    write_quantized(model, tokenizer, str(tmp_path / "nf4"))
    return tmp_path / "nf4"


def quantized_weights(model: torch.nn.Module) -> dict[str, bitsandbytes.nn.Params4bit]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits


def test_packed_weights_and_scales_are_bit_equal(model, quantized_folder):
    written, loaded = (quantized_weights(m) for m in (model, load_quantized_model(str(quantized_folder), model.dtype)))
    assert written.keys() == loaded.keys() and len(loaded) == 3 * 4
    for name, weight in written.items():
        other = loaded[name]
        assert torch.equal(weight, other), name
        expected, found = (p.quant_state.as_dict(packed=False) for p in (weight, other))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]) if torch.is_tensor(value) else value == found[key], (name, key)


def test_other_weights_and_logits_are_equal(model, quantized_folder):
    loaded = load_quantized_model(str(quantized_folder), torch.float32)
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]) and parameter.dtype == expected[name].dtype, name
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_folder_can_be_loaded_for_another_compute_dtype(model, quantized_folder, dtype):
    loaded = load_quantized_model(str(quantized_folder), dtype)
    for name, parameter in loaded.named_parameters():
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            assert parameter.quant_state.dtype == dtype and loaded.get_submodule(name[:-7]).compute_dtype == dtype
            assert torch.equal(parameter, quantized_weights(model)[name])
        else:
            assert parameter.dtype == dtype, name
    assert loaded.dtype == dtype and loaded.config.quantization_config.bnb_4bit_compute_dtype == dtype
    # The largest logit is about 2.5; in bf16 all values of its computation have 8 bits of precision.
    torch.testing.assert_close(logits(loaded).float(), logits(model), atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_loss_and_gradients_are_equal(golden_folder, tokenizer, tmp_path, dtype):
    original = load_quantized_model(str(golden_folder), dtype)
    write_quantized(original, tokenizer, str(tmp_path / "nf4"))
    batch = PaddingFreeCollator(original.config)(
        StepBatch.collate([{"input_ids": IDS, "labels": [-100] * 5 + IDS[5:]}]).samples
    )
    results = []
    for base in (original, load_quantized_model(str(tmp_path / "nf4"), dtype)):
        tuned = add_random_lora(base, ["query_key_value", "dense"])
        replace_layers(tuned, for_training=True)
        loss = tuned.train()(**batch).loss
        loss.backward()
        results.append({"loss": loss} | {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        assert value.abs().max() > 0 and torch.equal(value, results[1][name]), name


def test_folder_is_complete_with_its_tokenizer(quantized_folder, tokenizer):
    assert check_checkpoint(str(quantized_folder)).num_layers == 3
    loaded = load_tokenizer(str(quantized_folder))
    assert type(loaded) is ChatGLMTokenizer and loaded("类型#裙").input_ids == tokenizer("类型#裙").input_ids


def test_a_model_with_an_adapter_is_refused(model, tokenizer, tmp_path):
    tuned = add_lora(model, rank=4, alpha=32, dropout=0.0, target_modules=["dense"])
    assert get_peft_model_state_dict(tuned)
    for wrapped in (tuned, tuned.get_base_model()):
        with pytest.raises(ValueError, match="adapter"):
            write_quantized(wrapped, tokenizer, str(tmp_path / "nf4"))
    assert not (tmp_path / "nf4").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": False},
        {"quant_method": "gptq"},
    ],
)
def test_weights_quantized_in_another_way_are_refused(quantized_folder, changes):
    path = quantized_folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))
    with pytest.raises(ValueError, match=r"nf4/config\.json has a quantization_config that is not .*NF4"):
        check_checkpoint(str(quantized_folder))
    path.write_text(json.dumps(config | {"quantization_config": "nf4"}))
    with pytest.raises(ValueError, match=r"quantization_config"):
        check_checkpoint(str(quantized_folder))
