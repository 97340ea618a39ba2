"""scripts/evaluate_qlora.py and its modules: an interrupted evaluation gives the results of an uninterrupted one."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, add_random_lora, import_script, largest_file, write_rows
from huggingface_hub import ModelCard

from chatglm.chat import build_prompt
from qlora import loading
from qlora.adapter import load_adapter
from qlora.evaluation.general import compare, format_table, read_general_prompts, read_task, summarize_categories
from qlora.evaluation.metrics import METRICS, mean_scores, score
from qlora.evaluation.page import render_page
from qlora.evaluation.predictions import reference_text
from qlora.evaluation.protocols import PROTOCOLS
from qlora.inference import generation
from qlora.loading import load_quantized_model, load_tokenizer

for library in ("jieba", "rouge_chinese", "nltk"):
    pytest.importorskip(library)

ROWS, BATCH = 11, 4


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory) -> Path:
    """The folder of an adapter that changes the answers."""
    folder = tmp_path_factory.mktemp("adapter")
    add_random_lora(load_quantized_model(str(tiny_checkpoint), torch.float32), std=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(sample_rows, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "dev.jsonl", sample_rows[:ROWS])


@pytest.fixture(scope="module")
def script():
    return import_script(ROOT / "scripts" / "evaluate_qlora.py")


@pytest.fixture
def run(script, adapter, data, monkeypatch):
    """A function that runs the script, with answers of at most 12 tokens and without histograms to save time."""
    monkeypatch.setattr("qlora.evaluation.page.draw_histograms", lambda predictions: "")
    for name, protocol in PROTOCOLS.items():
        short = type(protocol)(**vars(protocol) | {"max_new_tokens": 12})
        monkeypatch.setitem(PROTOCOLS, name, short)

    def main(folder: Path, *flags: object):
        given = ["--adapter_path", adapter, "--data_path", data, "--output_dir", folder, "--batch_size", BATCH, *flags]
        monkeypatch.setattr(sys, "argv", ["evaluate_qlora.py", *map(str, given)])
        script.main()

    return main


def read_predictions(folder: Path) -> list[dict]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("protocol", ["greedy", "published"])
def test_every_row_is_answered_twice_and_scored(run, tmp_path, sample_rows, protocol, capsys):
    run(tmp_path, "--protocol", protocol)
    predictions, metrics = read_predictions(tmp_path), read_metrics(tmp_path)
    assert [row["index"] for row in predictions] == list(range(ROWS))
    assert [row["prompt"] for row in predictions] == [row["instruction"] for row in sample_rows[:ROWS]]
    assert any(row["base"] != row["adapter"] for row in predictions)
    for model in ("base", "adapter"):
        scores = [score(row[model], row["reference"]) for row in predictions]
        assert scores == [row["scores"][model] for row in predictions]
        assert metrics[model] == mean_scores(scores) and set(metrics[model]) == set(METRICS)
    assert metrics["samples"] == ROWS and metrics["settings"]["protocol"] == protocol
    assert f"{metrics['adapter']['rouge-l']:.2f}" in capsys.readouterr().out
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    assert page.count('<div class="sample">') == 10 and f"{metrics['base']['rouge-1']:.2f}" in page


def test_last_answer_of_a_conversation_is_the_reference(script, tokenizer, tmp_path):
    rounds = [("类型#裙", "白色的裙。"), ("类型#裤", "好看的裤。")]
    texts = [{"role": "system", "content": "写广告。"}]
    texts += [{"role": r, "content": t} for pair in rounds for r, t in zip(("user", "assistant"), pair, strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": texts}])
    args = script.EvaluationArguments(data_path=str(data))
    prompt = build_prompt(rounds[1][0], [(f"写广告。\n{rounds[0][0]}", rounds[0][1])])
    prompts, rows = script.read_samples(args, tokenizer)
    assert [tokenizer.build_prompt(*each) for each in prompts] == [prompt]
    assert rows == [{"prompt": prompt, "reference": rounds[1][1]}]


def test_scores_beside_an_adapter_are_added_to_its_card(run, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    run(copy / "evaluation_greedy", "--adapter_path", copy, "--max_prompts", 2)
    run(copy / "general_greedy", "--adapter_path", copy, "--max_prompts", 2, "--general")
    card, metrics = ModelCard.load(copy / "README.md"), read_metrics(copy / "evaluation_greedy")
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert scores == {name.upper(): round(value, 2) for name, value in metrics["adapter"].items()}
    assert f"| {metrics['base']['rouge-l']:.2f} |" in card.text
    assert "## Answers to general prompts, greedy protocol" in card.text
    unchanged = (adapter / "README.md").read_bytes()
    run(tmp_path / "elsewhere", "--max_prompts", 2)
    assert (adapter / "README.md").read_bytes() == unchanged


def test_rerun_answers_only_the_missing_rows(run, tmp_path, monkeypatch):
    complete, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    answered, limit, generate_texts = [], [100], generation.generate_texts

    def counted(model, tokenizer, prompts: list[str], **kwargs) -> list[str]:
        if len(answered) == limit[0]:
            raise KeyboardInterrupt
        answered.extend(prompts)
        return generate_texts(model, tokenizer, prompts, **kwargs)

    monkeypatch.setattr(generation, "generate_texts", counted)
    run(complete, "--protocol", "published")
    assert len(answered) == 2 * ROWS

    answered[:], limit[:] = [], [2 * 2 * BATCH]
    with pytest.raises(SystemExit, match="130"):
        run(interrupted, "--protocol", "published")
    path = interrupted / "predictions.jsonl"
    assert len(read_predictions(interrupted)) == 2 * BATCH
    path.write_bytes(path.read_bytes()[:-30])  # cuts the last line, as a crash would: its batch is answered again

    answered[:], limit[:] = [], [100]
    for missing in (ROWS - BATCH, 0):
        run(interrupted, "--protocol", "published")
        assert len(answered) == 2 * missing
        assert read_predictions(interrupted) == read_predictions(complete)
        assert read_metrics(interrupted) == read_metrics(complete)
        answered.clear()


@pytest.mark.parametrize("file", ["metrics.json", "predictions.jsonl", "summary.html"])
def test_full_disk_is_named_and_the_same_command_goes_on(run, tmp_path, capsys, file):
    expected, output = tmp_path / "expected", tmp_path / "out"
    run(expected)
    whole = (expected / "predictions.jsonl").stat().st_size
    sizes = {"metrics.json": 100, "predictions.jsonl": whole // 2, "summary.html": whole}  # each is larger than before
    with largest_file(sizes[file]), pytest.raises(SystemExit) as raised:
        run(output)
    assert re.fullmatch(rf"error: {output / file} cannot be written: [^\n]*\. Make room\.", str(raised.value))
    written = [path.name for path in output.iterdir()]
    assert set(written) <= {"metrics.json", "predictions.jsonl"}
    assert "predictions.jsonl" not in written or 0 < len(read_predictions(output)) <= ROWS
    run(output)
    assert read_predictions(output) == read_predictions(expected)


def test_complete_predictions_need_no_gpu_and_no_model(run, tmp_path, monkeypatch):
    run(tmp_path)
    before = read_metrics(tmp_path)
    monkeypatch.setattr(loading, "LARGEST_CPU_MODEL", 0)  # as if the model were too large for a CPU
    monkeypatch.setattr(loading, "load_quantized_model", None)
    run(tmp_path)
    assert read_metrics(tmp_path) == before
    with pytest.raises(SystemExit, match="no CUDA GPU was found"):
        run(tmp_path / "other")


def test_a_missing_adapter_is_reported_also_where_the_base_model_is_given(run, tmp_path, tiny_checkpoint):
    with pytest.raises(SystemExit, match="error: there is no adapter in "):
        run(tmp_path / "out", "--adapter_path", tmp_path, "--model_name_or_path", tiny_checkpoint)
    assert not (tmp_path / "out").exists()


def test_predictions_of_other_settings_are_not_mixed(run, tmp_path):
    run(tmp_path)
    before = read_predictions(tmp_path), read_metrics(tmp_path)
    for flags, named in (
        (("--seed", 7), "seed 42, now 7"),
        (("--protocol", "published"), "protocol greedy, now published"),
        (("--max_prompts", 5), "the rows are not the same"),
        (("--prompt_text", "写广告："), "the rows are not the same"),
        (("--compute_dtype", "bf16"), "now bfloat16"),
    ):
        with pytest.raises(SystemExit, match=rf"error: .*made in another way: .*{named}.*--output_dir"):
            run(tmp_path, *flags)
        assert (read_predictions(tmp_path), read_metrics(tmp_path)) == before


def test_out_of_memory_is_reported_and_a_smaller_batch_can_be_tried(run, tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate_texts", out_of_memory)
        with pytest.raises(SystemExit, match=r"error: CUDA out of memory: 4 prompts at once .*lower --batch_size"):
            run(tmp_path)
    run(tmp_path, "--batch_size", 2)
    assert len(read_predictions(tmp_path)) == ROWS


def test_predictions_without_settings_are_not_mixed(run, tmp_path):
    run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(SystemExit, match="made in another way"):
        run(tmp_path)


def test_greedy_answers_are_those_of_inference(run, tmp_path, script, adapter, tiny_checkpoint, sample_rows):
    run(tmp_path, "--batch_size", 1)
    (row, *_) = read_predictions(tmp_path)
    model = load_adapter(load_quantized_model(str(tiny_checkpoint), torch.float32), str(adapter)).eval()
    tokenizer = load_tokenizer(str(tiny_checkpoint))
    batch = tokenizer(sample_rows[0]["instruction"], split_special_tokens=True, return_tensors="pt")
    for name, off in (("base", True), ("adapter", False)):
        with model.disable_adapter() if off else torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row[name]


def test_general_prompts_are_answered_compared_and_resumed(run, tmp_path, monkeypatch, script, data, capsys):
    monkeypatch.setattr(script, "check_metric_libraries", None)  # not needed here, and so not called
    monkeypatch.setattr(script, "score", None)
    run(tmp_path, "--general", "--max_prompts", 6)
    predictions, metrics = read_predictions(tmp_path), read_metrics(tmp_path)
    prompts = read_general_prompts()[:6]
    assert [row["prompt"] for row in predictions] == [row["instruction"] for row in prompts]
    assert all(row["measures"] == compare(row, read_task(str(data))) for row in predictions)
    assert metrics["categories"] == summarize_categories(predictions) and metrics["categories"]["all"]["prompts"] == 6
    assert format_table(summarize_categories(predictions)) in capsys.readouterr().out
    assert (tmp_path / "summary.html").read_text(encoding="utf-8").count('<div class="sample">') == 6
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # its last batch is answered again
    run(tmp_path, "--general", "--max_prompts", 6)
    assert (read_predictions(tmp_path), read_metrics(tmp_path)) == (predictions, metrics)
    monkeypatch.setattr(loading, "load_quantized_model", None)  # everything is answered: another task only compares
    run(tmp_path, "--general", "--max_prompts", 6, "--data_path", ROOT / "data" / "dev.jsonl")
    with pytest.raises(SystemExit, match="the rows are not the same"):
        run(tmp_path, "--general", "--max_prompts", 5)


def test_references_are_cut_like_those_of_the_official_evaluation(genuine_tokenizer):
    # The labels of ptuning/main.py are cut to 64 tokens, [gMASK] and <sop> included.
    text = "换季必入的一条牛仔裙，好看又好搭，让精致感藏也藏不住。" * 8
    ids = genuine_tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 64
    expected = genuine_tokenizer.decode(ids[:62])
    assert reference_text(genuine_tokenizer, text, 64) == expected
    assert reference_text(genuine_tokenizer, text, None) == text.replace("，", ",")


def test_control_tokens_in_a_reference_stay_text(tokenizer):
    assert "sop" in reference_text(tokenizer, "裙<sop>裙", None)


def test_page_escapes_answers():
    scores = {model: dict.fromkeys(METRICS, 1.0) for model in ("base", "adapter")}
    row = {"prompt": "<script>alert(1)</script>", "reference": "a & b", "base": "<b>", "adapter": "", "scores": scores}
    page = render_page("title", {"seed": 1}, scores, [row], str.strip)
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page and "空 empty" in page
    assert "<svg" in page
