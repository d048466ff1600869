"""The commands train and generate, run in this process, and killed in another."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import error_of

from fastformer import cli
from fastformer.models import Seq2Seq, checkpoint, commands, data, runs, training
from fastformer.models.log import read_log
from fastformer.models.tokenizer import Tokenizer

SMALL = ["--context-length", "32", "--num-layers", "1", "--num-heads", "2", "--d-model", "32", "--vocab-size", "300"]
DEVICE = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
FILES = ["log.csv", "loss.png", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(data.sample_text()[:20_000])
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("".join(f"number {i}\t{i * i} squared\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path, pairs_file: Path) -> dict[str, Path]:
    """A folder for each kind of model."""
    folders = {}
    for kind in ("gpt", "bert", "seq2seq"):
        folders[kind] = tmp_path_factory.mktemp(kind) / "model"
        source = ["--pairs", str(pairs_file)] if kind == "seq2seq" else ["--text", str(text_file)]
        command = ["train", "--model", kind, *source, "--steps", "6", "--out", str(folders[kind]), *SMALL]
        assert cli.main(command) == 0
    return folders


def generate(folder: Path, *options: str) -> list[str]:
    return ["generate", "--model", str(folder), *options]


def test_train_leaves_a_model_a_tokenizer_a_log_and_a_picture(trained: dict[str, Path]) -> None:
    for kind, folder in trained.items():
        assert sorted(file.name for file in folder.iterdir()) == FILES
        assert checkpoint.load(folder / "model.safetensors").kind == kind
        with (folder / "log.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 7)]


def test_a_gpt_continues_a_prompt(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        options = ["--prompt", "The value", "--max-new-tokens", "12", "--seed", seed, "--top-k", "50"]
        assert cli.main(generate(trained["gpt"], *options)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("The value")
    assert outputs[0] == outputs[1] != outputs[2]


def test_streamed_text_is_that_of_all_tokens(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, model, tokenizer = checkpoint.load_folder(trained["gpt"])
    prompt = "naïve 数学"  # ends within no character, though single bytes are tokens
    tokens = model.eval().generate(tokenizer.encode(prompt)[None], 20, temperature=0.0)[0]
    assert cli.main(generate(trained["gpt"], "--prompt", prompt, "--max-new-tokens", "20", "--temperature", "0")) == 0
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"


@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
def test_one_beam_is_greedy(kind: str, trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for options in (["--temperature", "0"], ["--beams", "1"], ["--beams", "3"]):
        command = generate(trained[kind], "--prompt", "number 7", "--max-new-tokens", "8", *options)
        assert cli.main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert all(output.startswith("number 7") == (kind == "gpt") for output in outputs)


def test_a_bert_fills_in_what_mask_hides(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(generate(trained["bert"], "--prompt", "the [MASK] of a [MASK]")) == 0
    filled, first, second = capsys.readouterr().out.splitlines()
    assert filled.startswith("the") and "[MASK]" not in filled
    assert first.startswith("[MASK] 1: ") and second.startswith("[MASK] 2: ")
    assert first.count("%") == 5 and "[" not in first.removeprefix("[MASK]")

    line = error_of(generate(trained["bert"], "--prompt", "the value of"), capsys)
    assert "--prompt has no [MASK]" in line and "predicts what stands at [MASK]" in line
    line = error_of(generate(trained["bert"], "--prompt", "[MASK]", "--beams", "2"), capsys)
    assert "--beams can't be given for a bert" in line


def test_a_seq2seq_run_tells_the_exact_share(
    pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--steps", "2", "--vocab-size", "300"]
    assert cli.main(["train", "--model", "seq2seq", "--pairs", str(pairs_file), *out]) == 0
    output = capsys.readouterr().out
    assert "54 training and 6 held-out pairs" in output
    assert "% of 6 held-out targets are exact (greedy decoding)" in output


def test_resume_goes_on(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    start = ["train", "--text", str(text_file), "--out", str(folder)]
    assert cli.main([*start, "--steps", "3", *SMALL]) == 0
    assert cli.main([*start, "--steps", "5", "--resume"]) == 0
    assert "after 5 steps" in capsys.readouterr().out
    state = checkpoint.load(folder / "model.safetensors", with_training=True)
    assert state.training["steps_done"] == 5
    assert state.training["limits"] == {"steps": 5, "minutes": None}
    assert len((folder / "log.csv").read_text().splitlines()) == 6

    assert "5 steps and" in error_of([*start, "--resume"], capsys)  # until the checkpoint's own limits
    assert "add --resume" in error_of([*start, "--steps", "9"], capsys)
    assert "--d-model can't be given with --resume" in error_of([*start, "--resume", "--d-model", "64"], capsys)
    assert "--model is bert, must be gpt" in error_of([*start, "--resume", "--model", "bert"], capsys)
    assert "text or pairs are not those" in error_of(["train", "--out", str(folder), "--resume"], capsys)
    assert checkpoint.load(folder / "model.safetensors").training["steps_done"] == 5


def test_resume_reads_the_checkpoint_once(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", "--text", str(text_file), "--out", str(tmp_path)]
    assert cli.main([*start, *SMALL, "--steps", "1"]) == 0
    load, seen = checkpoint.load, []
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: (seen.append(path), load(path, **options))[1])
    assert cli.main([*start, "--resume", "--steps", "2"]) == 0
    assert seen == [tmp_path / "model.safetensors"]


def test_an_interrupted_run_says_how_to_go_on(
    pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"

    def interrupt(trainer: training.Trainer, path: Path, limits: training.Limits, **options: object) -> float:
        checkpoint.save(path, trainer.checkpoint())
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    source = ["--pairs", str(pairs_file), "--minutes", "0.5", "--save-every", "7"]
    assert cli.main(["train", "--model", "seq2seq", *source, "--out", str(folder), *SMALL]) == 130
    words = ["fastformer", "train", "--resume", "--out", str(folder), *source, "--device", str(DEVICE)]
    assert shlex.split(capsys.readouterr().err.splitlines()[-1]) == words


def test_train_refuses_wrong_input(
    text_file: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary, short, out = tmp_path / "binary", tmp_path / "short", tmp_path / "out"
    binary.write_bytes(bytes(range(256)))
    short.write_text("Too short to train on.")
    new = ["train", "--steps", "2", "--out", str(out)]
    seq2seq = [*new, "--model", "seq2seq", "--vocab-size", "300"]
    assert "not UTF-8" in error_of([*new, "--text", str(binary)], capsys)
    assert "text is too short" in error_of([*new, "--text", str(short)], capsys)
    assert "text is too short" in error_of([*seq2seq, "--text", str(short)], capsys)
    assert "No such file" in error_of([*new, "--text", str(tmp_path / "missing")], capsys)
    assert "Is a directory" in error_of([*new, "--text", str(tmp_path)], capsys)
    assert "no such file" in error_of([*new, "--text", str(text_file), "--resume"], capsys)
    assert "pairs are for a seq2seq" in error_of([*new, "--pairs", str(pairs_file)], capsys)
    both = ["--pairs", str(pairs_file), "--text", str(text_file)]
    assert "must not be given together" in error_of([*seq2seq, *both], capsys)
    assert "short, line 1: has 0 tabs" in error_of([*seq2seq, "--pairs", str(short)], capsys)
    assert "context_length, 4" in error_of(
        [*seq2seq, "--pairs", str(pairs_file), "--context-length", "4", "--batch-size", "2"], capsys
    )
    for option, value in (
        ("--num-heads", "5"),
        ("--vocab-size", "10"),
        ("--batch-size", "0"),
        ("--accumulate", "0"),
        ("--learning-rate", "0"),
        ("--warmup-steps", "-1"),
        ("--precision", "fp8"),
        ("--positions", "absolute"),
        ("--dropout", "2"),
        ("--steps", "0"),
        ("--save-every", "0"),
        ("--seed", "99999999999999999999999"),
        ("--seed", "-1"),
    ):
        line = error_of([*new, "--text", str(text_file), *SMALL, option, value], capsys)
        assert option.removeprefix("--").replace("-", "_") in line.replace("-", "_")
    assert not out.exists()


def test_generate_refuses_wrong_input(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such file" in error_of(generate(tmp_path, "--prompt", "x"), capsys)
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 99)
    assert "not a fastformer checkpoint" in error_of(generate(tmp_path, "--prompt", "x"), capsys)
    gpt = trained["gpt"]
    assert "--prompt" in error_of(generate(gpt, "--prompt", ""), capsys)
    assert "--prompt" in error_of(generate(trained["seq2seq"], "--prompt", " "), capsys)
    assert "temperature" in error_of(generate(gpt, "--prompt", "x", "--temperature", "-1"), capsys)
    beams = ["--max-new-tokens", "4", "--beams"]
    assert "num_beams is 0" in error_of(generate(gpt, "--prompt", "x", *beams, "0"), capsys)
    assert "--top-k can't be given with --beams" in error_of(
        generate(gpt, "--prompt", "x", *beams, "2", "--top-k", "3"), capsys
    )
    assert "context_length, 32" in error_of(generate(trained["seq2seq"], "--prompt", "x" * 99), capsys)
    assert "seed is 99999999999999999999999, must be" in error_of(
        generate(gpt, "--prompt", "x", "--seed", "99999999999999999999999"), capsys
    )
    for option, value in (("--top-k", "3"), ("--top-p", "0.5"), ("--seed", "1")):
        line = error_of(generate(gpt, "--prompt", "x", "--temperature", "0", option, value), capsys)
        assert f"{option} can't be given with --temperature 0" in line


def test_a_seq2seq_draws_where_that_is_asked_for(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stream(model: Seq2Seq, source: torch.Tensor, max_new_tokens: int, **options: Any) -> Iterator[torch.Tensor]:
        seen.append((options["temperature"], options["generator"] is not None))
        return iter(())

    monkeypatch.setattr(Seq2Seq, "stream", stream)
    for options in ([], ["--top-k", "3"], ["--top-p", "0.5"], ["--seed", "1"], ["--seed", "1", "--temperature", "2"]):
        assert cli.main(generate(trained["seq2seq"], "--prompt", "number 7", *options)) == 0
    assert seen == [(0.0, False), (1.0, True), (1.0, True), (1.0, True), (2.0, True)]


# Streamed text


class Counting:
    """A tokenizer that notes how many tokens it decodes at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.counts: list[int] = []

    def decode(self, tokens: torch.Tensor, **options: bool) -> str:
        self.counts.append(len(tokens))
        return self.tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
def test_pieces_of_any_tokens_are_their_text(kind: str, trained: dict[str, Path]) -> None:
    """Bytes in any order, spaces, and special tokens within, which stand for no text."""
    tokenizer = Tokenizer.load(trained[kind] / "tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    some = torch.cat((torch.arange(6), tokenizer.encode("  数学 naïve é\U0001f600  a b")))
    for length in [*range(8), *range(8, 60, 4)]:
        for source in (some, torch.arange(tokenizer.vocab_size)):
            tokens = source[torch.randint(len(source), (length,), generator=generator)]
            prompt = tokens[: length // 4]
            pieces = list(commands._texts(tokenizer, (x[None] for x in tokens[length // 4 :]), prompt))
            assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_streamed_text_comes_at_once_and_decodes_a_few_tokens(trained: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(trained["gpt"] / "tokenizer.json")
    text = "the value 数 of é words " * 20
    tokens, counting = tokenizer.encode(text), Counting(tokenizer)
    pieces = commands._texts(counting, (x[None] for x in tokens), tokenizer.encode("naïve"))
    assert next(pieces) == "naïve"  # before the first new token
    counting.counts.clear()
    assert next(pieces) == tokenizer.decode(tokens[:1])
    assert "".join(pieces) == text[len(tokenizer.decode(tokens[:1])) :]
    assert len(tokens) > 200 and max(counting.counts) < 16


def test_without_matplotlib_training_says_that_there_is_no_picture(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["train", "--text", str(text_file), "--steps", "1", "--out", str(tmp_path), *SMALL]) == 0
    assert "no picture of the losses" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == [name for name in FILES if name != "loss.png"]


def test_interrupted_before_the_first_checkpoint(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> float:
        raise KeyboardInterrupt

    command = ["train", "--text", str(text_file), "--steps", "9", "--out", str(tmp_path), *SMALL]
    monkeypatch.setattr("fastformer.models.training.Trainer.train_step", interrupt)
    assert cli.main(command) == 130
    assert "interrupted; nothing was saved yet" in capsys.readouterr().err
    monkeypatch.setattr("fastformer.models.runs.train_tokenizer", interrupt)
    assert cli.main(command) == 130
    assert capsys.readouterr().err == "fastformer: interrupted\n"


def start(command: list[str], folder: Path, rows: int) -> subprocess.Popen:
    """A run in another process that has trained a few steps, so that it has saved."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastformer.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline, log = time.monotonic() + 60, folder / "log.csv"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") > rows and (folder / "model.safetensors").exists():
            break
        time.sleep(0.01)
    return process


def test_killed_and_interrupted_runs_go_on(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = tmp_path / "run", ["--text", str(text_file)]
    limits = ["--steps", "100000", "--save-every", "4"]
    killed = start(["train", *text, "--out", str(folder), *limits, *SMALL, "--dropout", "0.1"], folder, rows=8)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    steps = checkpoint.load(folder / "model.safetensors").training["steps_done"]
    assert steps % 4 == 0

    resume = ["train", "--resume", *text, "--out", str(folder), "--save-every", "4"]
    # More than the killed run may have logged after it saved: else the signal could come before Python has started.
    logged = (folder / "log.csv").read_bytes().count(b"\n")
    interrupted = start(resume, folder, rows=logged + 4)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate()
    assert interrupted.returncode == 130
    command = f"fastformer train --resume --out {folder} --text {text_file} --save-every 4 --device {DEVICE}"
    assert f"To go on:\n  {command}\n" in errors
    assert sorted(file.name for file in folder.iterdir()) == FILES
    state = checkpoint.load(folder / "model.safetensors")
    rows = read_log(folder / "log.csv")
    assert [row.step for row in rows] == list(range(1, state.training["steps_done"] + 1))
    assert len(rows) >= steps + 4

    options = {"context_length": 32, "num_layers": 1, "num_heads": 2, "d_model": 32, "vocab_size": 300}
    dropout = {"dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1}
    unbroken, _ = runs.new_run("gpt", runs.read_material("gpt", text_file, None), options | dropout)
    assert [unbroken.train_step(step / 100000) for step in range(len(rows))] == [row.loss for row in rows]
