#!/bin/bash
# Large-DiT 600M on ImageNet 256x256, 8 GPUs. The same command again resumes.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 DATA_PATH [more flags of train.py]" >&2
    exit 2
fi
data_path=$1
shift

torchrun --nproc_per_node 8 "$(dirname "$0")/../train.py" \
    --model DiT_Llama_600M_patch2 \
    --data_path "$data_path" \
    --results_dir results/dit_llama_600M_bs256_lr1e-4_bf16_qknorm \
    --image_size 256 \
    --micro_batch_size 32 \
    --global_batch_size 256 \
    --lr 1e-4 \
    --data_parallel fsdp \
    --max_steps 3000000 \
    --ckpt_every 10000 \
    --log_every 100 \
    --precision bf16 \
    --grad_precision fp32 \
    --qk_norm \
    "$@"
