"""The demo: makes a tiny model, fine-tunes it and asks it, each with the program that a user would start for it.

The programs run as processes, with command lines that could be typed; nothing is imported from them.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from qlora.arguments import REPOSITORY, FinetuneArguments, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback
from qlora.startup import quick_imports
from qlora.training.processes import LAUNCHED_BY_TORCHRUN

INTRODUCTION = (
    "Demo: a tiny model made on the spot, fine-tuned by the same code as the real one. No weights, no GPU needed."
)


def run_demo(architecture: str, flags: list[str]):
    """Makes the tiny model, unless it is there, fine-tunes it, shows answers before and after.

    Args:
        architecture: chatglm, chatglm2 or chatglm3.
        flags: of train_qlora.py, as the user typed them; they come after those of the demo.
    Raises:
        SystemExit: a wrong flag, found before anything is deleted; or a program failed, with its exit status.
    """
    model, own_adapter = (in_repository(f"THUDM/{architecture}-tiny"), adapter_of(architecture))
    settings = ["--train_args_json", in_repository("scripts/demo.json"), "--eval_data_path", "none"]
    settings += ["--model_name_or_path", model, "--output_dir", own_adapter]
    flags = [*settings, *without_demo(flags, architecture)]
    with message_instead_of_traceback():
        args = parse_command_line(FinetuneArguments, flags)
        adapter = read_output_dir(args)
    is_report = args.check is not None or args.dry_run is not None
    print(INTRODUCTION)
    print("\n1/3 Making a tiny model")
    if Path(model, "config.json").is_file():
        print(f"{model} is there, from an earlier demo")
    else:
        start("scripts/make_tiny_checkpoint.py", "--architecture", architecture, "--output_dir", model)
    print("\n2/3 Fine-tuning")
    if not is_report:
        delete_earlier_demo(adapter, own_adapter)
    start("train_qlora.py", *flags)
    if is_report:
        return
    print("\n3/3 Answers before and after")
    with_adapter = ["--adapter_path", adapter]
    start("inference_qlora.py", *with_adapter, "--prompt_file", in_repository("data/dev.jsonl"), "--max_prompts", "3")
    inference, evaluation = in_repository("inference_qlora.py"), in_repository("scripts/evaluate_qlora.py")
    install = ["-m", "pip", "install"]
    commands = (
        [inference, *with_adapter, "--chat"],
        [*install, "gradio"],
        [inference, *with_adapter, "--web"],
        [*install, "jieba", "rouge-chinese", "nltk"],
        [evaluation, *with_adapter, "--max_prompts", "50"],
    )
    print("\nGo on with it:", *map(as_typed, commands), sep="\n  ")


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


def delete_earlier_demo(adapter: str, own_adapter: str):
    """Deletes the folder of the adapter, if it is the demo's own and not the user's.

    Args:
        adapter: where the adapter will be.
        own_adapter: where that of a demo is, if the user names no other place.
    Raises:
        SystemExit: another demo is writing there, or the folder cannot be deleted.
    """
    from qlora.training.run_lock import check_not_locked

    if Path(adapter).resolve() == Path(own_adapter).resolve() and Path(adapter).exists():
        with message_instead_of_traceback():
            check_not_locked(adapter)
            shutil.rmtree(adapter)


def start(program: str, *flags: str):
    """Runs a program of the repository; SystemExit with its exit status if it fails."""
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
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def as_typed(words: list[str]) -> str:
    """A command of the interpreter that runs, quoted as this system's shell reads it."""
    on_path = shutil.which("python")
    is_this = on_path is not None and Path(on_path).parent == Path(sys.executable).parent
    command = ["python" if is_this else sys.executable, *words]
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)
