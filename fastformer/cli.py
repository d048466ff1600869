"""The command line: fastformer bench, train, generate, env."""

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
from fastformer import backends

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastformer", description="Fused transformer kernels behind PyTorch's names.")
    parser.add_argument("--version", action="version", version=f"fastformer {fastformer.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("bench", help="check and measure every operation, then a GPT end to end", add_help=False)

    train = commands.add_parser(
        "train",
        help="train a GPT on a text file",
        description="Train a GPT. Without --text: on the English of Python's own help.",
        epilog="The folder then holds model.safetensors and tokenizer.json.",
    )
    train.set_defaults(run=_train)
    train.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to train on")
    train.add_argument("--minutes", type=float, help="stop after so long (10, if --steps is not given)")
    train.add_argument("--steps", type=int, help="stop after so many steps")
    train.add_argument("--out", type=Path, metavar="DIR", default=Path("fastformer-gpt"), help="(%(default)s)")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the checkpoint in DIR; --minutes and --steps count from its very start",
    )
    _device_argument(train)
    sizes = train.add_argument_group("model and optimizer (not with --resume, which keeps them)")
    for name, (kind, default, meaning) in NEW_RUN_OPTIONS.items():
        sizes.add_argument(_flag(name), type=kind, help=f"{meaning} ({default})")

    generate = commands.add_parser("generate", help="continue a prompt with a trained GPT")
    generate.set_defaults(run=_generate)
    generate.add_argument("--model", type=Path, metavar="DIR", default=Path("fastformer-gpt"), help="(%(default)s)")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(%(default)s)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P")
    generate.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    _device_argument(generate)

    env = commands.add_parser("env", help="what is installed, what would run, what is missing")
    env.set_defaults(run=_env)
    return parser


# What a new run chooses and a resumed one keeps: (type, default, help).
NEW_RUN_OPTIONS = {
    "vocab_size": (int, 4096, "tokens in the vocabulary, at most"),
    "context_length": (int, 256, "tokens seen at once"),
    "num_layers": (int, 6, "blocks"),
    "num_heads": (int, 6, "attention heads"),
    "d_model": (int, 384, "width"),
    "batch_size": (int, 4, "windows a step"),
    "learning_rate": (float, 1e-3, "the highest; a tenth of it at the end"),
    "seed": (int, 0, "of the weights and the order of the text"),
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _device_argument(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="(%(default)s)")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not available: {str(error).splitlines()[0]}") from error


def _train(options: argparse.Namespace) -> int:
    from fastformer.models import GPT, GPTConfig, checkpoint, data, training
    from fastformer.models.tokenizer import Tokenizer

    minutes = 10.0 if options.minutes is None and options.steps is None else options.minutes
    limits = training.Limits(options.steps, minutes)
    given = {name: getattr(options, name) for name in NEW_RUN_OPTIONS if getattr(options, name) is not None}
    chosen = {name: default for name, (_, default, _) in NEW_RUN_OPTIONS.items()} | given
    model_path, tokenizer_path = options.out / checkpoint.MODEL_FILE, options.out / checkpoint.TOKENIZER_FILE
    if not options.resume and model_path.exists():
        raise ValueError(f"--out is {options.out}, which holds a model already: add --resume to go on with it")
    text = data.sample_text() if options.text is None else data.read_text(options.text)
    train_text, held_out_text = data.split_text(text)

    if options.resume:
        if given:
            raise ValueError(f"{_flag(next(iter(given)))} can't be given with --resume, which keeps the checkpoint's")
        state = checkpoint.load(model_path, with_training=True)
        tokenizer = Tokenizer.load(tokenizer_path)
        model = checkpoint.build_model(model_path, state, options.device)
        config = training.config_of(state)
    else:
        config = training.TrainingConfig(
            batch_size=chosen["batch_size"], learning_rate=chosen["learning_rate"], seed=chosen["seed"]
        )
        tokenizer = Tokenizer.train(train_text, chosen["vocab_size"])
        sizes = {name: chosen[name] for name in ("context_length", "num_layers", "num_heads", "d_model")}
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(tokenizer.vocab_size, **sizes)).to(options.device)
    train_tokens, held_out_tokens = tokenizer.encode(train_text), tokenizer.encode(held_out_text)
    trainer = training.Trainer(model, train_tokens, held_out_tokens, model.config.context_length, config)
    if options.resume:
        trainer.restore(state)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_path)

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {len(train_tokens)} training and {len(held_out_tokens)} held-out tokens,"
        f" vocabulary {tokenizer.vocab_size}, on {options.device}"
    )
    try:
        held_out = training.train(trainer, model_path, limits)
    except KeyboardInterrupt:
        kept = f"{model_path} keeps the last checkpoint" if model_path.exists() else "nothing was saved yet"
        print(f"fastformer: interrupted; {kept}", file=sys.stderr)
        return 130
    print(f"held-out loss {held_out:.3f} after {trainer.steps_done} steps; saved to {model_path}")
    print(f'next: fastformer generate --model {options.out} --prompt "..."')
    return 0


def _generate(options: argparse.Namespace) -> int:
    from fastformer.models import checkpoint
    from fastformer.models.tokenizer import Tokenizer

    path = options.model / checkpoint.MODEL_FILE
    model = checkpoint.build_model(path, checkpoint.load(path), options.device).eval()
    tokenizer = Tokenizer.load(options.model / checkpoint.TOKENIZER_FILE)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{options.model}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    prompt = tokenizer.encode(options.prompt).to(options.device)
    if not len(prompt):
        raise ValueError("--prompt is empty, must hold a character at least")
    tokens = model.generate(
        prompt[None],
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    print(tokenizer.decode(tokens[0].cpu()))
    return 0


def _env(options: argparse.Namespace) -> int:
    from fastformer.benchmarks.machine import processor_name

    lines = {
        "fastformer": f"{fastformer.__version__} in {Path(fastformer.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "processor": f"{processor_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads",
        "C++ kernels (CPU)": _cpu_library(),
        "GPU": _gpu(),
        "Triton kernels": _triton(),
        "CUDA kernels": backends.CUDA_PROBLEM or "loaded (all operations but attention and linear)",
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
