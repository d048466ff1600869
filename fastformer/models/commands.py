"""The commands ``fastformer train`` and ``fastformer generate``; their options are those of fastformer/cli.py."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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

SAMPLED_WITH = ("temperature", "top_k", "top_p", "seed")
EXACT_PAIRS = 1000  # held-out pairs, at most, whose targets are compared
FILLED_IN = 5  # candidates that are shown for each [MASK]


def train(options: argparse.Namespace) -> int:
    """Train a model of one kind; 130 if Ctrl-C ended it."""
    kind = options.model or "gpt"
    folder = options.out or Path(f"fastformer-{kind}")
    model_path = folder / MODEL_FILE
    if options.save_every < 1:
        raise ValueError(f"--save-every is {options.save_every}, must be at least 1")
    given = {name: getattr(options, name) for name in NEW_RUN_OPTIONS if getattr(options, name) is not None}
    limits = None
    if options.steps is not None or options.minutes is not None:
        limits = training.Limits(options.steps, options.minutes)
    if options.resume:
        if given:
            flag = flag_of(next(iter(given)))
            raise ValueError(f"{flag} can't be given with --resume, which keeps the checkpoint's")
        state = checkpoint.load(model_path)
        if options.model not in (None, state.kind):
            raise ValueError(f"--model is {options.model}, must be {state.kind} like the checkpoint in {folder}")
        material = runs.read_material(state.kind, options.text, options.pairs)
        limits = limits or training.limits_of(state)
        trainer, tokenizer = runs.resumed_run(folder, material, options.device)
        kind = state.kind
    else:
        if model_path.exists():
            raise ValueError(f"--out is {folder}, which holds a model already: add --resume to go on with it")
        material = runs.read_material(kind, options.text, options.pairs)
        limits = limits or runs.PRESETS[kind].limits
        if "dropout" in given:
            given["embedding_dropout"] = given["attention_dropout"] = given["dropout"]
        trainer, tokenizer = runs.new_run(kind, material, given, options.device)
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
    """Continue a prompt, give the target of a source, or fill in what [MASK] hides."""
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
        _refuse(options, SAMPLED_WITH, "with --beams, which takes the likeliest")
        (found,) = model.beam_search(prompt[None], count, num_beams=options.beams, end_token=end_token)
        print(tokenizer.decode(found[0].tokens.cpu(), skip_special_tokens=True))
        return 0
    temperature = options.temperature
    if temperature is None:
        temperature = 0.8 if is_gpt else 0.0
    stream = model.stream(
        prompt[None],
        count,
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(options.device).manual_seed(options.seed or 0),
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


def _texts(tokenizer: Tokenizer, stream: Iterable[Tensor], tokens: Tensor) -> Iterator[str]:
    """The text of ``tokens`` [S] and of those that the stream gives, in pieces of whole characters."""
    given = 0
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for new in stream:
        if not text.endswith("\ufffd"):
            yield text[given:]
            given = len(text)
        tokens = torch.cat((tokens, new.cpu()))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
    yield text[given:]


@torch.no_grad()
def _fill_in(options: argparse.Namespace, model: Any, tokenizer: Tokenizer) -> int:
    _refuse(options, ("beams", "max_new_tokens", *SAMPLED_WITH), "for a bert, which generates nothing new")
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
    for name in ("text", "pairs"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    return shlex.join(words)


def _draw(folder: Path) -> None:
    try:
        draw_losses(read_log(folder / LOG_FILE), folder / PICTURE_FILE)
    except ImportError as error:
        print(f"no picture of the losses, {folder / LOG_FILE} has them: {error}", file=sys.stderr)
