#!/usr/bin/env bash
# What a GPU run measures first, in at most MINUTES (default 9): benchmarks/gpu_first.sh [MINUTES] [FOLDER]
# The JSON lines are in FOLDER, by default benchmarks/results. Needs torch with CUDA; nothing is installed.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu_first.py --minutes "${1:-9}" ${2:+--out "$2"}
