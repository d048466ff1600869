"""attn_implementation="fastformer" against transformers' own eager attention, on small models with random weights."""

import dataclasses
import functools
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import transformers

import fastformer
from fastformer import accuracy, backends
from fastformer.benchmarks import bench_hugging_face, harness
from fastformer.benchmarks.bench_hugging_face import ARCHITECTURES, IMAGE, build_model, draw_inputs
from fastformer.integrations.transformers import REFUSED, attention_forward, attention_mask, register

TOLERANCE = 2e-5  # of the largest value

GENERATING = [name for name, architecture in ARCHITECTURES.items() if architecture.generates]
PADDINGS = {name: [None] if a.kind == IMAGE else [None, "left", "right"] for name, a in ARCHITECTURES.items()}

each_padded = pytest.mark.parametrize(
    "name, padding", [(name, padding) for name, paddings in PADDINGS.items() for padding in paddings]
)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


@functools.cache
def model(name: str, implementation: str) -> transformers.PreTrainedModel:
    """Shared by the tests that don't change it."""
    return build_model(name, attn_implementation=implementation)


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", *, scale: Tensor | None = None) -> None:
    largest = (theirs if scale is None else scale).abs().max()
    difference = (ours - theirs).abs().max()
    assert difference <= TOLERANCE * largest, f"{what} differs by {difference:.2e}, the largest value is {largest:.2e}"


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor | None]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


@each_padded
def test_logits_and_gradients_are_those_of_eager_attention(name: str, padding: str | None) -> None:
    inputs = draw_inputs(name, padding=padding, labels=True)
    eager, ours = model(name, "eager"), model(name, "fastformer")
    expected, actual = eager(**inputs), ours(**inputs)

    logits, expected_logits = actual.logits, expected.logits
    if "labels" in inputs and logits.dim() == 3 and "decoder_input_ids" not in inputs:
        real = inputs["attention_mask"].bool()  # the logits of padding mean nothing
        logits, expected_logits = logits[real], expected_logits[real]
    assert logits.isfinite().all()
    assert_close(logits, expected_logits, "logits")

    expected_grads = gradients(expected.loss, eager)
    grads = gradients(actual.loss, ours)
    largest = torch.stack([g.abs().max() for g in expected_grads.values() if g is not None])
    for parameter, grad in expected_grads.items():
        if grad is None:
            assert grads[parameter] is None, parameter
        else:
            assert_close(grads[parameter], grad, f"gradient of {parameter}", scale=largest)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", GENERATING)
def test_generates_the_tokens_of_eager_attention(name: str, padding: str | None, cache: str) -> None:
    inputs = draw_inputs(name, padding=padding)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    expected = model(name, "eager").generate(**inputs, **options)
    tokens = model(name, "fastformer").generate(**inputs, **options)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "name, options",
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}),
        ("gpt_oss", {"layer_types": ["full_attention", "full_attention"]}),
        ("gpt_oss", "sinks"),
        ("t5", "relative_attention_bias"),
    ],
)
def test_what_the_models_add_to_attention_matters(name: str, options: dict | str) -> None:
    """Else the other tests would not notice that it is missing."""
    other = build_model(name, attn_implementation="fastformer", **({} if isinstance(options, str) else options))
    for parameter_name, parameter in other.named_parameters():
        if isinstance(options, str) and options in parameter_name:
            parameter.data.fill_(-1e4 if options == "sinks" else 0.0)
    inputs = draw_inputs(name)
    with torch.no_grad():
        logits, without = model(name, "fastformer")(**inputs).logits, other(**inputs).logits
    assert (logits - without).abs().max() > 1e-3 * logits.abs().max()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])  # which does not ask for them
def test_gives_the_attention_weights(name: str) -> None:
    inputs = draw_inputs(name, padding=PADDINGS[name][-1])
    with torch.no_grad():
        expected = model(name, "eager")(**inputs, output_attentions=True)
        actual = model(name, "fastformer")(**inputs, output_attentions=True)
    assert_close(actual.logits[:1], expected.logits[:1], "logits")
    kinds = [key for key in expected if key.endswith("attentions")]
    assert kinds
    for kind in kinds:
        assert len(actual[kind]) == len(expected[kind]) > 0
        for ours, theirs in zip(actual[kind], expected[kind]):
            assert_close(ours[:1], theirs[:1], kind)  # of the sequence without padding


def test_can_be_set_on_a_model_and_in_its_config() -> None:
    register()
    built = build_model("llama", attn_implementation="eager")
    inputs = draw_inputs("llama", padding="left")
    before = built(**inputs).logits
    built.set_attn_implementation("fastformer")
    assert built.config._attn_implementation == "fastformer"
    assert (built(**inputs).logits == model("llama", "fastformer")(**inputs).logits).all()
    built.set_attn_implementation("eager")
    assert (built(**inputs).logits == before).all()
    again = transformers.AutoModelForCausalLM.from_config(built.config, attn_implementation="fastformer")
    assert again.model.layers[0].self_attn.config._attn_implementation == "fastformer"


def test_importing_changes_nothing() -> None:
    code = "import sys, fastformer.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt2", {"attn_pdrop": 0.5}),
        ("bert", {"attention_probs_dropout_prob": 0.5}),
        ("t5", {"dropout_rate": 0.5}),
        ("gemma2", {"attention_dropout": 0.5}),
        ("gpt_oss", {"attention_dropout": 0.5}),
    ],
)
def test_trains_with_dropout(name: str, options: dict) -> None:
    built = build_model(name, attn_implementation="fastformer", **options).train()
    inputs = draw_inputs(name, padding="left", labels=True)
    losses = [built(**inputs).loss for _ in range(2)]
    assert losses[0] != losses[1]
    for grad in gradients(losses[0], built).values():
        assert grad is None or grad.isfinite().all()
    quiet = [built.eval()(**inputs).loss for _ in range(2)]
    assert quiet[0] == quiet[1]


def test_trainer_learns_what_it_learns_with_eager_attention(tmp_path: object) -> None:
    inputs = draw_inputs("llama", padding="right", labels=True)
    rows = [{key: tensor[i] for key, tensor in inputs.items()} for i in range(2)]

    def trained(implementation: str) -> tuple[list[float], transformers.PreTrainedModel]:
        built = build_model("llama", attn_implementation=implementation)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(built, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], built

    expected_losses, expected = trained("eager")
    losses, ours = trained("fastformer")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for (parameter, mine), theirs in zip(ours.named_parameters(), expected.parameters()):
        assert_close(mine, theirs, parameter)


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    ours = build_model("gemma2", attn_implementation="fastformer")
    inputs = draw_inputs("gemma2", padding="left", labels=True)
    actual = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False)
    expected = ours(**inputs)
    assert_close(actual.logits, expected.logits, "logits")
    grads = gradients(actual.loss, ours)
    for parameter, grad in gradients(expected.loss, ours).items():
        if grad is not None:
            assert_close(grads[parameter], grad, parameter, scale=torch.ones(()))


def test_bfloat16_rounds_no_more_than_eager_attention() -> None:
    inputs = draw_inputs("llama")
    exact = build_model("llama", attn_implementation="eager")
    rounded = {name: p.bfloat16() for name, p in exact.state_dict().items()}
    eager, ours = (build_model("llama", attn_implementation=name).bfloat16() for name in ("eager", "fastformer"))
    exact.load_state_dict(rounded)
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (ours, eager, exact.double())]
    verdict = accuracy.judge(*logits)
    assert verdict.ok, verdict


class Module(torch.nn.Module):
    """All that attention asks of the module that calls it."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def heads(*lengths: int) -> list[Tensor]:
    """Queries of four heads, keys and values of two: [2, 4 or 2, length, 8]."""
    return [torch.randn(2, n, length, 8) for n, length in zip((4, 2, 2), lengths)]


def keep(*rows: str) -> Tensor:
    """A mask from a picture: [1, 1, Sq, Sk]."""
    return torch.tensor([[character == "x" for character in row] for row in rows])[None, None]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "lengths, arguments, visible",
    [
        # Without a mask: causal, bidirectional, a single query, a static cache with free places.
        ((3, 3), {}, keep("x..", "xx.", "xxx")),
        ((3, 3), {"is_causal": False}, keep("xxx", "xxx", "xxx")),
        ((1, 3), {}, keep("xxx")),
        ((2, 4), {}, keep("x...", "xx..")),
        ((2, 4), {"is_causal": False}, keep("xxxx", "xxxx")),
        # With a window but no mask.
        ((4, 4), {"sliding_window": 2}, keep("x...", "xx..", ".xx.", "..xx")),
        ((4, 4), {"sliding_window": 2, "is_causal": False}, keep("xx..", "xxx.", ".xxx", "..xx")),
        ((1, 4), {"sliding_window": 2}, keep("..xx")),
        ((3, 4), {"sliding_window": 2}, keep("x...", "xx..", ".xx.")),
        # The mask says it all; a query may be left without a key.
        ((3, 3), {"attention_mask": keep("..x", "...", "xxx"), "sliding_window": 1}, keep("..x", "...", "xxx")),
        ((3, 3), {"position_bias": torch.randn(1, 4, 3, 3)}, keep("x..", "xx.", "xxx")),
        ((2, 4), {"position_bias": torch.randn(1, 4, 2, 4)}, keep("x...", "xx..")),
        (
            (2, 2),
            {"attention_mask": keep("..", "xx"), "position_bias": torch.randn(1, 4, 2, 2)},
            keep("..", "xx"),
        ),
        ((2, 2), {"attention_mask": torch.tensor([[[[0.0, -torch.inf], [0.5, 1.0]]]])}, keep("x.", "xx")),
        ((3, 3), {"softcap": 0.5, "s_aux": torch.randn(4), "scaling": 2.0}, keep("x..", "xx.", "xxx")),
        ((2, 2), {"attention_mask": keep("..", "xx"), "s_aux": torch.randn(4)}, keep("..", "xx")),
    ],
)
def test_attention_forward(lengths: tuple[int, int], arguments: dict, visible: Tensor, weights: bool) -> None:
    query, key, value = heads(lengths[0], lengths[1], lengths[1])
    arguments = {"attention_mask": None} | arguments
    actual, actual_weights = attention_forward(
        Module(is_causal=True), query, key, value, **arguments, output_attentions=weights
    )

    additive = [arguments[name] for name in ("attention_mask", "position_bias") if arguments.get(name) is not None]
    scores = query @ key.repeat_interleave(2, 1).mT * arguments.get("scaling", 8**-0.5)
    if "softcap" in arguments:
        scores = arguments["softcap"] * torch.tanh(scores / arguments["softcap"])
    scores = sum([mask for mask in additive if mask.dtype != torch.bool], start=scores)
    exponents = scores.exp() * visible
    sinks = arguments["s_aux"].exp()[:, None, None] if "s_aux" in arguments else 0.0
    expected_weights = exponents / (exponents.sum(-1, keepdim=True) + sinks).clamp(min=1e-30)
    expected = (expected_weights @ value.repeat_interleave(2, 1)).transpose(1, 2)

    assert actual.is_contiguous()
    assert_close(actual, expected, "output")
    if weights:
        assert_close(actual_weights, expected_weights, "weights")
    else:
        assert actual_weights is None


@pytest.mark.parametrize("arguments", [{}, {"sliding_window": 2}, {"is_causal": False, "softcap": 2.0}])
def test_packed_sequences(arguments: dict) -> None:
    query, key, value = (x[:1] for x in heads(7, 7, 7))
    starts = torch.tensor([0, 3, 3, 7])
    packed = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts) | dict.fromkeys(
        ("max_length_q", "max_length_k"), 4
    )
    actual, _ = attention_forward(Module(is_causal=True), query, key, value, None, **arguments, **packed)
    parts = [[x[:, :, begin:end] for x in (query, key, value)] for begin, end in ((0, 3), (3, 7))]
    alone = [attention_forward(Module(is_causal=True), *part, None, **arguments)[0] for part in parts]
    assert_close(actual, torch.cat(alone, 1), "output")
    with pytest.raises(ValueError, match="cu_seq_lens_q holds several sequences, which take no dropout"):
        attention_forward(Module(is_causal=True), query, key, value, None, 0.1, **arguments, **packed)


@pytest.mark.parametrize("argument", REFUSED)
def test_an_argument_that_it_cannot_honour_is_refused(argument: str) -> None:
    query, key, value = heads(3, 3, 3)
    with pytest.raises(ValueError, match=argument):
        attention_forward(Module(is_causal=True), query, key, value, None, **{argument: torch.tensor([0, 1, 3])})
    attention_forward(Module(is_causal=True), query, key, value, None, **{argument: None}, use_cache=True)


def test_a_model_that_computes_attention_itself_is_refused() -> None:
    config = transformers.MPNetConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    built = transformers.AutoModel.from_config(config, attn_implementation="fastformer")
    with pytest.raises(ValueError, match="MPNetPreTrainedModel has its own attention"):
        built(torch.arange(2, 8)[None])


def test_a_mask_is_made_only_where_there_is_padding() -> None:
    """Without one, causal attention is half the work; and a boolean one leaves rows of padding empty, so zero."""
    config = model("llama", "fastformer").config
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3, "config": config}
    assert attention_mask(**sizes) is None
    mask = attention_mask(**sizes, attention_mask=torch.tensor([[False, True, True]]))
    assert mask.tolist() == keep("...", ".x.", ".xx").tolist()


class OwnConfig(transformers.LlamaConfig):
    """One that doesn't tell which model reads it, and so gets the mask that every attention understands."""


@pytest.mark.parametrize("padding", [None, "left"])
def test_a_config_that_belongs_to_no_known_model(padding: str | None) -> None:
    expected = model("llama", "eager")
    config = OwnConfig(**expected.config.to_dict(), attn_implementation="fastformer")
    ours = transformers.LlamaForCausalLM(config).eval()
    ours.load_state_dict(expected.state_dict())
    inputs = draw_inputs("llama", padding=padding)
    real = inputs["attention_mask"].bool()
    assert_close(ours(**inputs).logits[real], expected(**inputs).logits[real], "logits")


def benchmark_rows(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[harness.Row]:
    monkeypatch.setattr(bench_hugging_face, "ARCHITECTURES", {name: ARCHITECTURES[name] for name in names})
    monkeypatch.setattr(bench_hugging_face, "BENCH", bench_hugging_face.TINY)
    device = torch.device("cpu")
    limits = harness.Limits(copy={1 << 20: 1e9}, read={1 << 20: 1e9}, product={torch.float32: 1e9})
    pace = harness.Pace(row_seconds=0.0, min_rounds=1)
    return list(bench_hugging_face.rows(device, harness.timer_for(device), limits, pace, random.Random(0)))


def test_benchmark_gives_every_case_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = benchmark_rows(monkeypatch, "t5")
    assert [(row.shape, row.mode) for row in rows] == [
        ("t5 2x17", "fwd"),
        ("t5 2x17", "fwd_bwd"),
        ("t5 2x17+16", "fwd"),
    ]
    for row in rows:
        assert not row.problem
        assert row.speedups().keys() == {"eager", "sdpa"}
        assert row.limit_seconds > 0


def test_benchmark_lets_auto_choose_whatever_backend_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    run_case = bench_hugging_face.run_case
    monkeypatch.setattr(
        bench_hugging_face, "run_case", lambda *args: chosen.append(backends.requested()) or run_case(*args)
    )
    with fastformer.backend("reference"):
        rows = benchmark_rows(monkeypatch, "vit")
        assert backends.requested() == "reference"
    assert chosen == ["auto", "auto"] and {row.backend for row in rows} == {"auto"}


def test_benchmark_goes_on_after_a_model_that_transformers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = dataclasses.replace(ARCHITECTURES["bert"], model="NoSuchModel")
    monkeypatch.setitem(ARCHITECTURES, "bert", unknown)
    lacking, *rows = benchmark_rows(monkeypatch, "bert", "vit")
    assert lacking.shape == "bert" and lacking.problem.startswith("AttributeError: ") and lacking.ours is None
    assert [row.shape for row in rows] == ["vit 2x32x32"] * 2 and all(row.ours for row in rows)


class Imports:
    """What importing transformers raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            raise self.error


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module", name="transformers"), "not installed: pip install fastformer[transformers]"),
        (RuntimeError("too\nold"), "transformers can't be imported: RuntimeError: too old"),
    ],
)
def test_benchmark_says_why_there_is_no_transformers(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_hugging_face.missing() == ""
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "meta_path", [Imports(error), *sys.meta_path])
    assert bench_hugging_face.missing() == reason
