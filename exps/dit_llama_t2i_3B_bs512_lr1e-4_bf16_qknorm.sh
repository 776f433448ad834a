#!/bin/bash
# Large-DiT-T2I 3B at about 256x256 in all aspects, 8 GPUs. The same command again resumes.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 DATA_YAML LLAMA [more flags of train.py]" >&2
    exit 2
fi
data_path=$1
lm=$2
shift 2

torchrun --nproc_per_node 8 "$(dirname "$0")/../train.py" \
    --model DiT_Llama_3B_patch2 \
    --data_path "$data_path" \
    --lm "$lm" \
    --results_dir results/dit_llama_t2i_3B_bs512_lr1e-4_bf16_qknorm \
    --image_size 256 \
    --micro_batch_size 32 \
    --global_batch_size 512 \
    --lr 1e-4 \
    --data_parallel fsdp \
    --max_steps 3000000 \
    --ckpt_every 10000 \
    --log_every 100 \
    --precision bf16 \
    --grad_precision fp32 \
    --qk_norm \
    "$@"
