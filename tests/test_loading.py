"""qlora/loading.py: what is quantized and trained; errors of folders and hardware."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import GOLDEN_ADAPTER, add_random_lora
from peft import get_peft_model_state_dict
from transformers import BitsAndBytesConfig

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from qlora.adapter import add_lora
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.loading import check_hardware, load_quantized_model, load_tokenizer, quantization_config

LINEAR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
DTYPES = (torch.float32, torch.bfloat16)


def lora(model, rank: int = 4, target_modules: tuple[str, ...] = ("query_key_value",)):
    return add_lora(model, rank=rank, alpha=32, dropout=0.0, target_modules=list(target_modules))


@pytest.fixture
def model(golden_folder: Path) -> ChatGLMForConditionalGeneration:
    return load_quantized_model(str(golden_folder), torch.float32)


def test_quantization_is_nf4_with_double_quantization():
    # Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    for dtype in DTYPES:
        config = quantization_config(dtype)
        assert isinstance(config, BitsAndBytesConfig)
        assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_linear_layers_are_quantized(golden_folder, dtype):
    model = load_quantized_model(str(golden_folder), dtype)
    quantized = [n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert sorted({name.rsplit(".", 1)[-1] for name in quantized}) == sorted(LINEAR)
    assert len(quantized) == 3 * len(LINEAR)
    for name in quantized:
        layer = model.get_submodule(name)
        assert (
            layer.weight.dtype == torch.uint8 and layer.weight.numel() == layer.in_features * layer.out_features // 2
        )
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.bias.dtype == dtype
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.uint8:
            assert parameter.dtype == dtype, name
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)


def test_quantized_weights_are_close_to_the_16_bit_ones(golden_folder, model):
    exact = ChatGLMForConditionalGeneration.from_pretrained(golden_folder, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            expected = exact.get_submodule(name).weight
            error = (weight - expected).std() / expected.std()
            assert error < 0.12, name  # about 0.09 for normal weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_adapter_is_trained_in_fp32(golden_folder, dtype):
    tuned = lora(load_quantized_model(str(golden_folder), dtype))
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_adapter_has_the_names_of_the_official_one(model):
    official = torch.load(GOLDEN_ADAPTER / "adapter_model.bin", weights_only=True)
    found = get_peft_model_state_dict(lora(model))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in official.items()}


def test_6b_model_has_the_published_number_of_trained_parameters():
    # 28 layers x rank 4 x (4,096 + 3 x 4,096), as in the published adapter.
    with torch.device("meta"):
        tuned = lora(ChatGLMForConditionalGeneration(ChatGLMConfig()))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 1_835_008
    # The head is the embedding, so that its weights are counted once.
    assert sum(p.numel() for p in tuned.get_base_model().parameters() if not p.requires_grad) == 6_173_286_400


def test_all_linear_layers_may_be_targets(model):
    tuned = lora(model, target_modules=LINEAR)
    assert len([n for n, p in tuned.named_parameters() if p.requires_grad]) == 2 * 3 * len(LINEAR)


def test_unknown_target_modules_are_named(model):
    with pytest.raises(ValueError, match=r"--lora_target_modules.* no q_proj, v_proj; it has .*query_key_value"):
        lora(model, target_modules=("query_key_value", "q_proj", "v_proj"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_same_after_an_evaluation(golden_folder, dtype):
    # On some CPUs bitsandbytes would repack the weights in evaluation mode, and could not train with them.
    tuned = add_random_lora(load_quantized_model(str(golden_folder), dtype))
    ids = [25, 50, 228, 507, 508, 129, 52, 509]
    batch = PaddingFreeCollator(tuned.config)(
        StepBatch.collate([{"input_ids": ids, "labels": [-100] * 5 + ids[5:]}]).samples
    )
    losses, gradients = [], []
    for _ in range(2):
        tuned.train()
        tuned.zero_grad()
        loss = tuned(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in tuned.named_parameters() if p.requires_grad})
        tuned.eval()
        with torch.no_grad():
            tuned(**batch)
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


# Folders.


def test_tokenizer_is_that_of_the_folder(golden_folder):
    tokenizer = load_tokenizer(str(golden_folder))
    assert type(tokenizer) is ChatGLMTokenizer and tokenizer.vocab_file == str(golden_folder / "ice_text.model")


@pytest.mark.parametrize("keep", [0, 1000])
def test_damaged_tokenizer_is_refused(golden_folder, keep):
    vocabulary = golden_folder / "ice_text.model"
    vocabulary.write_bytes(vocabulary.read_bytes()[:keep])
    with pytest.raises((ValueError, OSError), match=r"ice_text\.model"):
        load_tokenizer(str(golden_folder))


def test_folder_is_checked_before_loading(golden_folder):
    (golden_folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00002"):
        load_quantized_model(str(golden_folder), torch.float32)


def test_missing_weights_are_refused(golden_folder):
    # transformers only logs a warning, and initializes the missing layer at random.
    config = json.loads((golden_folder / "config.json").read_text()) | {"num_layers": 4}
    (golden_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_layers 4, and the weight files hold 3 layers"):
        load_quantized_model(str(golden_folder), torch.float32)


def spoil(folder: Path, name: str, value: float):
    """Sets one value of a weight in the files of a checkpoint."""
    for file in folder.glob("*.bin"):
        state = torch.load(file, weights_only=True)
        state.pop("lm_head.weight", None)  # which is the embedding, and need not be there
        if name in state:
            state[name].view(-1)[0] = value
        torch.save(state, file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer.word_embeddings.weight", float("nan")),
        ("transformer.final_layernorm.weight", float("inf")),
        ("transformer.layers.1.mlp.dense_4h_to_h.bias", -float("inf")),
        ("transformer.layers.0.attention.dense.weight", float("inf")),  # quantized: its scale is infinite
    ],
)
def test_values_that_are_not_finite_are_refused(golden_folder, name, value):
    spoil(golden_folder, name, value)
    with pytest.raises(ValueError, match=rf"golden: {name} is not finite .*torch\.float32") as raised:
        load_quantized_model(str(golden_folder), torch.float32)
    assert len(str(raised.value).splitlines()) == 1


def test_values_beyond_the_compute_dtype_are_refused(golden_folder):
    for file in golden_folder.glob("*.bin"):
        state = {name: tensor.bfloat16() for name, tensor in torch.load(file, weights_only=True).items()}
        torch.save(state, file)
    spoil(golden_folder, "transformer.final_layernorm.bias", 1e6)
    load_quantized_model(str(golden_folder), torch.bfloat16)
    with pytest.raises(ValueError, match=r"final_layernorm\.bias is not finite .*torch\.float16.*--compute_dtype"):
        load_quantized_model(str(golden_folder), torch.float16)


# Machines.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A function (free bytes, all bytes) that simulates a GPU."""

    def simulate(free: float, total: float = 80 * 2**30):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free), int(total)))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Test GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *size, device=None, **kwargs: randn(*size, **kwargs))

    return simulate


def one_line(raised: pytest.ExceptionInfo) -> str:
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


def test_6b_model_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no CUDA GPU was found .*6\.2 billion parameters need one") as raised:
        check_hardware(ChatGLMConfig(), torch.float32)
    assert "train_qlora.py --demo" in one_line(raised)


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_little_memory_is_reported_before_loading(gpu, dtype):
    gpu(free=3.5 * 2**30, total=8 * 2**30)
    with pytest.raises(ValueError, match=r"A Test GPU has 3\.5 of 8\.0 GiB free; the model needs at least") as raised:
        check_hardware(ChatGLMConfig(), dtype)
    # 5.64 billion weights of 4.127 bits, and an embedding of 0.53 billion of 2 or 4 bytes.
    needed = float(one_line(raised).split("needs at least ")[1].split()[0])
    floor = (5.64e9 * 4.127 / 8 + 0.535e9 * dtype.itemsize) / 2**30
    assert floor < needed < floor + 2


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA Setup failed\nsecond line"), AttributeError("undefined symbol: cquantize_blockwise")]
)
def test_error_of_bitsandbytes_is_reported(gpu, monkeypatch, error):
    gpu(free=70 * 2**30)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    with pytest.raises(ValueError, match=r"bitsandbytes .* does not work on A Test GPU .*6\.1.*torch") as raised:
        check_hardware(ChatGLMConfig(), torch.bfloat16)
    assert str(error).splitlines()[0] in one_line(raised)


def test_wrong_results_of_bitsandbytes_are_reported(gpu, monkeypatch):
    gpu(free=70 * 2**30)
    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda packed, state, *args, **kwargs: torch.zeros(64, 64)
    )
    with pytest.raises(ValueError, match=r"bitsandbytes .* does not work on A Test GPU .*wrong"):
        check_hardware(ChatGLMConfig(), torch.bfloat16)
