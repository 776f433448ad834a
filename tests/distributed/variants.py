"""Trains the tiny recipe for some steps in many ways inside one process group, and prints what came out as JSON; a
name that is none of a variant is one of `checks.py`, which gets FOLDER.

torchrun --nproc-per-node N tests/distributed/variants.py STEPS FOLDER NAME …
"""

import faulthandler
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import checks
import torch
import torch.distributed as dist
from runs import ALONE, after

from ldit.config.model import OriginalDiTConfig, TextModelConfig
from ldit.config.recipes.registry import recipe
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig, ParallelConfig
from ldit.config.spec import FlowConfig
from ldit.parallel.world import world_of

SWITCHES: dict[str, Any] = {
    "class_tokens": 2, "shared_adaln": True, "mid_layer": 1, "value_residual": True, "fine_layers": 1,
    "augment_labels": True,
}  # fmt: skip
# name: (changes of parallel, of train, of optim, of model)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}, {}),
    "accumulate": ({}, {"micro_batch_size": 1}, {}, {}),
    "accumulate2": ({}, {"micro_batch_size": 2}, {}, {}),
    "recompute": ({"recompute": "full"}, {}, {}, {}),
    "selective": ({"recompute": "selective"}, {}, {}, {}),
    "compiled": ({"compile": True}, {}, {}, {}),
    "compiled-selective": ({"compile": True, "recompute": "selective"}, {}, {}, {}),
    "compiled-tp2": ({"compile": True, "tp": 2}, {}, {}, {}),
    "keep": ({"reshard": False}, {}, {}, {}),
    "replicate": ({"replicate": 2}, {}, {}, {}),
    "tp2": ({"tp": 2}, {}, {}, {}),
    "tp4": ({"tp": 4}, {}, {}, {}),
    "looked-at": ({}, {}, {}, {}),
    "looked-at-keep": ({"reshard": False}, {}, {}, {}),
    "tp2-recompute": ({"tp": 2, "recompute": "full"}, {"micro_batch_size": 2}, {}, {}),
    "muon": ({}, {}, {"kind": "muon"}, {}),
    "muon-tp2": ({"tp": 2}, {}, {"kind": "muon"}, {}),
    "muon-replicate": ({"replicate": 2}, {}, {"kind": "muon"}, {}),
    "head": ({}, {}, {}, {"qk_norm": "head"}),
    "head-tp2": ({"tp": 2}, {}, {}, {"qk_norm": "head"}),
    "gqa": ({}, {}, {}, {"n_kv_heads": 2, "qk_norm": True, "rope": "2d"}),
    "gqa-tp2": ({"tp": 2}, {}, {}, {"n_kv_heads": 2, "qk_norm": True, "rope": "2d"}),
    "bf16": ({}, {"precision": "bf16"}, {}, {}),
    "moments": ({}, {}, {"moments": "bf16"}, {}),  # rounded by the places in each process's part
    "bf16-tp2": ({"tp": 2}, {"precision": "bf16"}, {}, {}),
    "fp16": ({}, {"precision": "fp16"}, {}, {}),
    "fp16-tp2": ({"tp": 2}, {"precision": "fp16"}, {}, {}),
    "chunked": ({}, {}, {"kind": "muon", "chunked": True, "every": 2, "base_width": 32}, {}),
    "chunked-tp2": ({"tp": 2}, {}, {"kind": "muon", "chunked": True, "every": 2, "base_width": 32}, {}),
    "switches": ({"recompute": "full"}, {}, {}, SWITCHES),
    "switches-tp2": ({"tp": 2}, {"micro_batch_size": 2}, {}, SWITCHES),
    "route": ({}, {}, {}, {}),
    "route-compiled": ({"compile": True}, {}, {}, {}),
    "text": ({}, {}, {}, {}),
    "text-tp2": ({"tp": 2}, {"micro_batch_size": 2}, {}, {}),
    "original": ({"recompute": "full"}, {}, {"weight_decay": 0.1}, {}),
    "original-muon": ({"reshard": False}, {"micro_batch_size": 2}, {"kind": "muon", "chunked": True}, {}),
    "original-bf16": ({}, {"precision": "bf16"}, {}, {}),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "switches": {"augment": 0.3, "dropout": 0.2, "nearest_of": 2, "min_snr": 5.0, "direction": 0.2},
    "route": {"route": 0.5, "route_blocks": (2, 2)},
}
"""By the first word of the name."""


def config_of(name: str) -> RunConfig:
    parallel, train, optim, model = VARIANTS[name]
    config = recipe("tiny-cpu")
    network: Any = replace(config.model, learn_sigma=False, **{"qk_norm": True, **model})
    if name.startswith("original"):
        network = OriginalDiTConfig(16, 4, 3, 64, 2, 4, num_classes=9, learn_sigma=False)
    if name.startswith("text"):
        network = TextModelConfig(
            patch_size=4, in_channels=3, dim=64, n_layers=2, n_heads=4, multiple_of=16, learn_sigma=False, qk_norm=True,
            rope="2d", max_seq_len=22, cap_feat_dim=24, mid_layer=1, shared_adaln=False,
        )  # fmt: skip
        config = replace(config, data=replace(config.data, path="emoji64-styles"))
    return replace(
        config,
        model=network,
        process=FlowConfig(),
        train=replace(config.train, batch_size=8, **train),
        optim=replace(config.optim, **optim),
        ema=replace(config.ema, host=name.endswith("moments")),
        objective=ObjectiveConfig(**OBJECTIVES.get(name.split("-")[0], {})),
        parallel=ParallelConfig(**parallel),
    )


def main() -> None:
    steps, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    faulthandler.dump_traceback_later(420, exit=True)  # a job that hangs says where, and ends
    torch.set_num_threads(1)
    together = "RANK" in os.environ
    if together:
        dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in names:
        if name not in VARIANTS:
            results[name] = checks.run(name, folder)
            continue
        config = config_of(name)
        world = world_of(config.parallel, torch.device("cpu")) if together else ALONE
        _, outcomes = after(config, steps, world, look_every=5 if name.startswith("looked-at") else 0)
        results[name] = {key: [o.values[key] for o in outcomes] for key in ("loss", "grad_norm")}
        assert not any(o.fault for o in outcomes), name
    if not together or dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    if together:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
