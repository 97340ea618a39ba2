"""Every program with a random ChatGLM2 and ChatGLM3 of two layers: training, answers, merging, 4-bit copies."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    adapter,
    add_random_lora,
    error_of,
    flags_of,
    history,
    import_script,
    random_chatglm2,
    run_main,
    write_json,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

import inference_qlora
import train_qlora
from chatglm2 import ChatGLM2Tokenizer
from glm_shared.chat import Prompt
from qlora.checkpoint import check_checkpoint
from qlora.data.dataset import SampleEncoder
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import generate_answers, generate_texts, stream_answer
from qlora.inference.slots import Slots, Task
from qlora.layers.linear import LoRANF4Linear, NF4Linear
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model, load_tokenizer

VERSIONS = [2, 3]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(version, tiny_script, sample_rows, tmp_path_factory) -> ChatGLM2Tokenizer:
    rows = [{"query": row["instruction"], "answer": row["output"]} for row in sample_rows]
    return tiny_script.make_tokenizer(rows, 1100, tmp_path_factory.mktemp("tokenizer"), f"chatglm{version}")


@pytest.fixture(scope="module")
def checkpoint(version, tokenizer, tmp_path_factory) -> Path:
    """A complete folder in the official format with random weights. Do not change it."""
    return random_chatglm2(tmp_path_factory.mktemp("chatglm2") / "tiny", tokenizer, version, seq_length=256)


@pytest.fixture(scope="module")
def trained(checkpoint, train_file, dev_file, tmp_path_factory) -> Path:
    """The output of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    args_json = write_json(
        folder / "args.json", folder / "out", max_steps=4, save_strategy="no", eval_steps=4, eval_on_start=True
    )
    flags = flags_of(args_json, checkpoint, train_file, dev_file)
    run_main(train_qlora, *flags, "--lora_target_modules", "query_key_value", "dense_4h_to_h")
    return folder / "out"


def test_training_lowers_the_loss_and_writes_an_adapter(trained, version):
    before, after = history(trained, "eval_loss")
    assert after < before
    assert len(adapter(trained)) == 2 * 2 * 2  # A and B of two layers in two blocks
    assert (trained / "tokenizer.model").is_file()
    assert type(load_tokenizer(str(trained))).__name__ == f"ChatGLM{version}Tokenizer"


def test_sample_is_the_official_prompt_with_the_answer(tokenizer, version):
    encoder = SampleEncoder(tokenizer, "", 512, 512)
    ids, labels, *_ = encoder.encode("类型#裙", [["你好", "你好。"]], "白色。")
    prompt = tokenizer.build_prompt_ids("类型#裙", [["你好", "你好。"]])
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :] == tokenizer.build_answer_ids("白色。")
    answer = "\n 白色。" if version == 3 else "白色。"  # messages of ChatGLM3-6B have a line of metadata
    assert tokenizer.decode(ids[len(prompt) : -1]) == answer and ids[-1] == tokenizer.eos_token_id
    cut, *_ = SampleEncoder(tokenizer, "", 12, 512).encode("类型#裙*颜色#白色*风格#简约*图案#条纹", [], "白")
    prompt, end = prompt_of_query(tokenizer), tokenizer.prompt_end
    assert cut == prompt[: 12 - end] + prompt[-end:] * bool(end) + tokenizer.build_answer_ids("白")


def test_chat_template_gives_the_prompt(tokenizer):
    history, query = [("你好", "你好。"), ("裙子", "白裙。<|user|>")], "黑色的"
    messages = [{"role": "system", "content": "简短。"}]
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": query})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.build_prompt(query, history, "简短。")
    ids = tokenizer.build_prompt_ids(query, history, "简短。")
    assert tokenizer.apply_chat_template(messages)["input_ids"] == ids
    batch = tokenizer.apply_chat_template([messages, messages[-1:]], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == ids
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), len(tokenizer.build_prompt_ids(query))]
    assert len(tokenizer.apply_chat_template([messages, messages[-1:]])["input_ids"]) == 2
    messages[0]["role"] = "developer"
    assert tokenizer.apply_chat_template(messages)["input_ids"] == ids


def test_ids_of_pieces_and_control_tokens(tokenizer):
    pieces, control = tokenizer.sp_model.get_piece_size(), list(tokenizer.control_tokens)
    assert tokenizer.vocab_size == len(tokenizer.get_vocab()) == pieces + len(control)
    # The embedding has rows without a token.
    found = tokenizer.convert_ids_to_tokens([*range(pieces, tokenizer.vocab_size + 1)])
    assert found == [*control, tokenizer.unk_token]
    assert tokenizer.control_token_ids == [*range(pieces, tokenizer.vocab_size), tokenizer.eos_token_id]
    assert tokenizer.longest_token == max(len(token) for token, i in tokenizer.get_vocab().items() if i < pieces)
    one, other = (tokenizer.encode(text, add_special_tokens=False) for text in ("白裙", "黑裤"))
    ids = tokenizer.encode("白裙", "黑裤")
    assert ids == [
        pieces + control.index("[gMASK]"),
        pieces + control.index("sop"),
        *one,
        *other,
        tokenizer.eos_token_id,
    ]


def prompt_of_query(tokenizer: ChatGLM2Tokenizer) -> list[int]:
    return tokenizer.build_prompt_ids("类型#裙*颜色#白色*风格#简约*图案#条纹")


def test_answers_before_and_after(trained, checkpoint, capsys, tmp_path):
    flags = ("--adapter_path", trained, "--model_name_or_path", checkpoint, "--max_new_tokens", 8)
    run_main(inference_qlora, *flags, "--prompt", "类型#裙", "--output", tmp_path / "answers.jsonl")
    (row,) = map(json.loads, (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    assert row.keys() == {"prompt", "base", "adapter"} and row["prompt"] == "类型#裙"
    assert "类型#裙" in capsys.readouterr().out


def test_report_names_the_model_and_shows_the_control_tokens(checkpoint, train_file, version, tmp_path, capsys):
    flags = flags_of(write_json(tmp_path / "args.json", tmp_path / "out"), checkpoint, train_file, "none")
    run_main(train_qlora, *flags, "--check", 1)
    report = capsys.readouterr().out
    assert f"architecture of ChatGLM{version}-6B" in report and report.rstrip().endswith("OK")
    shown = "[gMASK]sop<|user|>" if version == 3 else "[gMASK]sop"
    assert re.search(rf"control +{re.escape(shown)}\n", report) and re.search(r"end +</s>", report)


def test_chat_generates_from_the_official_prompt(checkpoint, tokenizer, version):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    caught = {}

    def generate(streamer, **options):
        caught.update(options)
        streamer.end()

    model.generate = generate
    model.chat(tokenizer, "你好", history=[("一", "二")])
    assert caught["input_ids"][0].tolist() == tokenizer.build_prompt_ids("你好", [("一", "二")])
    expected = {"top_p": 0.8, "temperature": 0.8, "top_k": 50, "max_length": 8192, "do_sample": True}
    assert {name: caught[name] for name in expected} == expected
    assert len(caught["eos_token_id"]) == {2: 1, 3: 3}[version]
    with pytest.raises(ValueError, match=r"expected \(question, answer\) pairs: for messages, call generate"):
        model.chat(tokenizer, "你好", history=[{"role": "user", "content": "一"}])


def test_every_stop_token_ends_an_answer(checkpoint, tokenizer):
    model = load_quantized_model(str(checkpoint), torch.float32).eval()
    for stop in tokenizer.stop_token_ids:
        steps: list[int] = []

        def sampler(logits: torch.Tensor, stop: int = stop, steps: list[int] = steps) -> torch.Tensor:
            steps.append(stop)
            return torch.full((len(logits), 1), stop if len(steps) == 3 else 300)

        (text,) = generate_texts(model, tokenizer, [Prompt("你好")], 40, sampler, 1)
        assert text == tokenizer.decode([300, 300]) and len(steps) < 20


def test_slots_and_streams_give_the_answers_of_a_batch(trained, checkpoint, tokenizer):
    model = PeftModel.from_pretrained(load_quantized_model(str(checkpoint), torch.float32), trained).eval()
    replace_layers(model, for_training=False)
    greedy = make_sampler(do_sample=False)
    prompts = [Prompt("类型#裙"), Prompt("类型#裤*颜色#黑色", [("你好", "好")]), Prompt("白色", (), "简短。")]
    expected = generate_answers(model, tokenizer, prompts, 12, greedy, batch_size=3)
    assert expected == [generate_answers(model, tokenizer, [prompt], 12, greedy, 1)[0] for prompt in prompts]
    for prompt, text in zip(prompts, expected, strict=True):
        *_, last = stream_answer(model, tokenizer, prompt, 12, greedy)
        assert last == text.rstrip("\ufffd")
    slots = Slots(model, 2, top_k=0)
    tasks = {i: Task(tokenizer.build_prompt_ids(*prompts[i]), 12, adapter=0) for i in (0, 1)}
    tokens = {slot: [first] for slot, first in zip(tasks, slots.begin(tasks), strict=True)}
    while len(tokens[0]) < 12:
        for slot, new in enumerate(slots.generate(1)):
            tokens[slot] += new
    for slot, ids in tokens.items():
        end = next((i for i, token in enumerate(ids[:12]) if token in tokenizer.stop_token_ids), 12)
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        assert tokenizer.clean_response(text) == expected[slot]


def test_replaced_layers_give_the_step_of_peft(checkpoint, train_file, tokenizer):
    from qlora.data.batching import StepBatch
    from qlora.data.collator import PaddingFreeCollator

    encoder = SampleEncoder(tokenizer, "", 512, 512)
    rows = [json.loads(line) for line in train_file.read_text(encoding="utf-8").splitlines()[:3]]
    samples = [encoder.encode(row["instruction"], [], row["output"])[:2] for row in rows]
    samples = [dict(zip(("input_ids", "labels"), sample, strict=True)) for sample in samples]
    found = []
    for replaced in (False, True):
        model = load_quantized_model(str(checkpoint), torch.float32)
        model = add_random_lora(model, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]).train()
        if replaced:
            replace_layers(model, for_training=True)
            kinds = {type(module) for block in model.get_base_model().blocks for module in block.modules()}
            assert {LoRANF4Linear, NF4Linear} <= kinds
            for block in model.get_base_model().blocks:
                block.recompute_attention = block.recompute_mlp = True
        loss = model(**PaddingFreeCollator(model.config)(StepBatch.collate(samples).samples)).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), gradients))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-4, rtol=1e-4)


def test_merged_folder_is_official_and_answers_as_with_the_adapter(trained, checkpoint, tokenizer, tmp_path, version):
    merge = import_script(ROOT / "scripts" / "merge_lora.py")
    flags = ("--adapter_path", trained, "--model_name_or_path", checkpoint, "--compute_dtype", "fp32")
    run_main(merge, *flags, "--output_dir", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["_name_or_path"] == f"THUDM/chatglm{version}-6b" and config["multi_query_attention"] is True
    assert check_checkpoint(str(tmp_path / "merged")).chatglm_version == version
    stored = torch.load(tmp_path / "merged" / "pytorch_model.bin", weights_only=True)
    assert "transformer.rotary_pos_emb.inv_freq" in stored and "transformer.output_layer.weight" in stored

    ids = torch.tensor([tokenizer.build_prompt_ids("类型#裙")])
    tuned = PeftModel.from_pretrained(load_quantized_model(str(checkpoint), torch.float32), trained).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    logits = tuned(input_ids=ids).logits
    # The merged weights are rounded to fp16.
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=0.02 * logits.abs().max().item(), rtol=0)


def test_four_bit_copy_gives_the_same_logits(checkpoint, tokenizer, tmp_path, version):
    quantize = import_script(ROOT / "scripts" / "quantize_checkpoint.py")
    flags = ("--model_name_or_path", checkpoint, "--compute_dtype", "fp32")
    run_main(quantize, *flags, "--output_dir", tmp_path / "nf4")
    ids = torch.tensor([tokenizer.build_prompt_ids("类型#裙")])
    logits = [
        load_quantized_model(str(p), torch.float32)(input_ids=ids).logits for p in (checkpoint, tmp_path / "nf4")
    ]
    assert torch.equal(*logits)
    assert type(load_tokenizer(str(tmp_path / "nf4"))).__name__ == f"ChatGLM{version}Tokenizer"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, which a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_layers": 3}, "num_layers 3, and the weight files hold 2 layers"),
        ({"ffn_hidden_size": 100}, r"dense_h_to_4h\.weight has shape \(192, 64\), expected \(200, 64\)"),
        ({"multi_query_group_num": 3}, "num_attention_heads is 4, expected a multiple of 3 multi_query_group_num"),
        ({"kv_channels": 0}, "kv_channels is 0, expected 1 or more"),
        ({"pad_token_id": 5000}, "pad_token_id is 5000, expected a token id below vocab_size, 1152"),
        ({"quantization_bit": 8}, "already quantized"),
        ({"model_type": "glm4"}, "a model of type 'glm4', expected 'chatglm'"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(folder, changes, reason):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=reason):
        check_checkpoint(str(folder))


def test_missing_tokenizer_file_is_named(folder):
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is missing.*chatglm2-6b"):
        check_checkpoint(str(folder))


def test_files_of_two_versions_are_refused(folder, version):
    edit(folder / "tokenizer_config.json", chatglm_version=5 - version)
    with pytest.raises(ValueError, match="they do not belong together"):
        load_tokenizer(str(folder))


def test_written_folder_says_the_version_only_if_its_config_does(folder, tmp_path, version):
    edit(folder / "config.json", _name_or_path="/data/mine")
    merge = import_script(ROOT / "scripts" / "merge_lora.py")
    flags = ("--adapter_path", "none", "--model_name_or_path", folder, "--output_dir", tmp_path / "out")
    run_main(merge, *flags)
    assert type(load_tokenizer(str(tmp_path / "out"))).__name__ == f"ChatGLM{version}Tokenizer"


def test_folder_that_does_not_say_its_version_is_asked_for_it(folder):
    for name in ("config.json", "tokenizer_config.json"):
        edit(folder / name, chatglm_version=None, _name_or_path="/data/mine")
    message = error_of(inference_qlora, "--adapter_path", "none", "--model_name_or_path", folder)
    assert 'Add "chatglm_version": 2 or 3 to tokenizer_config.json' in message
