"""train_qlora.py and inference_qlora.py, run with a random model of two layers."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    SAVE_STEPS,
    STEPS,
    adapter,
    assert_same_adapter,
    error_of,
    flags_of,
    history,
    largest_file,
    run_main,
    run_script,
    write_json,
    write_rows,
)
from peft import PeftModel, get_peft_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizer

import inference_qlora
import qlora.loading
import train_qlora
from glm_shared.chat import Prompt
from qlora.arguments import DEFAULT_PROMPT, InferenceArguments
from qlora.data.dataset import SampleEncoder
from qlora.inference import generation
from qlora.loading import load_quantized_model

PROMPTS = ("类型#裙*颜色#白色", "类型#裤")


# A complete run.


@pytest.fixture(scope="session")
def trained(tiny_checkpoint: Path, train_file: Path, dev_file: Path, tmp_path_factory) -> Path:
    """The output of an uninterrupted run. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    args_json = write_json(folder / "args.json", folder / "out")
    result = run_script("train_qlora.py", *flags_of(args_json, tiny_checkpoint, train_file, dev_file))
    assert result.returncode == 0, result.stderr
    return folder / "out"


def test_training_writes_adapter_tokenizer_and_state(trained):
    expected = {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "loss.png"}
    expected |= {"ice_text.model", "tokenizer_config.json", f"checkpoint-{SAVE_STEPS}", f"checkpoint-{STEPS}"}
    assert expected <= {path.name for path in trained.iterdir()}


def test_loss_falls(trained):
    losses = history(trained, "loss")
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1
    evaluations = history(trained, "eval_loss")
    assert len(evaluations) == STEPS // SAVE_STEPS and evaluations[-1] < evaluations[0]


def test_adapter_has_the_requested_size(trained, tiny_config):
    weights = adapter(trained)
    assert len(weights) == 2 * tiny_config.num_layers
    assert all("query_key_value.lora_" in name for name in weights)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 32, ["query_key_value"])


def interrupted(trained: Path, target: Path) -> Path:
    """A folder with the first checkpoint of a run, as after an interruption."""
    shutil.copytree(trained / f"checkpoint-{SAVE_STEPS}", target / f"checkpoint-{SAVE_STEPS}")
    return target


def test_resuming_from_the_last_checkpoint_gives_the_same_results(
    trained, tiny_checkpoint, train_file, dev_file, tmp_path
):
    output = interrupted(trained, tmp_path / "out")
    args_json = write_json(tmp_path / "args.json", output)
    flags = flags_of(args_json, tiny_checkpoint, train_file, dev_file, "--resume_from_checkpoint", "last")
    run_main(train_qlora, *flags)
    assert_same_adapter(output, trained)
    assert len(history(output, "loss")) == STEPS and (output / "loss.png").is_file()
    assert history(output, "loss")[SAVE_STEPS:] == pytest.approx(history(trained, "loss")[SAVE_STEPS:], abs=1e-4)


def test_resuming_from_a_path_gives_the_same_results(trained, tiny_checkpoint, train_file, dev_file, tmp_path):
    args_json = write_json(tmp_path / "args.json", tmp_path / "out")
    flags = flags_of(args_json, tiny_checkpoint, train_file, dev_file)
    run_main(train_qlora, *flags, "--resume_from_checkpoint", trained / f"checkpoint-{SAVE_STEPS}")
    assert_same_adapter(tmp_path / "out", trained)


@pytest.mark.parametrize("requested", ["last", "nowhere/checkpoint-500"])
def test_resuming_from_nothing_is_refused(tiny_checkpoint, train_file, dev_file, tmp_path, requested):
    (tmp_path / "out").mkdir()
    args_json = write_json(tmp_path / "args.json", tmp_path / "out")
    flags = flags_of(args_json, tiny_checkpoint, train_file, dev_file, "--resume_from_checkpoint", requested)
    message = error_of(train_qlora, *flags)
    assert f"--resume_from_checkpoint {requested}" in message and "whole checkpoint" in message


def test_tensorboard_has_the_logged_values(tiny_checkpoint, train_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args_json = write_json(
        tmp_path / "args.json", tmp_path / "out", report_to="tensorboard", max_steps=2, save_strategy="no"
    )
    run_main(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, "none"))
    (events,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    log = accumulator.EventAccumulator(str(events)).Reload()
    written = {tag: [event.value for event in log.Scalars(f"train/{tag}")] for tag in ("loss", "tokens_per_second")}
    assert written["loss"] == pytest.approx(history(tmp_path / "out", "loss"), rel=1e-6)
    assert len(written["tokens_per_second"]) == 2 and min(written["tokens_per_second"]) > 0


# One step, compared with gradient descent in plain operations.


@pytest.fixture
def one_step(tiny_checkpoint: Path, train_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that trains one step of plain gradient descent on the first 8 rows and returns the output folder."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(train_file.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")

    def run(name: str, *flags: object, **values) -> Path:
        values = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "lr_scheduler_type": "constant"} | values
        values |= {"warmup_ratio": 0, "max_steps": 1, "eval_steps": 1, "save_strategy": "no"}
        args_json = write_json(tmp_path / f"{name}.json", tmp_path / name, **values)
        flags = flags_of(args_json, tiny_checkpoint, rows, rows, "--lora_dropout", 0, *flags)
        run_main(train_qlora, *flags)
        return tmp_path / name

    return run


def padded_loss(model: PeftModel, tokenizer: PreTrainedTokenizer, rows: list[dict]) -> torch.Tensor:
    """The mean loss over all label tokens, with the layers of peft and a padded batch."""
    encode = SampleEncoder(tokenizer, "", 512, 512).encode
    samples = [encode(row["instruction"], [], row["output"])[:2] for row in rows]
    ids, labels = (pad_sequence([torch.tensor(s[i]) for s in samples], True, (3, -100)[i]) for i in (0, 1))
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(sample[0])] for sample in samples])
    return model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss


def test_one_step_is_gradient_descent_on_the_mean_loss(one_step, tiny_checkpoint, tokenizer, sample_rows):
    output = one_step("plain")
    model = load_quantized_model(str(tiny_checkpoint), torch.float32)
    tuned = PeftModel.from_pretrained(model, str(output), is_trainable=True)
    after = {name: t.clone() for name, t in get_peft_model_state_dict(tuned).items() if "lora_B" in name}
    # Evaluated after the step, on the same rows.
    evaluated = padded_loss(tuned, tokenizer, sample_rows[:8]).item()
    assert history(output, "eval_loss") == pytest.approx([evaluated], abs=1e-5)
    # B is zero at first, so that A has no gradient in the first step and does not change.
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    loss = padded_loss(tuned, tokenizer, sample_rows[:8])
    assert history(output, "loss") == pytest.approx([loss.item()], abs=1e-4)
    loss.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in tuned.named_parameters() if "lora_B" in n}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(after[name], -gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "flags"), [(8, 1, ()), (2, 4, ()), (1, 8, ()), (4, 2, ("--max_tokens", 150))]
)
def test_results_do_not_depend_on_the_micro_batches(one_step, batch_size, accumulation, flags):
    other = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    outputs = one_step("four_by_two"), one_step("other", *flags, **other, per_device_eval_batch_size=3)
    assert_same_adapter(*outputs, tolerance=1e-5)
    for key in ("loss", "eval_loss"):
        assert history(outputs[0], key) == pytest.approx(history(outputs[1], key), abs=1e-4)


@pytest.mark.parametrize("values", [{"bf16": True, "use_cpu": True}, {"train_sampling_strategy": "sequential"}])
def test_settings_of_the_json_are_accepted(one_step, values):
    (loss,) = history(one_step("settings", **values), "loss")
    assert 0 < loss < 20


@pytest.mark.parametrize(("key", "value"), [("label_smoothing_factor", 0.5), ("include_num_input_tokens_seen", True)])
def test_settings_that_would_be_ignored_are_refused(one_step, key, value):
    # The training step of `QLoRATrainer` replaces the parts of the Trainer that these settings change.
    with pytest.raises(SystemExit) as raised:
        one_step("settings", **{key: value})
    assert key in str(raised.value.code)


def test_other_target_modules_and_rank(one_step):
    flags = ("--lora_target_modules", "query_key_value", "dense_4h_to_h", "--lora_rank", 2)
    weights = adapter(one_step("more", *flags))
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in weights} == {"query_key_value", "dense_4h_to_h"}
    assert {min(tensor.shape) for tensor in weights.values()} == {2}


def test_without_evaluation_rows(tiny_checkpoint, train_file, tmp_path):
    args_json = write_json(tmp_path / "args.json", tmp_path / "out", max_steps=1, save_strategy="no")
    run_main(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, "none"))
    assert history(tmp_path / "out", "eval_loss") == []


# Errors of a training run.


def test_missing_weights_end_in_a_message(train_file, dev_file, tmp_path):
    args_json = write_json(tmp_path / "args.json", tmp_path / "out")
    message = error_of(train_qlora, *flags_of(args_json, tmp_path / "chatglm-6b", train_file, dev_file))
    assert "there is no folder" in message and "chatglm-6b" in message
    assert not (tmp_path / "out").exists()


def test_broken_row_ends_in_one_line(tiny_checkpoint, dev_file, tmp_path):
    args_json = write_json(tmp_path / "args.json", tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    message = error_of(train_qlora, *flags_of(args_json, tiny_checkpoint, rows, dev_file))
    assert f"{rows}, line 2: field 'output' is missing" in message


# Inference.


def answers(output: str) -> list[tuple[str, str, str]]:
    """(input, before, after) of each printed prompt."""
    return re.findall(r"Input: +(.*)\n.*Before: ?(.*)\n.*After: *(.*)", output)


def test_inference_prints_answers_before_and_after(trained, capsys):
    flags = (part for prompt in PROMPTS for part in ("--prompt", prompt))
    run_main(inference_qlora, "--adapter_path", trained, *flags, "--max_new_tokens", 10)
    found = answers(capsys.readouterr().out)
    assert [prompt for prompt, _, _ in found] == list(PROMPTS)
    assert any(before != after for _, before, after in found)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_from_a_file(trained, tmp_path, capsys, name):
    path = tmp_path / name
    if path.suffix == ".txt":
        path.write_text("\n".join(PROMPTS), encoding="utf-8")
    else:
        first = {"messages": [{"role": "user", "content": PROMPTS[0]}]}
        write_rows(path, [first, *({"instruction": prompt} for prompt in PROMPTS[1:])])
    flags = ("--adapter_path", trained, "--prompt_file", path, "--max_new_tokens", 10)
    run_main(inference_qlora, *flags)
    found = answers(capsys.readouterr().out)
    assert [prompt for prompt, _, _ in found] == list(PROMPTS)
    run_main(inference_qlora, *flags, "--max_prompts", 1, "--batch_size", 1)
    assert answers(capsys.readouterr().out) == found[:1]
    run_main(inference_qlora, *flags, "--max_prompts", 1, "--prompt_text", "写广告：")
    assert answers(capsys.readouterr().out)[0][0] == f"写广告：{PROMPTS[0]}"


def test_sampling_follows_the_seed(trained, capsys):
    printed = []
    for seed in (1, 1, 2):
        flags = ("--prompt", PROMPTS[0], "--max_new_tokens", 10, "--do_sample", True, "--temperature", 2.0)
        run_main(inference_qlora, "--adapter_path", trained, *flags, "--top_p", 1.0, "--seed", seed)
        printed += answers(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_conversation(trained, monkeypatch, capsys):
    lines = iter(["类型#裙", "", "clear", "类型#裤", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run_main(inference_qlora, "--adapter_path", trained, "--chat", "--max_new_tokens", 8)
    printed = capsys.readouterr().out
    assert "clear" in printed and len(printed.split("\n")) >= 3
    assert next(lines, None) is None


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_half_a_character_is_one_line_and_the_conversation_goes_on(trained, monkeypatch, capsys, errors):
    typed = io.BytesIO("裙".encode()[:2] + "\n类型#裤\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8", errors=errors))
    run_main(inference_qlora, "--adapter_path", trained, "--chat", "--max_new_tokens", 8)
    _, first, second, end = capsys.readouterr().out.split("\n> ")
    assert re.fullmatch("[^\n]*half a character[^\n]*\n", first) and "half" not in second and end == ""


def test_ctrl_c_ends_the_answer_and_not_the_conversation(trained, monkeypatch, capsys):
    lines, asked, stream_answer = iter(["类型#裙", "类型#裤", "exit"]), [], generation.stream_answer

    def interrupted_once(model, tokenizer, prompt: Prompt, *args):
        asked.append(prompt)
        yield "好看"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from stream_answer(model, tokenizer, prompt, *args)

    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(generation, "stream_answer", interrupted_once)
    run_main(inference_qlora, "--adapter_path", trained, "--chat", "--max_new_tokens", 8)
    assert "好看" in capsys.readouterr().out
    assert list(asked[1].history) == [("类型#裙", "好看")]  # what was seen of the answer belongs to the conversation


# Errors of an inference run.


def test_unknown_flag_ends_in_one_line_and_status_1():
    result = run_script("inference_qlora.py", "--adapter_pth", "x")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: unknown argument --adapter_pth (did you mean --adapter_path?).")
    assert len(result.stderr.splitlines()) == 1


def test_missing_adapter_ends_in_one_line(tmp_path):
    message = error_of(inference_qlora, "--adapter_path", tmp_path / "nowhere")
    assert "there is no adapter in" in message and "nowhere" in message and "--adapter_path" in message


def test_missing_adapter_beside_a_named_model_ends_in_one_line(tiny_checkpoint, monkeypatch, tmp_path):
    # A relative path of two parts could be a name on the Hub, which must not be requested.
    monkeypatch.chdir(tmp_path)
    flags = ("--adapter_path", "saved_files/nowhere", "--model_name_or_path", tiny_checkpoint)
    assert "there is no adapter in saved_files/nowhere" in error_of(inference_qlora, *flags)


def test_missing_base_model_ends_in_one_line(trained, tmp_path):
    flags = ("--adapter_path", trained, "--model_name_or_path", tmp_path / "chatglm-6b")
    assert "there is no folder" in error_of(inference_qlora, *flags)


def test_prompts_of_the_command_line_and_of_a_file_are_all_answered(tmp_path):
    (tmp_path / "prompts.txt").write_text("甲\n乙\n", encoding="utf-8")
    flags = InferenceArguments(prompt=["丙"], prompt_file=str(tmp_path / "prompts.txt"))
    assert list(inference_qlora.read_all_prompts(flags).values()) == [Prompt("丙"), Prompt("甲"), Prompt("乙")]
    assert list(inference_qlora.read_all_prompts(InferenceArguments()).values()) == [Prompt(DEFAULT_PROMPT)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "裙", " "], "--prompt, number 2: .*The prompt is empty"),
        (["--prompt_file", "prompts.txt"], r"prompts\.txt, line 3: .* has \d,\d+ tokens.*over the model's 2048:"),
        (["--max_new_tokens", 2047], "the default prompt: "),
        (["--output", "prompts.txt"], r"--output: prompts\.txt exists"),
        (["--output", "nowhere/answers.jsonl"], "--output: there is no folder nowhere"),
    ],
)
def test_what_cannot_be_answered_or_kept_is_refused_before_the_model_is_loaded(
    trained, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qlora.loading, "load_quantized_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "prompts.txt").write_text(f"裙\n\n{'裙' * 2000}\n", encoding="utf-8")
    assert re.search(message, error_of(inference_qlora, "--adapter_path", trained, *flags))


# Answers of a run.


@pytest.fixture
def few_prompts(trained) -> list:
    """The flags of a run with two batches of prompts."""
    flags = ["--adapter_path", trained, "--max_new_tokens", 4, "--batch_size", 2]
    return [*flags, *(part for prompt in ("甲甲甲", "乙", "丙丙", "丁") for part in ("--prompt", prompt))]


def test_answers_are_kept_in_the_order_of_the_prompts(few_prompts, tmp_path, capsys):
    run_main(inference_qlora, *few_prompts, "--output", tmp_path / "answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [tuple(row.values()) for row in rows] == answers(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["甲甲甲", "乙", "丙丙", "丁"]
    assert all(list(row) == ["prompt", "base", "adapter"] for row in rows)


def test_interruption_loses_no_finished_answer(few_prompts, tmp_path, monkeypatch, capsys):
    calls, generate_answers = [], generation.generate_answers

    def interrupted_in_the_second_batch(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate_answers(*args)

    monkeypatch.setattr(generation, "generate_answers", interrupted_in_the_second_batch)
    output = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit, match="130"):
        run_main(inference_qlora, *few_prompts, "--output", output)
    printed = capsys.readouterr()
    assert printed.err.endswith(f"\ninterrupted; the finished answers are in {output}\n")
    assert len(answers(printed.out)) == len(output.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(("size", "kept"), [(10, 0), (120, 1)])
def test_full_disk_leaves_whole_answers(few_prompts, tmp_path, capsys, size, kept):
    output = tmp_path / "answers.jsonl"
    with largest_file(size):
        message = error_of(inference_qlora, *few_prompts, "--output", output)
    assert re.fullmatch(f"error: {output} cannot be written: [^\n]*", message)
    assert output.exists() == bool(kept)
    if kept:
        rows = output.read_text(encoding="utf-8").splitlines()
        assert len(rows) == kept and all(map(json.loads, rows))


@pytest.mark.parametrize(
    ("flags", "advice"), [([], "lower --batch_size or --max_new_tokens"), (["--chat"], "hold a shorter conversation")]
)
def test_out_of_memory_is_one_line(trained, monkeypatch, flags, advice):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(generation, "decode", fail)
    monkeypatch.setattr("builtins.input", lambda prompt: "裙")
    message = error_of(inference_qlora, "--adapter_path", trained, "--max_new_tokens", 8, *flags)
    assert message.startswith(f"error: CUDA out of memory: {advice}") and len(message.splitlines()) == 1


def test_model_without_an_adapter_gives_one_answer(trained, tiny_checkpoint, tmp_path, capsys):
    flags = ["--max_new_tokens", 8, "--prompt", PROMPTS[0]]
    run_main(inference_qlora, "--adapter_path", trained, *flags)
    ((_, before, _),) = answers(capsys.readouterr().out)
    output = tmp_path / "answers.jsonl"
    alone = ["--adapter_path", "none", "--model_name_or_path", tiny_checkpoint, *flags]
    run_main(inference_qlora, *alone, "--output", output)
    assert capsys.readouterr().out == f"\n输入 Input:  {PROMPTS[0]}\n回答 Answer: {before}\n"
    assert json.loads(output.read_text(encoding="utf-8")) == {"prompt": PROMPTS[0], "answer": before}


def test_conversation_with_a_model_without_an_adapter(tiny_checkpoint, monkeypatch, capsys):
    lines = iter(["裙" * 3000, "类型#裙", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = ("--adapter_path", "none", "--model_name_or_path", tiny_checkpoint, "--chat", "--max_new_tokens", 8)
    run_main(inference_qlora, *flags)
    printed = capsys.readouterr().out.splitlines()
    assert "over the model's 2048" in printed[1]  # and the conversation goes on
    assert len(printed) >= 3


@pytest.mark.parametrize("mode", ["--chat", "--serve"])
def test_prompts_that_would_be_ignored_are_refused(mode):
    message = error_of(inference_qlora, mode, "--prompt", "裙", "--prompt_file", "prompts.txt", "--max_prompts", 1)
    assert message.endswith("leave out --prompt, --prompt_file, --max_prompts.")


def test_missing_prompt_file_ends_in_one_line(trained, tmp_path):
    message = error_of(inference_qlora, "--adapter_path", trained, "--prompt_file", tmp_path / "nowhere.txt")
    assert "nowhere.txt" in message
