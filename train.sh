#!/usr/bin/env bash
# Fine-tune ChatGLM-6B with QLoRA on one GPU:
#
#   bash train.sh                          chatGLM_6B_QLoRA.json, data/train.jsonl, THUDM/chatglm-6b
#   bash train.sh --lora_rank 8            any flag of train_qlora.py
#   bash train.sh --learning_rate 1e-4     any field of TrainingArguments, in the JSON's place
#   bash train.sh --check                  every check that needs no loaded model, and a sample
#   bash train.sh --dry_run 3              three samples as the model sees them; needs no weights and no GPU
#   NPROC_PER_NODE=2 bash train.sh         one process per GPU
#   bash train.sh --demo                   training and inference of a tiny model, on a CPU, in a few minutes
#
# Paths that you type count from where you stand; defaults, and the output_dir in a JSON, from this repository.
[ -n "${BASH_VERSION:-}" ] || { echo "error: use bash train.sh; this shell is another one." >&2; exit 1; }
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"  # scripts/ import the project, which need not be installed
at="$repository/"
[[ ! . -ef "$repository" ]] || at=

launch=(python)
if [[ -n "${NPROC_PER_NODE:-}" ]]; then
  launch=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE")
  launch+=(--signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)  # SIGUSR1: passed on to the processes, too
fi

demo=false check=false flags=()
for argument in "$@"; do
  case "$argument" in
    -h | --help*) exec python "${at}train_qlora.py" "$argument" ;;
    --demo) demo=true ;;
    --check* | --dry[_-]run*) check=true flags+=("$argument") ;;
    *) flags+=("$argument") ;;
  esac
done

if ! $demo; then
  exec "${launch[@]}" "${at}train_qlora.py" "${flags[@]}"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # a tiny model gains nothing from more, and loses where cores are shared
model="${at}THUDM/chatglm-tiny" demo_adapter="${at}saved_files/chatglm_tiny_demo"
flags=(--train_args_json "${at}scripts/demo.json" --model_name_or_path "$model" --eval_data_path none "${flags[@]}")
# A wrong flag ends here, before an earlier demo is deleted.
adapter=$(python -c "from qlora import arguments, command_line, errors
with errors.message_instead_of_traceback():
    args = command_line.parse_command_line(arguments.FinetuneArguments)
    from qlora.training.training_args import read_training_args
    print(read_training_args(args.train_args_json, args.training_args).training_args.output_dir)" "${flags[@]}")
echo "Demo: a tiny ChatGLM made on the spot, fine-tuned by the same code as the real one. No weights, no GPU needed."

echo "
1/3 Making a tiny model"
if [[ -f "$model/config.json" ]]; then
  echo "$model is there, from an earlier demo"
else
  python "${at}scripts/make_tiny_checkpoint.py" --output_dir "$model"
fi

echo "
2/3 Fine-tuning"
$check || [[ "$adapter" != "$demo_adapter" ]] || rm -rf "$adapter"  # of an earlier demo
"${launch[@]}" "${at}train_qlora.py" "${flags[@]}"
! $check || exit 0

echo "
3/3 Answers before and after"
python "${at}inference_qlora.py" --adapter_path "$adapter" --prompt_file "${at}data/dev.jsonl" --max_prompts 3

echo "
Go on with it:
  python ${at}inference_qlora.py --adapter_path $adapter --chat
  pip install gradio && python ${at}inference_qlora.py --adapter_path $adapter --web
  pip install jieba rouge-chinese nltk && python ${at}scripts/evaluate_qlora.py --adapter_path $adapter --max_prompts 50"
