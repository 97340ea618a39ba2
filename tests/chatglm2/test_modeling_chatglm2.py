"""chatglm2/modeling_chatglm2.py, compared with the outputs of the official code, and with itself on other inputs.

Golden values come from tests/golden/chatglm2: the official modeling code of ChatGLM2-6B in fp32, on a random model of
3 layers of width 64 with 2 groups for 4 heads, with and without a LoRA adapter made by peft 0.4. The code of
ChatGLM3-6B gave the same logits and tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import GOLDEN
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, fast_layers
from chatglm2.fused_norm import FusedSublayerNorm
from chatglm2.modeling_chatglm2 import RMSNorm
from chatglm2.rotary import ChatGLM2RotaryEmbedding
from qlora.adapter import load_adapter
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.inference.decoding import decode, make_sampler
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model

CHECKPOINT = GOLDEN / "chatglm2" / "checkpoint"
ADAPTER = GOLDEN / "chatglm2" / "adapter"
LOGITS = {"atol": 1e-4, "rtol": 0}
LOSS = {"abs": 1e-5}


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((GOLDEN / "chatglm2" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def arrays() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "chatglm2" / "arrays.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def load(folder: Path = CHECKPOINT, attention: str = "sdpa") -> ChatGLM2ForConditionalGeneration:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def with_adapter(model: ChatGLM2ForConditionalGeneration, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(model, ADAPTER, is_trainable=trainable)


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> ChatGLM2ForConditionalGeneration:
    return load(attention=request.param)


@pytest.fixture
def sdpa_model() -> ChatGLM2ForConditionalGeneration:
    return load()


def tensors(case: dict, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.atleast_2d(torch.tensor(case[name])) for name in names}


def samples_of(case: dict) -> list[dict]:
    """The rows of a golden batch as samples without padding."""
    lengths = [sum(row) for row in case["attention_mask"]]
    rows = zip(case["input_ids"], case["labels"], lengths, strict=True)
    return [{"input_ids": ids[:length], "labels": labels[:length]} for ids, labels, length in rows]


def check_gradients(tuned: PeftModel, arrays: dict[str, torch.Tensor]):
    found = {n.replace(".default", ""): p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    expected = {name.removeprefix("grad/"): value for name, value in arrays.items() if name.startswith("grad/")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_auto_classes_give_native_classes():
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert type(config) is ChatGLM2Config and config.chatglm_version == 2
    assert type(AutoModel.from_pretrained(CHECKPOINT)) is ChatGLM2ForConditionalGeneration
    _, info = AutoModelForCausalLM.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("adapter", [False, True])
def test_logits_equal_official(model, cases, arrays, number, adapter):
    tuned = with_adapter(model) if adapter else model
    logits = tuned(**tensors(cases["forward"][number], "input_ids")).logits[0]
    name = f"forward_{number}_logits" + "_with_adapter" * adapter
    torch.testing.assert_close(logits, arrays[name].reshape(logits.shape), **LOGITS)


def test_adapter_of_old_peft_is_read_with_its_checks(sdpa_model, cases, arrays):
    tuned = load_adapter(sdpa_model, str(ADAPTER))
    logits = tuned(**tensors(cases["forward"][0], "input_ids")).logits[0]
    torch.testing.assert_close(logits, arrays["forward_0_logits_with_adapter"].reshape(logits.shape), **LOGITS)


@pytest.mark.parametrize("given", [False, True])
def test_left_padded_batch_equals_official(model, cases, arrays, given):
    batch = tensors(cases["left_padded"], "input_ids", "attention_mask", "position_ids")
    assert torch.equal(model.config.position_ids(batch["input_ids"], batch["attention_mask"]), batch["position_ids"])
    if not given:
        del batch["position_ids"]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], arrays["left_padded_logits"][real], **LOGITS)


@pytest.mark.parametrize("masked", [False, True])
def test_right_padded_batch_equals_official(model, cases, arrays, masked):
    batch = tensors(cases["train_batch"], "input_ids", "labels", "attention_mask")
    real = batch["attention_mask"].bool()
    if not masked:
        del batch["attention_mask"]
    outputs = model(**batch)
    torch.testing.assert_close(outputs.logits[real], arrays["train_batch_logits"][real], **LOGITS)
    assert outputs.loss.item() == pytest.approx(cases["train_batch"]["loss"], **LOSS)


def test_hidden_states_and_cache_equal_official(sdpa_model, cases, arrays):
    outputs = []
    for block in sdpa_model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    sdpa_model(**tensors(cases["forward"][2], "input_ids"))
    for found, expected in zip(outputs, arrays["hidden_2"][1:], strict=True):
        torch.testing.assert_close(found[0], expected, **LOGITS)
    case = cases["kv_cache"]
    ids = torch.tensor([cases["forward"][case["forward_index"]]["input_ids"][: case["prefill"]]])
    layer = sdpa_model(input_ids=ids, use_cache=True).to_tuple()[1].layers[0]
    torch.testing.assert_close(layer.keys[0].transpose(0, 1), arrays["kv_layer0_key"], **LOGITS)
    torch.testing.assert_close(layer.values[0].transpose(0, 1), arrays["kv_layer0_value"], **LOGITS)


def test_lora_gradients_equal_official(model, cases, arrays):
    tuned = with_adapter(model, trainable=True)
    outputs = tuned(**tensors(cases["train_batch"], "input_ids", "labels", "attention_mask"))
    assert outputs.loss.item() == pytest.approx(cases["train_batch"]["loss_with_mask_with_adapter"], **LOSS)
    outputs.loss.backward()
    check_gradients(tuned, arrays)


@pytest.mark.parametrize("packed", [False, True])
def test_concatenated_samples_equal_official(model, cases, arrays, packed):
    tuned = with_adapter(model, trainable=True)
    samples = samples_of(cases["train_batch"])
    batch = PaddingFreeCollator(model.config)(StepBatch.collate(samples).samples)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    assert batch["packed_sequences"].lengths == [[0, length] for length in lengths.tolist()]
    if not packed:
        del batch["packed_sequences"]
        batch["attention_mask"] = torch.arange(1, len(samples) + 1).repeat_interleave(lengths)[None]
    loss = tuned(**batch).loss
    assert loss.item() == pytest.approx(cases["train_batch"]["loss_with_adapter"], **LOSS)
    loss.backward()
    check_gradients(tuned, arrays)


@pytest.mark.parametrize("number", range(6))
def test_greedy_tokens_equal_official(sdpa_model, cases, number):
    case = cases["generate"][number]
    tuned = with_adapter(sdpa_model) if case["with_adapter"] else sdpa_model
    prompt, count = torch.tensor([case["prompt"]]), len(case["new_tokens"])
    output = tuned.generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    assert output[0, prompt.shape[1] :].tolist() == case["new_tokens"]


@pytest.mark.parametrize("number", range(2))
def test_greedy_tokens_of_a_left_padded_batch_equal_official(sdpa_model, cases, number):
    case = cases["generate_batch"][number]
    tuned = with_adapter(sdpa_model).get_base_model() if case["with_adapter"] else sdpa_model
    batch = tensors(cases["left_padded"], "input_ids", "attention_mask")
    count = len(case["new_tokens"][0])
    options = {"max_new_tokens": count, "sampler": make_sampler(do_sample=False)}
    pieces = list(decode(tuned, **batch, **options, stop_token_ids=[-1]))  # in the golden run no token ended an answer
    assert torch.cat(pieces, dim=1).tolist() == case["new_tokens"]


def test_kernels_of_a_decoding_step_choose_the_official_tokens(sdpa_model, cases, monkeypatch):
    # In Triton's interpreter: norms, and attention of single tokens.
    pytest.importorskip("triton")
    monkeypatch.setattr(fast_layers, "kernels_supported", lambda tensor: True)
    replace_layers(sdpa_model, for_training=False)
    kinds = {type(module) for block in sdpa_model.blocks for module in block.modules()}
    assert {fast_layers.DecodingAttention, FusedSublayerNorm} <= kinds
    case = next(case for case in cases["generate_batch"] if not case["with_adapter"])
    batch, sampler = tensors(cases["left_padded"], "input_ids", "attention_mask"), make_sampler(do_sample=False)
    pieces = list(decode(sdpa_model, **batch, max_new_tokens=3, sampler=sampler, stop_token_ids=[-1]))
    assert torch.cat(pieces, dim=1).tolist() == [tokens[:3] for tokens in case["new_tokens"]]


def test_reading_a_prompt_in_pieces_gives_the_logits_of_one_pass(model, cases):
    ids = torch.tensor([cases["forward"][4]["input_ids"]])
    one_pass = model(input_ids=ids).logits
    logits, cache = model(input_ids=ids[:, :7], use_cache=True).to_tuple()
    found = [logits]
    for start, end in ((7, 12), (12, 13), (13, ids.shape[1])):
        positions = torch.arange(start, end)[None]
        found.append(model(input_ids=ids[:, start:end], position_ids=positions, cache=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), one_pass, **LOGITS)


def test_four_bit_model_has_untouched_head_and_frequencies():
    model = load_quantized_model(str(CHECKPOINT), torch.float32, AutoConfig.from_pretrained(CHECKPOINT))
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    linear = [module for name, module in model.named_modules() if name.endswith(("dense", "dense_h_to_4h"))]
    assert {type(module) for module in linear} == {Linear4bit}
    expected = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)  # half of a head of 16 features
    torch.testing.assert_close(model.transformer.rotary_pos_emb.inv_freq, expected)


def test_rotary_tables_are_those_of_the_official_code_in_fp32():
    # Source: the rows that an fp32 model computes, angle = position * 10000 ** (-2j / 64).
    rotary = ChatGLM2RotaryEmbedding(ChatGLM2Config())
    cos, sin = rotary(torch.tensor([[0, 1, 8191]]), torch.float32)
    angles = torch.tensor([0, 1, 8191])[:, None] * 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(cos[0, :, 0], angles.cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin[0, :, 0], angles.sin(), atol=1e-3, rtol=0)


def test_weights_of_norms_begin_with_one():
    model = ChatGLM2ForConditionalGeneration(AutoConfig.from_pretrained(CHECKPOINT))
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    for weight in norms:
        torch.nn.init.zeros_(weight)
    model.apply(model._init_weights)
    assert len(norms) == 7 and all((weight == 1).all() for weight in norms)


def test_embedding_and_head_can_be_replaced():
    model = ChatGLM2ForConditionalGeneration(AutoConfig.from_pretrained(CHECKPOINT))
    embedding, head = torch.nn.Embedding(8, 64), torch.nn.Linear(64, 8)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head


def test_norm_multiplies_by_the_weight_before_it_rounds():
    norm = RMSNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() / 2**8
    assert torch.equal(found, exact.bfloat16())


def test_safetensors_round_trip_keeps_logits(sdpa_model, cases, tmp_path):
    sdpa_model.save_pretrained(tmp_path)
    batch = tensors(cases["forward"][1], "input_ids")
    again = load(tmp_path)
    assert again.config.chatglm_version == 2
    assert torch.equal(again(**batch).logits, sdpa_model(**batch).logits)
