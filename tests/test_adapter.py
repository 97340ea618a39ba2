"""qlora/adapter.py: adapters that are loaded, refused, or trained on; and that a path is never looked up elsewhere."""

import dataclasses
import json
import math
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
from conftest import (
    GOLDEN_ADAPTER,
    ROOT,
    adapter,
    add_random_lora,
    error_of,
    flags_of,
    history,
    import_script,
    run_main,
    write_json,
)
from peft import get_peft_model_state_dict

import inference_qlora
import train_qlora
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qlora.adapter import add_lora, base_model_path, load_adapter, load_adapters
from qlora.arguments import FinetuneArguments
from qlora.data.dataset import IGNORE_INDEX
from qlora.evaluation.protocols import PROTOCOLS
from qlora.loading import load_quantized_model
from qlora.training.preflight import run_preflight
from qlora.training.preflight_report import describe


def lora(model, rank: int = 4, target_modules: tuple[str, ...] = ("query_key_value",)):
    return add_lora(model, rank=rank, alpha=32, dropout=0.0, target_modules=list(target_modules))


@pytest.fixture
def model(golden_folder: Path) -> ChatGLMForConditionalGeneration:
    return load_quantized_model(str(golden_folder), torch.float32)


def edit_config(folder: Path | str, **changes):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Loading.


def test_adapter_of_old_peft_loads(model):
    tuned = load_adapter(model, str(GOLDEN_ADAPTER))
    official = torch.load(GOLDEN_ADAPTER / "adapter_model.bin", weights_only=True)
    for name, tensor in get_peft_model_state_dict(tuned).items():
        assert torch.equal(tensor, official[name])


def save_adapter(folder: Path, target_modules: tuple[str, ...] = ("query_key_value",), **shape) -> str:
    """Writes an adapter of a model of another shape; returns its path."""
    config = ChatGLMConfig(**{"vocab_size": 512, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4} | shape)
    lora(ChatGLMForConditionalGeneration(config), target_modules=target_modules).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shape", [{"hidden_size": 32}, {"num_layers": 4}, {"num_layers": 2}])
def test_adapter_of_another_shape_is_refused(model, tmp_path, shape):
    path = save_adapter(tmp_path / "other", inner_hidden_size=64, **shape)
    with pytest.raises(ValueError, match=r"the adapter in .*other does not fit .*--model_name_or_path") as raised:
        load_adapter(model, path)
    assert len(str(raised.value).splitlines()) == 1


def test_adapter_for_other_modules_is_refused(model, tmp_path):
    path = Path(save_adapter(tmp_path / "other"))
    config = json.loads((path / "adapter_config.json").read_text()) | {"target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the adapter in .*other does not fit"):
        load_adapter(model, str(path))


def test_adapter_without_weights_is_refused(model, tmp_path):
    path = Path(save_adapter(tmp_path / "other"))
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError)) as raised:
        load_adapter(model, str(path))
    assert "other" in str(raised.value)


def test_damaged_adapter_is_refused(model, tmp_path):
    path = Path(save_adapter(tmp_path / "other"))
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises((ValueError, OSError)) as raised:
        load_adapter(model, str(path))
    assert "other" in str(raised.value)


def damage(folder: Path):
    weights = folder / "adapter_model.bin"
    weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "the adapter's weights in {} are damaged"),
        (
            lambda folder: (folder / "adapter_model.bin").unlink(),
            "{} has no weights (adapter_model.safetensors or adapter_model.bin): copy them there again",
        ),
        (lambda folder: edit_config(folder, r=0), "r is 0"),
    ],
)
def test_second_adapter_is_checked_before_the_model_is_loaded(golden_folder, tmp_path, monkeypatch, spoil, reason):
    monkeypatch.setattr("qlora.loading.load_quantized_model", lambda *_: pytest.fail("the model was loaded"))
    second = shutil.copytree(GOLDEN_ADAPTER, tmp_path / "second")
    spoil(second)
    flags = ("--serve", "--model_name_or_path", golden_folder, "--adapter_path", GOLDEN_ADAPTER, second)
    assert reason.format(second) in error_of(inference_qlora, *flags)


def test_second_adapter_that_does_not_fit_is_named(model, tmp_path):
    second = save_adapter(tmp_path / "second", inner_hidden_size=64, hidden_size=32)
    with pytest.raises(ValueError, match=r"the adapter in .*second does not fit the base model"):
        load_adapters(model, [str(GOLDEN_ADAPTER), second])


def test_adapter_is_plain_lora(model):
    config = lora(model, rank=8).peft_config["default"]
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.bias, config.use_dora) == (8, 32, "none", False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_adapter_that_is_not_finite_is_refused(model, tmp_path, value):
    folder = shutil.copytree(GOLDEN_ADAPTER, tmp_path / "spoilt")
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    name = list(state)[-1]
    state[name][0, 0] = value
    torch.save(state, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=rf"spoilt cannot be used: {name} is not finite"):
        load_adapter(model, str(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'"),
        ({"alpha_pattern": {"query_key_value": math.inf}}, "query_key_value is inf"),
        ({"r": "4"}, "r is '4'"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"use_dora": True}, "is more than plain LoRA"),
        ({"peft_type": "NOTHING"}, "is not the configuration of an adapter"),
    ],
)
def test_adapter_config_that_cannot_be_used_is_refused(model, tmp_path, change, reason):
    folder = shutil.copytree(GOLDEN_ADAPTER, tmp_path / "adapter")
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=reason) as raised:
        load_adapter(model, str(folder))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_broken_adapter_config_is_refused(model, tmp_path, content):
    folder = shutil.copytree(GOLDEN_ADAPTER, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json is not the configuration of an adapter"):
        load_adapter(model, str(folder))


# The base model that an adapter names.


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with models/base and saved_files/run/checkpoint-4, an adapter that names the former."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    edit_config(
        shutil.copytree(GOLDEN_ADAPTER, tmp_path / "saved_files" / "run"), base_model_name_or_path="models/base"
    )
    shutil.copytree(tmp_path / "saved_files" / "run", tmp_path / "saved_files" / "run" / "checkpoint-4")
    return tmp_path


@pytest.mark.parametrize("path", ["saved_files/run", "saved_files/run/checkpoint-4"])
def test_relative_base_path_is_found_above_the_adapter(repository, path, monkeypatch):
    assert base_model_path(str(repository / path)) == str(repository / "models" / "base")
    elsewhere = repository / "elsewhere"
    (elsewhere / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert base_model_path(str(repository / path)) == "models/base"  # the current folder comes first


def test_base_model_that_is_in_neither_place(repository, monkeypatch):
    monkeypatch.chdir(repository / "models")
    adapter_path = str(repository / "saved_files" / "run")
    (repository / "models" / "base").rmdir()
    with pytest.raises(FileNotFoundError) as raised:
        base_model_path(adapter_path)
    message = str(raised.value)
    assert f"in {repository / 'models'}, nor in {adapter_path} or a folder above it" in message
    assert "models/base" in message and "--model_name_or_path" in message


@pytest.mark.parametrize("name", [None, "", 7])
def test_adapter_that_names_no_base_model(repository, name):
    edit_config(repository / "saved_files" / "run", base_model_name_or_path=name)
    with pytest.raises(ValueError, match="names no base model: give it with --model_name_or_path"):
        base_model_path(str(repository / "saved_files" / "run"))


# Training on from the values of an adapter.


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory) -> Path:
    """An adapter of `tiny_checkpoint` with random values, rank 4, on two kinds of layers. Do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "first"
    model = load_quantized_model(str(tiny_checkpoint), torch.float32)
    add_random_lora(model, ("query_key_value", "dense"), std=0.2).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(tiny_checkpoint, train_file, dev_file, tmp_path) -> list[str]:
    args_json = write_json(tmp_path / "args.json", tmp_path / "out", max_steps=1, save_steps=1, warmup_ratio=0.0)
    return flags_of(args_json, tiny_checkpoint, train_file, dev_file)


def preflight_of(flags: list[str], **more):
    names = ("train_args_json", "model_name_or_path")
    given = dict(zip(names, flags[1::2], strict=False)) | {"train_data_path": [flags[5]], "eval_data_path": None}
    return run_preflight(FinetuneArguments(**given | more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_training_starts_from_the_values_of_the_file(golden_folder, tmp_path, dtype, stored):
    folder = shutil.copytree(GOLDEN_ADAPTER, tmp_path / "adapter")
    values = {n: t.to(stored) for n, t in torch.load(folder / "adapter_model.bin", weights_only=True).items()}
    torch.save(values, folder / "adapter_model.bin")
    tuned = load_adapter(load_quantized_model(str(golden_folder), dtype), str(folder), train_with_dropout=0.1)
    found = get_peft_model_state_dict(tuned)
    assert found.keys() == values.keys()
    assert all(torch.equal(tensor, values[name].float()) for name, tensor in found.items())
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(values) and all(".lora_" in name for name in trainable)
    assert {parameter.dtype for parameter in tuned.parameters() if parameter.requires_grad} == {torch.float32}
    config = tuned.peft_config["default"]
    assert (config.lora_dropout, config.base_model_name_or_path) == (0.1, str(golden_folder))


@pytest.mark.parametrize("plain", [(), ("--plain",)])
def test_first_loss_is_that_of_the_adapter(flags, tiny_checkpoint, trained, tmp_path, plain):
    # The learning rate of the only step is 0, so that the adapter and its loss stay what they were.
    write_json(tmp_path / "args.json", tmp_path / "out", max_steps=1, eval_steps=1, learning_rate=0.0)
    run_main(train_qlora, *flags, "--init_adapter", trained, *plain)
    assert adapter(tmp_path / "out").keys() == adapter(trained).keys()
    assert all(torch.equal(tensor, adapter(trained)[name]) for name, tensor in adapter(tmp_path / "out").items())
    model = load_adapter(load_quantized_model(str(tiny_checkpoint), torch.float32), str(trained)).eval()
    samples = preflight_of(flags, eval_data_path=flags[7]).eval_samples
    with torch.no_grad():
        losses, counts = zip(*(loss_and_count(model, sample) for sample in samples), strict=True)
    expected = sum(losses) / sum(counts)
    assert history(tmp_path / "out", "eval_loss") == pytest.approx([expected], abs=1e-4)


def loss_and_count(model: peft.PeftModel, sample: dict) -> tuple[float, int]:
    """The sum of a sample's losses, and the number of its labels."""
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
    count = int((labels[:, 1:] != IGNORE_INDEX).sum())
    return model(input_ids=ids, labels=labels).loss.item() * count, count


def test_config_of_the_saved_adapter_is_that_of_any_run(flags, trained, tiny_checkpoint, tmp_path):
    edit_config(copy := shutil.copytree(trained, tmp_path / "copy"), base_model_name_or_path="another/model")
    run_main(train_qlora, *flags, "--init_adapter", copy)
    config, old = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", trained))
    assert config.keys() == old.keys() and config["base_model_name_or_path"] == str(tiny_checkpoint)
    changed = {name for name in config if config[name] != old[name]}
    assert sorted(config.pop("target_modules")) == sorted(old.pop("target_modules"))
    assert changed <= {"lora_dropout", "target_modules"} and config["lora_dropout"] == 0.05
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert not all(torch.equal(tensor, adapter(trained)[name]) for name, tensor in adapter(checkpoint).items())
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {1}  # a new one


def test_settings_are_those_of_the_adapter(flags, trained, caplog):
    found = preflight_of(flags, init_adapter=str(trained))
    assert found.problems == [] and "was not trained on" not in caplog.text
    assert (found.lora.rank, found.lora.target_modules) == (4, ["dense", "query_key_value"])
    assert found.trainable == sum(tensor.numel() for tensor in adapter(trained).values())
    line = f"rank 4 on dense, query_key_value, {found.trainable:,} parameters, with the values of {trained}\n"
    assert line in describe(found)


def test_same_flags_are_accepted_and_others_refused(flags, trained):
    same = {"lora_rank": 4, "lora_alpha": 32.0, "lora_target_modules": ["query_key_value", "dense"]}
    assert preflight_of(flags, init_adapter=str(trained), **same).problems == []
    for name, value in {"lora_rank": 8, "lora_alpha": 16.0, "lora_target_modules": ["dense"]}.items():
        (problem,) = preflight_of(flags, init_adapter=str(trained), **same | {name: value}).problems
        assert f"--{name} is {value}, not {'[' if isinstance(value, list) else ''}" in problem
    with pytest.raises(ValueError, match=r"--init_adapter .*--resume_from_checkpoint .*give one of them"):
        FinetuneArguments(init_adapter=str(trained), resume_from_checkpoint="last")


def test_adapter_of_another_base_model_is_reported(flags, trained, tmp_path, caplog):
    copy = shutil.copytree(trained, tmp_path / "copy")
    edit_config(copy, base_model_name_or_path="another/model")
    assert preflight_of(flags, init_adapter=str(copy)).problems == []
    assert f"The adapter in {copy} was not trained on {flags[3]}" in caplog.text


def test_unusable_adapters_are_found_before_the_model_is_loaded(flags, trained, tmp_path):
    (problem,) = preflight_of(flags, init_adapter=str(tmp_path / "nowhere")).problems
    assert "there is no adapter in" in problem
    (problem,) = preflight_of(flags, init_adapter=str(GOLDEN_ADAPTER)).problems  # of three layers, not two
    assert "does not fit the base model" in problem
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "adapter_model.safetensors").unlink()
    (problem,) = preflight_of(flags, init_adapter=str(copy)).problems
    assert "has no weights" in problem


def test_adapter_of_the_original_project_fits(flags, golden_folder):
    found = preflight_of(flags, model_name_or_path=str(golden_folder), init_adapter=str(GOLDEN_ADAPTER))
    assert not [problem for problem in found.problems if "adapter" in problem]
    assert found.trainable == sum(tensor.numel() for tensor in adapter(GOLDEN_ADAPTER).values())


# A path is a path: nothing is looked up on the network.


@pytest.fixture
def lookups(monkeypatch) -> list:
    """The names of hosts that were looked up; every look-up fails."""
    asked = []

    def fail(host, *args, **kwargs):
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return asked


@pytest.fixture
def programs(flags, tiny_checkpoint, dev_file, tmp_path) -> dict[str, tuple]:
    """Program -> its module and its flags besides those of the adapter, which stands under a name like a hub's."""
    evaluate, merge, quantize = (
        import_script(ROOT / "scripts" / f"{name}.py")
        for name in ("evaluate_qlora", "merge_lora", "quantize_checkpoint")
    )
    base = ("--model_name_or_path", tiny_checkpoint)
    data = ("--data_path", dev_file, "--max_prompts", 1, "--output_dir", tmp_path / "evaluation")
    return {
        "train": (train_qlora, *flags),
        "infer": (inference_qlora, *base, "--prompt", "类型#裙", "--max_new_tokens", 2),
        "merge": (merge, *base, "--output_dir", tmp_path / "merged", "--compute_dtype", "fp32"),
        "quantize": (quantize, *base, "--output_dir", tmp_path / "nf4", "--compute_dtype", "fp32"),
        "evaluate": (evaluate, *base, *data),
    }


@pytest.mark.parametrize("name", ["train", "infer", "merge", "quantize", "evaluate"])
def test_no_path_is_looked_up_on_the_network(programs, lookups, trained, tmp_path, monkeypatch, name):
    if name == "evaluate":
        pytest.importorskip("jieba")
        monkeypatch.setitem(PROTOCOLS, "greedy", dataclasses.replace(PROTOCOLS["greedy"], max_new_tokens=2))
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(trained, "saved_files/some_adapter"))
    edit_config(folder, base_model_name_or_path="THUDM/chatglm-6b")  # which is not here
    flag = {"train": "--init_adapter", "quantize": None}.get(name, "--adapter_path")
    chosen = (flag, folder) if flag else ()
    run_main(*programs[name], *chosen)
    if chosen:
        (folder / "adapter_model.safetensors").unlink()
        for output in ("out", "merged", "evaluation"):
            shutil.rmtree(output, ignore_errors=True)
        assert "saved_files/some_adapter has no weights" in error_of(*programs[name], *chosen)
    assert lookups == []
