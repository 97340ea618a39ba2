"""Answer the same prompts with the base model and with the adapter.

python inference_qlora.py                                        # the adapter that `bash train.sh` leaves
python inference_qlora.py --prompt 类型#裤*风格#简约 --prompt 类型#裙*颜色#白色
python inference_qlora.py --prompt_file data/dev.jsonl --do_sample True
python inference_qlora.py --chat                                 # a conversation with the tuned model
"""

import logging
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizer, set_seed

from qlora.arguments import DEFAULT_PROMPT, InferenceArguments, choose_compute_dtype, parse_command_line
from qlora.data import read_prompts
from qlora.errors import message_instead_of_traceback
from qlora.generation import generate_answers
from qlora.loading import load_adapter, load_quantized_model, load_tokenizer


def main():
    with message_instead_of_traceback():
        args = parse_command_line(InferenceArguments)
        base_path = args.model_name_or_path or base_model_path(args.adapter_path)
        prompts = read_prompts(args.prompt_file) if args.prompt_file else args.prompt or [DEFAULT_PROMPT]
        tokenizer = load_tokenizer(base_path)
        model = load_adapter(
            load_quantized_model(base_path, choose_compute_dtype(args.compute_dtype, {})), args.adapter_path
        ).eval()
    set_seed(args.seed)
    if args.chat:
        converse(model, tokenizer, decoding(args))
    else:
        compare(model, tokenizer, prompts[: args.max_prompts], args.batch_size, decoding(args))


def base_model_path(adapter_path: str) -> str:
    """The base model that an adapter names as its own."""
    if not (Path(adapter_path) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"there is no adapter in {adapter_path} (no adapter_config.json). Train one with `bash train.sh`, or say "
            "where it is with --adapter_path."
        )
    return PeftConfig.from_pretrained(adapter_path).base_model_name_or_path


def decoding(args: InferenceArguments) -> dict:
    """Options of `generate`: greedy, or sampling as the official model does it."""
    sampling = {"do_sample": True, "top_p": args.top_p, "temperature": args.temperature}
    return {"max_new_tokens": args.max_new_tokens, **(sampling if args.do_sample else {"do_sample": False})}


def compare(model: PeftModel, tokenizer: PreTrainedTokenizer, prompts: list[str], batch_size: int, options: dict):
    """Prints each prompt with the answers before and after fine-tuning."""
    with model.disable_adapter():
        before = generate_answers(model, tokenizer, prompts, batch_size, **options)
    after = generate_answers(model, tokenizer, prompts, batch_size, **options)
    for prompt, base_answer, tuned_answer in zip(prompts, before, after, strict=True):
        print(f"\n输入 Input:  {prompt}\n微调前 Before: {base_answer}\n微调后 After:  {tuned_answer}")


def converse(model: PeftModel, tokenizer: PreTrainedTokenizer, options: dict):
    """A conversation on the terminal, the reply shown as it comes."""
    print("清空历史 clear history: clear   结束 leave: exit")
    history = []
    while (query := ask()) not in ("exit", "quit", None):
        if query == "clear":
            history = []
        elif query:
            shown = ""
            for reply, rounds in model.get_base_model().stream_chat(tokenizer, query, history, **options):
                # Cleaning up may change what is already on the screen, but only its last characters.
                print("\r" * (not shown) + reply[len(shown) :], end="", flush=True)
                shown, latest = reply, rounds
            print()
            history = latest


def ask() -> str | None:
    """What the user types; None at the end of the input."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
