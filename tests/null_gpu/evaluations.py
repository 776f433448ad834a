"""An evaluation of 3B on the simulated GPU, two rows: launches and waits, plain, as a CUDA graph, compiled, both.

Run by test_null_gpu.py; the last line is a JSON object.
"""

import json

import counts
import torch

from ldit.bench.sampling import random_network
from ldit.config.presets import preset
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import Prepared, prepare

FORMS = {
    "plain": {"graph": False},
    "graph": {},  # the default on a GPU
    "compiled": {"graph": False, "compiled": True},
    "graph+compiled": {"compiled": True},
}


def main() -> None:
    config = preset("DiT_Llama_3B_patch2", input_size=32, qk_norm=True)
    network = random_network(config, torch.device("cuda"), torch.bfloat16)
    time, labels = torch.tensor([500.0, 500.0]), torch.tensor([1, 1000])
    x = torch.zeros(2, 4, 32, 32, device="cuda", dtype=torch.bfloat16)
    rows = {}
    for name, options in FORMS.items():
        copy = prepare(network, InferenceOptions(**options))
        assert isinstance(copy, Prepared)
        copy.plan([(500.0, 1), (500.0, 1000)])
        for _ in range(3):
            counts.reset()
            copy(x, time, labels)
        found = counts.read()
        row = {"launches": counts.launches(found), "waits": counts.waits(found)}
        rows[name] = row if copy.graphs is None else {**row, "graphs": len(copy.graphs)}
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
