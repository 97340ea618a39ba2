#!/usr/bin/env bash
# Fine-tune ChatGLM-6B with QLoRA on one GPU:
#
#   bash train.sh                          chatGLM_6B_QLoRA.json, data/train.jsonl, THUDM/chatglm-6b
#   bash train.sh --lora_rank 8            any flag of train_qlora.py
#   bash train.sh --learning_rate 1e-4     any field of TrainingArguments, in the JSON's place
#   bash train.sh --check                  every check that needs no loaded model, and a sample
#   bash train.sh --dry_run 3              three samples as the model sees them; needs no weights and no GPU
#   NPROC_PER_NODE=2 bash train.sh         one process per GPU
#   bash train.sh --demo                   python train_qlora.py --demo: training and inference of a tiny model
#
# Paths that you type count from where you stand; defaults, and the output_dir in a JSON, from this repository.
[ -n "${BASH_VERSION:-}" ] || { echo "error: use bash train.sh; this shell is another one." >&2; exit 1; }
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
at="$repository/"
[[ ! . -ef "$repository" ]] || at=

launch=(python)
if [[ -n "${NPROC_PER_NODE:-}" ]]; then
  launch=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE")
  launch+=(--signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)  # SIGUSR1: passed on to the processes, too
fi
for argument in "$@"; do
  case "$argument" in
    -h | --help* | --demo*) launch=(python) ;;  # one process
  esac
done
exec "${launch[@]}" "${at}train_qlora.py" "$@"
