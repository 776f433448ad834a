#!/usr/bin/env bash
# Trains the bundled class model on a GPU for MINUTES (default 5): benchmarks/gpu_train.sh [MINUTES] [FOLDER]
# Weights (bf16 safetensors), metrics and samples are in FOLDER, by default benchmarks/results. Nothing is installed.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu_train.py --minutes "${1:-5}" ${2:+--out "$2"}
