#!/bin/bash
# The original's table on one machine with 8 GPUs: 50,000 pictures a row, then FID, sFID, Inception Score, precision and
# recall against ADM's statistics. Everything resumes: the same command goes on where it was stopped. Costs and what moves
# the numbers: docs/evaluation.md. Before, put VIRTUAL_imagenet256_labeled.npz and VIRTUAL_imagenet512.npz into
# REFERENCES and the Inception weights where `ldit evaluate` finds them.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 REFERENCES OUT [row ...]   rows: 3b-256 7b-256 7b-256-unguided 3b-512 dit-256 dit-256-unguided dit-512" >&2
    exit 2
fi
references=$1
out=$2
shift 2
# The papers of this family do not all state their guidance scale; DiT and SiT use 1.5.
guidance=${GUIDANCE:-1.5}
num=${NUM:-50000}
gpus=${GPUS:-8}
mkdir -p "$out"

row() { # name, size, guidance, source
    local name=$1 size=$2 scale=$3 source=$4
    local reference="$references/VIRTUAL_imagenet${size}.npz"
    [ "$size" = 256 ] && reference="$references/VIRTUAL_imagenet256_labeled.npz"
    torchrun --nproc-per-node "$gpus" -m ldit sample --ckpt "$source" --num "$num" --labels random \
        --solver ddpm --steps 250 --guidance "$scale" --guidance-channels 3 --guidance-interval 0 1 \
        --batch-size 32 --out "$out/$name.npz"
    torchrun --nproc-per-node "$gpus" -m ldit evaluate "$out/$name.npz" --reference "$reference" --json "$out/$name.json"
}

rows=("$@")
[ ${#rows[@]} -gt 0 ] || rows=(3b-256 7b-256 7b-256-unguided 3b-512 dit-256 dit-256-unguided dit-512)
for name in "${rows[@]}"; do
    case $name in
    3b-256) row "$name" 256 "$guidance" Alpha-VLLM/Large-DiT/240218_3b_bs256_step1350k ;;
    7b-256) row "$name" 256 "$guidance" Alpha-VLLM/Large-DiT/240218_7b_bs512_step620k ;;
    7b-256-unguided) row "$name" 256 1 Alpha-VLLM/Large-DiT/240218_7b_bs512_step620k ;;
    3b-512) row "$name" 512 "$guidance" "${L_DIT_3B_512:?name the folder of a 512 model: none was released}" ;;
    dit-256) row "$name" 256 "$guidance" facebook/DiT-XL-2-256 ;;
    dit-256-unguided) row "$name" 256 1 facebook/DiT-XL-2-256 ;;
    dit-512) row "$name" 512 "$guidance" facebook/DiT-XL-2-512 ;;
    *)
        echo "$0: unknown row $name" >&2
        exit 2
        ;;
    esac
done
