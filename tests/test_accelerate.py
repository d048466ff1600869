"""accelerate and restore: which layers become ours and whose they were, and that all else about the model stays."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

import fastformer
from fastformer import nn
from fastformer.accelerate import FASTER

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")

E, H = 20, 4


class MyNorm(torch.nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Model(torch.nn.Module):
    """An encoder-decoder with a shared norm, tied weights, a list outside the module tree and a subclassed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, E)
        self.encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True), 2
        )
        self.decoder = torch.nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, batch_first=True)
        self.norm = torch.nn.LayerNorm(E)
        self.heads = torch.nn.ModuleDict({"norm": self.norm, "mine": MyNorm(E), "rms": torch.nn.RMSNorm(E)})
        self.probabilities = torch.nn.Softmax(dim=-1)
        self.unembedding = torch.nn.Linear(E, 50, bias=False)
        self.unembedding.weight = self.embedding.weight
        self.unregistered = [self.norm]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        padding = torch.zeros_like(tokens, dtype=torch.bool)
        padding[0, -2:] = True
        x = self.decoder(x, self.encoder(x, src_key_padding_mask=padding), memory_key_padding_mask=padding)
        for head in (*self.heads.values(), *self.unregistered):
            x = head(x)
        return self.probabilities(self.unembedding(x))


@pytest.fixture
def model() -> Model:
    return Model()


TOKENS = torch.arange(12).view(2, 6)
PARTS = ("self_attn", "multihead_attn", "norm1", "norm2", "norm3", "linear1", "linear2")
DECODER = {"decoder", *(f"decoder.{part}" for part in PARTS)}


def kinds(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("training", [True, False])
def test_same_model(model: Model, training: bool) -> None:
    model.train(training)
    model.decoder.norm3.eval()
    model.heads["rms"].requires_grad_(False)
    original = copy.deepcopy(model)
    modules, parameters, state = dict(model.named_modules()), dict(model.named_parameters()), model.state_dict()
    report = fastformer.accelerate(model)

    swapped = {layer.name for layer in report.swapped}
    assert swapped == {
        *(f"encoder.layers.{i}.{part}" for i in (0, 1) for part in PARTS if part not in ("multihead_attn", "norm3")),
        *(f"encoder.layers.{i}" for i in (0, 1)),
        "encoder",
        *DECODER,
        "norm",
        "heads.rms",
        "probabilities",
        "unembedding",
    }
    for name, kind in kinds(original).items():
        assert kinds(model)[name] is (FASTER[kind] if name in swapped or name == "heads.norm" else kind), name
    for (name, module), before in zip(model.named_modules(), original.modules(), strict=True):
        assert module is modules[name] and module.training == before.training
    for (name, parameter), before in zip(model.named_parameters(), original.parameters(), strict=True):
        assert parameter is parameters[name] and parameter.requires_grad == before.requires_grad
    assert list(model.state_dict()) == list(state)
    assert model.unembedding.weight is model.embedding.weight
    assert model.heads["norm"] is model.norm is model.unregistered[0]

    torch.testing.assert_close(model(TOKENS), original(TOKENS), rtol=2e-5, atol=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS), original(TOKENS), rtol=2e-5, atol=2e-5)
    for each in (model, original):
        each(TOKENS)[..., 0].log().sum().backward()
    for (name, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_report(model: Model) -> None:
    model.decoder.norm1.forward = model.decoder.norm1.forward
    before = kinds(model)
    planned = fastformer.accelerate(model, dry_run=True)
    assert kinds(model) == before
    report = fastformer.accelerate(model)
    assert report.swapped == planned.swapped and report.left == planned.left
    assert "24 layers would be swapped" in str(planned)
    text = str(report)
    assert "24 layers swapped" in text and "now fastformer.nn.TransformerEncoderLayer" in text
    assert "encoder.layers.0, encoder.layers.1" in text
    reasons = {layer.name: layer.reason for layer in report.left}
    assert reasons["heads.mine"] == "a subclass of torch.nn.LayerNorm"
    assert reasons["embedding"] == "fastformer has no such layer"
    assert reasons["encoder.layers.0.self_attn.out_proj"] == "part of a swapped layer"
    assert reasons["decoder.norm1"] == "its forward was replaced"
    again = fastformer.accelerate(model)
    assert not again.swapped
    assert {layer.name: layer.reason for layer in again.left}["norm"] == "is fastformer's already"


@pytest.mark.parametrize(
    ("options", "swapped"),
    [
        ({"only": "decoder"}, DECODER),
        ({"only": ["decoder.norm1", torch.nn.Softmax]}, {"decoder.norm1", "probabilities"}),
        ({"only": torch.nn.LayerNorm, "skip": ["encoder", "decoder"]}, {"norm"}),
        ({"skip": torch.nn.Module}, set()),
        ({"skip": [torch.nn.TransformerEncoderLayer, "decoder", "heads"]}, {"encoder", "probabilities", "unembedding"}),
    ],
)
def test_only_and_skip(model: Model, options: dict[str, Any], swapped: set[str]) -> None:
    report = fastformer.accelerate(model, **options)
    assert {layer.name for layer in report.swapped} == swapped
    assert {name for name, kind in kinds(model).items() if kind in FASTER.values()} - {"heads.norm"} == swapped
    assert {layer.reason for layer in report.left} & {"in skip", "not in only"}


def test_hooks_stay(model: Model) -> None:
    fired: list[str] = []
    handles = [
        model.norm.register_forward_pre_hook(lambda *_: fired.append("before")),
        model.norm.register_forward_hook(lambda *_, **__: fired.append("after"), with_kwargs=True),
        model.norm.register_full_backward_hook(lambda *_: fired.append("backward")),
        model.norm.register_state_dict_post_hook(lambda *_: fired.append("state")),
    ]
    fastformer.accelerate(model)
    model(TOKENS).sum().backward()
    assert fired == ["before", "after"] * 3 + ["backward"] * 3
    model.state_dict()
    assert "state" in fired
    for handle in handles:
        handle.remove()
    fired.clear()
    model(TOKENS)
    model.state_dict()
    assert not fired


@pytest.mark.parametrize("options", [{}, {"only": ["decoder", "norm"]}, {"skip": "encoder"}])
def test_restore(model: Model, options: dict[str, Any]) -> None:
    model.ours = nn.LayerNorm(E)
    before, output = kinds(model), model.eval()(TOKENS)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    report = fastformer.accelerate(model, **options)
    assert report.swapped
    for restored in (len(report.swapped), 0):
        assert fastformer.restore(model) == restored
        assert kinds(model) == before
        for name, module in model.named_modules():
            assert list(vars(module)) == list(attributes[name])
            assert all(value is attributes[name][key] for key, value in vars(module).items()), name
        assert torch.equal(model(TOKENS), output)
    assert fastformer.accelerate(model, **options).swapped == report.swapped


def test_restore_leaves_what_became_something_else(model: Model) -> None:
    fastformer.accelerate(model)
    parametrize.register_parametrization(model.norm, "weight", torch.nn.Softplus())
    fastformer.restore(model)
    assert parametrize.is_parametrized(model.norm) and isinstance(model.norm, nn.LayerNorm)
    parametrize.remove_parametrizations(model.norm, "weight")
    assert fastformer.restore(model) == 1 and type(model.norm) is torch.nn.LayerNorm


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model: Model, copied: Callable[[Model], Model]) -> None:
    before = kinds(model)
    report = fastformer.accelerate(model)
    twin = copied(model)
    assert kinds(twin) == kinds(model)
    assert torch.equal(twin.eval()(TOKENS), model.eval()(TOKENS))
    assert fastformer.restore(twin) == len(report.swapped)
    assert kinds(twin) == before and kinds(model)["norm"] is nn.LayerNorm


@pytest.mark.parametrize("name", [kind.__name__ for kind in FASTER])
def test_the_model_may_be_a_layer(name: str) -> None:
    arguments = {"Softmax": (-1,), "LayerNorm": (E,), "RMSNorm": (E,), "LinearCrossEntropyLoss": (E, 30)}
    if name in ("TransformerEncoder", "TransformerDecoder"):
        model = getattr(torch.nn, name)(getattr(torch.nn, f"{name}Layer")(E, H, 24), 1)
    else:
        model = getattr(torch.nn, name)(*arguments.get(name, (E, H)))
    report = fastformer.accelerate(model)
    assert type(model) is getattr(nn, name) is not getattr(torch.nn, name)
    assert "the model itself" in str(report)
    fastformer.restore(model)
    assert type(model) is getattr(torch.nn, name)


def test_dtype_and_meta() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(E, dtype=torch.bfloat16), torch.nn.RMSNorm(E, device="meta"))
    fastformer.accelerate(model)
    assert model[0].weight.dtype == torch.bfloat16 and model[1].weight.is_meta


def test_weights_that_are_no_plain_tensors_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(E, E), torch.nn.Linear(E, E), torch.nn.Linear(E, E))
    model[0].weight = torch.nn.Parameter(TwoTensor(model[0].weight.detach(), model[0].weight.detach()))
    parametrize.register_parametrization(model[1], "weight", torch.nn.Softplus())
    before, x = kinds(model)["1"], torch.randn(3, E)
    expected = model(x)
    report = fastformer.accelerate(model)
    left = {layer.name: layer.reason for layer in report.left}
    assert left["0"] == "its weight is a TwoTensor" and left["1"] == "a subclass of torch.nn.Linear"
    assert [layer.name for layer in report.swapped] == ["2"] and type(model[1]) is before
    torch.testing.assert_close(model(x), expected)


def test_layer_without_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(E, E))
    model[0].weight = None
    fastformer.accelerate(model)
    assert fastformer.restore(model) is not None or type(model[0]) is torch.nn.Linear


def test_torch_and_other_models_stay(model: Model) -> None:
    before = {cls: dict(vars(cls)) for cls in FASTER}
    other = copy.deepcopy(model)
    fastformer.accelerate(model)
    assert all(dict(vars(cls)) == names for cls, names in before.items())
    assert not set(kinds(other).values()) & set(FASTER.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: fastformer.accelerate(model.state_dict()), TypeError, "model is a OrderedDict"),
        (lambda model: fastformer.restore([model]), TypeError, "model is a list"),
        (lambda model: fastformer.accelerate(model, only="nrom"), ValueError, "only has 'nrom'"),
        (lambda model: fastformer.accelerate(model, skip=["norm", 3]), TypeError, "skip has 3"),
        (lambda model: fastformer.accelerate(model, skip=int), TypeError, "skip has <class 'int'>"),
    ],
)
def test_errors(model: Model, call: Callable[[Model], None], error: type[Exception], message: str) -> None:
    before = kinds(model)
    with pytest.raises(error, match=message):
        call(model)
    assert kinds(model) == before


def test_torch_fx_takes_swapped_layers_for_leaves() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(E, E), torch.nn.LayerNorm(E), torch.nn.RMSNorm(E), torch.nn.Softmax(-1))
    before = [dict(vars(module)) for module in model]
    fastformer.accelerate(model)
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, E)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 4, "output"]
    torch.testing.assert_close(traced(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    fastformer.restore(model)
    assert [vars(module) for module in model] == before
