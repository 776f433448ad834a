#!/bin/bash
# The original's table on one machine with 8 GPUs: 50,000 pictures a row, then FID, sFID, Inception Score, precision and
# recall against ADM's statistics. Everything resumes: the same command goes on where it was stopped, and passes over
# rows whose OUT/ROW.json stands, whatever its settings were. Costs and what moves the numbers: docs/evaluate.md.
# Before, put VIRTUAL_imagenet256_labeled.npz and VIRTUAL_imagenet512.npz into REFERENCES and the Inception weights where
# `ldit evaluate` finds them.
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
rows=("$@")
[ $# -gt 0 ] || rows=(3b-256 7b-256 7b-256-unguided 3b-512 dit-256 dit-256-unguided dit-512)
none="L_DIT_3B_512 names no folder of a 512 model, and none was released"

refuse() {
    echo "$0: $1" >&2
    exit 2
}

todo=() # four words a row, of which nothing is made before all are known to have what they need
row() { # name, size, guidance, source
    local reference="$references/VIRTUAL_imagenet$2.npz"
    [ "$2" = 512 ] || reference="$references/VIRTUAL_imagenet$2_labeled.npz"
    if [ -e "$out/$1.json" ]; then
        echo "$0: $1 stands: $out/$1.json" >&2
    elif [ -f "$reference" ]; then
        todo+=("$1" "$reference" "$3" "$4")
    else
        refuse "$1: no file $reference"
    fi
}

for name in "${rows[@]}"; do
    case $name in
    3b-256) row "$name" 256 "$guidance" Alpha-VLLM/Large-DiT/240218_3b_bs256_step1350k ;;
    7b-256) row "$name" 256 "$guidance" Alpha-VLLM/Large-DiT/240218_7b_bs512_step620k ;;
    7b-256-unguided) row "$name" 256 1 Alpha-VLLM/Large-DiT/240218_7b_bs512_step620k ;;
    3b-512)
        if [ -n "${L_DIT_3B_512:-}" ]; then
            row "$name" 512 "$guidance" "$L_DIT_3B_512"
        else
            [ $# -eq 0 ] || refuse "$name: $none"
            echo "$0: $name is passed over: $none" >&2
        fi
        ;;
    dit-256) row "$name" 256 "$guidance" facebook/DiT-XL-2-256 ;;
    dit-256-unguided) row "$name" 256 1 facebook/DiT-XL-2-256 ;;
    dit-512) row "$name" 512 "$guidance" facebook/DiT-XL-2-512 ;;
    *) refuse "unknown row $name" ;;
    esac
done
[ ${#todo[@]} -gt 0 ] || exit 0

python -c "
import sys
from ldit.cli.main import guard
from ldit.eval.extractors.inception_weights import check_weights, find_weights
sys.exit(guard(lambda: check_weights(find_weights()) and 0))"
mkdir -p "$out"
for ((k = 0; k < ${#todo[@]}; k += 4)); do
    name=${todo[k]}
    torchrun --nproc-per-node "$gpus" -m -- ldit sample --ckpt "${todo[k + 3]}" --num "$num" --labels random \
        --solver ddpm --steps 250 --guidance "${todo[k + 2]}" --guidance-channels 3 --guidance-interval 0 1 \
        --batch-size 32 --out "$out/$name.npz"
    torchrun --nproc-per-node "$gpus" -m -- ldit evaluate "$out/$name.npz" --reference "${todo[k + 1]}" \
        --json "$out/$name.json"
done
