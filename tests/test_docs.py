"""README, docs/ and the other pages: files, flags, settings and messages that they name exist in the code."""

import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, import_script
from transformers import TrainingArguments

import chatglm
from qlora.adapter import add_lora
from qlora.arguments import FinetuneArguments, InferenceArguments, training_argument_names
from qlora.checkpoint import check_checkpoint
from qlora.command_line import parse_command_line, shown_flags
from qlora.data.dataset import SampleEncoder, load_samples
from qlora.data.rows import read_rows
from qlora.loading import load_quantized_model
from qlora.training.preflight_report import show_sample
from qlora.training.training_args import read_training_args

READMES = ("README.md", "README_zh.md")
PAGES = sorted(str(path.relative_to(ROOT)) for part in ("*.md", "docs/*.md", "data/*.md") for path in ROOT.glob(part))
PAGES.append("THUDM/README.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
every_page = pytest.mark.parametrize("page", PAGES)
data_pages = pytest.mark.parametrize("page", ["docs/data.md", "docs/data_zh.md"])
troubleshooting_pages = pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/troubleshooting_zh.md"])


def blocks(page: str, language: str = r"\w*") -> list[str]:
    """The contents of a page's code blocks in a language."""
    return [body for _, body in re.findall(rf"^```({language})\n(.*?)^```$", TEXTS[page], re.M | re.S)]


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S)


def commands(page: str) -> list[list[str]]:
    """Every `bash train.sh ...` and `python X.py ...` of a page as a list of words, from blocks and from the prose."""
    code = [re.sub(r"(^|\s+)#\s.*", "", line) for body in blocks(page, "bash") for line in body.splitlines()]
    code += re.findall(r"`([^`\n]+)`", prose(page))
    found = [re.findall(r"(?:bash|python) [\w/]+\.(?:sh|py)\b[^&|]*", line) for line in code]
    return [shlex.split(command) for line in found for command in line]


def check_flags(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch):
    """Parses flags as the script does; raises an error for an unknown flag."""
    path = ROOT / script
    module = importlib.import_module(path.stem) if path.parent == ROOT else import_script(path)
    if hasattr(module, "parse_args"):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        module.parse_args()
        return
    kinds = {value for key, value in vars(module).items() if key.endswith("Arguments")} - {TrainingArguments}
    own = {kind for kind in kinds if kind.__module__ == module.__name__}
    (kind,) = own or kinds
    parse_command_line(kind, flags)


def own_arguments(script: Path) -> type | None:
    """The dataclass of a script's arguments; None if the script has none of its own."""
    module = import_script(script)
    kinds = [value for key, value in vars(module).items() if key.endswith("Arguments")]
    return next((kind for kind in kinds if kind.__module__ == module.__name__), None)


@every_page
def test_commands_use_scripts_and_flags_that_exist(page, monkeypatch):
    for _, script, *flags in commands(page):
        script = script.removeprefix("/path/to/")
        if script == "train.sh":
            script = "train_qlora.py"
        if script.startswith("tests/"):
            assert (ROOT / script).is_file()
        elif not {"--help", "--help_all"} & set(flags):
            check_flags(script, flags, monkeypatch)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != "CHANGELOG.md"]
)  # CHANGELOG.md names flags of earlier releases
def test_flags_named_in_the_text_exist(page):
    kinds = [FinetuneArguments, InferenceArguments, *map(own_arguments, ROOT.glob("scripts/*.py"))]
    known = {name for kind in kinds if kind for name in shown_flags(kind)} | {"--help", "--help_all", "--overwrite"}
    known |= {f"--{name}" for name in training_argument_names()}
    named = {word for code in re.findall(r"`(--[^`]+)`", prose(page)) for word in code.split() if word[:2] == "--"}
    assert named <= known


def test_tables_of_flags_are_those_of_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["update_docs.py", "--check"])
    import_script(ROOT / "scripts" / "update_docs.py").main()


def test_help_shows_few_flags(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(FinetuneArguments, ["--help"])
    assert len(re.findall(r"^  -", capsys.readouterr().out, re.M)) <= 17


@pytest.mark.parametrize("page", READMES)
def test_readme_is_short(page):
    assert len(TEXTS[page].splitlines()) <= 250


@pytest.mark.parametrize("page", ["docs/training.md", "docs/training_zh.md"])
def test_json_is_the_shipped_one(page):
    (shown,) = [body for body in blocks(page, "json") if "output_dir" in body]
    assert shown.strip() == (ROOT / "chatGLM_6B_QLoRA.json").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/guide_zh.md"])
def test_settings_and_snippets_of_the_guide_work(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (settings,) = [body for body in blocks(page, "json") if "output_dir" in body]
    Path("my.json").write_text(settings, encoding="utf-8")
    read_training_args("my.json")
    Path("rows.jsonl").write_text(example_rows(page), encoding="utf-8")
    assert len(list(read_rows("rows.jsonl"))) == 3
    Path("answers.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": " "}\n')
    labels = Path("saved_files/my_adapter/evaluation_greedy/predictions.jsonl")
    labels.parent.mkdir(parents=True)
    labels.write_text('{"base": "a", "adapter": "b ", "reference": "b"}\n')
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page, "exec"), {})
    assert len(list(read_rows("self.jsonl"))) == 32 and len(list(read_rows("general.jsonl"))) == 1


def example_rows(page: str, with_tools: bool = False) -> str:
    """The example rows of a page, as the text of a file; those with tools are for one model only."""
    rows = [body for body in blocks(page, "json") if "output_dir" not in body]
    return "".join(body for body in rows if ('"tools"' in body) == with_tools)


@data_pages
def test_example_rows_are_accepted(page, rows_file):
    rows_file.write_text(example_rows(page), encoding="utf-8")
    assert len(list(read_rows(str(rows_file)))) == 5
    rows_file.write_text(example_rows(page, with_tools=True), encoding="utf-8")
    assert [row["turns"] for row in read_rows(str(rows_file))] == [[1, 2]] * 4


@data_pages
def test_shown_samples_are_those_of_the_example_rows(page, rows_file, genuine_tokenizer):
    rows_file.write_text(example_rows(page), encoding="utf-8")
    samples = load_samples(str(rows_file), SampleEncoder(genuine_tokenizer, "", 512, 1536))
    shown = "\n".join(show_sample(sample, genuine_tokenizer, color=False) for sample in samples)
    assert shown + "\n" in blocks(page, "text")


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith("_zh.md")])
def test_chinese_and_latin_text_are_separated_by_a_space(page):
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose(page))
    han, latin = "[\u4e00-\u9fff]", "[A-Za-z0-9`%]"
    assert not re.findall(rf".{{0,9}}(?:{han}{latin}|{latin}{han}).{{0,9}}", text)


@every_page
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'src="([^"]+)"', prose(page))
    for target in targets:
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = ((ROOT / page).parent / path if path else ROOT / page).resolve()
        assert linked.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)", prose(str(linked.relative_to(ROOT))), re.M)
            assert fragment in map(anchor, headings), target


def anchor(heading: str) -> str:
    """The fragment that GitHub makes of a heading: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_list_of_files_is_complete():
    (listed,) = [body for body in blocks("docs/architecture.md", "text") if body.startswith("train.sh ")]
    paths = [line.split()[0] for line in listed.splitlines()]
    assert all((ROOT / path).exists() for path in paths)
    parts = ("*.py", "chatglm*/**/*.py", "glm_*/**/*.py", "qlora/**/*.py", "scripts/**/*.py")
    modules = {str(path.relative_to(ROOT)) for part in parts for path in ROOT.glob(part)}
    assert {path for path in paths if path.endswith(".py")} == {path for path in modules if "__init__" not in path}


@pytest.mark.parametrize("page", READMES)
def test_tree_has_every_folder(page):
    (tree,) = [body for body in blocks(page, "text") if body.startswith("train.sh ")]
    listed = {line.split()[0] for line in tree.splitlines()}
    parts = ("chatglm", "chatglm2", "glm_models", "glm_shared", "glm_kernels", "qlora")
    parts += ("scripts", "docs", "tests", "data", "pics", "THUDM")
    folders = {f"{part}/" for part in parts} | {f"qlora/{path.parent.name}/" for path in ROOT.glob("qlora/*/*.py")}
    assert {path for path in listed if path.endswith("/")} == folders
    assert all((ROOT / path).exists() for path in listed)


@troubleshooting_pages
def test_quoted_messages_are_those_of_the_code(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as no_folder:
        check_checkpoint("my_model")
    with pytest.raises(ValueError) as unknown_flag:
        parse_command_line(FinetuneArguments, ["--lora_rnak=8"])
    for raised in (no_folder, unknown_flag):
        assert f"error: {raised.value}\n" in TEXTS[page]


@troubleshooting_pages
def test_explained_messages_are_in_the_code(page):
    sources = [path for part in ("chatglm", "chatglm2", "qlora") for path in ROOT.glob(f"{part}/**/*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    code += "CUDA out of memory, Failed to find C compiler"  # messages of torch and Triton
    table = re.search(r"^\| there is no folder.*?(\n\n|\Z)", TEXTS[page], re.M | re.S).group()
    for cell in re.findall(r"^\| (.*?) \|", table, re.M):
        message = re.sub(r"（.*）|, during training", "", cell).replace("line N", "line {self.line}")
        assert all(piece.strip() in code for piece in re.split("[;…]", message)), message


def test_tests_named_in_reliability_exist():
    rows = re.findall(r"^\| .*", TEXTS["docs/reliability.md"], re.M)[2:]  # without the header of the table
    assert len(rows) > 10
    for row in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", row)
        code = "".join((ROOT / path).read_text(encoding="utf-8") for path in files)
        assert files and all(f"\ndef {test}(" in code for test in re.findall(r"`(test_\w+)`", row)), row


def test_section_named_in_messages_exists():
    # HOW_TO_GET in qlora/checkpoint.py names it.
    assert re.search(r"^## Weights$", TEXTS["README.md"], re.M)
    assert re.search(r"^## .*Weights", TEXTS["README_zh.md"], re.M)


def test_continuous_integration_finds_the_two_commands():
    patterns = re.findall(r"grep -m1 '(.*)' README", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(patterns) == 2
    for pattern in patterns:
        assert all(re.search(pattern, TEXTS[page], re.M) for page in READMES), pattern


@pytest.mark.parametrize("page", READMES)
def test_python_example_runs(page, tiny_checkpoint, tmp_path, monkeypatch):
    add_lora(
        load_quantized_model(str(tiny_checkpoint), torch.float32), 4, 32, 0.0, ["query_key_value"]
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(chatglm.ChatGLMTokenizer, "chat_length", 80)
    (code,) = blocks(page, "python")
    replacements = {
        "THUDM/chatglm-6b": str(tiny_checkpoint),
        "saved_files/chatGLM_6B_QLoRA_t32": str(tmp_path),
        "cuda": "cpu",
    }
    for value, replacement in replacements.items():
        assert f'"{value}"' in code
        code = code.replace(f'"{value}"', repr(replacement))
    names = {}
    exec(code, names)
    assert isinstance(names["reply"], str) and len(names["history"]) == 2


def test_every_flag_has_a_help_sentence():
    for kind in (FinetuneArguments, InferenceArguments):
        assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(kind))
