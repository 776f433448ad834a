"""Breaks one key line of training or evaluation at a time and sees whether the tests notice.

    python tools/mutations.py [--only N …] [--json FILE]

Each mutant is a copy of the tree with one replacement; the tests of its area run on it and must fail. The list was
written before the tests of the rows it stands for.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "shortest_first"
_FAULT = re.compile(r"^(FAILED|ERROR) \S+::", re.MULTILINE)
VARIANTS = "tests/nn/test_variants.py"
TRAIN, DATA, SHARED = "tests/training", "tests/data", "tests/distributed"
CHECKPOINT = "tests/checkpoint tests/storage"
EVAL = "tests/eval"
TEXT = "tests/e2e/test_text_model.py"
DIT = "tests/training/test_original_dit.py"
STREAMS = " ".join(
    f"tests/{name}.py"
    for name in (
        "eval/test_evaluate",
        "eval/test_evaluation_outputs",
        "eval/test_evaluation_hook",
        "pipeline/test_image_stream",
    )
)
SETS = " ".join(
    f"tests/pipeline/test_{name}.py" for name in ("sample_set", "sample_set_stopped", "sample_set_refused", "set_array")
)


class Mutant(NamedTuple):
    """`old` -> `new` in `file` (below src/ldit), and the tests that should notice."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # the step
    Mutant("training/step.py", "torch.isfinite(norm) & torch.isfinite(loss)", "torch.isfinite(loss)", TRAIN),
    Mutant("training/step.py", "& (loss <= limit)", "", TRAIN),
    Mutant("training/step.py", "clip / norm, 1.0", "clip, 1.0", TRAIN),
    Mutant("training/step.py", "norm > clip", "norm < clip", TRAIN),
    Mutant("training/step.py", "torch.ones_like(norm) / scale", "torch.ones_like(norm)", TRAIN),
    Mutant("training/step.py", "state.updates += 1", "pass", TRAIN),
    Mutant("training/update.py", "self.weights.sync_to_model()", "pass", TRAIN),
    Mutant("training/step.py", "    weights.zero_grad()\n", "", TRAIN),
    Mutant("training/step.py", "learning_rate(config, state.step + 1)", "learning_rate(config, state.step)", TRAIN),
    Mutant("training/step.py", "* world.data_parts / config.batch_size", "/ config.batch_size", SHARED),
    Mutant("training/state.py", "1.0 / (world.replicate * layout.copies)", "1.0 / world.replicate", SHARED),
    Mutant("training/step.py", "sync_gradients(model, micro is micros[-1])", "sync_gradients(model, False)", SHARED),
    Mutant("training/step.py", "sums[name] + value if sums else value", "value", TRAIN),
    # optimisers
    Mutant("training/adamw.py", "found_inf=(~sound)", "found_inf=(sound & ~sound)", TRAIN),
    Mutant("training/optim.py", 'math.sqrt(config.warmup_steps / step)', 'math.sqrt(step / config.warmup_steps)', TRAIN),
    Mutant("training/adamw.py", "{row.name}\", layout, part", "{row.name}\", layout, torch.zeros_like(part)", TRAIN),
    Mutant("training/muon.py", "grad = torch.where(sound, grad, buffer)", "pass", TRAIN),
    Mutant("training/muon.py", "buffer.lerp_(grad, 1 - self.settings.momentum)", "buffer.lerp_(grad, self.settings.momentum)", TRAIN),
    Mutant("training/muon.py", "return grad.lerp(buffer, self.settings.momentum)", "return buffer.clone()", TRAIN),
    Mutant("training/muon.py", "math.sqrt(max(rows // self._pieces(i), columns))", "math.sqrt(min(rows // self._pieces(i), columns))", TRAIN),
    Mutant("training/muon.py", "torch.where(sound, moved, matrix, out=matrix)", "matrix.copy_(moved)", TRAIN),
    # averages
    Mutant("training/ema.py", "min(decay, n / (9 + n))", "decay", TRAIN),
    Mutant("training/ema.py", "decay(i) for i in range(n - self.every + 1, n + 1)", "decay(i + 1) for i in range(n - self.every + 1, n + 1)", TRAIN),
    Mutant("training/posthoc.py", "math.exp((gamma + 1)", "math.exp(gamma", TRAIN),
    # weights
    Mutant("training/weights.py", "value.copy_(kept)", "pass", TRAIN),
    Mutant("training/weights.py", "else held.to(torch.float32).add_(grad)", "else grad", TRAIN),
    Mutant("training/weights.py", "if low <= row < high", "if low < row < high", TRAIN),
    # guard and scaler
    Mutant("training/guard.py", "self.left_out = 0", "pass", TRAIN),
    Mutant("training/guard.py", "self.scale /= 2", "pass", TRAIN),
    Mutant("training/guard.py", "min(self.scale * 2, 2.0**24), 0", "self.scale, 0", TRAIN),
    Mutant("training/guard.py", "self.count < SETTLED", "False", TRAIN),
    # trainer and state
    Mutant("training/trainer.py", "state.offset = offset + (failed - state.step)", "state.offset = offset + 0 * (failed - state.step)", TRAIN),
    Mutant("training/trainer.py", "state.guard.left_out > config.limit", "False", TRAIN),
    Mutant("training/trainer.py", "self.saver.wait()  # raises where it failed", "pass", TRAIN),
    Mutant("training/checkpointing.py", '"offset": state.offset,', '"offset": 0,', TRAIN),
    Mutant("training/checkpointing.py", '"scaler": state.scaler.to_json(),', "", TRAIN),
    Mutant("training/checkpointing.py", 'record.get("updates", step)', "step", TRAIN),
    Mutant("training/background.py", "self.wait()\n\n        def run", "def run", TRAIN),
    Mutant("training/saver.py", "return copy.copy_(value.detach(), non_blocking=True)", "return value.detach()", TRAIN),
    # layouts and exchange
    Mutant("parallel/layout.py", "chunk = -(-(high - low) // self.shard)", "chunk = (high - low) // self.shard", SHARED),
    Mutant("parallel/layout.py", "self.tp_axis is not None or tp == 0", "self.tp_axis is not None or tp == 1", SHARED),
    Mutant("parallel/exchange.py", "copy_(piece.view(own.part_shape(*member)))", "copy_(piece.view(own.part_shape(*member)) * 0)", SHARED),
    Mutant("parallel/tensor.py", "return _sum(grads[0], ctx.group), None\n\n\nclass _Leave", "return grads[0], None\n\n\nclass _Leave", SHARED),
    Mutant("parallel/tensor.py", "off.square().mean(-1, keepdim=True)", "off.mean(-1, keepdim=True)", SHARED),
    Mutant("parallel/tensor.py", "return grads[0].chunk(ctx.size, dim=-1)[ctx.index], None", "return grads[0].chunk(ctx.size, dim=-1)[0], None", SHARED),
    # checkpoints
    Mutant("checkpoint/save.py", "commit[0].finish(known)", "commit[0].finish({name: Record(record.size, '0' * 64) for name, record in known.items()})", CHECKPOINT),
    Mutant("checkpoint/save.py", "unfinished.abort()", "pass", CHECKPOINT),
    Mutant("checkpoint/save.py", "if free < needed:", "if False:", CHECKPOINT),
    Mutant("storage/shards.py", "os.fsync(self._file.fileno())", "pass", CHECKPOINT),
    Mutant("storage/shards.py", "if stored != shape:", "if False:", CHECKPOINT),
    Mutant("storage/atomic.py", "            os.rename(old, final)\n        raise", "            pass\n        raise", CHECKPOINT),
    Mutant("checkpoint/run.py", "for number, old in steps[keep:]", "for number, old in steps[keep + 1 :]", CHECKPOINT),
    Mutant("checkpoint/run.py", "keep_every and number % keep_every == 0", "keep_every and number % keep_every == 1", CHECKPOINT),
    Mutant("checkpoint/run.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", CHECKPOINT),
    Mutant("storage/manifest.py", "return sorted(shares[index])", "return sorted(shares[index])[1:]", CHECKPOINT),
    # what is done to the network
    Mutant("parallel/plan.py", 'if config.recompute != "none":', "if False:", TRAIN),
    Mutant("parallel/plan.py", "if config.compile or (has_triton(world.device) and not config.eager):", "if False:", TRAIN),
    Mutant("parallel/plan.py", "reshard = config.reshard and block is not blocks[-1]", "reshard = True", SHARED),
    # order, starting points, resume
    Mutant("data/order.py", "manual_seed(self.seed + epoch)", "manual_seed(self.seed)", DATA),
    Mutant("data/loader.py", "offset + step * self.batch_size + self.part * self.share", "offset + step * self.batch_size", DATA),
    Mutant("training/init_from.py", "mapping |= {} if null is None else {null: source_null}", "pass", TRAIN),
    Mutant("training/resume.py", "if refused:", "if False:", "tests/training tests/e2e/test_run.py"),
    # figures of evaluation
    Mutant("eval/metrics/moments.py", "self._mean += offset * (len(rows) / self.count)", "self._mean = mean", EVAL),
    Mutant("eval/metrics/moments.py", "factors[-1] = offset * math.sqrt(weight)", "factors[-1] = 0.0", EVAL),
    Mutant("eval/metrics/moments.py", "self._products.cpu() / (self.count - 1)", "self._products.cpu() / self.count", EVAL),
    Mutant("eval/metrics/moments.py", "self._products += torch.outer(offset, offset) * weight", "pass", EVAL),
    Mutant("eval/metrics/frechet.py", "traces - 2.0 * common", "traces - common", EVAL),
    Mutant("eval/metrics/frechet.py", "kept = values > cut", "kept = values > -1", EVAL),
    Mutant("eval/metrics/frechet.py", "max(len(values), _LEAST_RANK)", "len(values)", EVAL),
    Mutant("eval/metrics/scores.py", "self.negentropy / self.count", "self.negentropy", EVAL),
    Mutant("eval/metrics/kernel.py", "square.sum() - square.diagonal().sum()", "square.sum()", EVAL),
    Mutant("eval/metrics/kernel.py", "return inner.square().mul_(inner)", "return inner.square()", EVAL),
    Mutant("eval/metrics/neighbours.py", "distances.fill_diagonal_(torch.inf)", "pass", EVAL),
    Mutant("eval/metrics/neighbours.py", "nearest[other] = _smallest(nearest[other], distances.T.contiguous())", "pass", EVAL),
    Mutant("eval/metrics/neighbours.py", "distances <= radii[other]", "distances < radii[other]", EVAL),
    Mutant("eval/metrics/neighbours.py", "distances < squares.mul_(rounding)", "distances < 0.0", EVAL),
    Mutant("eval/metrics/neighbours.py", "samples, references = samples - centre, references - centre", "pass", EVAL),
    Mutant("eval/metrics/components.py", "vectors.flip(1)[:, :count]", "vectors[:, :count]", EVAL),
    Mutant("eval/metrics/components.py", "(len(rows),), generator", "(len(rows) // 2,), generator", EVAL),
    Mutant("eval/metrics/components.py", "torch.quantile(data, p / 100) - data.mean()", "torch.quantile(data, p / 100) - value", EVAL),
    Mutant("eval/extractors/inception.py", "count_include_pad=False", "count_include_pad=True", EVAL),
    Mutant("eval/extractors/resize.py", "place - low", "place - low - 0.5", EVAL),
    Mutant("eval/extractors/extractor.py", "for part in parts]) for name", "for part in parts[::-1]]) for name", EVAL),
    Mutant("eval/metrics/collect.py", "dist.recv(rows[first : first + count]", "dist.recv(rows[:count]", "tests/distributed/test_moments.py"),
    Mutant("eval/metrics/collect.py", "[first : first + len(rows)] = rows", "[: len(rows)] = rows", EVAL),
    Mutant("pipeline/sets/stream.py", "self.block))[rank::size]", "self.block))", STREAMS),
    Mutant("eval/during_training.py", "before[-1][1] <= value", "before[-1][1] > value", STREAMS),
    Mutant("eval/during_training.py", "rows = own[turn] if turn < len(own) else ranges[0]", "rows = own[turn]", SHARED),
    Mutant("eval/during_training.py", "turn < len(own) and world.tp_index == 0", "turn < len(own)", SHARED),
    Mutant("eval/reference.py", "if spatial not in (0, extractor.spatial):", "if False:", STREAMS),
    Mutant("training/tasks/augment.py", "stack([sin, cos / squeeze, down], 1)", "stack([sin, cos * squeeze, down], 1)", TRAIN),
    Mutant("training/tasks/augment.py", "torch.lerp(images, soft, share)", "images", TRAIN),
    Mutant("eval/during_training.py", "fault is not None or world.alarmed(STOP)", "False", "tests/distributed/test_variants.py"),
    Mutant("eval/outputs.py", "if file.exists() and not (", "if False and (", STREAMS),
    Mutant("checkpoint/run.py", "pair[0] <= step and pair[0] in committed", "pair[0] <= step", STREAMS),
    Mutant("eval/measure.py", "world.clear_alarm(STOP)", "pass", "tests/distributed/test_variants.py"),
    Mutant("checkpoint/run.py", "if best is not None and not (best.step <= step and best.step in committed):", "if False:", STREAMS),
    Mutant("checkpoint/run.py", "max(set(chain) & {number for number, _ in committed}, default=None)", "best and best.step", STREAMS),
    Mutant("training/tasks/classifier.py", "loss * to_device(self.weights, device)[labels]", "loss", TRAIN),
    # sets of pictures
    Mutant("pipeline/sets/job.py", "self.choices[k % count]", "self.choices[k * count // 23]", SETS),
    Mutant("pipeline/sets/job.py", 'uniform(self.seed, "label", id=k)', 'uniform(0, "label", id=k)', SETS),
    Mutant("storage/shared_job.py", "if not may_differ and old.get(key) != new.get(key)", "if False", SETS),
    Mutant("storage/shared_job.py", "and not held_by_other(path)", "", SETS),
    Mutant("storage/shared_job.py", "range(rank, len(self.blocks), size)", "range(0, len(self.blocks), 1)", SETS),
    Mutant("pipeline/sets/array.py", "if hashlib.sha256(data).hexdigest() !=", "if path.name ==", SETS),
    Mutant("pipeline/sets/array.py", "if final.get(CRC) != _crc(self.out):", "if False:", SETS),
    # data at scale
    Mutant("training/step.py", 'torch.where(sound, values, -1 if name == "time" else 0)', "values", TRAIN),
    Mutant("training/step.py", "len(micro) - len(micro.faults)", "len(micro)", TRAIN),
    Mutant("data/loader.py", 'if self.bad == "stop":', "if False:", DATA),
    Mutant("training/skipped.py", "if fault.where in self.known:", "if False:", TRAIN),
    Mutant("training/tasks/inputs.py", 'self.seed, "posterior", 0, position', '0, "posterior", 0, position', TRAIN),
    Mutant("training/tasks/autoencoder.py", "self.kl_weight * kl", "kl", TRAIN),
    Mutant("codecs/latents.py", "return (raw - _per_channel(config.shift, raw)) *", "return raw *", "tests/codecs tests/training"),
    Mutant("data/latent_cache/reader.py", "(2 * row + bool(flip))", "(2 * row)", DATA),
    Mutant("data/images/decoding.py", "    check_size(*image.size, decoding.max_pixels)\n", "", DATA),
    Mutant("data/images/decoding.py", "_BACK.get(turned, turned)", "turned", DATA),
    Mutant("data/formats/tar_index.py", 'if head["key"] != key:', "if False:", DATA),
    Mutant("data/formats/tar_members.py", "or b\"..\" in parts ", "", DATA),
    Mutant("data/user_set.py", "if not 0 <= number < count:", "if number >= count:", DATA),
    # a network or a process of the user's
    Mutant("pipeline/load.py", "return source.experiment.objective if source.experiment else None", "return None", "tests/e2e/test_extend.py"),
    Mutant("pipeline/load.py", "if own and given is None:", "if False:", "tests/e2e/test_extend.py"),
    Mutant("training/resume.py", "if what in old and old[what] != new.get(what):", "if False:", "tests/e2e/test_extend.py"),
    Mutant("training/resume.py", 'if old.get("codec") != new.get("codec"):', "if False:", "tests/e2e/test_latents.py"),
    # switches
    Mutant("diffusion/flow.py", 'over = t.clamp(min=LEAST_TIME) if self.prediction == "x0" else t', "over = t", "tests/diffusion"),
    Mutant("training/tasks/diffusion.py", "if batch.step < end:", "if batch.positions[0] < end * 4:", "tests/training/test_switches.py"),
    Mutant("sampling/guidance.py", "c, u = (out.float() for out", "u, c = (out.float() for out", "tests/pipeline/test_internal_guidance.py"),
    Mutant("nn/dit.py", "blocks = [rows[0] + own for", "blocks = [rows[0] + 0 * own for", VARIANTS),
    Mutant("nn/dit.py", "stride=grid.stride // 2", "stride=grid.stride", VARIANTS),
    Mutant("nn/dit.py", "training.kept + self.class_tokens, self.class_tokens)", "training.kept, 0)", VARIANTS),
    Mutant("nn/dit.py", "fine_rope, None", "fine_rope, values", VARIANTS),
    Mutant("nn/dit.py", "tokens = tokens + self.fine_embedder", "tokens = tokens + 0 * self.fine_embedder", VARIANTS),
    Mutant("nn/dit.py", "training.seeds + 2 * index", "training.seeds", VARIANTS),
    Mutant("nn/dit.py", "dropped(update, seeds + 1, dropout)", "dropped(update, seeds, dropout)", VARIANTS),
    Mutant("nn/dit.py", "[unrotated(self.class_tokens, config.head_dim, device)]", "[rope_table(config.rope, 1, self.class_tokens, config.head_dim, device)]", VARIANTS),
    Mutant("nn/dit.py", "return rope[self.places]", "return rope[: self.places.shape[1]][None]", VARIANTS),
    Mutant("nn/dit.py", 'or owner[0] in ("final_layer", "mid_head") or', 'or owner[0] == "final_layer" or', VARIANTS),
    Mutant("nn/layers.py", "x / (1 - rate)", "x", VARIANTS),
    Mutant("training/tasks/inputs.py", "(noises - x0[:, None])", "noises", "tests/training/test_switches.py"),
    Mutant("training/tasks/augment.py", "_rotation(-turn),", "_rotation(turn),", "tests/training"),
    Mutant("training/muon.py", "unflatten(1, (self._pieces(first), -1))", "unflatten(1, (1, -1))", "tests/training/test_muon.py"),
    # AdamW's moments in fewer bits, averages in host memory, the update of a step
    Mutant("training/moments.py", "+ bits) & -65536", ") & -65536", TRAIN),
    Mutant("training/moments.py", "+ chance).floor()", ").round()", TRAIN),
    Mutant("training/moments.py", "torch.where(sound, new, old, out=old)", "old.copy_(new)", TRAIN),
    Mutant("training/moments.py", "& 0x1FFFF", "& 0xFFFF", TRAIN),
    Mutant("training/moments.py", "(index + 1) * _GOLDEN", "0", TRAIN),
    Mutant("training/adamw.py", "squares.mean(-1, keepdim=True)", "squares.amax(-1, keepdim=True)", TRAIN),
    Mutant("training/adamw.py", "* (lr / bias1)", "* lr", TRAIN),
    Mutant("training/adamw.py", "1 - lr * self.weight_decay).sub_", "1.0).sub_", TRAIN),
    Mutant("training/adamw.py", "self.count += sound", "self.count += 1", TRAIN),
    Mutant("training/ema.py", "if n % self.every:", "if False:", TRAIN),
    Mutant("training/ema.py", "[first : first + CHUNK], share)", "[:CHUNK], share)", TRAIN),
    Mutant("training/update.py", "        self.averages.settle()\n", "", TRAIN),
    Mutant("training/step.py", "torch._foreach_norm(grads, 2, torch.float32)", "torch._foreach_norm(grads)", TRAIN),
    # the original DiT in training, and models as recipes
    Mutant("training/optim.py", " if row[0] not in weights.fixed", "", DIT),
    Mutant("training/optim.py", "3 if _QKV.fullmatch(name) else 1", "1", DIT),
    Mutant("training/tasks/diffusion.py", 'if name == "pos_embed":', "if False:", DIT),
    Mutant("training/init_from.py", "in ORIGINAL_DIT_HEADS else model.num_heads", "in ORIGINAL_DIT_HEADS else None", DIT),
    Mutant("training/telemetry.py", "unflatten(-1, (3, attention.heads, -1))", "unflatten(-1, (3, 1, -1))", DIT),
    Mutant("diffusion/flow.py", 'if config.times == "uniform":', "if False:", DIT),
    Mutant("diffusion/flow.py", "dim=1, eps=LEAST_LENGTH", "dim=1", "tests/training/test_switches.py"),
    Mutant("config/recipes/finetune.py", "        process=spec.process,\n", "", DIT),
    Mutant("checkpoint/layouts/dit_pt.py", "settings = _sit_settings(spec.process) or {}", "settings: dict[str, str] = {}", DIT),
    # several sources in one table
    Mutant("eval/evaluate.py", "if key not in known:", "if True:", "tests/eval/test_compare.py"),
    Mutant("eval/evaluate.py", "heldout=share or _share_of(request)", "heldout=_share_of(request)", "tests/eval/test_compare.py"),
    Mutant("eval/compare.py", " if len(set(column)) > 1", "", "tests/eval/test_compare.py"),
    # Solvers, and files that are verified once.
    Mutant("sampling/multistep.py", "_GROWTH = 2.0", "_GROWTH = 9.0", "tests/sampling/test_closed_form.py"),
    Mutant("sampling/multistep.py", "(2.0, 1.25)", "(2.0, 2.0)", "tests/sampling/test_closed_form.py"),
    Mutant("sampling/multistep.py", "if 1 <= i <= order - 2:", "if False:", "tests/sampling/test_orders.py"),
    Mutant("sampling/single_step.py", "elif before is not None and", "elif False and before is not None and", "tests/sampling/test_closed_form.py"),
    Mutant("sampling/sde.py", "math.sqrt(2.0 * strength * h)", "math.sqrt(strength * h)", "tests/sampling/test_sde.py"),
    Mutant("sampling/sde.py", "strength = coefficient(b.r)", "strength = 0.0", "tests/sampling/test_sde.py"),
    Mutant("sampling/adaptive.py", "if error <= 1.0 or", "if True or", "tests/sampling/test_dopri5.py"),
    Mutant("sampling/adaptive.py", "_LONGEST * way, ", "", "tests/sampling/test_dopri5.py"),
    Mutant("storage/verified.py", "stat.st_ctime_ns", "0", "tests/storage/test_verified.py"),
    Mutant("storage/verified.py", "[*state, sha256]\n\n", "[*state, sha256] or True\n\n", "tests/storage/test_verified.py"),
    Mutant("checkpoint/layouts/dit_pt.py", "if stated not in (rows, rows - 1):", "if False:", "tests/checkpoint/test_sit_pt.py"),
    Mutant("pipeline/generate.py", "if request.one_by_one:", "if False:", "tests/pipeline/test_invariance.py"),
    Mutant("eval/metrics/moments.py", "covariance[: band.start, band] = covariance[band, : band.start].T", "pass", "tests/eval/test_moments.py"),
    Mutant("eval/metrics/kernel.py", "2.0 * kernel[:, :first].sum()", "kernel[:, :first].sum()", "tests/eval/test_kernel.py"),
    Mutant("eval/metrics/rows.py", "torch.isfinite(torch.stack(rows.aminmax())).all()", "True", "tests/eval/test_moments.py"),
    Mutant("eval/extractors/protocol.py", "align_corners=False", "align_corners=True", "tests/eval/test_extractor.py"),
    Mutant("diffusion/flow.py", "d / sigma.square()", "d / sigma", "tests/diffusion"),
    Mutant("diffusion/flow.py", "t = min(noise_time, self._times[1])", "t = noise_time", "tests/diffusion"),
    Mutant("diffusion/flow.py", "return losses[\"mse\"] if self._of_noise else ", "return ", "tests/diffusion"),
    Mutant("diffusion/path.py", "-sigma.square() / (alpha * half)", "-sigma.square() / half", "tests/diffusion"),
    Mutant("diffusion/path.py", "alpha.square() * self._half_beta(t) / sigma", "alpha * self._half_beta(t) / sigma", "tests/diffusion"),
    Mutant("eval/extractors/protocol.py", "bicubic(images, SIZE).sub(128.0)", "tf1_bilinear(images, SIZE).sub(128.0)", "tests/eval/test_extractor.py"),
    # text models
    Mutant("data/captions.py", "u * float(sums[-1])", "u", f"{DATA}/test_metadata.py {DATA}/test_captions.py"),
    Mutant("codecs/text.py", "[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:most]", "[tokenizer.bos_token_id, *ids][:most]", "tests/codecs/test_text.py"),
    Mutant("codecs/text.py", "count = 1 if on_cpu else _ROWS", "count = _ROWS", f"tests/codecs/test_text.py {TEXT}"),
    Mutant("codecs/text_cache.py", "place, self.job.shard_size)", "place, self.job.shard_size + 1)", "tests/codecs/test_text_cache.py"),
    Mutant("codecs/conditioners.py", "torch.where(u < self.dropout, self.null, labels)\n\n    def name_of(self, label: int) -> str:\n        \"\"\"The text", "labels\n\n    def name_of(self, label: int) -> str:\n        \"\"\"The text", f"tests/codecs/test_text.py {TEXT}"),
    Mutant("training/tasks/diffusion.py", "uniform(self.seed, \"caption\", 0, position)", "0.5", TEXT),
    Mutant("training/tasks/diffusion.py", "return enlarged(small, x0.shape[2:])", "return enlarged(small.flip(3), x0.shape[2:])", "tests/e2e/test_cascade.py"),
    Mutant("data/buckets.py", "drawn[shuffled]", "0", f"{DATA}/test_buckets.py"),
    Mutant("data/loader.py", "generator(self.seed, \"crop\", 0, self.positions[row])", "generator(self.seed, \"crop\", 0, row)", f"{DATA}/test_buckets.py"),
    Mutant("pipeline/generate.py", "request.negatives[rows.start : rows.stop]", "request.negatives[: len(rows)][::-1]", TEXT),
    Mutant("eval/matching.py", "1 + (scores[1:] > scores[0]).sum()", "1 + (scores[1:] < scores[0]).sum()", f"{EVAL}/test_matching.py"),
    Mutant("checkpoint/eight_bits.py", "rows.abs().amax(1)", "rows.abs().amax()", "tests/checkpoint/test_eight_bits.py"),
]  # fmt: skip


def tested(tests: str, folder: Path) -> str:
    """What `tests` say of the copy of the tree in `folder`: "passed", "failed", or "broken" where not one could run.

    Short tests run first. Jobs of several processes take 8 steps, which show whether layouts agree as well as 50 do.
    """
    paths = os.pathsep.join(map(str, (folder / "src", Path(__file__).parent)))
    env = {
        "LDIT_TEST_TIMES": str(folder / "times.json"), **os.environ,
        "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "LDIT_JOB_STEPS": "8",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, *tests.split()]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return "passed"
    # The exit code does not tell: with several workers one failure counts as an interruption. A module that cannot be
    # imported is named without a test.
    return "failed" if _FAULT.search(done.stdout) else "broken"


def fate(mutant: Mutant, folder: Path) -> str:
    """What becomes of this mutant in the copy."""
    path = folder / "src" / "ldit" / mutant.file
    sound = path.read_text()
    if mutant.old not in sound:
        raise SystemExit(f"{mutant.file}: {mutant.old!r} is not there any more")
    path.write_text(sound.replace(mutant.old, mutant.new, 1))
    try:
        return {"passed": "SURVIVED", "failed": "killed", "broken": "BROKEN"}[tested(mutant.tests, folder)]
    finally:
        path.write_text(sound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants, from 0")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    chosen = range(len(MUTANTS)) if arguments.only is None else arguments.only
    alive: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("src", "tests", "benchmarks", "tools", "docs", "exps"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "Makefile"):
            shutil.copy(file, folder / file.name)
        for tests in dict.fromkeys(MUTANTS[number].tests for number in chosen):
            if tested(tests, folder) != "passed":
                raise SystemExit(f"{tests}: does not pass without any mutant")
        for number in chosen:
            mutant, began = MUTANTS[number], time.monotonic()
            word = fate(mutant, folder)
            alive += [number] if word != "killed" else []
            print(
                f"{number:2} {word:8} {time.monotonic() - began:5.0f} s  {mutant.file}: {mutant.old.split(chr(10))[0]}",
                flush=True,
            )
    killed = len(chosen) - len(alive)
    print(f"{killed} of {len(chosen)} killed")
    if arguments.json:
        arguments.json.write_text(json.dumps({"mutants": len(chosen), "killed": killed, "alive": alive}) + "\n")


if __name__ == "__main__":
    main()
