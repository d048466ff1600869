"""Checkpoints of transformers' GPT-2, Llama and BERT give the same numbers here, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import safetensors.torch
import transformers
from pretrained_support import BERT_SIZES, BERTS, CAUSAL, SCALED, assert_close, bert, edit, randomised

from fastformer.models import BERT, GPT, RotaryScaling
from fastformer.models.layouts import layout_to_write


def assert_same_gradients(ours: GPT | BERT, theirs: torch.nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    base = "" if any(name.startswith(("transformer.", "model.", "bert.")) for name in expected) else "bert."
    expected = {base + name: p.grad for name, p in expected.items()}
    scale = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    parameters = dict(ours.named_parameters())
    for piece in layout_to_write(ours.config).pieces(ours.config):
        whole = parameters.pop(piece.ours).grad
        for name, part in zip(piece.theirs, whole.split(piece.sizes or [len(whole)]), strict=True):
            assert_close(part.t() if piece.transposed else part, expected[name], f"gradient of {name}", scale=scale)
    assert not parameters


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 61, (3, 20))


@pytest.mark.parametrize("name", CAUSAL)
def test_gpt_gives_the_same_logits_and_gradients_and_saves_them(name: str, tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    expected = theirs(tokens).logits
    assert_close(ours(tokens), expected, "logits")

    theirs(tokens, labels=tokens).loss.backward()
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert_close(loss, theirs.loss_function(expected, tokens, vocab_size=61), "loss")
    assert_same_gradients(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert_close(back(tokens).logits, expected, "logits of what was saved")
    assert GPT.from_pretrained(tmp_path / "ours").config == ours.config


def test_generation_is_transformers_own(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL["llama scaled, tied"]())
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(tokens[:, :8], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert torch.equal(GPT.from_pretrained(tmp_path).generate(tokens[:, :8], 16, temperature=0), expected)


@pytest.mark.parametrize("name", BERTS)
def test_bert_gives_the_same_outputs_and_gradients_and_saves_them(name: str, tokens: Tensor, tmp_path: Path) -> None:
    theirs = bert(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BERT.from_pretrained(tmp_path / "theirs")
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    segments = torch.randint(2, tokens.shape)
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "token_type_ids": segments}
    options = {"tokens_mask": mask, "segments": segments}

    def outputs(model: BERT) -> tuple[Tensor, ...]:
        if name == "masked":
            return (model(tokens, **options),)
        if name == "classes":
            return (model.classify(tokens, **options),)
        features = model.features(tokens, **options)
        pooled = model.pool(features)
        return (features, pooled) if name == "base" else (model(tokens, **options), model.next_sentence(pooled))

    expected = theirs(**inputs).to_tuple()
    found = outputs(ours)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "output")
    weights = [torch.randn_like(x) * (mask[..., None] if x.dim() == 3 else 1) for x in expected]
    for tensors in (found, expected):
        sum((x * weight).sum() for x, weight in zip(tensors, weights)).backward()
    assert_same_gradients(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    for a, b in zip(back(**inputs).to_tuple(), expected, strict=True):
        assert_close(a, b, "output of what was saved")
    assert BERT.from_pretrained(tmp_path / "ours").config == ours.config


def test_bert_losses_are_transformers(tokens: Tensor, tmp_path: Path) -> None:
    theirs = bert("masked")
    theirs.save_pretrained(tmp_path / "masked")
    targets = torch.where(torch.rand(tokens.shape) < 0.3, tokens, -100)
    loss = BERT.from_pretrained(tmp_path / "masked")(tokens, targets)
    assert_close(loss, theirs(tokens, labels=targets).loss, "masked loss")

    theirs = bert("classes")
    theirs.save_pretrained(tmp_path / "classes")
    classes = torch.tensor([0, 2, 1])
    loss = BERT.from_pretrained(tmp_path / "classes").classify(tokens, classes)
    assert_close(loss, theirs(tokens, labels=classes).loss, "classification loss")


def test_bert_with_names_of_tensorflows_first(tokens: Tensor, tmp_path: Path) -> None:
    theirs = bert("masked")
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, was in old.items():
            name = name.replace(new, was)
        renamed[name] = tensor
    assert any(name.endswith("gamma") for name in renamed)
    renamed["bert.embeddings.position_ids"] = torch.arange(32)[None]
    renamed["cls.predictions.decoder.weight"] = renamed["bert.embeddings.word_embeddings.weight"].clone()
    renamed["cls.predictions.decoder.bias"] = renamed["cls.predictions.bias"].clone()
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    ours = BERT.from_pretrained(tmp_path)
    assert_close(ours(tokens), theirs(tokens).logits, "logits")


def test_checkpoint_in_several_files(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL["llama"]())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = GPT.from_pretrained(tmp_path)
    assert_close(ours(tokens), theirs(tokens).logits, "logits")
    (tmp_path / "model-of-mine.safetensors").touch()
    ours.save_pretrained(tmp_path)  # over it: the index would lead to the old files
    assert {x.name for x in tmp_path.glob("model*")} == {"model.safetensors", "model-of-mine.safetensors"}
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), ours(tokens))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    theirs.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    lost = next((tmp_path / "other").glob("model-*"))
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        GPT.from_pretrained(tmp_path / "other")


def test_checkpoint_without_heads_and_with_old_constants(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL["gpt2"]())
    theirs.transformer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert_close(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, "logits")


@pytest.mark.parametrize("rope", [{"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": SCALED}])
def test_llama_config_of_transformers_4(rope: dict[str, Any], tmp_path: Path) -> None:
    CAUSAL["llama"]().save_pretrained(tmp_path)
    edit(tmp_path, lambda settings: settings.pop("rope_parameters") and settings.update(rope))
    config = GPT.from_pretrained(tmp_path).config
    assert config.rotary_base == 500.0
    scaling = RotaryScaling(8.0, 1.0, 4.0, 16) if "rope_scaling" in rope else None
    assert config.rotary_scaling == scaling


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_dtype(dtype: torch.dtype | None, tokens: Tensor, tmp_path: Path) -> None:
    theirs = CAUSAL["llama"]().half()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype or torch.float16}
    assert torch.equal(ours.token_embedding.weight, theirs.model.embed_tokens.weight.to(dtype or torch.float16))
    assert ours.rotary.cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.rotary.cos[0, 0] == 1.0


# What a model keeps of its checkpoint, and how it is saved


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_saves_the_special_tokens_that_were_read(tmp_path: Path) -> None:
    CAUSAL["gpt2"]().save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", lambda settings: settings.update(pad_token_id=0))
    GPT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (1, 2, 0)
    new = GPT(GPT.from_pretrained(tmp_path / "theirs").config)
    new.save_pretrained(tmp_path / "new")
    assert settings_of(tmp_path / "new")["eos_token_id"] is None


def test_saves_the_labels_that_were_read(tmp_path: Path) -> None:
    labels = {0: "good", 1: "bad", 2: "so so"}
    theirs = bert("classes", id2label=labels, label2id={name: i for i, name in labels.items()})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BERT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert back.id2label == labels
    assert back.label2id == theirs.config.label2id
    BERT(ours.config).save_pretrained(tmp_path / "new")
    assert settings_of(tmp_path / "new")["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CAUSAL["gpt2"]().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    ours = GPT.from_pretrained(tmp_path)
    torch.nn.init.zeros_(ours.norm.weight)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    for broken in ("safetensors.torch.save_file", "json.dumps"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
            patched.setattr(broken, full)
            ours.save_pretrained(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# The next-sentence head


def test_next_sentence_head_alone(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(transformers.BertForNextSentencePrediction(transformers.BertConfig(**BERT_SIZES)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BERT.from_pretrained(tmp_path / "theirs")
    lengths, segments, follows = torch.tensor([20, 7, 2]), torch.randint(2, tokens.shape), torch.tensor([0, 1, 1])
    mask = (torch.arange(20) < lengths[:, None]).long()
    expected = theirs(tokens, attention_mask=mask, token_type_ids=segments, labels=follows)
    options = {"tokens_lengths": lengths, "segments": segments}
    assert_close(ours.classify_next_sentence(tokens, **options), expected.logits, "logits")
    loss = ours.classify_next_sentence(tokens, follows, **options)
    assert_close(loss, expected.loss, "loss")
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert settings_of(tmp_path / "ours")["architectures"] == ["BertForNextSentencePrediction"]
    back = transformers.BertForNextSentencePrediction.from_pretrained(tmp_path / "ours").eval()
    assert_close(back(tokens).logits, theirs(tokens).logits, "logits of what was saved")
