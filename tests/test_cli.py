"""The command line, run in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastformer import cli
from fastformer.models import checkpoint, data

SMALL = ["--context-length", "32", "--num-layers", "1", "--num-heads", "2", "--d-model", "32", "--vocab-size", "300"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(data.sample_text()[:20_000])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(["train", "--text", str(text_file), "--steps", "6", "--out", str(folder), *SMALL]) == 0
    return folder


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command prints."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastformer: error: ")
    return lines[0]


def generate(folder: Path, *options: str) -> list[str]:
    return ["generate", "--model", str(folder), "--max-new-tokens", "12", *options]


def test_train_then_generate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(file.name for file in trained.iterdir()) == ["model.safetensors", "tokenizer.json"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main(generate(trained, "--prompt", "The value", "--seed", seed, "--top-k", "50")) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("The value")
    assert outputs[0] == outputs[1] != outputs[2]


def test_resume_goes_on(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    start = ["train", "--text", str(text_file), "--out", str(folder)]
    assert cli.main([*start, "--steps", "3", *SMALL]) == 0
    assert cli.main([*start, "--steps", "5", "--resume"]) == 0
    assert "after 5 steps" in capsys.readouterr().out
    state = checkpoint.load(folder / "model.safetensors", with_training=True)
    assert state.training["steps_done"] == 5

    assert "5 steps and" in error_of([*start, "--steps", "5", "--resume"], capsys)
    assert "add --resume" in error_of([*start, "--steps", "9"], capsys)
    assert "--d-model can't be given with --resume" in error_of([*start, "--resume", "--d-model", "64"], capsys)
    assert "text is not the one" in error_of(["train", "--out", str(folder), "--resume"], capsys)
    assert checkpoint.load(folder / "model.safetensors").training["steps_done"] == 5


def test_train_refuses_wrong_input(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary, short, out = tmp_path / "binary", tmp_path / "short", tmp_path / "out"
    binary.write_bytes(bytes(range(256)))
    short.write_text("Too short to train on.")
    new = ["train", "--steps", "2", "--out", str(out)]
    assert "not UTF-8" in error_of([*new, "--text", str(binary)], capsys)
    assert "text is too short" in error_of([*new, "--text", str(short)], capsys)
    assert "No such file" in error_of([*new, "--text", str(tmp_path / "missing")], capsys)
    assert "Is a directory" in error_of([*new, "--text", str(tmp_path)], capsys)
    assert "no such file" in error_of([*new, "--text", str(text_file), "--resume"], capsys)
    for option, value in (
        ("--num-heads", "5"),
        ("--vocab-size", "10"),
        ("--batch-size", "0"),
        ("--learning-rate", "0"),
        ("--steps", "0"),
    ):
        error_of([*new, "--text", str(text_file), *SMALL, option, value], capsys)
    assert not out.exists()


def test_generate_refuses_wrong_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in error_of(generate(tmp_path, "--prompt", "x"), capsys)
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 99)
    assert "not a fastformer checkpoint" in error_of(generate(tmp_path, "--prompt", "x"), capsys)
    assert "--prompt" in error_of(generate(trained, "--prompt", ""), capsys)
    assert "temperature" in error_of(generate(trained, "--prompt", "x", "--temperature", "-1"), capsys)


def test_interrupted_training_says_what_is_kept(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastformer.models.training.Trainer.train_step", interrupt)
    command = ["train", "--text", str(text_file), "--steps", "9", "--out", str(tmp_path), *SMALL]
    assert cli.main(command) == 130
    assert "interrupted; nothing was saved yet" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--steps", "many"], ["generate", "--device", "moon"]])
def test_unknown_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_missing_package_says_how_to_get_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = error_of(generate(trained, "--prompt", "x"), capsys)
    assert line.endswith("tokenizers is not installed: pip install fastformer[models]")


def test_env_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert f"instruction-set level {torch.ops.fastformer.cpu_isa()}" in output
    assert "Triton " in output
    assert "tokenizers " in output


def test_env_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("fastformer.backends.CPU_LIBRARY", False)
    assert cli.main(["env"]) == 0
    output = capsys.readouterr().out
    assert "missing; CPU tensors run torch's own kernels. Install a C++ compiler" in output
    assert "missing: a CUDA build of torch brings Triton" in output
    assert "missing numpy, safetensors, tokenizers, tqdm: pip install fastformer[models]" in output
