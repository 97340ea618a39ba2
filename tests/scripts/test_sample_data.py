"""The sample data set and scripts/make_sample_data.py, which writes it."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_sample_data.py"
SPLIT_SIZES = {"train": 3000, "dev": 200}
# Values that the advertisements name in other words: a top by its subtype, denim by its short form.
SYNONYMS = {
    "上衣": ("衬衫", "卫衣", "t恤", "polo衫", "棒球服", "外套", "风衣", "西装", "针织衫", "毛衣", "开衫", "雪纺衫")
}
SYNONYMS |= {"牛仔布": ("牛仔裤", "牛仔裙")}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    texts = {split: (ROOT / "data" / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLIT_SIZES}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


@pytest.fixture(scope="module")
def rows(splits: dict[str, list[dict]]) -> list[dict]:
    return splits["train"] + splits["dev"]


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def attributes_of(row: dict) -> list[list[str]]:
    return [attribute.split("#") for attribute in row["instruction"].split("*")]


def test_shipped_data_is_what_the_script_writes(tmp_path: Path) -> None:
    result = run("--output_dir", tmp_path / "new")
    assert result.returncode == 0, result.stderr
    for split in SPLIT_SIZES:
        written, shipped = (folder / f"{split}.jsonl" for folder in (tmp_path / "new", ROOT / "data"))
        assert written.read_bytes() == shipped.read_bytes(), f"run scripts/make_sample_data.py: {shipped} is stale"


def test_sizes_and_keys(splits: dict[str, list[dict]]) -> None:
    assert {split: len(rows) for split, rows in splits.items()} == SPLIT_SIZES
    assert all(list(row) == ["instruction", "output"] for rows in splits.values() for row in rows)


def test_seed_and_sizes_are_used(tmp_path: Path) -> None:
    for seed in (1, 2):
        run("--output_dir", tmp_path / str(seed), "--num_train", 4, "--num_dev", 2, "--seed", seed)
    first, second = ((tmp_path / seed / "train.jsonl").read_text(encoding="utf-8") for seed in "12")
    assert first != second
    assert len(first.splitlines()) == 4
    assert len((tmp_path / "1" / "dev.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("option", ["--num_train", "--num_dev"])
def test_sizes_below_one_are_refused(tmp_path: Path, option: str) -> None:
    result = run("--output_dir", tmp_path / "new", option, 0)
    assert result.returncode == 2
    assert f"{option} 0" in result.stderr
    assert not (tmp_path / "new").exists()


def test_instructions_and_outputs_are_unique(rows: list[dict]) -> None:
    assert len({frozenset(row["instruction"].split("*")) for row in rows}) == len(rows)
    assert len({row["output"] for row in rows}) == len(rows)


def test_instructions_are_attributes_with_the_type_first(rows: list[dict]) -> None:
    for row in rows:
        attributes = attributes_of(row)
        assert all(len(pair) == 2 and all(pair) for pair in attributes), row
        assert attributes[0] in (["类型", "上衣"], ["类型", "裙"], ["类型", "裤"]), row
        assert 5 <= len(attributes) <= 8, row  # type, naming attribute, and 3 to 6 more
        assert len({tuple(pair) for pair in attributes}) == len(attributes), row


def test_lengths(rows: list[dict]) -> None:
    lengths = [len(row["output"]) for row in rows]
    assert min(lengths) >= 60 and max(lengths) <= 140
    assert max(lengths) - min(lengths) > 50


def test_every_attribute_is_mentioned(rows: list[dict]) -> None:
    for row in rows:
        for key, value in attributes_of(row):
            words = SYNONYMS.get(value, (value,))
            assert any(word in row["output"] for word in words), f"{key}#{value} is not in {row['output']}"


def test_outputs_are_complete_sentences(rows: list[dict]) -> None:
    for row in rows:
        text = row["output"]
        assert text[-1] in "。！" and not re.search(r"[{}\s|]|[，。！？]{2}|^[，。]", text), text
        assert re.fullmatch(r"[\u4e00-\u9fff，。！？、]+", re.sub("t恤|polo|[av](?=字|领)", "", text)), text


def test_outputs_share_few_sentences(rows: list[dict]) -> None:
    """At most one output in a hundred has more than half of its sentences in common with another output."""
    sentences = [set(filter(None, re.split("[。！？]", row["output"]))) for row in rows]
    owners = defaultdict(set)
    for index, own in enumerate(sentences):
        for sentence in own:
            owners[sentence].add(index)
    close = 0
    for index, own in enumerate(sentences):
        shared = Counter(other for sentence in own for other in owners[sentence] if other != index)
        close += any(2 * count > len(own) for count in shared.values())
    assert close <= len(rows) / 100


def test_every_garment_and_every_value_is_used(generator: ModuleType, rows: list[dict]) -> None:
    used = {value for row in rows for _, value in attributes_of(row)}
    assert {garment.identity.split("#")[1] for garment in generator.GARMENTS} <= used
    assert {value for perks in generator.PERKS.values() for value in perks} <= used


def test_every_feature_of_every_garment_can_be_written(generator: ModuleType) -> None:
    order = generator.KEY_ORDER.split()
    for garment in generator.GARMENTS:
        for key, values in garment.features.items():
            assert key in order
            for value in values.split():
                assert value in generator.write_clause(random.Random(0), key, value, linked=False)


def test_clashing_values_are_never_combined(generator: ModuleType, rows: list[dict]) -> None:
    assert generator.clashes(["无袖", "棉", "喇叭袖"])
    assert not generator.clashes(["无袖", "棉", "红色"])
    assert not any(generator.clashes([value for _, value in attributes_of(row)]) for row in rows)
