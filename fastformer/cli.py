"""The command line: fastformer bench, tune, train, generate, env."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

import fastformer
from fastformer import backends, tuning
from fastformer.models.checkpoint import KINDS
from fastformer.models.commands import NEW_RUN_OPTIONS, default_of, flag_of, generate, train
from fastformer.models.runs import PRESETS

MODEL_PACKAGES = ("numpy", "safetensors", "tokenizers", "tqdm")
BENCHMARK_PACKAGES = ("matplotlib",)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. What is wrong with the user's input is one line, status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    try:
        if arguments[:1] == ["bench"]:  # has a parser of its own
            from fastformer.benchmarks.run import main as bench

            return bench(arguments[1:])
        options = parser.parse_args(arguments)
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastformer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastformer: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastformer", description="Fused transformer kernels behind PyTorch's names.")
    parser.add_argument("--version", action="version", version=f"fastformer {fastformer.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser(
        "bench", help="check and measure operations and whole models beside their peers", add_help=False
    )

    _tune_parser(commands)
    _train_parser(commands)
    _generate_parser(commands)
    env = commands.add_parser("env", help="what is installed, what would run, what is missing")
    env.set_defaults(run=_env)
    return parser


def _tune_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure on this machine from which sizes on ours is faster, for `auto` to go by",
        description="Measures every operation against torch's, with and without gradients, from small sizes to large"
        " ones, and keeps the result, which `auto` then goes by on this machine, with these versions and so many"
        " threads. Takes some minutes; an interruption leaves what was kept before. A kernel that has a wrong answer,"
        " or can't run, is told, never chosen, and makes the exit status 1.",
        epilog="FASTFORMER_TUNING names the file (tuning.json in the cache folder); off: no table is used.",
    )
    parser.set_defaults(run=_tune)
    parser.add_argument("--show", action="store_true", help="print what is kept")
    parser.add_argument("--reset", action="store_true", help="delete it, for all machines")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="at the widths of gpt2, bert, llama (3.2 1B) or a folder with config.json (three small models' widths)",
    )
    parser.add_argument("--op", action="append", metavar="OP[,OP]", help="these operations; repeatable (all)")
    parser.add_argument(
        "--dtype", action="append", metavar="DTYPE[,DTYPE]", help="in these dtypes; repeatable (float32,bfloat16)"
    )
    _device_argument(parser)


def _tune(options: argparse.Namespace) -> int:
    from fastformer.benchmarks.tune import run

    return run(options)


def _train_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a GPT, a BERT or a Seq2Seq on text or pairs",
        description="Train a model. Without --text or --pairs: on the English of Python's own help, of which a Seq2Seq"
        " learns to give runs of words in reverse order.",
        epilog="The folder then holds model.safetensors, tokenizer.json, log.csv and loss.png. Ctrl-C saves and ends.",
    )
    parser.set_defaults(run=train)
    parser.add_argument("--model", choices=KINDS, help="what to train (gpt)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to train on")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE.tsv", help="pairs to train a seq2seq on: source, tab, target in each line"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long (gpt, bert 10, if --steps is not given)")
    parser.add_argument(
        "--steps", type=int, help=f"stop after so many steps (seq2seq {PRESETS['seq2seq'].limits.steps})"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="(fastformer-gpt, -bert or -seq2seq)")
    parser.add_argument(
        "--save-every", type=int, default=100, metavar="STEPS", help="between checkpoints (%(default)s)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the checkpoint in DIR, until its --minutes or --steps, or those given here, which count from"
        " its very start",
    )
    _device_argument(parser)
    sizes = parser.add_argument_group("model and optimizer (not with --resume, which keeps them)")
    for name, (kind, meaning) in NEW_RUN_OPTIONS.items():
        if kind is None:
            sizes.add_argument(flag_of(name), action="store_true", default=None, help=meaning)
        else:
            sizes.add_argument(flag_of(name), type=kind, help=f"{meaning} ({default_of(name)})")


def _generate_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt with a trained GPT, give a Seq2Seq's target, fill in a BERT's [MASK]",
        description="A GPT continues the prompt; a Seq2Seq gives the target of the prompt; a BERT fills in what [MASK]"
        " hides in the prompt, and has none of the options for generating.",
    )
    parser.set_defaults(run=generate)
    parser.add_argument("--model", type=Path, metavar="DIR", default=Path("fastformer-gpt"), help="(%(default)s)")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="(gpt 100, seq2seq its context)")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 takes the likeliest token (gpt 0.8; seq2seq 0, or 1 with --top-k, --top-p or --seed)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P")
    parser.add_argument("--seed", type=int, help="of what is drawn (0)")
    parser.add_argument("--beams", type=int, metavar="W", help="search with W beams, and draw nothing")
    _device_argument(parser)


def _device_argument(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="(%(default)s)")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not available: {str(error).splitlines()[0]}") from error


def _env(options: argparse.Namespace) -> int:
    cores = f"{os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"
    lines = {
        "fastformer": f"{fastformer.__version__} in {Path(fastformer.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "processor": f"{tuning.processor_name()}, {cores}",
        "C++ kernels (CPU)": _cpu_library(),
        "GPU": _gpu(),
        "Triton kernels": _triton(),
        "CUDA kernels": backends.CUDA_PROBLEM
        or "loaded (all operations but linear; attention in bfloat16 and float16)",
        "tuning": _tuning(),
        "train, generate": _packages(MODEL_PACKAGES, "models"),
        "bench": _packages(MODEL_PACKAGES + BENCHMARK_PACKAGES, "bench"),
    }
    width = max(map(len, lines)) + 2
    for name, text in lines.items():
        print(f"{name:<{width}}{text}")
    return 0


def _cpu_library() -> str:
    if not backends.CPU_LIBRARY:
        return (
            "missing; CPU tensors run torch's own kernels. Install a C++ compiler (g++ or clang++), then:"
            " pip install --force-reinstall --no-deps --no-build-isolation fastformer"
        )
    return f"instruction-set level {backends.CPU_LEVEL} (FASTFORMER_CPU_ISA lowers it)"


def _tuning() -> str:
    file = tuning.path()
    if file is None:
        return "no table is used (FASTFORMER_TUNING=off)"
    used = backends.tables_in_use()
    if not used:
        return f"no table of this machine, these versions and so many threads in {file}: `fastformer tune` measures one"
    return f"{file}: {used}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none found by torch (built for {built})" if built else "none: this torch is built for the CPU only"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}" if torch.version.cuda else ", ".join(names)


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "missing: a CUDA build of torch brings Triton along (https://pytorch.org/get-started/locally)"
    version = metadata.version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"Triton {version}, interpreted (TRITON_INTERPRET=1), on any device"
    if torch.cuda.is_available():
        return f"Triton {version}, on the GPU"
    return f"Triton {version}, but no GPU to run on (TRITON_INTERPRET=1 interprets them, slowly)"


def _packages(names: tuple[str, ...], extra: str) -> str:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        return f"missing {', '.join(missing)}: pip install fastformer[{extra}]"
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
