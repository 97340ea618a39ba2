"""The demo: makes a tiny model, fine-tunes it and asks it, each with the program that a user would start for it.

The programs run as processes, with command lines that could be typed; nothing is imported from them.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora.arguments import REPOSITORY, FinetuneArguments, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback
from qlora.startup import quick_imports
from qlora.training.processes import LAUNCHED_BY_TORCHRUN

INTRODUCTION = (
    "Demo: a tiny model made on the spot, fine-tuned by the same code as the real one. No weights, no GPU needed."
)
MAKER = ("scripts/make_tiny_checkpoint.py", "--architecture")


def run_demo(architecture: str, flags: list[str]):
    """Makes the tiny model, unless it is there, fine-tunes it, shows answers before and after.

    With `--check` or `--dry_run` it says what it would do.

    Args:
        architecture: chatglm, chatglm2 or chatglm3.
        flags: of train_qlora.py, as the user typed them; they come after those of the demo.
    Raises:
        SystemExit: a wrong flag, found before anything is deleted; or a program failed, with its exit status.
    """
    model, own_adapter = in_repository(f"THUDM/{architecture}-tiny"), adapter_of(architecture)
    flags = without_demo(flags, architecture)
    with message_instead_of_traceback():
        args = parse_command_line(FinetuneArguments, [*settings(model, own_adapter), *flags])
        adapter = read_output_dir(args)
        earlier_demo = adapter if is_earlier_demo(adapter, own_adapter) else None
    print(INTRODUCTION)
    if args.check is not None or args.dry_run is not None:
        report(architecture, model, own_adapter, earlier_demo, flags)
        return
    print("\n1/3 Making a tiny model")
    if is_made(model):
        print(f"{model} is there, from an earlier demo")
    else:
        anew = "Nothing of the tiny model is kept; the same command begins anew."
        start(*MAKER, architecture, "--output_dir", model, when_interrupted=anew)
    print("\n2/3 Fine-tuning")
    with message_instead_of_traceback():
        if is_earlier_demo(adapter, own_adapter):  # another demo may have begun there meanwhile
            shutil.rmtree(adapter)
    kept = f"The tiny model in {model} is kept; the same command fine-tunes it."
    start("train_qlora.py", *settings(model, own_adapter), *flags, when_interrupted=kept)
    print("\n3/3 Answers before and after")
    with_adapter = ["--adapter_path", adapter]
    further = commands(with_adapter)
    kept = f"The adapter in {adapter} is kept. To go on with it: {as_typed(further[0])}"
    prompts = ["--prompt_file", in_repository("data/dev.jsonl"), "--max_prompts", "3"]
    start("inference_qlora.py", *with_adapter, *prompts, when_interrupted=kept)
    print("\nGo on with it:", *map(as_typed, further), sep="\n  ")


def report(architecture: str, model: str, own_adapter: str, earlier_demo: str | None, flags: list[str]):
    """Says what the demo would do; nothing is trained, and nothing deleted.

    What is checked of the fine-tuning needs a tokenizer and a model, trained or not. Where there is none yet, one that
    is not trained is made in a temporary folder, which takes seconds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        print("\n1/3 Making a tiny model")
        if is_made(model):
            print(f"{model} is there, from an earlier demo")
        else:
            print(f"{model} would be made, in about a minute; one that is not trained is checked in its place")
            model = str(Path(scratch, Path(model).name))
            start(*MAKER, architecture, "--output_dir", model, "--max_steps", "0")
        print("\n2/3 Fine-tuning")
        if earlier_demo:
            print(f"{earlier_demo}, from an earlier demo, would be deleted; a new folder is checked in its place")
            own_adapter += ".new"
        start("train_qlora.py", *settings(model, own_adapter), *flags)
    print("\n3/3 Answers before and after\nThree prompts of data/dev.jsonl would be answered")


def settings(model: str, adapter: str) -> list[str]:
    """The demo's flags of train_qlora.py."""
    of_json = ["--train_args_json", in_repository("scripts/demo.json"), "--eval_data_path", "none"]
    return [*of_json, "--model_name_or_path", model, "--output_dir", adapter]


def commands(with_adapter: list[str]) -> list[list[str]]:
    """What can be done with the demo's adapter, as commands of the interpreter."""
    inference, evaluation = in_repository("inference_qlora.py"), in_repository("scripts/evaluate_qlora.py")
    install = ["-m", "pip", "install"]
    return [
        [inference, *with_adapter, "--chat"],
        [*install, "gradio"],
        [inference, *with_adapter, "--web"],
        [*install, "jieba", "rouge-chinese", "nltk"],
        [evaluation, *with_adapter, "--max_prompts", "50"],
    ]


def is_made(model: str) -> bool:
    """Whether the tiny model is there; its maker writes config.json last."""
    return Path(model, "config.json").is_file()


def adapter_of(architecture: str) -> str:
    """Where the adapter of a demo is."""
    return in_repository(f"saved_files/{architecture}_tiny_demo")


def without_demo(flags: list[str], architecture: str) -> list[str]:
    """Flags without `--demo` and its value."""
    kept: list[str] = []
    for before, word in zip(["", *flags], flags, strict=False):
        is_value = before == "--demo" and word == architecture
        if not (is_value or word == "--demo" or word.startswith("--demo=")):
            kept.append(word)
    return kept


def read_output_dir(args: FinetuneArguments) -> str:
    """Where the run writes its adapter. Nothing is logged: the program that trains reads the same once more.

    Raises:
        FileNotFoundError, ValueError: see `read_training_args`; the demo was started by torchrun.
    """
    if LAUNCHED_BY_TORCHRUN in os.environ:
        raise ValueError("--demo starts its programs itself, each once: use `python train_qlora.py --demo`.")
    with quick_imports():
        from qlora.training.training_args import read_training_args

    logging.disable()
    try:
        return read_training_args(args.train_args_json, args.training_args).training_args.output_dir
    finally:
        logging.disable(logging.NOTSET)


def is_earlier_demo(adapter: str, own_adapter: str) -> bool:
    """Whether the folder of the adapter holds an earlier demo, and is not one that the user named.

    Raises:
        ValueError: another demo is writing there.
    """
    from qlora.training.run_lock import check_not_locked

    if Path(adapter).resolve() != Path(own_adapter).resolve() or not Path(adapter).exists():
        return False
    check_not_locked(adapter)
    return True


def start(program: str, *flags: str, when_interrupted: str = ""):
    """Runs a program of the repository.

    Args:
        program: its path there.
        flags: of the program.
        when_interrupted: what is printed after its own message if Ctrl-C ends it.
    Raises:
        SystemExit: with its exit status, if it fails.
    """
    sys.stdout.flush()  # what was printed so far comes before the program's output
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]  # scripts/ import the project
    # A tiny model gains nothing from more threads, and loses where cores are shared. Windows has another encoding for
    # text that is redirected to a file, which may lack Chinese.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, in_repository(program), *flags], env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the program has received it, too, and ends with a message
        status = process.wait() or 130
    if status == 130 and when_interrupted:
        print(when_interrupted, file=sys.stderr)
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def as_typed(words: list[str]) -> str:
    """A command of the interpreter that runs, quoted as this system's shell reads it."""
    on_path = shutil.which("python")
    is_this = on_path is not None and Path(on_path).parent == Path(sys.executable).parent
    command = ["python" if is_this else sys.executable, *words]
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)
