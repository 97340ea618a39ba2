"""scripts/make_tiny_checkpoint.py: the model of the demo, made with one step of pre-training."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.checkpoint import check_checkpoint


@pytest.fixture(scope="module")
def folder(tiny_script, sample_rows, tmp_path_factory) -> Path:
    scratch = tmp_path_factory.mktemp("demo")
    data = write_rows(scratch / "rows.jsonl", sample_rows)
    flags = {"--data_path": data, "--output_dir": scratch / "tiny", "--vocab_size": 1100, "--max_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny_checkpoint.py", *(str(x) for pair in flags.items() for x in pair)])
        tiny_script.main()
    return scratch / "tiny"


def test_folder_is_a_complete_checkpoint(folder):
    config = check_checkpoint(str(folder))
    assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() < 2e6


def test_special_tokens_have_the_official_places(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    start = tokenizer.convert_tokens_to_ids("[MASK]")
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>"]
    assert tokenizer.convert_ids_to_tokens(range(start, start + 11)) == [*names, "<|blank_2|>", "<|blank_3|>"]


def test_cpu_is_used_where_there_is_no_cuda(tiny_script, sample_rows, tokenizer, monkeypatch):
    """Otherwise the Trainer would take Apple's GPU."""
    rows = [{"query": row["instruction"], "answer": row["output"]} for row in sample_rows[:4]]
    used = []

    def trainer(model, args, **kwargs):
        return SimpleNamespace(train=lambda: used.append(args.use_cpu))

    monkeypatch.setattr(tiny_script, "QLoRATrainer", trainer)
    tiny_script.pretrain(rows, tokenizer, 1, seed=0)
    assert used == [True]


def test_trained_model_decodes_with_a_cache(folder):
    # The Trainer sets config.use_cache to False; `generate` would use the value in the file.
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.use_cache is not False
