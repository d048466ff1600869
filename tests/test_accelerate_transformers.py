"""accelerate and restore on Hugging Face's models, small and with random weights: whole models and their configs."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers_support import Head, assert_close, assert_same_step, causal_pair, kinds

import fastformer
from fastformer.benchmarks.bench_hugging_face import ARCHITECTURES, IMAGE, build_model, draw_inputs
from fastformer.integrations.transformers_config import ATTENTION, NAME

#: What is swapped in each architecture, beside every torch.nn.Linear.
SWAPPED = {
    "gpt2": {"GPT2LMHeadModel", "GPT2Attention", "GPT2MLP", "LayerNorm"},
    "bert": {"BertLayer", "BertSelfAttention", "BertSelfOutput", "BertOutput", "LayerNorm"},
    "roberta": {"RobertaLayer", "RobertaSelfAttention", "RobertaSelfOutput", "RobertaOutput", "LayerNorm"},
    "t5": {"T5Attention", "T5DenseActDense", "T5LayerNorm"},
    "bart": {"BartAttention", "LayerNorm"},
    "llama": {"LlamaForCausalLM", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"},
    "qwen3": {"Qwen3ForCausalLM", "Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm"},
    "mistral": {"MistralForCausalLM", "MistralAttention", "MistralMLP", "MistralRMSNorm"},
    "gemma2": {"Gemma2Attention", "Gemma2MLP", "Gemma2RMSNorm"},
    "gpt_oss": {"GptOssAttention", "GptOssRMSNorm"},
    "vit": {"ViTAttention", "ViTMLP", "LayerNorm"},
}
SWAPPED = {name: {*own, "Linear"} for name, own in SWAPPED.items()}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def generated(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    prompt = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder")}
    return model.generate(**prompt, max_new_tokens=6, do_sample=False)


# --- the ten architectures


@each_architecture
def test_computes_the_same(name: str, backend: str) -> None:
    model = build_model(name)
    original = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    report = fastformer.accelerate(model)
    assert {layer.kind for layer in report.swapped} == SWAPPED[name]
    assert {layer.name for layer in report.swapped} == {
        module_name for module_name, kind in kinds(original).items() if kind.__name__ in SWAPPED[name]
    }
    assert all(module is modules[module_name] for module_name, module in model.named_modules())
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters) and all(now[key] is parameters[key] for key in now)
    assert list(model.state_dict()) == list(original.state_dict())

    for padding in (None, "left", "right"):
        inputs = draw_inputs(name, padding=padding)
        with torch.inference_mode():
            ours, theirs = model(**inputs).logits, original(**inputs).logits
        if padding and ARCHITECTURES[name].kind != IMAGE and "decoder_input_ids" not in inputs:
            real = inputs["attention_mask"].bool()
            ours, theirs = ours[real], theirs[real]
        assert_close(ours, theirs, f"logits with padding {padding}")
        if ARCHITECTURES[name].generates and padding != "right":
            assert torch.equal(generated(model, inputs), generated(original, inputs))
    assert_same_step(model, original, **draw_inputs(name, padding="right", labels=True))


@each_architecture
def test_autocast(name: str, backend: str) -> None:
    model = build_model(name)
    original, inputs = copy.deepcopy(model), draw_inputs(name)
    fastformer.accelerate(model)
    with torch.inference_mode():
        exact = original(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(**inputs).logits, original(**inputs).logits
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@each_architecture
def test_restore_gives_back(name: str) -> None:
    model, inputs = build_model(name), draw_inputs(name)
    before, logits = kinds(model), model(**inputs).logits
    attributes = {module_name: dict(vars(module)) for module_name, module in model.named_modules()}
    report = fastformer.accelerate(model)
    model(**inputs)
    if ARCHITECTURES[name].generates:
        generated(model, inputs)
    for restored in (len(report.swapped), 0):
        assert fastformer.restore(model) == restored
        assert kinds(model) == before
        for module_name, module in model.named_modules():
            assert vars(module).keys() == attributes[module_name].keys()
            for key, value in vars(module).items():
                assert value is attributes[module_name][key], f"{key} of {module_name}"
        assert torch.equal(model(**inputs).logits, logits)


@each_architecture
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(name: str, copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model, inputs = build_model(name), draw_inputs(name)
    before = kinds(model)
    holders = [module for module in model.modules() if hasattr(module, "config")]
    configs = len({id(module.config) for module in holders})
    report = fastformer.accelerate(model)
    twin = copied(model)
    assert kinds(twin) == kinds(model) != before
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert fastformer.restore(twin) == len(report.swapped)
    assert kinds(twin) == before != kinds(model)
    assert len({id(module.config) for module in twin.modules() if hasattr(module, "config")}) == configs


@each_architecture
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, inputs = build_model(name), draw_inputs(name)
    logits, original = model(**inputs).logits, type(model)
    fastformer.accelerate(model)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [ARCHITECTURES[name].model]
    loaded = original.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, logits)
    through_ours = type(model).from_pretrained(tmp_path)
    fastformer.restore(through_ours)
    assert kinds(through_ours) == kinds(loaded)


# --- configs


def test_a_config_may_be_shared() -> None:
    first = build_model("llama")
    config = first.config
    second = transformers.LlamaForCausalLM(config).eval()
    wrapper = torch.nn.ModuleDict({"first": first, "norm": torch.nn.LayerNorm(4)})
    wrapper.config = config
    before, output = config.to_dict(), second(**draw_inputs("llama")).logits
    fastformer.accelerate(wrapper)
    assert second.config is config and config._attn_implementation == "sdpa" and config.to_dict() == before
    assert all(not any("fastformer" in key for key in vars(module)) for module in second.modules())
    assert torch.equal(second(**draw_inputs("llama")).logits, output)
    configs = {id(module.config) for module in wrapper.modules() if hasattr(module, "config")}
    assert configs == {id(wrapper.config)} != {id(config)}
    assert wrapper.config._attn_implementation == NAME
    fastformer.restore(wrapper)
    assert wrapper.config is first.config is first.model.layers[0].self_attn.config is config


def test_configs_inside_configs() -> None:
    text, vision = build_model("llama"), build_model("vit")
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config)
    config.text_config, config.vision_config = text.config, vision.config
    model = torch.nn.ModuleList([text, vision])
    model.config = config
    fastformer.accelerate(model, skip="0.model.layers.1.self_attn")
    attention = [layer.self_attn for layer in text.model.layers]
    assert [x.config._attn_implementation for x in attention] == [NAME, "sdpa"]
    assert text.config is attention[1].config and text.config._attn_implementation == "sdpa"
    assert model.config is not config and model.config.vision_config is vision.config
    assert vision.config._attn_implementation == NAME and config.vision_config._attn_implementation == "sdpa"
    fastformer.restore(model)
    assert model.config is config and model.config.text_config is attention[0].config is text.config
    assert model.config.vision_config is vision.config and vision.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bart"])
def test_only_and_skip(name: str) -> None:
    model = build_model(name)
    original, config = copy.deepcopy(model), model.config
    attention = [n for n, kind in kinds(model).items() if kind.__name__ in ATTENTION]
    report = fastformer.accelerate(model, only=attention[0])
    assert [layer.name for layer in report.swapped if layer.kind != "Linear"] == attention[:1]
    assert model.config is config is model.get_submodule(attention[1]).config
    assert model.get_submodule(attention[0]).config._attn_implementation == NAME
    inputs = draw_inputs(name, padding="left")
    real = slice(None) if "decoder_input_ids" in inputs else inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[real], original(**inputs).logits[real])
    report = fastformer.accelerate(model, skip=type(model.base_model))
    assert all(layer.kind in (type(model).__name__, "Linear") for layer in report.swapped)
    fastformer.accelerate(model)
    assert model.config is not config and model.config._attn_implementation == NAME
    assert_close(model(**inputs).logits[real], original(**inputs).logits[real])
    fastformer.restore(model)
    assert kinds(model) == kinds(original) and model.config is config
    assert all(model.get_submodule(n).config is config for n in attention)


def test_the_base_model_alone() -> None:
    model = build_model("llama").train()
    report = fastformer.accelerate(model, only="model")
    assert {layer.kind for layer in report.swapped} == SWAPPED["llama"] - {"LlamaForCausalLM"}
    assert "logits" in dict(model(**draw_inputs("llama", labels=True)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bart"])
def test_what_was_changed_in_a_config_stays(name: str) -> None:
    """As it would in the original, and what another model's owner changed there meanwhile stays too."""
    model = build_model(name).train()
    config = model.config
    fastformer.accelerate(model)
    model.resize_token_embeddings(70)
    model.config.use_cache = False
    model.config.mine = {"some": "thing"}
    config.theirs = 3
    fastformer.restore(model)
    assert model.config is config and config._attn_implementation != "fastformer"
    assert (config.vocab_size, config.use_cache, config.mine, config.theirs) == (70, False, {"some": "thing"}, 3)
    inputs = {
        key: x.clamp(max=69) if x.dtype == torch.int64 else x for key, x in draw_inputs(name, labels=True).items()
    }
    assert model(**inputs).loss.isfinite()
    fastformer.accelerate(model)
    model.set_attn_implementation("eager")
    fastformer.restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "options", "change", "kind", "reason"),
    [
        ("llama", {"attn_implementation": "eager"}, None, "LlamaAttention", "is 'eager', not the default"),
        ("llama", {"attn_implementation": "flex_attention"}, None, "LlamaAttention", "'flex_attention'"),
        ("gemma2", {"output_attentions": True}, None, "Gemma2Attention", "asks for the attention weights"),
        ("gemma2", {}, None, "Gemma2ForCausalLM", "softcapped"),
        ("gpt_oss", {}, None, "GptOssForCausalLM", "router"),
        ("gpt_oss", {}, None, "GptOssExperts", "no experts"),
        ("bart", {}, None, "BartDecoderLayer", "part of a longer forward"),
        ("bert", {}, None, "BertForMaskedLM", "part of a longer forward"),
        ("llama", {}, lambda m: setattr(m, "loss_function", max), "LlamaForCausalLM", "loss function was replaced"),
        ("llama", {}, lambda m: setattr(m, "lm_head", Head(64, 99)), "LlamaForCausalLM", "no plain torch.nn.Linear"),
        ("llama", {}, lambda m: setattr(m.model.norm, "forward", abs), "LlamaRMSNorm", "forward was replaced"),
        ("llama", {}, lambda m: fastformer.accelerate(m), "LlamaForCausalLM", "fastformer's already"),
        ("llama", {}, lambda m: fastformer.accelerate(m), "LlamaAttention", "fastformer's already"),
        ("llama", {}, None, "Embedding", "no such layer"),
        ("llama", {}, None, "SiLUActivation", "part of a swapped layer"),
    ],
)
def test_reasons(
    name: str, options: dict[str, Any], change: Callable[[torch.nn.Module], Any] | None, kind: str, reason: str
) -> None:
    model = build_model(name, **options)
    if change is not None:
        change(model)
    before = kinds(model)
    planned = fastformer.accelerate(model, dry_run=True)
    assert kinds(model) == before
    report = fastformer.accelerate(model)
    assert (planned.swapped, planned.left) == (report.swapped, report.left)
    assert [layer for layer in report.left if layer.kind == kind and reason in layer.reason]
    assert reason in str(report) and "swapped" in str(report)


# --- nothing else changes


def test_the_library_stays() -> None:
    def everything() -> dict[str, dict[str, Any]]:
        modules = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.llama")}
        found = {name: dict(vars(module)) for name, module in modules.items()}
        for module in modules.values():
            found |= {str(x): dict(vars(x)) for x in vars(module).values() if isinstance(x, type)}
        return found

    build_model("llama")(**draw_inputs("llama"))
    before = everything()
    model = build_model("llama")
    fastformer.accelerate(model)
    model(**draw_inputs("llama"))
    fastformer.restore(model)
    assert everything() == before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_compile_and_checkpointing(name: str) -> None:
    dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    pair = causal_pair(name) if name != "bert" else [build_model(name, **dropout).train() for _ in range(2)]
    model, original = (copy.deepcopy(each) for each in pair)
    fastformer.accelerate(model)
    inputs = draw_inputs(name, labels=True)
    assert_same_step(torch.compile(model, backend="aot_eager", fullgraph=True), original, **inputs)
    model.gradient_checkpointing_enable()
    assert_same_step(model, original, **inputs)


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """transformers is imported by those who need it, and an unpickled model knows fastformer's attention."""
    model = build_model("bart")  # in which attention alone is transformers'
    inputs = draw_inputs("bart")
    fastformer.accelerate(model)
    torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    program = f"""
import sys, torch, fastformer
fastformer.restore(torch.nn.LayerNorm(4))
fastformer.accelerate(torch.nn.LayerNorm(4))
assert "transformers" not in sys.modules
model, inputs, logits = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(**inputs).logits, logits)
assert fastformer.restore(model)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
