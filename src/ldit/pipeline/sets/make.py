"""Makes many images of one model: `ldit sample --num N --out DIR | FILE.npz`, resumable, on any number of processes.

A set is cut into blocks of `batch_size` consecutive images, which are always sampled together. Processes communicate
through files only (`ldit.storage.shared_job`). So the set is the same for any number of processes and after any number
of kills. On a GPU this holds as far as kernels are deterministic; if memory runs out, a block is sampled in parts,
which changes rounding.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldit.checkpoint.run import trained_on
from ldit.codecs.codec import check_codec
from ldit.codecs.conditioners import build_conditioner, check_conditioner
from ldit.codecs.pixels import to_uint8
from ldit.config.requests.sampling import ModelRequest
from ldit.errors import RequestError, RunError
from ldit.log import logger
from ldit.parallel.world import launched, report_once
from ldit.pipeline.generate import Done, ImageSampler, Sample
from ldit.pipeline.load import (
    Pipeline,
    inference_options,
    is_compiled,
    load_source,
    open_guide,
    open_requested,
    own_process,
    process_device,
)
from ldit.pipeline.loaded import codec_roots
from ldit.pipeline.prompts import negative_prompts, request_prompts
from ldit.pipeline.request import ResolvedRequest, check_request
from ldit.pipeline.sets.array import ArrayWriter
from ldit.pipeline.sets.folder import Block, FolderWriter
from ldit.pipeline.sets.job import Labels, assign_labels, describe
from ldit.sampling.fast.options import is_offloaded
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.outputs import refuse_inside
from ldit.storage.progress import Progress
from ldit.storage.shared_job import cut
from ldit.storage.signals import stopped_by_signals


class _Sampled(NamedTuple):
    """A block, and the network calls that it took."""

    block: Block
    evaluations: int
    guided_rows: int


class BlockSampler:
    """Samples the images of a set, block by block.

    On a CPU each block is computed by one thread, with as many blocks in parallel as there are cores. Sums over several
    threads depend on their number, and a set must not depend on the number of cores or processes. On a GPU one thread
    computes a block while the caller handles the previous one.

    `evaluations` (conditional network calls) and `guided_rows` are totals of the blocks that were yielded.
    """

    def __init__(
        self,
        pipe: Pipeline,
        request: ResolvedRequest,
        labels: Labels,
        num: int,
        batch_size: int,
        guide: Pipeline | None = None,
    ) -> None:
        """`request` says how images are sampled; its labels and seeds are replaced by those of each block."""
        self.pipe, self.guide, self.request, self.labels = pipe, guide, request, labels
        self.batch_size, self.ranges = batch_size, cut(num, batch_size)
        self.evaluations = self.guided_rows = 0
        self.on_images: Callable[[float], None] = lambda count: None
        """Called from the threads after each solver step, with its share of a block's images."""
        self._cores = torch.get_num_threads() if pipe.device.type == "cpu" else 0
        self._threads = self._cores if self._cores and not is_offloaded(pipe.model) else 1

    def blocks(self, numbers: Iterable[int]) -> Generator[Block, None, None]:
        """Yields the blocks with these numbers, in order. Close the iterator to stop early; blocks in progress then
        stop after their current step. RunError names an image that is not finite."""
        num_threads, stop = torch.get_num_threads(), threading.Event()
        pool = ThreadPoolExecutor(self._threads, "sample", self._init_thread)
        ahead: deque[Future[_Sampled]] = deque()
        try:
            # Keep every thread busy, and yield in order.
            for number in numbers:
                ahead.append(pool.submit(self._block, number, stop))
                if len(ahead) > self._threads:
                    yield self._counted(ahead.popleft().result())
            while ahead:
                yield self._counted(ahead.popleft().result())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)

    def _init_thread(self) -> None:
        """Runs first in each thread of the pool."""
        if self._cores:
            torch.set_num_threads(1)
        if self.pipe.device.type == "cuda":
            torch.cuda.set_device(self.pipe.device)

    def _block(self, number: int, stop: threading.Event) -> _Sampled:
        # Labels and seeds depend on the images' numbers alone.
        rows = self.ranges[number]
        labels = self.labels.of(rows)
        request = replace(self.request, labels=labels, seeds=tuple(self.labels.seed + index for index in rows))
        # Sample.
        tensors: list[Tensor] = []
        evaluations = guided_rows = 0
        share = len(rows) / max(len(request.levels) - 1, 1)
        sampler = ImageSampler(
            self.pipe, request, guide=self.guide, batch_size=self.batch_size, cancelled=stop.is_set,
            callback=lambda step: self.on_images(share),
        )  # fmt: skip
        for event in sampler.events():
            if isinstance(event, Sample):
                assert event.tensor is not None
                tensors.append(event.tensor)
            elif isinstance(event, Done):
                evaluations, guided_rows = event.evaluations, event.guided_rows
        if stop.is_set():
            raise RunError(f"images {rows.start} to {rows.stop - 1} were not made: sampling was stopped")
        # Check, because conversion to uint8 would hide NaN.
        images = torch.stack(tensors)  # (B, 3, H, W) in [-1, 1]
        finite = images.isfinite().flatten(1).all(1).tolist()
        if False in finite:
            place = finite.index(False)
            raise RunError(f"image {rows[place]} (seed {request.seeds[place]}, class {labels[place]}) is not finite")
        return _Sampled(Block(rows, to_uint8(images), labels), evaluations, guided_rows)

    def _counted(self, sampled: _Sampled) -> Block:
        self.evaluations += sampled.evaluations
        self.guided_rows += sampled.guided_rows
        return sampled.block


class SampleSet:
    """A requested set, checked and described before weights are read. Image k of `num` has the request's seed + k;
    blocks of `batch_size` images are sampled together."""

    def __init__(self, request: ModelRequest, num: int) -> None:
        """RequestError, SourceError or CodecError for a set that cannot be made."""
        for name, value in (("num", num), ("batch_size", request.batch_size)):
            if value < 1:
                raise RequestError(f"{name}: must be at least 1, got {value}")
        # Open the sources, without their weights.
        self.request, self.num, self.device = request, num, process_device(request.device)
        self.source = open_requested(request)
        self.guide = open_guide(request)
        spec = self.source.spec
        inference_options(request)  # raises for options that exclude each other
        # Check the request with the labels of the first block: the rest is the same for every block.
        prompts = request_prompts(spec, request)
        negatives = () if prompts is None else negative_prompts(request, 1)
        conditioner = build_conditioner(spec, tuple(dict.fromkeys(prompts or ())), negatives[0] if negatives else None)
        self.labels = assign_labels(request, conditioner, prompts)
        self.ranges = cut(num, request.batch_size)
        first = self.ranges[0]
        labels = self.labels.of(first)
        changes: dict[str, Any] = {"class_labels": labels, "num": None}
        if prompts is not None:
            changes = {"prompts": [conditioner.name_of(label) for label in labels], "prompts_file": None, "num": None}
        elif self.labels.rule is None:
            changes = {"class_labels": (), "num": len(first)}
        block = request.sampling(**changes)
        weaker = None if self.guide is None else self.guide.spec
        resolved = check_request(spec, block, process=own_process(self.source), guide=weaker)
        # Labels of a block are numbers of all prompts, not of its own alone.
        self.resolved = replace(resolved, labels=labels, conditioner=conditioner)
        roots = codec_roots(request.local_diffusers_model_root, self.source.path)
        check_codec(spec.codec, roots, spec.model.in_channels)
        check_conditioner(spec, roots)
        # Describe the set, with fingerprints of the weights.
        self.dtype = request.dtype or ("fp32" if self.device.type == "cpu" else "bf16")
        self.description = describe(request, num, self.source, self.guide, self.resolved, self.labels, self.dtype)

    def sampler(self) -> BlockSampler:
        """A sampler of the set's blocks; reads the weights."""
        request = self.request
        # Compiled or not: the description says what was asked for, since images differ by rounding alone.
        compiled = is_compiled(request, (self.source, self.guide), self.device, self.num)
        root, inference = request.local_diffusers_model_root, inference_options(request)
        inference = replace(inference, compiled=compiled)
        pipe = load_source(self.source, self.device, self.dtype, request.ema, root, request.offload, inference)
        guide = None
        if self.guide is not None:
            guide = load_source(self.guide, self.device, self.dtype, request.ema, None, request.offload, inference)
        return BlockSampler(pipe, self.resolved, self.labels, self.num, request.batch_size, guide)


def make_set(request: ModelRequest, num: int, out: Path) -> bool:
    """Make this process's blocks of a set: a folder of PNGs or, if `out` ends in .npz, an array. Returns whether the
    set is complete afterwards; False when other processes are still working.

    Stopped after a signal (`ldit.storage.signals`); RequestError when `out` holds something else or another set.
    """
    with stopped_by_signals():
        launch = launched()
        # Check everything, and begin the set or continue it. All processes find the same errors in the command; the
        # main process alone reports them.
        with report_once(RequestError):
            check_set_dir(out)
            sample_set = SampleSet(request, num)
            if (data := trained_on(sample_set.source.path)) is not None:
                refuse_inside(out, [data])
            writer = ArrayWriter if out.suffix == ".npz" else FolderWriter
            files = writer(out, sample_set.description, sample_set.labels)
            has_work = files.begin()
        if not has_work:
            logger.info("%s is complete: nothing is left to do", out)
            return True

        def make(numbers: Iterator[int]) -> None:
            """Sample and write these blocks. Weights are read here, so only if there is a block to make."""
            sampler = sample_set.sampler()
            progress = Progress(num, files.count_done, launch.rank == 0, "images")
            sampler.on_images = progress.begun
            try:
                with closing(sampler.blocks(numbers)) as blocks:
                    for block in blocks:
                        files.write(block.rows.start // request.batch_size, block)
                        progress.advance(len(block.rows))
            finally:
                progress.close()
            logger.info("%s evaluations, %s guided rows", f"{sampler.evaluations:,}", f"{sampler.guided_rows:,}")

        return files.make_share(launch.rank, launch.size, make)


def check_set_dir(out: Path) -> None:
    """RequestError when no set can be made at `out`."""
    check_not_in_checkpoint(out)
    if out.suffix == ".npz" and out.is_dir():
        raise RequestError(f"--out {out}: is a folder, expected the name of a file")
    if out.suffix != ".npz" and out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: is a file, expected a folder or a name that ends in .npz")
