"""qlora/training/model_card.py: what an adapter's README.md says, and what is uploaded with it."""

import hashlib
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import flags_of, run_main, write_json
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer

import train_qlora
from qlora.arguments import FinetuneArguments, InferenceArguments, LoraSettings
from qlora.command_line import parse_command_line
from qlora.errors import TrainingStopped
from qlora.training.model_card import UPLOADED, add_section, describe_losses, shown_path, write_model_card
from qlora.training.run_lock import LOCK_FILE
from qlora.training.same_run import RUN_FILE
from qlora.training.trainer import QLoRATrainer
from qlora.training.training_args import read_training_args

TOKEN = "hf_0123456789"


@pytest.fixture(scope="module")
def uploaded() -> list[str]:
    """The paths that the run of `folder` uploaded."""
    return []


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, train_file, dev_file, tmp_path_factory, uploaded) -> Path:
    """The adapter of a short run that uploads it; an evaluation, a checkpoint and, for now, the lock lie beside it."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    (folder / "evaluation_greedy").mkdir(parents=True)
    (folder / "evaluation_greedy" / "predictions.jsonl").write_text("{}", encoding="utf-8")

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], **kwargs):
        assert repo_id == "me/adapter" and get_token() == TOKEN
        assert self.token is None and (folder / LOCK_FILE).is_file()
        paths = [str(path.relative_to(folder)) for path in Path(folder_path).rglob("*") if path.is_file()]
        uploaded.extend(filter_repo_objects(paths, allow_patterns=allow_patterns))

    values = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "hub_model_id": "me/adapter"}
    args_json = write_json(folder.parent / "args.json", folder, push_to_hub=True, weight_decay=0.25, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(HfApi, "upload_folder", upload_folder)
        patch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/adapter"))
        flags = flags_of(args_json, tiny_checkpoint, f"{train_file}:2", dev_file, "--lora_rank", 2)
        run_main(train_qlora, *flags, "--train_data_path", f"{train_file}:2", dev_file)
    return folder


def test_exactly_the_adapter_is_uploaded(folder, uploaded):
    assert sorted(uploaded) == sorted({*UPLOADED} - {"tokenizer.model"})  # of another model
    assert (folder / "checkpoint-2" / RUN_FILE).is_file() and not (folder / LOCK_FILE).exists()
    assert str(folder).encode() in (folder / "training_args.bin").read_bytes()  # why it must stay here
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not [content for content in files if TOKEN.encode() in content]


def test_head_of_the_card_is_what_the_hub_reads(folder):
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert data.language == ["zh", "en"] and {"chatglm", "lora", "qlora"} <= set(data.tags)
    assert data.base_model is None  # the model of this test is in a temporary folder


def test_card_describes_data_settings_and_losses(folder, train_file, dev_file):
    text = ModelCard.load(folder / "README.md").text
    for file, samples in ((train_file, 96), (dev_file, 11)):
        assert f"| {file.name} | {samples} | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in text
    assert f"{dev_file.name} (evaluation) | 11 |" in text
    settings = dict(re.findall(r"^\| (\w+) \| (.*) \|$", text, re.M))
    expected = {"lora_rank": "2", "weight_decay": "0.25", "learning_rate": "0.01", "max_steps": "4", "seed": "42"}
    assert expected.items() <= settings.items() and settings["lora_target_modules"] == "query_key_value"
    assert "num_train_epochs" not in settings  # max_steps is stronger
    assert not [name for name in settings if name.startswith(("hub", "push", "save", "dataloader", "output", "accel"))]
    losses = [entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]]
    first, *_, last = [entry["loss"] for entry in losses if "loss" in entry]
    assert f"training loss: {first:.3f} (step 1) → {last:.3f} (step 4)" in text and "evaluation loss: " in text
    assert "](loss.png)" in text and "transformers " in text and "saved_files/adapter" in text
    assert TOKEN not in text and str(folder.parent) not in text


def test_commands_of_the_card_are_accepted(folder):
    text = ModelCard.load(folder / "README.md").text
    commands = [shlex.split(line, comments=True) for line in re.findall("^python .*", text, re.M)]
    parsed = [parse_command_line(InferenceArguments, flags) for _, script, *flags in commands]
    assert [args.adapter_path for args in parsed] == [["saved_files/adapter"]] * 2
    assert [args.serve for args in parsed] == [False, True]


def test_scores_are_added_to_a_card_and_replaced(folder, tmp_path):
    (tmp_path / "README.md").write_bytes((folder / "README.md").read_bytes())
    before = ModelCard.load(folder / "README.md").text
    for value in (10.0, 20.128):
        add_section(tmp_path, "Evaluation on a.jsonl", f"table {value}", {"bleu-4": value, "rouge-l": value})
        add_section(tmp_path, "General", f"general {value}")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.startswith(before.rstrip())
    assert card.text.count("## Evaluation on a.jsonl") == card.text.count("## General") == 1
    assert "table 20.128" in card.text and "10.0" not in card.text
    found = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert found == {"BLEU-4": ("bleu", 20.13), "ROUGE-L": ("rouge", 20.13)}
    assert card.data.library_name == "peft"


def test_an_adapter_without_a_card_gets_none(tmp_path):
    add_section(tmp_path, "Evaluation", "table")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "base_model"),
    [
        ("THUDM/chatglm-6b", "THUDM/chatglm-6b"),
        ("my/merged", "my/merged"),
        ("../THUDM/chatglm-6b", None),
        ("/models/of/me/chatglm", None),
    ],
)
def test_base_model_is_named_if_its_path_is_a_name_on_the_hub(tmp_path, monkeypatch, path, base_model):
    monkeypatch.chdir(tmp_path)
    setup = read_training_args(str(write_json(tmp_path / "args.json", tmp_path / "out")))
    args = FinetuneArguments(model_name_or_path=path, prompt_text="写广告：", init_adapter="/models/of/me/first")
    write_model_card(tmp_path, args, setup, LoraSettings(rank=8), [], [])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base_model and "/of/me" not in str(card)
    assert (f"base_model:adapter:{path}" in card.data.tags) == (base_model is not None)
    assert f'AutoModelForCausalLM.from_pretrained("{base_model or Path(path).name}"' in card.text
    assert "--prompt_text '写广告：'" in card.text and "loss.png" not in card.text
    assert "| init_adapter | first |\n" in card.text and "| lora_rank | 8 |\n" in card.text


def test_paths_are_shown_without_the_folders_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path("data/a.jsonl") == shown_path(str(tmp_path / "data" / "a.jsonl")) == "data/a.jsonl"
    assert shown_path("/home/me/a.jsonl") == shown_path("../../me/a.jsonl") == "a.jsonl"


def test_lowest_evaluation_loss_is_named_beside_the_last():
    history = [{"step": 1, "loss": 4.0}, {"step": 2, "eval_loss": 3.0}, {"step": 3, "eval_loss": 3.5}]
    assert describe_losses(history) == [
        "training loss: 4.000 (step 1) → 4.000 (step 1)",
        "evaluation loss: 3.500 (step 3), at its lowest 3.000 (step 2)",
    ]
    assert describe_losses([]) == []


def test_failed_upload_says_where_the_adapter_is(monkeypatch):
    given = {}

    def fail(self, **kwargs):
        given.update(kwargs)
        raise RuntimeError("no route to host")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    args = SimpleNamespace(hub_revision="v2", output_dir="saved_files/x")
    with pytest.raises(TrainingStopped, match=r"is in saved_files/x, but its upload to me/x failed: no route"):
        QLoRATrainer.push_to_hub(SimpleNamespace(args=args, hub_model_id="me/x"))
    # Neither checkpoints nor training_args.bin.
    assert given["allow_patterns"] == list(UPLOADED) and given["revision"] == "v2"
