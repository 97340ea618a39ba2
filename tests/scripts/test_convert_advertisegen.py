"""scripts/convert_advertisegen.py, run in a new process."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_advertisegen.py"
GOOD = {"content": "类型#裙*颜色#白色", "summary": "这条白色的裙子“很美”。"}
CONVERTED = {"instruction": GOOD["content"], "output": GOOD["summary"]}


def to_json(row: object) -> bytes:
    return json.dumps(row).encode("ascii")


GOOD_LINE = to_json(GOOD) + b"\n"


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, encoding="utf-8")


def make_source(folder: Path, train: bytes = GOOD_LINE * 3, dev: bytes = GOOD_LINE) -> Path:
    source = folder / "AdvertiseGen"
    source.mkdir()
    (source / "train.json").write_bytes(train)
    (source / "dev.json").write_bytes(dev)
    return source


def make_archive(folder: Path, names: list[str]) -> Path:
    archive = folder / "AdvertiseGen.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(GOOD_LINE)
            tar.addfile(info, io.BytesIO(GOOD_LINE))
    return archive


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_fails(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Checks that the script ended with a message of one line with all of these parts."""
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_converts_both_files(tmp_path: Path) -> None:
    result = run(make_source(tmp_path), "--output_dir", tmp_path / "new" / "adgen")
    assert result.returncode == 0, result.stderr
    assert read_rows(tmp_path / "new" / "adgen" / "train.jsonl") == [CONVERTED] * 3
    assert read_rows(tmp_path / "new" / "adgen" / "dev.jsonl") == [CONVERTED]
    train_line, dev_line = result.stdout.splitlines()
    assert train_line.endswith("train.jsonl: 3 rows") and dev_line.endswith("dev.jsonl: 1 rows")
    assert sorted(path.name for path in (tmp_path / "new" / "adgen").iterdir()) == ["dev.jsonl", "train.jsonl"]


def test_writes_chinese_unescaped_and_drops_other_fields(tmp_path: Path) -> None:
    run(make_source(tmp_path, dev=to_json(GOOD | {"id": 7})), "--output_dir", tmp_path / "out")
    expected = json.dumps(CONVERTED, ensure_ascii=False) + "\n"
    assert (tmp_path / "out" / "dev.jsonl").read_bytes() == expected.encode("utf-8")


def test_skips_empty_lines(tmp_path: Path) -> None:
    result = run(make_source(tmp_path, train=GOOD_LINE + b"\r\n\n" + GOOD_LINE), "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert read_rows(tmp_path / "out" / "train.jsonl") == [CONVERTED] * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"content": "a", ', "not valid JSON"),
        (b'{"content": "\xff"}', "not valid UTF-8"),
        (b'["content", "summary"]', "expected a JSON object, found a list"),
        (b"[" * 100_000, "nested too deeply"),
        (to_json({"content": "a"}), "field 'summary' is missing"),
        (to_json({"instruction": "a", "output": "b"}), "field 'content' is missing"),
        (to_json({"content": "a", "summary": " \n"}), "field 'summary' is empty"),
        (to_json({"content": "", "summary": "b"}), "field 'content' is empty"),
        (to_json({"content": 5, "summary": "b"}), "field 'content' must be a string, found a number"),
        (to_json({"content": "a", "summary": None}), "field 'summary' must be a string, found null"),
        (to_json({"content": "a", "summary": "\ud800"}), "a lone surrogate"),
        (b'{"content": "a", "content": "b", "summary": "c"}', "'content' stands twice"),
    ],
)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_invalid_line_is_named_and_no_file_is_left(tmp_path: Path, split: str, line: bytes, reason: str) -> None:
    source = make_source(tmp_path, **{split: GOOD_LINE + b"\n" + line + b"\n" + GOOD_LINE})
    assert_fails(run(source, "--output_dir", tmp_path / "out"), f"{split}.json, line 3: ", reason)
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_file(tmp_path: Path) -> None:
    assert_fails(run(make_source(tmp_path, dev=b"\n"), "--output_dir", tmp_path / "out"), "dev.json has no rows")


def test_bad_lines_are_listed(tmp_path: Path) -> None:
    source = make_source(tmp_path, train=GOOD_LINE + b"{\n[]\n" + GOOD_LINE + b"{}\n" * 20)
    result = run(source, "--output_dir", tmp_path / "out")
    first, *listed = result.stderr.splitlines()
    assert first == f"error: {source / 'train.json'} has 22 rows that cannot be used:"
    assert [line.partition(":")[0] for line in listed] == [
        *(f"- line {n}" for n in (2, 3, *range(5, 13))),
        "- and 12 more.",
    ]


@pytest.mark.parametrize("missing", ["train.json", "dev.json"])
def test_missing_file(tmp_path: Path, missing: str) -> None:
    source = make_source(tmp_path)
    (source / missing).unlink()
    assert_fails(run(source, "--output_dir", tmp_path / "out"), f"the folder {source} has no {missing}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere", "AdvertiseGen.tar.gz"])
def test_missing_folder_or_archive(tmp_path: Path, name: str) -> None:
    message = f"there is no folder or archive {tmp_path / name}; docs/data.md says where to download it\n"
    assert_fails(run(tmp_path / name, "--output_dir", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existing", ["train.jsonl", "dev.jsonl"])
def test_keeps_existing_output_without_overwrite(tmp_path: Path, existing: str) -> None:
    source, output_dir = make_source(tmp_path), tmp_path / "out"
    output_dir.mkdir()
    (output_dir / existing).write_text("mine", encoding="utf-8")
    assert_fails(run(source, "--output_dir", output_dir), existing, "--overwrite")
    assert [path.name for path in output_dir.iterdir()] == [existing]
    assert (output_dir / existing).read_text(encoding="utf-8") == "mine"
    assert run(source, "--output_dir", output_dir, "--overwrite").returncode == 0
    assert read_rows(output_dir / existing)[0] == CONVERTED


def test_failed_overwrite_keeps_the_old_files(tmp_path: Path) -> None:
    source, output_dir = make_source(tmp_path, dev=b"broken"), tmp_path / "out"
    output_dir.mkdir()
    for name in ("train.jsonl", "dev.jsonl"):
        (output_dir / name).write_text("old", encoding="utf-8")
    assert_fails(run(source, "--output_dir", output_dir, "--overwrite"), "dev.json, line 1")
    assert {path.name: path.read_text() for path in output_dir.iterdir()} == {"train.jsonl": "old", "dev.jsonl": "old"}


def test_reads_the_archive_without_extracting(tmp_path: Path) -> None:
    names = ["AdvertiseGen/._train.json", "AdvertiseGen/train.json", "../../dev.json", "../evil.txt"]
    archive = make_archive(tmp_path, names)
    result = run(archive, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert read_rows(tmp_path / "out" / "train.jsonl") == read_rows(tmp_path / "out" / "dev.jsonl") == [CONVERTED]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"AdvertiseGen.tar.gz", "out/train.jsonl", "out/dev.jsonl"}


@pytest.mark.parametrize(("names", "found"), [(["a/train.json"], 0), (["train.json", "a/dev.json", "b/dev.json"], 2)])
def test_archive_must_hold_each_file_once(tmp_path: Path, names: list[str], found: int) -> None:
    result = run(make_archive(tmp_path, names), "--output_dir", tmp_path / "out")
    assert_fails(result, "AdvertiseGen.tar.gz", f"one file named dev.json in the archive, found {found}")


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"not an archive", lambda data: b""])
def test_damaged_archive(tmp_path: Path, damage) -> None:
    archive = make_archive(tmp_path, ["train.json", "dev.json"])
    archive.write_bytes(damage(archive.read_bytes()))
    assert_fails(run(archive, "--output_dir", tmp_path / "out"), "AdvertiseGen.tar.gz is not a whole .tar.gz")
    assert list((tmp_path / "out").iterdir()) == []
