#!/usr/bin/env bash
# Fine-tune ChatGLM-6B with QLoRA on one GPU:
#
#   bash train.sh                          chatGLM_6B_QLoRA.json, data/train.jsonl, THUDM/chatglm-6b
#   bash train.sh --lora_rank 8            any flag of train_qlora.py
#   bash train.sh --check                  every check that needs no loaded model, and a sample
#   bash train.sh --dry_run 3              three samples as the model sees them; needs no weights and no GPU
#   NPROC_PER_NODE=2 bash train.sh         one process per GPU
#   bash train.sh --demo                   training and inference of a tiny model, on a CPU, in two minutes
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # scripts/ import the project, which need not be installed

launch=(python)
if [[ -n "${NPROC_PER_NODE:-}" ]]; then
  launch=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE")
  launch+=(--signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)  # SIGUSR1: passed on to the processes, too
fi

demo=false check=false flags=()
for argument in "$@"; do
  case "$argument" in
    -h | --help*) exec python train_qlora.py "$argument" ;;
    --demo) demo=true ;;
    --check* | --dry[_-]run*) check=true flags+=("$argument") ;;
    *) flags+=("$argument") ;;
  esac
done

if $demo; then
  demo_flags=(--train_args_json scripts/demo.json --model_name_or_path THUDM/chatglm-tiny --eval_data_path none)
  # A wrong flag ends here, before an earlier demo is deleted.
  python -c "from qlora import arguments, command_line, errors
with errors.message_instead_of_traceback():
    command_line.parse_command_line(arguments.FinetuneArguments)" "${demo_flags[@]}" "${flags[@]}"
  echo "Demo: a tiny ChatGLM made on the spot, fine-tuned by the same code as the real one. No weights, no GPU needed."
  $check || rm -rf saved_files/chatglm_tiny_demo  # of an earlier demo
  [[ -f THUDM/chatglm-tiny/config.json ]] || python scripts/make_tiny_checkpoint.py --output_dir THUDM/chatglm-tiny
  "${launch[@]}" train_qlora.py "${demo_flags[@]}" "${flags[@]}"
  $check || python inference_qlora.py --adapter_path saved_files/chatglm_tiny_demo \
    --prompt_file data/dev.jsonl --max_prompts 3
else  # exec: signals to this script reach the training
  exec "${launch[@]}" train_qlora.py --train_args_json chatGLM_6B_QLoRA.json --model_name_or_path THUDM/chatglm-6b \
    --train_data_path data/train.jsonl --eval_data_path data/dev.jsonl "${flags[@]}"
fi
