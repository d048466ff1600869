"""Hugging Face's models, small and with random weights, which the tests use too; and what accelerate() makes of them.

Forward, the two passes of a training step, and greedy generation, beside the model as transformers gives it with each
of its attentions: its own ("eager") and, where it allows that, torch's scaled_dot_product_attention ("sdpa").

Needs transformers; importing this file does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastformer

from .checking import describe
from .harness import FORWARD, TRAINING, Case, Limits, Pace, Row, Timer, Work, run_case, short_name
from .peers import Package, why_not_imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a model takes: ids; ids of a source and a target; pixels. CAUSAL and SEQ2SEQ models generate.
CAUSAL, ENCODER, SEQ2SEQ, IMAGE = "causal", "encoder", "seq2seq", "image"
PAD, START = 0, 1  # token ids; the inputs' tokens are drawn from the others


@dataclass(frozen=True)
class Size:
    """Of a model and of a batch for it."""

    width: int
    hidden: int  # of the feed-forward
    layers: int
    heads: int
    kv_heads: int  # where keys and values have fewer
    vocabulary: int
    window: int  # where attention has one
    image: int  # pixels a side
    patch: int
    batch: int
    seqlen: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


TINY = Size(64, 96, 2, 4, 2, vocabulary=99, window=6, image=32, patch=8, batch=2, seqlen=17)
BENCH = Size(384, 1536, 4, 6, 2, vocabulary=8192, window=64, image=224, patch=16, batch=2, seqlen=256)


@dataclass(frozen=True)
class Architecture:
    """One model of transformers."""

    model: str  # the class's name
    config: str
    kind: str
    options: Callable[[Size], dict[str, Any]]  # of the config

    @property
    def generates(self) -> bool:
        return self.kind in (CAUSAL, SEQ2SEQ)


def _gpt2(s: Size) -> dict[str, Any]:
    return {"n_embd": s.width, "n_inner": s.hidden, "n_layer": s.layers, "n_head": s.heads, "n_positions": 2 * s.seqlen}


def _bert(s: Size) -> dict[str, Any]:
    return {
        "hidden_size": s.width,
        "intermediate_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "max_position_embeddings": 2 * s.seqlen,
    }


def _t5(s: Size) -> dict[str, Any]:
    sizes = {"d_model": s.width, "d_ff": s.hidden, "d_kv": s.head_dim, "num_layers": s.layers, "num_heads": s.heads}
    return sizes | {"decoder_start_token_id": START}


def _bart(s: Size) -> dict[str, Any]:
    return {
        "d_model": s.width,
        "encoder_ffn_dim": s.hidden,
        "decoder_ffn_dim": s.hidden,
        "encoder_layers": s.layers,
        "decoder_layers": s.layers,
        "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads,
        "max_position_embeddings": 2 * s.seqlen,
        "decoder_start_token_id": START,
        "forced_eos_token_id": None,
    }


def _llama(s: Size) -> dict[str, Any]:
    sizes = _bert(s)
    return sizes | {"num_key_value_heads": s.kv_heads, "head_dim": s.head_dim}


def _mistral(s: Size) -> dict[str, Any]:
    return _llama(s) | {"sliding_window": s.window}


def _gemma2(s: Size) -> dict[str, Any]:
    return _mistral(s) | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": s.head_dim}


def _gpt_oss(s: Size) -> dict[str, Any]:
    sizes = _mistral(s) | {"num_local_experts": 4, "num_experts_per_tok": 2}
    del sizes["max_position_embeddings"]  # which its rotary embedding's scaling goes with
    return sizes


def _vit(s: Size) -> dict[str, Any]:
    sizes = _bert(s)
    del sizes["max_position_embeddings"]
    return sizes | {"image_size": s.image, "patch_size": s.patch, "num_labels": 10}


ARCHITECTURES = {
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", CAUSAL, _gpt2),
    "bert": Architecture("BertForMaskedLM", "BertConfig", ENCODER, _bert),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", ENCODER, _bert),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", SEQ2SEQ, _t5),  # position bias
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, _bart),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", CAUSAL, _llama),  # fewer key heads, as in those below
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", CAUSAL, _llama),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", CAUSAL, _mistral),  # window
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", CAUSAL, _gemma2),  # window, softcap
    "gpt_oss": Architecture("GptOssForCausalLM", "GptOssConfig", CAUSAL, _gpt_oss),  # window, sinks, experts
    "vit": Architecture("ViTForImageClassification", "ViTConfig", IMAGE, _vit),
}


def build_model(name: str, size: Size = TINY, *, noise: float = 0.1, **options: Any) -> PreTrainedModel:
    """The architecture with random weights, the same in every call, in eval mode.

    ``noise`` is the deviation of what is added to every parameter, so that biases, norms and sinks matter, which
    transformers initialises to constants. ``options`` go to the config over the size's own.
    """
    import transformers

    architecture = ARCHITECTURES[name]
    tokens = {"vocab_size": size.vocabulary, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": None}
    base = {} if architecture.kind == IMAGE else tokens
    config = getattr(transformers, architecture.config)(**(base | architecture.options(size) | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, architecture.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
    return model


def draw_inputs(name: str, size: Size = TINY, *, padding: str | None = None, labels: bool = False) -> dict[str, Tensor]:
    """A batch for the model, the same in every call.

    Args:
        padding: "left" or "right": that side of every sequence but the first is padding, a third of it; of an image
            nothing is.
        labels: add what the model's loss takes.
    """
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(1)
    if architecture.kind == IMAGE:
        inputs = {"pixel_values": torch.randn(size.batch, 3, size.image, size.image, generator=generator)}
        return inputs | ({"labels": torch.arange(size.batch) % 10} if labels else {})
    ids = torch.randint(START + 1, size.vocabulary, (size.batch, size.seqlen), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        padded = slice(0, size.seqlen // 3) if padding == "left" else slice(size.seqlen - size.seqlen // 3, None)
        mask[1:, padded] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    inputs = {"input_ids": ids, "attention_mask": mask}
    # A token behind padding is no target either: what predicts it is the padding's own logits.
    target = ids.masked_fill(mask * mask.roll(1, dims=1).index_fill(1, torch.tensor(0), 1) == 0, -100)
    if architecture.kind == SEQ2SEQ:
        # The target is shorter than the source, so that queries and keys of the cross-attention differ in number.
        target = torch.randint(START + 1, size.vocabulary, (size.batch, size.seqlen - 3), generator=generator)
        start = torch.full_like(target[:, :1], START)
        inputs["decoder_input_ids"] = torch.cat([start, target[:, :-1]], dim=1)
    return inputs | ({"labels": target} if labels else {})


GENERATION = "generation"  # greedy, of NEW_TOKENS
NEW_TOKENS = 16
COUNT = sum(3 if architecture.generates else 2 for architecture in ARCHITECTURES.values())  # of the cases
PARAMETER = "model."  # begins the names of the inputs that are parameters
# T5 1.1's feed-forward. That of 1.0 has ReLU: where one hidden unit is next to zero, gradients jump by rounding.
BENCH_OPTIONS = {"t5": {"feed_forward_proj": "gated-gelu"}}
# Attention without rotary embedding doesn't depend on a bias that all keys share: its gradient is rounding alone.
NO_GRADIENT = (".key.bias", ".k_proj.bias")


def missing() -> str:
    """Why there is nothing to be had of this, in a line; "" if there is."""
    try:
        import transformers  # noqa: F401
    except Exception as error:
        return why_not_imported(error, Package("transformers", "fastformer[transformers]"))
    return ""


def rows(device: torch.device, timer: Timer, limits: Limits, pace: Pace, rng: random.Random) -> Iterator[Row]:
    """All of it in float32. ``auto`` chooses our kernels, as it does for a user."""
    for name in ARCHITECTURES:
        found: list[Row] = []
        with fastformer.backend("auto"):  # without the yield, or it would be the caller's backend too
            try:
                for case in cases(name, device, torch.float32, BENCH):
                    found += run_case(case, "auto", timer, limits, pace, rng)
            except Exception as error:  # such as a transformers that lacks the model; the others go on
                row = Row("hugging_face", name, short_name(torch.float32), "", "auto", problem=describe(error))
                found.append(row)
        yield from found


def cases(name: str, device: torch.device, dtype: torch.dtype, size: Size) -> Iterator[Case]:
    """An architecture's, with one set of parameters."""
    models = _contestants(name, device, dtype, size)
    for task in (FORWARD, TRAINING, *([GENERATION] if ARCHITECTURES[name].generates else [])):
        inputs = {key: tensor.to(device) for key, tensor in _task_inputs(name, task, size).items()}
        inputs |= {PARAMETER + key: parameter for key, parameter in models["eager"].named_parameters()}
        yield Case(
            operation="hugging_face",
            shape=_shape(name, task, size),
            dtype=dtype,
            inputs=partial(dict, inputs),
            ours=Task(models["ours"], task),
            reference=partial(_with_parameters, Task(models["reference"], task)),
            peers={
                "eager": Task(models["eager"], task),
                "sdpa": Task(models["sdpa"], task) if "sdpa" in models else "transformers has no SDPA for it",
            },
            judged_by="sdpa" if "sdpa" in models else "eager",  # what transformers runs unless told otherwise
            work={TRAINING if task == TRAINING else FORWARD: _work(models["eager"], task, inputs)},
        )


def _shape(name: str, task: str, size: Size) -> str:
    if ARCHITECTURES[name].kind == IMAGE:
        return f"{name} {size.batch}x{size.image}x{size.image}"
    return f"{name} {size.batch}x{size.seqlen}" + (f"+{NEW_TOKENS}" if task == GENERATION else "")


class Task(torch.nn.Module):
    """What is timed: inputs by name -> a tensor. It has the parameters, so those among the inputs are passed over."""

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **inputs: Tensor) -> Tensor:
        """The logits; or the loss []; or the logits of each new token [B, NEW_TOKENS, vocabulary]."""
        inputs = {key: tensor for key, tensor in inputs.items() if not key.startswith(PARAMETER)}
        if self.task == FORWARD:
            return self.model(**inputs).logits
        if self.task == TRAINING:
            return self.model(**inputs).loss
        generated = self.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(generated.logits, dim=1)


def _with_parameters(task: Task, **inputs: Tensor) -> Tensor:
    """The task with the parameters among the inputs in place of its own."""
    parameters = {key: tensor for key, tensor in inputs.items() if key.startswith(PARAMETER)}
    return torch.func.functional_call(task, parameters, kwargs=inputs)


def _contestants(name: str, device: torch.device, dtype: torch.dtype, size: Size) -> dict[str, PreTrainedModel]:
    """The model with each attention that it has, accelerated, and as reference: all on one set of parameters.

    The reference differs from "eager" in its experts, which run one by one, in float64 too.
    """
    variants: dict[str, dict[str, Any]] = {
        "eager": {"attn_implementation": "eager"},
        "sdpa": {"attn_implementation": "sdpa"},
        "reference": {"attn_implementation": "eager", "experts_implementation": "eager"},
        "ours": {},
    }
    first = build_model(name, size, noise=0.02, **BENCH_OPTIONS.get(name, {}), **variants["eager"]).to(device, dtype)
    for parameter_name, parameter in first.named_parameters():
        parameter.requires_grad_(not parameter_name.endswith(NO_GRADIENT))
    models = {"eager": first}
    for variant, options in variants.items():
        if variant == "eager" or (variant == "sdpa" and not first._supports_sdpa):
            continue
        models[variant] = build_model(name, size, **BENCH_OPTIONS.get(name, {}), **options).to(device, dtype)
        for module, source in zip(models[variant].modules(), first.modules()):
            module._parameters.update(source._parameters)
    fastformer.accelerate(models["ours"])
    return models


def _task_inputs(name: str, task: str, size: Size) -> dict[str, Tensor]:
    """What encoders read is padded on the right; other texts fill their rows."""
    padding = "right" if ARCHITECTURES[name].kind in (ENCODER, SEQ2SEQ) else None
    inputs = draw_inputs(name, size, padding=padding, labels=task == TRAINING)
    if task == GENERATION:
        inputs.pop("decoder_input_ids", None)
    return inputs


def _work(model: PreTrainedModel, task: str, inputs: dict[str, Tensor]) -> Work:
    """Matrix products as torch counts them in a run; every parameter read once a pass, its gradient written once."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(task == TRAINING):
        output = Task(model, task)(**inputs)
        if task == TRAINING:
            torch.autograd.grad(output, [p for p in model.parameters() if p.requires_grad])
    passes = {FORWARD: 1, TRAINING: 3, GENERATION: NEW_TOKENS}[task]
    return Work(sum(p.nbytes for p in model.parameters()) * passes, counter.get_total_flops())
