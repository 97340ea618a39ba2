"""qlora/export/official_folder.py: a model loaded from a 4-bit folder is bit-equal to the one that was written.

Folders in the official int8 and int4 format are read back as the official kernels extract the weights.
"""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import GOLDEN, GOLDEN_CHECKPOINT, add_random_lora, copy_tokenizer
from peft import get_peft_model_state_dict

from chatglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from qlora.adapter import add_lora
from qlora.checkpoint import check_checkpoint, linear_layers, read_config, weight_files
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.export.four_bit_copy import write_quantized
from qlora.export.merging import WeightReader
from qlora.export.official_folder import quantize_rows, write_checkpoint
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


# The official int8 and int4 format.


@pytest.mark.parametrize("checkpoint", [GOLDEN_CHECKPOINT, GOLDEN / "chatglm2" / "checkpoint"], ids=["1", "2"])
@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_linear_layers_are_whole_numbers_times_a_scale_for_each_row(checkpoint, tmp_path, dtype, bits):
    config, source = read_config(checkpoint), WeightReader(str(checkpoint))
    read: list[str] = []

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        read.append(name)
        return source(name)

    write_checkpoint(tmp_path / dtype, config, tensor, shard_size="2KB", dtype=dtype)
    files = weight_files(tmp_path / dtype)
    stored = {name: value for file in files for name, value in torch.load(file, weights_only=True).items()}
    linear = {f"{name}.weight" for name in linear_layers(config)}
    assert len(linear) == 3 * 4 and len(files) > 3 * 4
    assert stored.keys() == source.file_of.keys() | {f"{name}_scale" for name in linear}
    for name in source.file_of:
        weight = source(name)
        if name in linear:
            weight = weight.float()
            numbers, scale = extract_int4(stored[name]) if bits == 4 else stored[name], stored[f"{name}_scale"]
            assert stored[name].dtype == torch.int8 and scale.dtype == torch.float16
            assert scale.shape == weight.shape[:1] and stored[name].numel() == weight.numel() * bits // 8
            assert ((weight - numbers * scale[:, None].float()).abs() <= 0.501 * scale[:, None]).all(), name
            assert (numbers.abs().amax(dim=1) == 2 ** (bits - 1) - 1).all(), name
        else:
            assert torch.equal(stored[name], weight.half()) and stored[name].dtype == torch.float16, name
    assert all(read.count(name) == 1 for name in linear)  # numbers and scales at once
    values = json.loads((tmp_path / dtype / "config.json").read_text())
    assert values["quantization_bit"] == bits and values["torch_dtype"] == "float16"


def extract_int4(packed: torch.Tensor) -> torch.Tensor:
    """[out_features, in_features / 2] -> [out_features, in_features], as the kernel int4WeightExtractionHalf."""
    columns = []
    for byte in packed.int().T & 255:
        high, low = byte // 16, byte % 16
        columns += [high - 16 * (high > 7), low - 16 * (low > 7)]
    return torch.stack(columns, dim=1)


def test_bytes_of_rows():
    weight = torch.tensor([[0.5, -1.0, 3.5, -3.5], [0.0, 0.0, 0.0, 0.0]])
    numbers, scale = quantize_rows(weight, 4)
    assert numbers.tolist() == [[0x1E, 0x79], [0, 0]] and scale.tolist() == [0.5, 0]
    numbers, scale = quantize_rows(weight * 254, 8)
    assert numbers.tolist() == [[18, -36, 127, -127], [0, 0, 0, 0]] and scale.tolist() == [7, 0]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_such_a_folder_is_refused_here(golden_folder, tokenizer, tmp_path, dtype):
    source = WeightReader(str(golden_folder))
    write_checkpoint(tmp_path / dtype, read_config(golden_folder), lambda name, _: source(name), dtype=dtype)
    copy_tokenizer(tokenizer, tmp_path / dtype)
    with pytest.raises(ValueError, match=rf"the format of THUDM/chatglm-6b-{dtype} for the official code"):
        check_checkpoint(str(tmp_path / dtype))


@pytest.mark.parametrize(("value", "where"), [(float("nan"), r"dense\.weight"), (1e8, r"dense\.weight_scale")])
def test_a_weight_without_a_finite_scale_is_refused(golden_folder, tmp_path, value, where):
    source = WeightReader(str(golden_folder))

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.full(shape, value) if name.endswith("0.attention.dense.weight") else source(name)

    with pytest.raises(ValueError, match=rf"layers\.0\.attention\.{where} is not finite"):
        write_checkpoint(tmp_path / "int4", read_config(golden_folder), tensor, dtype="int4")
