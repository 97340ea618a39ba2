"""chatglm/modeling_chatglm.py, compared with the outputs of the official code, and with itself on other inputs.

Golden values come from tests/golden/tiny: the official modeling code in fp32, on a random model of 3 layers of width
64, with and without a LoRA adapter made by peft 0.4.
"""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, GOLDEN_ADAPTER, GOLDEN_CHECKPOINT
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, set_seed

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.modeling_chatglm import prefix_lm_mask
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.loading import load_quantized_model

LOGITS = {"atol": 1e-4, "rtol": 0}
LOSS = {"abs": 1e-5}
ATTENTION = ("eager", "sdpa")


def load(folder: Path = GOLDEN_CHECKPOINT, attention: str = "sdpa") -> ChatGLMForConditionalGeneration:
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def with_adapter(model: ChatGLMForConditionalGeneration, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(model, GOLDEN_ADAPTER, is_trainable=trainable)


@pytest.fixture(params=ATTENTION)
def model(request: pytest.FixtureRequest) -> ChatGLMForConditionalGeneration:
    return load(attention=request.param)


@pytest.fixture
def sdpa_model() -> ChatGLMForConditionalGeneration:
    return load()


def tensors(case: dict) -> dict[str, torch.Tensor]:
    """input_ids and labels of a golden case, [B, T]."""
    return {name: torch.atleast_2d(torch.tensor(case[name])) for name in ("input_ids", "labels")}


def separate_samples(case: dict, pad_token_id: int = 3) -> list[dict[str, list[int]]]:
    """The rows of a padded golden batch as samples without padding."""
    lengths = [len(row) - row.count(pad_token_id) for row in case["input_ids"]]
    rows = zip(case["input_ids"], case["labels"], lengths, strict=True)
    return [{"input_ids": ids[:length], "labels": labels[:length]} for ids, labels, length in rows]


def lora_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Gradients of the adapter, under the names in the adapter's file."""
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def greedy(model, prompt: list[int], new_tokens: int = 20, **kwargs) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        **kwargs,
    )
    return output[0, len(prompt) :].tolist()


# Against the official code.


@pytest.mark.parametrize("name", ["single", "mask_token"])
def test_logits_and_loss_equal_official(model, cases, arrays, name):
    outputs = model(**tensors(cases[name]))
    torch.testing.assert_close(outputs.logits[0], arrays[f"{name}_logits"], **LOGITS)
    assert outputs.loss.item() == pytest.approx(cases[name]["loss"], **LOSS)


@pytest.mark.parametrize("masked", [False, True])
def test_right_padded_batch_equals_official(model, cases, arrays, masked):
    batch = tensors(cases["train_batch"])
    real = batch["input_ids"] != model.config.pad_token_id
    outputs = model(**batch, attention_mask=real.long() if masked else None)
    torch.testing.assert_close(outputs.logits[real], arrays["train_batch_logits"][real], **LOGITS)
    assert outputs.loss.item() == pytest.approx(cases["train_batch"]["loss"], **LOSS)


def test_adapter_of_old_peft_gives_official_logits(model, cases, arrays):
    outputs = with_adapter(model)(**tensors(cases["single"]))
    torch.testing.assert_close(outputs.logits[0], arrays["single_logits_with_adapter"], **LOGITS)


def test_lora_gradients_equal_official(model, cases, arrays):
    tuned = with_adapter(model, trainable=True)
    outputs = tuned(**tensors(cases["train_batch"]))
    assert outputs.loss.item() == pytest.approx(cases["train_batch"]["loss_with_adapter"], **LOSS)
    outputs.loss.backward()
    gradients = lora_gradients(tuned)
    expected = {name.removeprefix("grad/"): value for name, value in arrays.items() if name.startswith("grad/")}
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("number", range(3))
def test_greedy_tokens_equal_official(model, cases, number):
    case = cases["generate"][number]
    tuned = with_adapter(model) if case.get("with_adapter") else model
    assert greedy(tuned, case["prompt"], len(case["new_tokens"])) == case["new_tokens"]


def test_positions_and_mask_of_a_left_padded_batch_equal_official():
    # The official tokenizer computes them (tests/golden/tokenizer.json); here the model does.
    expected = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["left_padded_batch"]
    ids, config = torch.tensor(expected["input_ids"]), ChatGLMConfig()
    attention_mask = (ids != config.pad_token_id).long()
    position_ids = config.position_ids(ids, attention_mask)
    assert position_ids.tolist() == expected["position_ids"]
    visible = prefix_lm_mask(attention_mask, position_ids[:, 1], 0, ids.shape[1])
    official = ~torch.tensor(expected["attention_mask_true_means_blocked"]).bool()
    queries = attention_mask.bool()[:, None, :, None]  # the mask of padding queries does not matter
    assert torch.equal(visible & queries, official & queries)


GMASK, MASK, SOP, PAD = 130001, 130000, 130004, 3


@pytest.mark.parametrize(
    ("ids", "position", "block_position"),
    [
        ([7, 8, GMASK, SOP, 9, 10], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        ([7, MASK, 8, 9, SOP, 10], [0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]),  # a blank within the text
        ([7, MASK, 8, GMASK, SOP, 10], [0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 1, 2]),
        ([7, GMASK, 8, MASK, SOP, 10], [0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]),
        ([GMASK, SOP, 7, SOP, 8], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]),  # the first <sop> ends the prompt
        ([PAD, PAD, 7, MASK, 8, SOP], [0, 0, 0, 1, 2, 1], [0, 0, 0, 0, 0, 1]),
        ([7, 8, 9], [0, 1, 2], [0, 0, 0]),
    ],
)
def test_positions(ids, position, block_position):
    # Source: the rules in "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", section 2.1.
    ids = torch.tensor([ids])
    found = ChatGLMConfig().position_ids(ids, (ids != PAD).long())
    assert found.tolist() == [[position, block_position]]


# Loading.


def test_auto_classes_give_native_classes(golden_folder):
    # config.json and tokenizer_config.json refer to remote code, which is not in the folder and is not needed.
    config = json.loads((golden_folder / "config.json").read_text())
    assert "AutoModel" in config["auto_map"]
    tokenizer_config = json.loads((golden_folder / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    (golden_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert type(AutoConfig.from_pretrained(golden_folder)) is ChatGLMConfig
    assert type(AutoModel.from_pretrained(golden_folder)) is ChatGLMForConditionalGeneration
    assert type(AutoModelForCausalLM.from_pretrained(golden_folder)) is ChatGLMForConditionalGeneration
    assert type(AutoTokenizer.from_pretrained(golden_folder)) is ChatGLMTokenizer


def test_every_weight_of_checkpoint_is_used(golden_folder):
    _, info = ChatGLMForConditionalGeneration.from_pretrained(golden_folder, output_loading_info=True)
    assert not any(info.values()), info


def test_safetensors_round_trip_keeps_logits(sdpa_model, cases, tmp_path):
    sdpa_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    batch = tensors(cases["single"])
    assert torch.equal(load(tmp_path)(**batch).logits, sdpa_model(**batch).logits)


def merge_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Deletes the two shards and their index from a folder, and returns their tensors."""
    state = {}
    for shard in sorted(folder.glob("pytorch_model-*.bin")):
        state |= torch.load(shard, weights_only=True)
        shard.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    return state


def test_checkpoint_with_a_different_head_is_refused(golden_folder):
    state = merge_shards(golden_folder)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][17, 3] += 1
    torch.save(state, golden_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lm_head\.weight and transformer\.word_embeddings\.weight .* differ"):
        load(golden_folder)


def test_checkpoint_without_head_is_tied(golden_folder, cases, arrays):
    state = merge_shards(golden_folder)
    del state["lm_head.weight"]
    torch.save(state, golden_folder / "pytorch_model.bin")
    model = load(golden_folder)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    torch.testing.assert_close(model(**tensors(cases["single"])).logits[0], arrays["single_logits"], **LOGITS)


def test_tied_weight_is_one_parameter(sdpa_model):
    assert sdpa_model.lm_head.weight is sdpa_model.transformer.word_embeddings.weight
    resized = sdpa_model.resize_token_embeddings(576)
    assert resized.weight is sdpa_model.lm_head.weight and sdpa_model.lm_head.out_features == 576


def test_inverse_frequencies_are_right_after_quantized_loading(golden_folder):
    # No state dict contains them, so that a model created on the meta device could be loaded without them.
    model = load_quantized_model(golden_folder, torch.float32)
    dim = 64 // 4 // 2  # hidden size 64, 4 heads, half a head
    exact = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    inv_freq = model.transformer.rotary_emb.inv_freq.float()
    assert torch.equal(inv_freq, exact.half().float())
    assert not torch.equal(inv_freq, exact.float())  # rounding to fp16 changes them
    stored = torch.load(golden_folder / "pytorch_model-00001-of-00002.bin", weights_only=True)
    assert torch.equal(inv_freq, stored["transformer.layers.0.attention.rotary_emb.inv_freq"].float())


# Generation.


def test_left_padded_batch_equals_single_prompts(model, cases):
    prompts = [case["prompt"] for case in cases["generate"][:2]]
    alone = [greedy(model, prompt) for prompt in prompts]
    length = max(map(len, prompts))
    padded = torch.tensor([[3] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert output[:, length:].tolist() == alone


def test_left_padding_does_not_change_logits(model, cases):
    ids = torch.tensor([cases["single"]["input_ids"]])
    padded = torch.nn.functional.pad(ids, (7, 0), value=model.config.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (7, 0))
    logits = model(input_ids=padded, attention_mask=mask).logits[:, 7:]
    torch.testing.assert_close(logits, model(input_ids=ids).logits, **LOGITS)


def test_cached_decoding_equals_uncached(model, cases):
    prompt = cases["generate"][1]["prompt"]
    generate = {"input_ids": torch.tensor([prompt]), "max_new_tokens": 20, "do_sample": False}
    generate |= {"output_scores": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(**generate, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.cat(cached.scores), torch.cat(uncached.scores), **LOGITS)


def test_cache_is_used_in_decoding(sdpa_model, cases):
    lengths = []
    sdpa_model.transformer.word_embeddings.register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    prompt = cases["generate"][1]["prompt"]
    greedy(sdpa_model, prompt, new_tokens=4)
    assert lengths == [len(prompt), 1, 1, 1]


def test_static_cache_equals_dynamic(model, cases):
    prompt = cases["generate"][1]["prompt"]
    assert greedy(model, prompt, cache_implementation="static") == greedy(model, prompt)


def test_static_cache_in_a_left_padded_batch(model, cases):
    prompts = [case["prompt"] for case in cases["generate"][:2]]
    padded = torch.tensor([[3] * 7 + prompts[0], prompts[1]])
    mask = (torch.arange(12) >= torch.tensor([[7], [0]])).long()
    output = model.generate(
        input_ids=padded, attention_mask=mask, max_new_tokens=20, do_sample=False, cache_implementation="static"
    )
    assert output[:, 12:].tolist() == [case["new_tokens"] for case in cases["generate"][:2]]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_decoding_step_by_step_equals_one_pass(model, cases, name):
    ids = torch.tensor([cases["single"]["input_ids"]])
    context = cases["single"]["input_ids"].index(model.config.bos_token_id)
    one_pass = model(input_ids=ids).logits
    first = model(input_ids=ids[:, : context + 1], use_cache=True)
    logits, cache = first.to_tuple()
    steps = [logits]
    for i in range(context + 1, ids.shape[1]):
        # From <sop> on, `position` stays at [gMASK], the token before it, and `block_position` counts 1, 2, 3, ...
        position_ids = torch.tensor([[[context - 1], [i - context + 1]]])
        step = model(input_ids=ids[:, i : i + 1], position_ids=position_ids, use_cache=True, **{name: cache})
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), one_pass, **LOGITS)


def log_probability(model, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()


def test_beam_search_finds_an_answer_at_least_as_likely(sdpa_model, cases):
    prompt = cases["generate"][1]["prompt"]
    beams = greedy(sdpa_model, prompt, new_tokens=8, num_beams=2)
    assert log_probability(sdpa_model, prompt, beams) >= log_probability(
        sdpa_model, prompt, greedy(sdpa_model, prompt, 8)
    )


def test_sampling_follows_the_seed(sdpa_model, cases):
    prompt = torch.tensor([cases["generate"][1]["prompt"]])
    sampled = []
    for seed in (1, 1, 2):
        set_seed(seed)
        sampled.append(sdpa_model.generate(input_ids=prompt, max_new_tokens=10, do_sample=True, temperature=2.0))
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


def test_streamer_gives_the_generated_text(tiny_model, tokenizer):
    inputs = tokenizer("类型#裙", return_tensors="pt")
    generate = {**inputs, "max_new_tokens": 12, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    worker = threading.Thread(target=tiny_model.generate, kwargs={**generate, "streamer": streamer})
    worker.start()
    streamed = "".join(streamer)
    worker.join()
    answer = tiny_model.generate(**generate)[0, inputs["input_ids"].shape[1] :]
    assert streamed == tokenizer.decode(answer, skip_special_tokens=True) != ""


# Training.


@pytest.fixture(params=["packed", "masked"])
def concatenate(request: pytest.FixtureRequest, model) -> Callable[[list[dict]], dict]:
    """Concatenates samples in a row, with attention by sample (packed) or with a mask."""

    def collate(samples: list[dict]) -> dict:
        batch = PaddingFreeCollator(model.config)(StepBatch.collate(samples).samples)
        if request.param == "masked":
            lengths = torch.tensor(batch.pop("packed_sequences").lengths).sum(dim=1)
            batch["attention_mask"] = torch.arange(1, len(samples) + 1).repeat_interleave(lengths)[None]
        return batch

    return collate


def label_logits(model, batch: dict) -> torch.Tensor:
    """Logits at the positions that predict a label, [L, V], of a batch from the collator."""
    return model(**{name: value for name, value in batch.items() if "labels" not in name}).logits[0]


def test_concatenated_samples_have_separate_losses(model, concatenate, cases):
    samples = separate_samples(cases["train_batch"])
    batch = concatenate(samples)
    logits = label_logits(model, batch)
    counts = [sum(label != -100 for label in sample["labels"]) for sample in samples]
    parts = zip(samples, logits.split(counts), batch["shift_labels"][0].split(counts), strict=True)
    for sample, sample_logits, sample_labels in parts:
        alone = model(**{name: torch.tensor([ids]) for name, ids in sample.items()}).loss
        together = torch.nn.functional.cross_entropy(sample_logits, sample_labels)
        assert together.item() == pytest.approx(alone.item(), **LOSS)


def test_concatenated_batch_has_loss_and_gradients_of_padded_batch(model, concatenate, cases, arrays):
    tuned = with_adapter(model, trainable=True)
    loss = tuned(**concatenate(separate_samples(cases["train_batch"]))).loss
    assert loss.item() == pytest.approx(cases["train_batch"]["loss_with_adapter"], **LOSS)
    loss.backward()
    for name, gradient in lora_gradients(tuned).items():
        torch.testing.assert_close(gradient, arrays[f"grad/{name}"], atol=1e-4, rtol=0)


def test_sample_does_not_attend_to_other_samples(model, concatenate, cases):
    samples = separate_samples(cases["train_batch"])
    other = [{**sample, "input_ids": list(sample["input_ids"])} for sample in samples]
    other[0]["input_ids"][2] = 42  # in the prompt of the first sample
    count = sum(label != -100 for label in samples[0]["labels"])
    logits, changed = (label_logits(model, concatenate(rows)) for rows in (samples, other))
    torch.testing.assert_close(logits[count:], changed[count:], atol=1e-6, rtol=0)
    assert (logits[:count] - changed[:count]).abs().amax(-1).min() > 1e-3


def test_losses_of_micro_batches_add_up(model, concatenate, cases):
    samples = separate_samples(cases["train_batch"])
    all_samples = concatenate(samples)
    count = all_samples["shift_labels"].numel()
    parts = (model(**concatenate(part), num_items_in_batch=count).loss for part in (samples[:1], samples[1:]))
    assert sum(parts).item() == pytest.approx(model(**all_samples).loss.item(), **LOSS)


def test_number_of_items_divides_the_summed_loss(sdpa_model, cases):
    batch = tensors(cases["train_batch"])
    count = int((batch["labels"] != -100).sum())
    mean = sdpa_model(**batch).loss.item()
    for items in (count, 7 * count, torch.tensor(7 * count)):
        loss = sdpa_model(**batch, num_items_in_batch=items).loss.item()
        assert loss == pytest.approx(mean * count / int(items), **LOSS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_activations_keeps_gradients(cases, arrays, reentrant):
    tuned = with_adapter(load(), trainable=True)
    tuned.enable_input_require_grads()
    enable = getattr(tuned, "activation_checkpointing_enable", tuned.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    tuned.train()
    calls = []
    tuned.get_base_model().transformer.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tuned(**tensors(cases["train_batch"])).loss.backward()
    assert len(calls) == 2  # in the forward pass, and recomputed in the backward pass
    for name, gradient in lora_gradients(tuned).items():
        torch.testing.assert_close(gradient, arrays[f"grad/{name}"], atol=1e-4, rtol=0)


def test_logits_to_keep_selects_positions(sdpa_model, cases):
    ids = torch.tensor([cases["single"]["input_ids"]])
    logits = sdpa_model(input_ids=ids).logits
    positions = torch.tensor([3, 7, 11])
    torch.testing.assert_close(sdpa_model(input_ids=ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(sdpa_model(input_ids=ids, logits_to_keep=positions).logits, logits[:, positions])


def test_embeddings_instead_of_ids(sdpa_model, cases):
    ids = torch.tensor([cases["single"]["input_ids"]])
    context = cases["single"]["input_ids"].index(sdpa_model.config.bos_token_id)
    index = torch.arange(ids.shape[1])
    position_ids = torch.stack((index.clamp(max=context - 1), (index - context + 1).clamp(min=0)))[None]
    embeds = sdpa_model.get_input_embeddings()(ids)
    logits = sdpa_model(inputs_embeds=embeds, position_ids=position_ids).logits
    torch.testing.assert_close(logits, sdpa_model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="position_ids"):
        sdpa_model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        sdpa_model(input_ids=ids, inputs_embeds=embeds)


def test_bf16_logits_are_close_to_fp32(cases, arrays):
    # bf16 has 8 bits of mantissa; the largest logits are about 4.
    model = load().to(torch.bfloat16)
    logits = model(**tensors(cases["single"])).logits[0].float()
    expected = arrays["single_logits"]
    error = ((logits - expected).abs().mean() / expected.abs().mean()).item()
    assert math.isfinite(error) and error < 0.05
