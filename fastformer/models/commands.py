"""The commands ``fastformer train`` and ``fastformer generate``; their options are those of fastformer/cli.py."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastformer.models import checkpoint, pairs, runs, training
from fastformer.models.checkpoint import MODEL_FILE, TOKENIZER_FILE
from fastformer.models.log import LOG_FILE, PICTURE_FILE, Log, draw_losses, read_log
from fastformer.models.tokenizer import Tokenizer

#: What a new run chooses and a resumed one keeps: (type, what it means).
NEW_RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "vocab_size": (int, "tokens in the vocabulary, at most"),
    "context_length": (int, "tokens seen at once"),
    "num_layers": (int, "blocks"),
    "num_heads": (int, "attention heads"),
    "d_model": (int, "width"),
    "positions": (str, "learned, sinusoidal or rotary"),
    "norm": (str, "layer_norm or rms_norm"),
    "activation": (str, "gelu, gelu_tanh, relu, silu, swiglu or geglu"),
    "dropout": (float, "of embeddings, attention weights and what sublayers give"),
    "batch_size": (int, "windows, or pairs, of a forward pass"),
    "accumulate": (int, "forward passes of a step"),
    "learning_rate": (float, "the highest; a tenth of it at the end"),
    "warmup_steps": (int, "until it is reached"),
    "precision": (str, "fp32, or bf16 for autocast"),
    "checkpoint_activations": (None, "compute activations anew in backward, which saves memory"),
    "seed": (int, "of the weights, the order of the data, and dropout"),
}

DRAWN_WITH = ("top_k", "top_p", "seed")  # above a temperature of 0 alone
EXACT_PAIRS = 1000  # held-out pairs, at most, whose targets are compared
FILLED_IN = 5  # candidates that are shown for each [MASK]


class Run(NamedTuple):
    """What ``train`` goes on with, of a run that is new or resumed."""

    kind: str
    limits: training.Limits
    material: runs.Material
    trainer: training.Trainer
    tokenizer: Tokenizer


def train(options: argparse.Namespace) -> int:
    """Train a model of one kind; 130 if Ctrl-C ended it.

    Raises:
        OSError: a file can't be read or written.
        ValueError: an option or a file is not what it must be, or the loss, a gradient or a weight is not finite.
    """
    if options.save_every < 1:
        raise ValueError(f"--save-every is {options.save_every}, must be at least 1")
    folder = options.out or Path(f"fastformer-{options.model or 'gpt'}")
    model_path = folder / MODEL_FILE
    kind, limits, material, trainer, tokenizer = (_resumed if options.resume else _new)(options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{MODEL_FILE}.*.tmp"):  # of a run that was killed while it saved
        leftover.unlink(missing_ok=True)
    log = Log(folder / LOG_FILE, trainer.steps_done)
    if not options.resume:
        tokenizer.save(folder / TOKENIZER_FILE)

    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{kind}: {parameters / 1e6:.1f} M parameters, {len(trainer.train_tokens)} training and"
        f" {len(trainer.held_out_tokens)} held-out {'pairs' if kind == 'seq2seq' else 'tokens'}, vocabulary"
        f" {tokenizer.vocab_size}, on {options.device}"
    )
    try:
        held_out = training.train(trainer, model_path, limits, save_every=options.save_every, log=log)
    except KeyboardInterrupt:
        if model_path.exists():
            _draw(folder)
            print(f"fastformer: interrupted; {model_path} keeps the last checkpoint. To go on:", file=sys.stderr)
            print(f"  {_resume_command(options, folder)}", file=sys.stderr)
        else:
            print("fastformer: interrupted; nothing was saved yet", file=sys.stderr)
        return 130
    print(f"held-out loss {held_out:.3f} after {trainer.steps_done} steps; saved to {model_path}")
    if kind == "seq2seq":
        shown = trainer.held_out_tokens[:EXACT_PAIRS]
        share = pairs.exact_share(trainer.model, shown)
        print(f"{100 * share:.1f}% of {len(shown)} held-out targets are exact (greedy decoding)")
    _draw(folder)
    source = shlex.quote(material[1][0][0]) if kind == "seq2seq" else ""
    prompt = {"gpt": '"..."', "bert": '"... [MASK] ..."', "seq2seq": source}[kind]
    print(f"next: fastformer generate --model {shlex.quote(str(folder))} --prompt {prompt}")
    return 0


def generate(options: argparse.Namespace) -> int:
    """Continue a prompt, give the target of a source, or fill in what [MASK] hides.

    Raises:
        OSError: a file can't be read.
        ValueError: an option or a file is not what it must be.
    """
    state, model, tokenizer = checkpoint.load_folder(options.model, options.device)
    model.eval()
    if state.kind == "bert":
        return _fill_in(options, model, tokenizer)
    if not (options.prompt if state.kind == "gpt" else options.prompt.strip()):
        raise ValueError("--prompt is empty, must hold a character at least")
    prompt = tokenizer.encode(options.prompt).to(options.device)
    is_gpt = state.kind == "gpt"
    count = options.max_new_tokens
    if count is None:
        count = 100 if is_gpt else model.config.context_length
    end_token = None if is_gpt else tokenizer.number(runs.END)
    if options.beams is not None:
        _refuse(options, ("temperature", *DRAWN_WITH), "with --beams, which takes the likeliest")
        (found,) = model.beam_search(prompt[None], count, num_beams=options.beams, end_token=end_token)
        print(tokenizer.decode(found[0].tokens.cpu(), skip_special_tokens=True))
        return 0
    temperature = options.temperature
    if temperature is None:
        drawn = any(getattr(options, name) is not None for name in DRAWN_WITH)
        temperature = 0.8 if is_gpt else float(drawn)
    generator = None
    if temperature == 0:
        _refuse(options, DRAWN_WITH, "with --temperature 0, which takes the likeliest")
    else:
        seed = 0 if options.seed is None else options.seed
        training.check_seed(seed)
        generator = torch.Generator(options.device).manual_seed(seed)
    stream = model.stream(
        prompt[None],
        count,
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=generator,
        end_token=end_token,
    )
    for text in _texts(tokenizer, stream, prompt.cpu() if is_gpt else prompt.cpu()[:0]):
        print(text, end="", flush=True)
    print()
    return 0


def flag_of(name: str) -> str:
    """The option of the command line that a setting has."""
    return "--" + name.replace("_", "-")


def default_of(name: str) -> str:
    """The presets' values of a setting, for its help."""
    found = {}
    for kind, preset in runs.PRESETS.items():
        fields = training.TrainingConfig.__dataclass_fields__ | checkpoint.KINDS[kind][1].__dataclass_fields__
        chosen = {**preset.model, **preset.training, "vocab_size": preset.vocab_size}
        found[kind] = chosen[name] if name in chosen else fields[name].default
    if len(set(found.values())) == 1:
        return str(found["gpt"])
    return ", ".join(f"{kind} {value}" for kind, value in found.items())


def _new(options: argparse.Namespace, folder: Path) -> Run:
    """A run that begins."""
    kind = options.model or "gpt"
    if (folder / MODEL_FILE).exists():
        raise ValueError(f"--out is {folder}, which holds a model already: add --resume to go on with it")
    limits = _limits(options) or runs.PRESETS[kind].limits
    given = {name: getattr(options, name) for name in NEW_RUN_OPTIONS if getattr(options, name) is not None}
    if "dropout" in given:
        given["embedding_dropout"] = given["attention_dropout"] = given["dropout"]
    material = runs.read_material(kind, options.text, options.pairs)
    trainer, tokenizer = runs.new_run(kind, material, given, options.device)
    return Run(kind, limits, material, trainer, tokenizer)


def _resumed(options: argparse.Namespace, folder: Path) -> Run:
    """The run whose checkpoint is in the folder."""
    _refuse(options, NEW_RUN_OPTIONS, "with --resume, which keeps the checkpoint's")
    limits = _limits(options)
    state, model, tokenizer = checkpoint.load_folder(folder, options.device, with_training=True)
    if options.model not in (None, state.kind):
        raise ValueError(f"--model is {options.model}, must be {state.kind} like the checkpoint in {folder}")
    limits = limits or training.limits_of(state)
    material = runs.read_material(state.kind, options.text, options.pairs)
    return Run(state.kind, limits, material, runs.resumed_run(state, model, tokenizer, material), tokenizer)


def _limits(options: argparse.Namespace) -> training.Limits | None:
    """Those that are given."""
    if options.steps is None and options.minutes is None:
        return None
    return training.Limits(options.steps, options.minutes)


def _texts(tokenizer: Tokenizer, stream: Iterable[Tensor], tokens: Tensor) -> Iterator[str]:
    """The text of ``tokens`` [S] and of those that the stream gives, in pieces of whole characters.

    Each piece is what the text of the last tokens grows by. They begin with those of the piece before it, as a decoder
    may drop the space that a text begins with.
    """
    last, given = tokens, 0  # given: characters of the text of the last tokens
    start = 0  # of the next piece, among the last tokens
    for new in chain([tokens[:0]], stream):
        last = torch.cat((last, new.cpu()))
        text = tokenizer.decode(last, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # within a character, maybe
            continue
        yield text[given:]
        piece = tokenizer.decode(last[start:], skip_special_tokens=True)
        if piece:  # not of special tokens alone, behind which the next text would lose its space
            last, text = last[start:], piece
        given, start = len(text), len(last)
    yield text[given:]


@torch.no_grad()
def _fill_in(options: argparse.Namespace, model: Any, tokenizer: Tokenizer) -> int:
    _refuse(options, ("beams", "max_new_tokens", "temperature", *DRAWN_WITH), "for a bert, which generates nothing new")
    mask = tokenizer.number("[MASK]")
    prompt = tokenizer.encode(options.prompt, special_tokens=True)
    if not (prompt == mask).any():
        raise ValueError(
            "--prompt has no [MASK], must have one at least: a bert doesn't continue a text, it predicts what stands at"
            " [MASK]"
        )
    ends = torch.tensor([tokenizer.number("[CLS]")]), torch.tensor([tokenizer.number("[SEP]")])
    tokens = torch.cat((ends[0], prompt, ends[1]))
    logits = model(tokens[None].to(options.device))[0, 1:-1].float().cpu()  # [S, V]
    logits[:, list(tokenizer.special_tokens.values())] = -torch.inf
    places = (prompt == mask).nonzero()[:, 0]
    best = logits[places].softmax(-1).topk(min(FILLED_IN, tokenizer.vocab_size - len(tokenizer.special_tokens)))
    prompt[places] = best.indices[:, 0]
    print(tokenizer.decode(prompt))
    for number, (chances, candidates) in enumerate(zip(best.values, best.indices, strict=True), start=1):
        words = [f"{tokenizer.decode(x[None])} {100 * p:.1f}%" for x, p in zip(candidates, chances.tolist())]
        print(f"[MASK] {number}: {', '.join(words)}")
    return 0


def _refuse(options: argparse.Namespace, names: Iterable[str], where: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{flag_of(name)} can't be given {where}")


def _resume_command(options: argparse.Namespace, folder: Path) -> str:
    words = ["fastformer", "train", "--resume", "--out", str(folder)]
    for name in ("text", "pairs", "steps", "minutes", "save_every", "device"):
        if getattr(options, name) is not None:
            words += [flag_of(name), str(getattr(options, name))]
    return shlex.join(words)


def _draw(folder: Path) -> None:
    try:
        draw_losses(read_log(folder / LOG_FILE), folder / PICTURE_FILE)
    except ImportError as error:
        print(f"no picture of the losses, {folder / LOG_FILE} has them: {error}", file=sys.stderr)
