"""README.md and README_zh.md say the same, and what they say of files, flags, settings and messages is true."""

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

import chatglm.chat
from qlora.arguments import FinetuneArguments, InferenceArguments, parse_command_line
from qlora.checkpoint import check_checkpoint
from qlora.data.dataset import SampleEncoder, load_samples
from qlora.data.rows import read_rows
from qlora.loading import add_lora, load_quantized_model
from qlora.training.preflight_report import show_sample

NAMES = ("README.md", "README_zh.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
PAGES = (*NAMES, "THUDM/README.md", "data/README.md")
both = pytest.mark.parametrize("name", NAMES)


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """The contents of the code blocks in a language."""
    return [body for _, body in re.findall(rf"^```({language})\n(.*?)^```$", text, re.M | re.S)]


def without_comments(code: str) -> list[str]:
    """Lines without the comments, which are in each page's language."""
    return [re.sub(r"(^|\s+)#\s.*", "", line) for line in code.splitlines()]


def prose(text: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Every `bash train.sh ...` and `python X.py ...` of a page as a list of words, from blocks and from the prose."""
    code = [line for body in blocks(text, "bash") for line in without_comments(body)]
    code += re.findall(r"`([^`\n]+)`", prose(text))
    found = [re.findall(r"(?:bash|python) [\w/]+\.(?:sh|py)\b[^&|]*", line) for line in code]
    return [shlex.split(command) for line in found for command in line]


def flag_table(text: str) -> list[list[str]]:
    """The rows of the table of flags: flag, default, meaning."""
    rows = re.findall(r"^\| (`--\w+`) \|(.*)\|(.*)\|$", text, re.M)
    return [[cell.strip().replace("`", "") for cell in row] for row in rows]


def shown_default(field: dataclasses.Field) -> str:
    """A default as the table shows it."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "" if value is None else " ".join(value) if isinstance(value, list) else str(value)


def check_flags(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch):
    """Parses flags as the script does; raises where it does not know one."""
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
    """The dataclass of a script's arguments, if it has one of its own."""
    module = import_script(script)
    return next((value for key, value in vars(module).items() if key.endswith("Arguments")), None)


@pytest.mark.parametrize("page", PAGES)
def test_commands_use_scripts_and_flags_that_exist(page, monkeypatch):
    found = commands((ROOT / page).read_text(encoding="utf-8"))
    assert found
    for _, script, *flags in found:
        if script == "train.sh":
            script, flags = "train_qlora.py", [flag for flag in flags if flag != "--demo"]
        if flags != ["--help"]:
            check_flags(script, flags, monkeypatch)


@both
def test_flags_named_in_the_text_exist(name):
    kinds = [FinetuneArguments, InferenceArguments, *map(own_arguments, ROOT.glob("scripts/*.py"))]
    fields = [field for kind in kinds if kind for field in dataclasses.fields(kind)]
    known = {name for field in fields for name in (f"--{field.name}", *field.metadata.get("aliases", ()))}
    named = {
        word for code in re.findall(r"`(--[^`]+)`", prose(TEXTS[name])) for word in code.split() if word[:2] == "--"
    }
    assert named <= known | {"--help"}


@both
def test_json_is_the_shipped_one(name):
    (shown,) = [body for body in blocks(TEXTS[name], "json") if "output_dir" in body]
    assert shown.strip() == (ROOT / "chatGLM_6B_QLoRA.json").read_text(encoding="utf-8").strip()


def example_rows(text: str) -> list[str]:
    """The rows of the chapter on data."""
    return [body for body in blocks(text, "json") if "instruction" in body]


@both
def test_example_rows_are_accepted(name, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(example_rows(TEXTS[name])), encoding="utf-8")
    assert len(list(read_rows(str(path)))) == 3


@both
def test_example_rows_look_to_the_model_as_shown(name, tmp_path, genuine_tokenizer):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(example_rows(TEXTS[name])), encoding="utf-8")
    samples = load_samples(str(path), SampleEncoder(genuine_tokenizer, "", 512, 1536))
    shown = "\n".join(show_sample(sample, genuine_tokenizer, colour=False) for sample in samples)
    assert shown + "\n" in blocks(TEXTS[name], "text")


@both
def test_flag_table_has_every_flag_with_its_default(name):
    expected = [(f"--{field.name}", shown_default(field)) for field in dataclasses.fields(FinetuneArguments)]
    assert [(flag, default) for flag, default, _ in flag_table(TEXTS[name])] == expected


def test_meanings_of_flags_are_those_of_help():
    expected = [field.metadata["help"] for field in dataclasses.fields(FinetuneArguments)]
    assert [meaning for _, _, meaning in flag_table(TEXTS["README.md"])] == expected


def test_both_pages_have_the_same_structure():
    english, chinese = TEXTS.values()
    for pattern in (r"^(#+) ", r"^```(\w*)", r"^(\|) ", r"^(-|\d+\.) ", r"^<!-- (.*) -->"):
        assert re.findall(pattern, english, re.M) == re.findall(pattern, chinese, re.M), pattern


def test_both_pages_have_the_same_code():
    english, chinese = ([without_comments(body) for body in blocks(TEXTS[name])] for name in NAMES)
    for one, other in zip(english, chinese, strict=True):
        if one[0].startswith("train.sh "):  # the list of files, explained in each page's language
            one, other = ([line.split()[0] for line in lines] for lines in (one, other))
        assert one == other


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = prose((ROOT / page).read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if fragment:
            assert fragment in map(anchor, re.findall(r"^#+ (.*)", prose(linked.read_text(encoding="utf-8")), re.M))


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, punctuation dropped, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@both
def test_list_of_files_is_complete(name):
    (listed,) = [body for body in blocks(TEXTS[name], "text") if body.startswith("train.sh ")]
    paths = [line.split()[0] for line in listed.splitlines()]
    assert all((ROOT / path).exists() for path in paths)
    modules = {
        str(path.relative_to(ROOT))
        for part in ("chatglm", "glm_kernels", "qlora", "scripts")
        for path in ROOT.glob(f"{part}/**/*.py")
    }
    modules |= {path.name for path in ROOT.glob("*.py")}
    assert {path for path in paths if path.endswith(".py")} == {path for path in modules if "__init__" not in path}


@both
def test_quoted_messages_are_those_of_the_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as no_folder:
        check_checkpoint("THUDM/chatglm-6b")
    with pytest.raises(ValueError) as unknown_flag:
        parse_command_line(FinetuneArguments, ["--lora_rnak=8"])
    for raised in (no_folder, unknown_flag):
        assert f"error: {raised.value}\n" in TEXTS[name]


@both
def test_messages_explained_are_in_the_code(name):
    sources = [
        path.read_text(encoding="utf-8") for part in ("chatglm", "qlora") for path in ROOT.glob(f"{part}/**/*.py")
    ]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(sources))  # strings over several lines
    code += "CUDA out of memory, Failed to find C compiler"  # torch's and Triton's
    table = re.search(r"^\| there is no folder.*?\n\n", TEXTS[name], re.M | re.S).group()
    for cell in re.findall(r"^\| (.*?) \|", table, re.M):
        message = re.sub(r"（.*）|, during training", "", cell).replace("line N", "line {number}")
        assert all(piece.strip() in code for piece in re.split("[;…]", message)), message


@both
def test_tests_that_keep_promises_exist(name):
    (table,) = re.findall(r"^## (?:Reliability|可靠性)\n(.*?)^## ", TEXTS[name], re.M | re.S)
    for row in re.findall(r"^\| .*", table, re.M)[2:]:  # without the head
        files = re.findall(r"`(tests/[\w/]+\.py)`", row)
        code = "".join((ROOT / path).read_text(encoding="utf-8") for path in files)
        assert files and all(f"\ndef {test}(" in code for test in re.findall(r"`(test_\w+)`", row)), row


def test_section_that_messages_name_exists():
    # qlora/checkpoint.py: HOW_TO_GET.
    assert re.search(r"^## Weights$", TEXTS["README.md"], re.M)
    assert re.search(r"^## .*Weights", TEXTS["README_zh.md"], re.M)


def test_continuous_integration_finds_the_two_commands():
    for pattern in re.findall(r"grep -m1 '(.*)'", (ROOT / ".ci" / "run").read_text(encoding="utf-8")):
        assert all(re.search(pattern, text, re.M) for text in TEXTS.values()), pattern


def test_python_example_runs(tiny_checkpoint, tmp_path, monkeypatch):
    add_lora(
        load_quantized_model(str(tiny_checkpoint), torch.float32), 4, 32, 0.0, ["query_key_value"]
    ).save_pretrained(tmp_path)
    monkeypatch.setitem(chatglm.chat.CHAT_DEFAULTS, "max_length", 80)
    (code,) = blocks(TEXTS["README.md"], "python")
    here = {"THUDM/chatglm-6b": str(tiny_checkpoint), "saved_files/chatGLM_6B_QLoRA_t32": str(tmp_path), "cuda": "cpu"}
    for there, stand_in in here.items():
        assert f'"{there}"' in code
        code = code.replace(f'"{there}"', repr(stand_in))
    names = {}
    exec(code, names)
    assert isinstance(names["reply"], str) and len(names["history"]) == 2
