"""docs/colab.ipynb: its commands, settings and links; .ci/run runs the cells without a GPU."""

import json
import re
import shlex

from conftest import ROOT

import inference_qlora
import train_qlora
from qlora.arguments import FinetuneArguments, InferenceArguments
from qlora.command_line import parse_command_line
from qlora.training.training_args import read_training_args

NOTEBOOK = ROOT / "docs" / "colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
KINDS = {train_qlora.__name__: FinetuneArguments, inference_qlora.__name__: InferenceArguments}


def code(on_gpu: bool) -> list[str]:
    """The source of the cells that need a GPU, or of those that do not."""
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if ("gpu" in cell["metadata"].get("tags", [])) is on_gpu]


def commands() -> list[tuple[str, list[str]]]:
    """Every `!python X.py ...` of a cell with its flags."""
    lines = "\n".join(code(on_gpu=True)).replace("\\\n", "").splitlines()
    return [
        (words[1].removesuffix(".py"), words[2:]) for line in lines if (words := shlex.split(line))[:1] == ["!python"]
    ]


def test_cell_without_gpu_runs_the_demo_as_the_readme_does():
    demo = re.search(r"^pip install .*--demo$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[0]
    assert f"!{demo}" in code(on_gpu=False)
    assert not [source for source in code(on_gpu=False) if "python" in source or "nvidia" in source]


def test_commands_are_accepted():
    assert [script for script, _ in commands()] == ["train_qlora", "train_qlora", "inference_qlora"]
    adapters = set()
    for script, flags in commands():
        args = parse_command_line(KINDS[script], flags)
        if script == "train_qlora":
            assert not args.eval_data_path or args.check
            setup = read_training_args(args.train_args_json, args.training_args, evaluate=bool(args.eval_data_path))
            adapters |= {setup.training_args.output_dir} - {"saved_files/chatGLM_6B_QLoRA_t32"}
        else:
            adapters |= set(args.adapter_path)
    assert adapters == {"saved_files/colab"}  # what is trained is asked and saved
    assert "cp -r saved_files/colab " in code(on_gpu=True)[-1]


def test_texts_are_in_both_languages_and_nothing_is_stored():
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert re.search("[\u4e00-\u9fff]", source) and re.search("[a-z]{3} [a-z]{2}", source), source
            for target in re.findall(r"\]\(([^)#]+)", source):
                assert (NOTEBOOK.parent / target).exists(), target
        else:
            assert not cell["outputs"] and cell["execution_count"] is None
