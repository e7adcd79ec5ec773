#!/usr/bin/env bash
# LoRA for Atom-7B-Chat on instruction rows: the flags of the recipe that this project grew from.
# Usage: MODEL=/models/Atom-7B-Chat DATA=huanhuan.jsonl [OUTPUT=runs/atom] bash train.sh [further options, which win]
set -euo pipefail
: "${MODEL:?set MODEL to the folder or hub name of the base model}"
: "${DATA:?set DATA to a JSONL file with instruction, input and output}"

exec espalier train \
  --dataset_path "$DATA" \
  --model_path "$MODEL" \
  --lora_rank 8 \
  --per_device_train_batch_size 16 \
  --gradient_accumulation_steps 1 \
  --max_steps 120000 \
  --save_steps 40000 \
  --save_total_limit 3 \
  --learning_rate 1e-4 \
  --fp16 \
  --remove_unused_columns false \
  --logging_steps 10 \
  --output_dir "${OUTPUT:-runs/atom-7b-chat}" \
  "$@"
