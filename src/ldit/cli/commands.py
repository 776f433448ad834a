"""The table of commands: name, line of help, request and function. Modules are imported when a command runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command, or one subcommand of a command with several ("bench train")."""

    name: str
    group: str
    line: str
    """What it does, for `ldit --help`."""
    request: str
    """"module:class" of its request, whose fields are its flags; "" for a function that parses the arguments itself."""
    function: str
    """"module:function", which takes the request and returns the exit code."""
    text: str = ""
    """A longer description for its own help."""


GROUPS = ("train", "sample", "evaluate", "data", "checkpoints", "other")
_REQUESTS, _COMMANDS = "ldit.config.requests", "ldit.commands"

TABLE = (
    Command("train", "train", "train a recipe, or resume a run", "", "ldit.cli.train:run"),
    Command("recipes", "train", "list the recipes", f"{_REQUESTS}.other:RecipesRequest", f"{_COMMANDS}.recipes:run"),
    Command(
        "plot", "train", "draw the curves of runs", f"{_REQUESTS}.plot:PlotRequest", f"{_COMMANDS}.plot:run",
        "Draw the curves of runs as one image, with a panel for each key.",
    ),
    Command(
        "launch slurm", "train", "write the batch script of a cluster", "", "ldit.cli.launch:run",
    ),
    Command(
        "sample", "sample", "make images from a checkpoint",
        f"{_REQUESTS}.sampling:SampleRequest", f"{_COMMANDS}.sample:run",
        "Sample images. --num with --out makes a set: rerun the same command to finish one that was interrupted; "
        "torchrun or srun share the work among processes.",
    ),
    Command(
        "evaluate", "evaluate", "measure images: FID and other Fréchet distances, precision, recall",
        f"{_REQUESTS}.evaluate:EvaluateRequest", f"{_COMMANDS}.evaluate:run",
        "Measure images: FID and Fréchet distances in other features, Inception Score, precision, recall, KID. Samples "
        "of a checkpoint are made in memory and not kept; torchrun shares the work among processes.",
    ),
    Command(
        "stats", "evaluate", "compute the statistics of a set of images, as a reference",
        f"{_REQUESTS}.evaluate:StatsRequest", f"{_COMMANDS}.evaluate:run_stats",
        "Compute mean and covariance of the features of a set of images, and write them to a file, a reference for "
        "`ldit evaluate`. torchrun shares the work among processes.",
    ),
    Command(
        "encode", "data", "make a latent cache of a set of images",
        f"{_REQUESTS}.encode:EncodeRequest", f"{_COMMANDS}.encode:run",
        "Encode images with an autoencoder into a latent cache: training on it gives what the images give, and is "
        "faster. Rerun the same command to finish a cache that was interrupted; torchrun or srun share the work among "
        "processes.",
    ),
    Command(
        "data check", "data", "check a set of images",
        f"{_REQUESTS}.data:CheckRequest", f"{_COMMANDS}.data:run_check",
        "Decode every image of a set and report bad images, sizes, modes, classes and duplicates. Exit code 1 when "
        "anything is bad.",
    ),
    Command(
        "info", "checkpoints", "describe a checkpoint without loading it",
        f"{_REQUESTS}.convert:InfoRequest", f"{_COMMANDS}.info:run",
        "Describe a checkpoint, an autoencoder, a classifier or a codec's folder, from headers and shapes alone.",
    ),
    Command(
        "convert", "checkpoints", "write a checkpoint in another layout",
        f"{_REQUESTS}.convert:ConvertRequest", f"{_COMMANDS}.convert:run",
        "Write a checkpoint in another layout. Raw and EMA weights are both written if the source has both. The EMA "
        "weights of an autoencoder's run become a folder that can be used as a codec (diffusers layout). A codec that "
        "the source names by path is copied into an ldit export.",
    ),
    Command(
        "ema", "checkpoints", "reconstruct an EMA of any length from a run's snapshots",
        f"{_REQUESTS}.convert:EMARequest", f"{_COMMANDS}.ema:run",
        "Reconstruct an EMA of any length from the snapshots of a run (post-hoc EMA, Karras et al. 2024).",
    ),
    Command(
        "bench train", "other", "measure the training step",
        f"{_REQUESTS}.bench:BenchTrainRequest", f"{_COMMANDS}.bench:run_train",
        "Measure the training step on random latents: images/s, FLOP/s and memory of several variants.",
    ),
    Command(
        "bench sample", "other", "measure sampling",
        f"{_REQUESTS}.bench:BenchSampleRequest", f"{_COMMANDS}.bench:run_sample",
        "Measure sampling on random weights: milliseconds an evaluation, images/s and memory.",
    ),
    Command(
        "doctor", "other", "report on this installation, and how to fix what is missing",
        f"{_REQUESTS}.other:DoctorRequest", f"{_COMMANDS}.doctor:run",
        "Report versions, devices, where models and weights are looked for, which extras are installed, and the "
        "command that installs each missing one.",
    ),
)  # fmt: skip
PLANNED = ("plan", "demo", "serve", "push")
"""Commands of the contract that are not built yet."""
NAMES = tuple(dict.fromkeys(row.name.split()[0] for row in TABLE))


def rows_of(name: str) -> list[Command]:
    """The rows of a command; several where it has subcommands."""
    return [row for row in TABLE if row.name.split()[0] == name]
