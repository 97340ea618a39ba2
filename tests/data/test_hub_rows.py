"""qlora/data/hub_rows.py: rows of data sets on a stand-in of the Hugging Face Hub."""

import json
from pathlib import Path

import datasets
import pytest
from conftest import largest_file, write_json
from hub_server import serve_hub, use_hub
from huggingface_hub import ModelCard, constants

from qlora.arguments import FinetuneArguments
from qlora.data.hub_rows import fetch_rows, is_hub_name, with_local_files
from qlora.data.rows import read_rows
from qlora.training.model_card import data_files, write_model_card
from qlora.training.preflight import run_preflight

NAME = "someone/rows-0.5M"


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with a data set of two splits, whose columns have other names than the fields."""
    rows = [{"id": n, "question": f"第{n}问", "output": None, "answer": f"答“{n}”\n"} for n in range(12)]
    with serve_hub() as server:
        server.datasets[NAME] = {"train.jsonl": lines(rows), "test.jsonl": lines(rows[:2]), "README.md": b"rows"}
        server.datasets["someone/subsets"] = {
            "README.md": b"---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n"
            b"  data_files: b.jsonl\n---\n",
            "a.jsonl": lines([{"instruction": "a", "output": "b"}]),
            "b.jsonl": lines([{"instruction": "c", "output": "d", "history": [["e", "f"]]}]),
        }
        use_hub(server, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.chdir(tmp_path)
        datasets.disable_progress_bars()  # one that cannot write, since the disk is full, would never release its lock
        yield server
        datasets.enable_progress_bars()


COLUMNS = {"instruction": "question", "output": "answer"}


def test_rows_of_a_split_with_renamed_columns(hub):
    path = fetch_rows(NAME, "train[2:]", COLUMNS)
    rows = list(read_rows(path))
    assert [(row["line"], row["query"], row["answer"]) for row in rows] == [
        (n - 1, f"第{n}问", f"答“{n}”\n") for n in range(2, 12)
    ]
    assert len(list(read_rows(fetch_rows(NAME, "test", COLUMNS)))) == 2
    written = Path(path).stat().st_mtime_ns
    assert fetch_rows(NAME, "train[2:]", COLUMNS) == path and Path(path).stat().st_mtime_ns == written
    constants.HF_HUB_OFFLINE = True  # `use_hub` restores it
    assert fetch_rows(NAME, "train[2:]", COLUMNS) == path


def test_subset_and_history(hub):
    (row,) = read_rows(fetch_rows("someone/subsets/two", "train", {}))
    assert row["query"] == "c" and row["history"] == [["e", "f"]]
    with pytest.raises(ValueError, match=r"someone/subsets cannot be read, split train: .*'one', 'two'"):
        fetch_rows("someone/subsets", "train", {})


@pytest.mark.parametrize(
    ("name", "split", "columns", "message"),
    [
        ("someone/nothing", "train", {}, "there is no data file someone/nothing, and http://127.0.0.1:"),
        (NAME, "validation", {}, 'split validation: Unknown split "validation"'),
        (NAME, "train", {"output": "reply"}, "it has no column reply, but id, question, output, answer."),
        ("someone/broken", "train", {}, "the data set someone/broken cannot be read, split train: JSON parse error"),
    ],
)
def test_problems_end_in_one_line(hub, name, split, columns, message):
    hub.datasets["someone/broken"] = {"train.jsonl": b"{"}
    with pytest.raises(ValueError) as raised:
        fetch_rows(name, split, columns)
    text = str(raised.value)
    assert message in text and "\n" not in text and text.endswith(".") and not text.endswith("..")


def test_full_disk_leaves_no_file(hub, tmp_path):
    fetch_rows(NAME, "train", COLUMNS)
    with largest_file(10), pytest.raises(ValueError, match=rf"{tmp_path}\S+ cannot be written: a file there must"):
        fetch_rows(NAME, "test", COLUMNS)
    assert len(list((tmp_path / "datasets" / "chatglm_qlora" / "hub" / NAME).iterdir())) == 1


def test_offline_without_the_data_set(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Couldn't reach 'someone/rows-0\.5M' on the Hub"):
        fetch_rows(NAME, "train", {})


def test_names_and_paths(hub):
    Path("data").mkdir()
    assert all(map(is_hub_name, [NAME, "a/b/c", "BelleGroup/train_0.5M_CN"]))
    paths = ["data/rows", "a/rows.jsonl", "a/rows.json", "rows", "./a/b", "/a/b", "../a/b", "a/b/c/d", "", "a/"]
    assert not any(map(is_hub_name, paths))


def test_flags_become_files_with_their_weights(hub):
    Path("my.jsonl").write_bytes(lines([{"instruction": "a", "output": "b"}]))
    flags = FinetuneArguments(
        train_data_path=["my.jsonl:2", f"{NAME}:0.5"],
        eval_data_path=NAME,
        eval_split="train[:3]",
        column_map=["instruction=question", "output=answer"],
    )
    local = with_local_files(flags)
    (mine, two), (theirs, half) = local.train_files()
    assert (mine, two, half) == ("my.jsonl", 2, 0.5)
    assert len(list(read_rows(theirs))) == 12 and len(list(read_rows(local.eval_data_path))) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_split": "train", "eval_data_path": NAME}, "--train_split: this is for a data set"),
        ({"column_map": ["a=b"], "eval_split": "test"}, "--eval_split, --column_map: this is for a data set"),
        ({"column_map": ["a"]}, "--column_map a: expected field=column"),
    ],
)
def test_flags_without_a_use_are_refused(hub, flags, message):
    with pytest.raises(ValueError, match=message):
        with_local_files(FinetuneArguments(**{"eval_data_path": None} | flags))


def test_run_and_card_name_the_data_set(hub, tiny_checkpoint, tmp_path):
    hub.datasets[NAME]["test.jsonl"] = lines([{"question": "好", "answer": ""}, {"question": "好", "answer": "好"}])
    args_json = write_json(tmp_path / "args.json", tmp_path / "out")
    flags = FinetuneArguments(
        train_args_json=str(args_json),
        model_name_or_path=str(tiny_checkpoint),
        train_data_path=[NAME],
        eval_data_path=NAME,
        column_map=["instruction=question", "output=answer"],
    )
    preflight = run_preflight(flags)
    (problem,) = preflight.problems
    assert problem.endswith("jsonl, line 1: field 'output' is empty.") and NAME in problem
    args = preflight.args
    files = data_files(args, preflight.train_samples, None)
    assert len(preflight.train_samples) == 12 and files[0].name.startswith(f"{NAME}/train.")
    (tmp_path / "out").mkdir(exist_ok=True)
    write_model_card(tmp_path / "out", args, preflight.setup, preflight.lora, files, [])
    assert ModelCard.load(tmp_path / "out" / "README.md").data.datasets == [NAME]
