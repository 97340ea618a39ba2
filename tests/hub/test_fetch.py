"""Models by name, from a stand-in of the hubs' HTTP interfaces on this machine."""

import builtins
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import (
    GOLDEN_ADAPTER,
    GOLDEN_CHECKPOINT,
    ROOT,
    copy_tokenizer,
    error_of,
    flags_of,
    import_script,
    largest_file,
    run_main,
    write_json,
)
from hub_server import COMMIT, Hub, reset, serve_hub, use_hub
from huggingface_hub import ModelCard, ModelInfo, constants

import train_qlora
from qlora.arguments import DownloadArguments, FinetuneArguments
from qlora.checkpoint import check_checkpoint, needed_files
from qlora.hub import fetch, hugging_face
from qlora.hub.fetch import fetch_model, hub_name
from qlora.hub.repository import SOURCE_FILE, model_source
from qlora.training.preflight import run_preflight
from qlora.training.same_run import RUN_FILE
from qlora.units import readable_size

NAME = "THUDM/chatglm-6b"
SHARD = "pytorch_model-00001-of-00002.bin"
TOLD = DownloadArguments(download=True)


@pytest.fixture(scope="module")
def golden_files(tokenizer, tmp_path_factory) -> dict[str, bytes]:
    """The files of a small model, and others that its repository may have."""
    folder = shutil.copytree(GOLDEN_CHECKPOINT, tmp_path_factory.mktemp("golden") / "copy")
    copy_tokenizer(tokenizer, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = {"README.md": b"# a model", "modeling_chatglm.py": b"raise SystemExit", "extra/pytorch_model.bin": b"no"}
    return files | others | {"MODEL_LICENSE": b"terms"}


@pytest.fixture
def hub(golden_files, tmp_path, monkeypatch):
    """A hub with the model, which huggingface_hub asks; an empty current folder, and no terminal."""
    with serve_hub() as server:
        server.models[NAME] = dict(golden_files)
        use_hub(server, monkeypatch)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def terminal(monkeypatch):
    """A terminal on which the user types an answer; the function that sets it returns the questions."""

    def type_answer(answer: str | BaseException) -> list[str]:
        questions: list[str] = []

        def read(question: str) -> str:
            questions.append(question)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(builtins, "input", read)
        return questions

    return type_answer


def problem(flags: DownloadArguments = TOLD, path: str = NAME) -> str:
    """The message with which fetching a model ends."""
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        fetch_model(path, flags)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".") and not message.endswith("..")
    return message


def ranges(hub: Hub, file: str) -> list[str | None]:
    """The ranges of a file that were asked for; None for the whole file."""
    return [part for _, path, part in hub.requests if path.endswith(file)]


# What is downloaded.


def test_model_is_downloaded_by_name(hub, golden_files):
    fetch_model(NAME, TOLD)
    config = check_checkpoint(NAME)
    assert config.num_layers == json.loads(golden_files["config.json"])["num_layers"]
    needed = needed_files(NAME, golden_files)
    assert {path.name for path in Path(NAME).iterdir()} == {*needed, SOURCE_FILE}
    assert all((Path(NAME) / name).read_bytes() == golden_files[name] for name in needed)
    assert hub.files_asked() == needed and not any(name.endswith(".py") for name in needed)
    assert model_source(NAME) == {"hub": "huggingface", "repository": NAME, "revision": COMMIT}
    assert os.listdir("THUDM") == ["chatglm-6b"]
    fetch_model(NAME, TOLD)
    assert len(hub.files_asked()) == len(needed)  # nothing is asked for a folder that is there


def test_default_path_is_that_model_wherever_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "REPOSITORY", tmp_path / "repository")
    assert hub_name(str(tmp_path / "repository" / "THUDM" / "chatglm-6b")) == NAME
    monkeypatch.chdir(tmp_path)
    assert hub_name("THUDM/chatglm2-6b") == "THUDM/chatglm2-6b"


def test_name_that_its_authors_gave_up_is_looked_up_under_the_new_one(hub):
    hub.models["zai-org/chatglm-6b"] = hub.models.pop(NAME)
    fetch_model(NAME, TOLD)
    assert model_source(NAME)["repository"] == "zai-org/chatglm-6b"


def test_pinned_revision(hub):
    fetch_model(NAME, DownloadArguments(download=True, revision="v1"))
    assert f"/api/models/{NAME}/revision/v1" in [path for _, path, _ in hub.requests]
    assert all(f"/resolve/{COMMIT}/" in path for _, path, _ in hub.requests if "/resolve/" in path)
    shutil.rmtree(NAME)
    assert f"has no revision v2 of {NAME}" in problem(DownloadArguments(download=True, revision="v2"))


def test_needed_files():
    tokenizer = ["ice_text.model", "tokenizer_config.json"]
    names = ["x.py", "config.json", *tokenizer, "pytorch_model.bin", "model.safetensors.index.json"]
    names += [f"model-0000{n}-of-00002.safetensors" for n in (2, 1)] + ["model-1/../x-of-2.safetensors", "LICENSE"]
    assert needed_files("a/b", names) == ["config.json", *tokenizer, "LICENSE", *names[5:6], *names[7:5:-1]]
    assert needed_files("a/b", names[:5]) == names[1:5]
    with pytest.raises(ValueError, match=r"a/b has no ice_text\.model, no model\.safetensors\.index\.json or "):
        needed_files("a/b", ["config.json", "tokenizer_config.json"])


def test_other_model_is_refused_before_its_weights_are_downloaded(hub):
    hub.models[NAME]["config.json"] = b'{"model_type": "llama"}'
    assert "holds a model of type 'llama'" in problem()
    assert hub.files_asked() == ["config.json"] and not Path(NAME).exists()


# Interruptions and damage.


def test_ctrl_c_and_the_same_command_once_more(hub, golden_files, monkeypatch):
    def press_ctrl_c(connection):
        while staged.stat().st_size < 50_000:
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)
        assert interrupted.wait(10)

    main_thread, interrupted = threading.main_thread().ident, threading.Event()
    staged = Path("THUDM/chatglm-6b.download").absolute() / SHARD
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores the signal
    hub.breaks[SHARD] = (100_000, press_ctrl_c)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            fetch_model(NAME, TOLD)
    finally:
        signal.signal(signal.SIGINT, handler)
        interrupted.set()
    size = staged.stat().st_size
    assert "and the same command goes on from there" in str(raised.value)
    assert not Path(NAME).exists() and 50_000 <= size <= 100_000
    hub.requests.clear()
    message = problem(DownloadArguments())
    here = sum(path.stat().st_size for path in staged.parent.iterdir())
    assert f", of which {readable_size(here)} are in {staged.parent}. " in message
    fetch_model(NAME, TOLD)
    assert ranges(hub, SHARD) == [f"bytes={size}-"]
    assert (Path(NAME) / SHARD).read_bytes() == golden_files[SHARD]
    assert check_checkpoint(NAME)


def test_broken_connection_and_the_same_command_once_more(hub, golden_files, monkeypatch):
    hub.breaks[SHARD] = (100_000, reset)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)
    message = problem()
    assert message.startswith(f"{NAME} is not complete: the download broke off (")
    hub.requests.clear()
    fetch_model(NAME, TOLD)
    (part,) = ranges(hub, SHARD)
    assert 0 < int(part.removeprefix("bytes=").removesuffix("-")) <= 100_000
    assert (Path(NAME) / SHARD).read_bytes() == golden_files[SHARD]


@pytest.mark.parametrize("size", [1_000, 312_233, 400_000], ids=["a part", "all of it", "too much"])
def test_damaged_remains_of_a_file_are_replaced(hub, golden_files, size):
    staging = Path("THUDM/chatglm-6b.download")
    staging.mkdir(parents=True)
    (staging / SHARD).write_bytes(bytes(size))
    (staging / "old.bin").write_bytes(b"of another revision")
    fetch_model(NAME, TOLD)
    assert len(golden_files[SHARD]) == 312_233
    assert (Path(NAME) / SHARD).read_bytes() == golden_files[SHARD] and not (Path(NAME) / "old.bin").exists()


@pytest.mark.parametrize("file", [SHARD, "tokenizer_config.json"])  # with a SHA-256, and with git's SHA-1
def test_file_with_a_wrong_checksum_is_refused_and_deleted(hub, file):
    hub.damaged = {file}
    message = problem()
    assert f"{file} of {NAME} came with another checksum" in message
    staging = Path("THUDM/chatglm-6b.download")
    assert not Path(NAME).exists() and not (staging / file).exists() and (staging / "config.json").exists()
    hub.damaged = set()
    fetch_model(NAME, TOLD)
    assert check_checkpoint(NAME)


def test_index_that_names_other_files_ends_in_a_message(hub):
    index = hub.models[NAME]["pytorch_model.bin.index.json"]
    hub.models[NAME]["pytorch_model.bin.index.json"] = index.replace(b"-00002-of-00002", b"-00003-of-00003")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 weight files are missing, the first is .*Download"):
        fetch_model(NAME, TOLD)
    assert not Path(NAME).exists()


def test_disk_without_room_is_found_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 400_000))
    assert "The disk has 0.4 MB free, which is too little: make room" in problem()
    assert not hub.files_asked() and not Path("THUDM").exists()


def test_disk_that_is_full_during_the_download(hub):
    with largest_file(200_000):
        message = problem()
    assert "must not be so large. Make room: " in message and "the same command goes on from there" in message
    fetch_model(NAME, TOLD)
    assert check_checkpoint(NAME)


def test_second_process_waits_for_the_first(hub, tmp_path):
    staging = Path("THUDM/chatglm-6b.download")
    staging.mkdir(parents=True)
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    second = threading.Thread(target=fetch_model, args=(NAME, TOLD))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    staging.rename(NAME)
    os.close(descriptor)
    second.join(10)
    assert not second.is_alive() and not hub.files_asked()


def test_folder_of_another_process_is_kept(hub):
    Path(NAME).mkdir(parents=True)
    fetch.download(hugging_face.find(NAME, None), Path("THUDM/chatglm-6b.download"), Path(NAME))
    assert os.listdir("THUDM") == ["chatglm-6b"] and not hub.files_asked()


# Who is asked, and what is said.


def test_script_needs_to_be_told(hub):
    message = problem(DownloadArguments())
    assert message.startswith(f"there is no folder {NAME}. Hugging Face has {NAME} (revision {COMMIT}): 7 files, ")
    assert " GB free. " in message and message.endswith("add --download to the command.")
    assert not hub.files_asked() and not Path("THUDM").exists()


@pytest.mark.parametrize("answer", ["y", "n", "", EOFError()], ids=["yes", "no", "nothing", "end"])
def test_user_at_a_terminal_is_asked(hub, terminal, answer):
    questions = terminal(answer)
    if answer == "y":
        fetch_model(NAME, DownloadArguments())
    else:
        assert "add --download" in problem(DownloadArguments())
    (question,) = questions
    assert question.startswith(f"there is no folder {NAME}. ") and question.endswith("Download them? [y/N] ")
    assert Path(NAME).exists() is (answer == "y")


def test_nobody_is_asked_by_one_of_several_processes_nor_by_a_report(hub, terminal, monkeypatch):
    questions = terminal("y")
    with pytest.raises(FileNotFoundError, match="add --download"):
        fetch_model(NAME, DownloadArguments(), may_ask=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "add --download" in problem(DownloadArguments())
    assert not questions


@pytest.mark.parametrize("content", ["nothing", "a file", "a link", "no model"])
def test_what_exists_is_never_looked_up(hub, content):
    Path("THUDM").mkdir()
    if content == "a file":
        Path(NAME).touch()
    elif content == "a link":
        Path(NAME).symlink_to("nowhere")
    else:
        Path(NAME).mkdir()
    if content == "no model":
        (Path(NAME) / "adapter_config.json").write_text("{}")
    if Path(NAME).is_dir():
        fetch_model(NAME, TOLD)
    else:
        assert f"there is no folder {NAME}. Download the files" in problem()
    assert not hub.requests


@pytest.mark.parametrize("path", ["./THUDM/chatglm-6b", "/THUDM/chatglm-6b", "a/b/c", "../a", "a/", "~/a"])
def test_other_paths_are_no_names(hub, path):
    assert f"there is no folder {path}. Download the files" in problem(path=path)
    assert not hub.requests


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "and HF_HUB_OFFLINE is set, so that it is not looked up on Hugging Face: unset it. Or copy" in problem()
    assert not hub.requests


def test_unreachable_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = problem()
    assert "and http://127.0.0.1:9 cannot be reached (" in message
    assert "name a mirror in the environment variable HF_ENDPOINT, or add --hub modelscope. " in message
    assert message.endswith(f'Or copy the files of {NAME} into this folder (README, "Weights").')
    assert "Download the files of THUDM/chatglm-6b, chatglm2-6b or chatglm3-6b" in problem(path="THUDM/chatglm-6bb")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, "GatedRepo"), f"the authors of {NAME} want you to accept its terms"),
        ((500, "Internal"), "500 Internal Server Error"),
    ],
)
def test_hub_that_refuses(hub, answer, message):
    hub.refused[NAME] = answer
    assert message in problem()


def test_hub_without_checksums(hub):
    info = ModelInfo(id=NAME, sha=COMMIT, siblings=[{"rfilename": name, "size": 1} for name in hub.models[NAME]])
    with pytest.raises(ValueError, match=f"tells no size and checksum of config.json in {NAME}"):
        hugging_face.repository(info)


def test_unknown_model(hub):
    assert f"there is no folder saved_files/my_adapter, and {hub.url} has no public model saved_files/my_adapter." in (
        problem(path="saved_files/my_adapter")
    )


# ModelScope.


@pytest.fixture(scope="module")
def scope_server(tmp_path_factory):
    """The one ModelScope of this process: its package reads the address once."""
    pytest.importorskip("modelscope")
    with serve_hub() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", server.url)
        patch.setenv("MODELSCOPE_CACHE", str(tmp_path_factory.mktemp("modelscope")))
        yield server


@pytest.fixture
def model_scope(hub, scope_server, golden_files):
    """ModelScope, where the model has another name."""
    scope_server.models, scope_server.damaged = {"ZhipuAI/chatglm-6b": dict(golden_files)}, set()
    scope_server.requests.clear()
    return scope_server


def test_model_scope_is_asked_for_its_own_name(model_scope, golden_files):
    told = DownloadArguments(download=True, hub="modelscope")
    message = problem(DownloadArguments(hub="modelscope"))
    assert "ModelScope has ZhipuAI/chatglm-6b (revision master): 7 files, " in message
    fetch_model(NAME, told)
    needed = needed_files(NAME, golden_files)
    assert {path.name for path in Path(NAME).iterdir()} == {*needed, SOURCE_FILE}
    assert all((Path(NAME) / name).read_bytes() == golden_files[name] for name in needed)
    assert check_checkpoint(NAME) and model_source(NAME)["repository"] == "ZhipuAI/chatglm-6b"
    asked = {path.rpartition("/repo/")[2] for _, path, _ in model_scope.requests if "/repo/" in path}
    assert asked == {"files", *needed}


def test_model_scope_refuses_a_wrong_checksum_too(model_scope):
    model_scope.damaged = {SHARD}
    assert problem(DownloadArguments(download=True, hub="modelscope")).startswith(
        "ZhipuAI/chatglm-6b is not complete: "
    )
    assert not Path(NAME).exists()


def test_unknown_model_on_model_scope(model_scope):
    assert "ModelScope does not list the files of a/b (" in problem(DownloadArguments(hub="modelscope"), "a/b")


def test_missing_package_of_model_scope(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "needs the package modelscope: pip install modelscope" in problem(DownloadArguments(hub="modelscope"))


# The programs.


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train_qlora", ["--eval_data_path", "none"]),
        ("inference_qlora", ["--adapter_path", "none"]),
        ("scripts/evaluate_qlora", ["--adapter_path", GOLDEN_ADAPTER]),
        ("scripts/merge_lora", ["--output_dir", "merged"]),
        ("scripts/quantize_checkpoint", ["--output_dir", "nf4"]),
        ("scripts/benchmark", ["--what", "load"]),
    ],
)
def test_every_program_takes_a_name(hub, program, flags):
    message = error_of(import_script(ROOT / f"{program}.py"), "--model_name_or_path", NAME, *flags)
    assert f"Hugging Face has {NAME} (revision {COMMIT})" in message and "add --download" in message


def test_run_downloads_its_model_and_notes_where_it_came_from(hub, tiny_checkpoint, train_file, tmp_path):
    hub.models[NAME] = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    args_json = write_json(tmp_path / "args.json", tmp_path / "out", max_steps=1, save_steps=1)
    run_main(train_qlora, *flags_of(args_json, NAME, train_file, "none", "--download"))
    run = json.loads((tmp_path / "out" / "checkpoint-1" / RUN_FILE).read_text(encoding="utf-8"))
    assert run["settings"]["--model_name_or_path"] == f"{NAME}, revision {COMMIT}"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"| base_model | {NAME}, revision {COMMIT} (huggingface) |" in card.text
    assert card.data.base_model == NAME and "| download |" not in card.text


def with_missing_file(train_file: Path, **flags) -> FinetuneArguments:
    paths = [str(train_file), "nowhere.jsonl"]
    return FinetuneArguments(model_name_or_path=NAME, train_data_path=paths, eval_data_path="none", **flags)


def test_check_says_what_would_be_downloaded_beside_other_problems(hub, train_file, terminal):
    questions = terminal("y")
    problems = "\n".join(run_preflight(with_missing_file(train_file, check=1)).problems)
    assert problems.count("there is no data file nowhere.jsonl") == problems.count("add --download") == 1
    assert not questions and not hub.files_asked()


def test_mistakes_are_reported_before_the_download(hub, train_file, terminal):
    with pytest.raises(ValueError, match="there is no data file nowhere"):
        run_preflight(with_missing_file(train_file, download=True))
    questions = terminal("y")
    assert any("nowhere" in problem for problem in run_preflight(with_missing_file(train_file)).problems)
    assert not questions and not hub.files_asked()
