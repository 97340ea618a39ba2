"""qlora/benchmark/records.py and the tables that scripts/update_docs.py writes from records."""

import json

import pytest
from conftest import ROOT, import_script

from qlora.atomic import append_lines
from qlora.benchmark.records import code_hash, machine, newest_records

RECORD = {"name": "train", "code": "abc", "gpu": "H100", "processor": "Xeon", "tokens_per_second": 22000}
MEMORY = {"peak_memory_gib": 23.04, "predicted_memory_gib": 23.3, "gpu_busy": 0.981}


def test_newest_record_of_each_name(tmp_path):
    path = tmp_path / "records.jsonl"
    decode = RECORD | {"name": "decode"}
    for record in (RECORD | {"tokens_per_second": 1, "code": "old"}, decode, RECORD):
        append_lines(path, [record])
    assert newest_records(path) == {"train": RECORD, "decode": decode}


@pytest.mark.parametrize("key", ["code", "gpu", "processor"])
def test_rows_that_cannot_be_compared_are_refused(key):
    script = import_script(ROOT / "scripts" / "update_docs.py")
    other = RECORD | MEMORY | {"name": "train --memory_budget 8GiB", key: "another"}
    records = {record["name"]: record for record in (RECORD | MEMORY, other)}
    first, second = (f"| run <!-- measured: {name} --> | |\n" for name in records)
    assert "22,000" in script.measured_rows(first, records) and "22,000" in script.measured_rows(second, records)
    with pytest.raises(ValueError, match="measure all rows of a table with one version on one machine"):
        script.measured_rows(first + second, records)


def test_code_hash_changes_with_code_only(tmp_path):
    kernels, page = tmp_path / "glm_kernels", tmp_path / "docs" / "page.py"
    for path in (kernels / "kernel.py", kernels / "kernel.cu", page):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    before = code_hash(tmp_path)
    page.write_text("2")
    assert code_hash(tmp_path) == before
    for path in kernels.iterdir():
        path.write_text("2")
        assert code_hash(tmp_path) != before
        path.write_text("1")


def test_machine_can_be_written_as_json():
    described = json.loads(json.dumps(machine()))
    assert described["cores"] > 0 and described["versions"]["torch"]


def test_rows_of_tables_are_written_from_records():
    script = import_script(ROOT / "scripts" / "update_docs.py")
    figures = {key: RECORD[key] for key in ("code", "gpu", "processor")}
    decode = figures | {"name": "decode", "tokens_per_second_batch_1": 223}
    records = {"train": RECORD | MEMORY, "decode": decode}
    page = (
        "| all memory <!-- measured: train --> | 1 | 2 | 3 | 4 |\n"
        "| fewer columns <!-- measured: train --> | | |\n"
        "| answers <!-- measured: decode --> | 1 | old |\n"
        "| another project | 670 | 6.0 GiB |\n"
    )
    assert script.measured_rows(page, records) == (
        "| all memory <!-- measured: train --> | 22,000 | 23.0 GiB | 23.3 GiB | 98% |\n"
        "| fewer columns <!-- measured: train --> | 22,000 | 23.0 GiB |\n"
        "| answers <!-- measured: decode --> | 223 | |\n"
        "| another project | 670 | 6.0 GiB |\n"
    )
    with pytest.raises(ValueError, match="no record 'load'"):
        script.measured_rows("| x <!-- measured: load --> | 1 |\n", records)
