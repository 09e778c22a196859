"""The networks of `mtl_optax.bench.models` in PyTorch, and TorchJD's two engines.

Weights are copied, so losses, Gramians and combined gradients can be compared. PyTorch
and TorchJD are optional: `why_missing` says what is lacking, and `make_peer` may not be
called then.
"""

import functools
import importlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import numpy.typing as npt
from jaxtyping import PyTree

from mtl_optax.bench.models import EPSILON, Problem

Numbers: TypeAlias = npt.NDArray[Any]

INSTALL = (
    'pip install --extra-index-url https://download.pytorch.org/whl/cpu -e ".[bench]"'
)
PLAIN = "torch"
WAYS = (PLAIN, "backward", "backward_by_leaf", "autogram")


class PeerWay(NamedTuple):
    """A way of taking a step's gradient in PyTorch.

    Attributes:
      run: leaves a gradient in every parameter.
      gradient: ``() -> `` what `run` left, in the order of the leaves of
        `Problem.params` and in their layout.
    """

    run: Callable[[], None]
    gradient: Callable[[], list[Numbers]]


class Peer(NamedTuple):
    """A problem in PyTorch.

    Attributes:
      losses: ``() -> [T]``.
      gramian: ``() -> [T, T]``, by the autogram engine.
      ways: by the names in `WAYS`.
    """

    losses: Callable[[], Numbers]
    gramian: Callable[[], Numbers]
    ways: dict[str, PeerWay]


class _Parameter(NamedTuple):
    """A parameter of PyTorch, and how its arrays become those of JAX."""

    tensor: Any
    to_jax: Callable[[Numbers], Numbers]


class _Layer(NamedTuple):
    """A module, and its parameters in the form they have in JAX."""

    module: Any
    parameters: PyTree[_Parameter]


class _Net(NamedTuple):
    """A network: what holds its modules, its parameters, its outputs ``[N, T]``."""

    root: Any
    parameters: list[_Parameter]
    outputs: Callable[[], Any]


def why_missing() -> str:
    """What is lacking for PyTorch's side, in words; empty if nothing is.

    Example:
      >>> why_missing() == "" or "TorchJD is left out" in why_missing()
      True
    """
    for name in ("torch", "torchjd"):
        try:
            importlib.import_module(name)
        except ImportError:
            return f"{name} is not installed, so TorchJD is left out: {INSTALL}"
    if jax.default_backend() != "cpu":
        return "TorchJD is left out: it would run on the CPU, and JAX does not"
    return ""


def use_best_threads(run: Callable[[], Any]) -> str:
    """Gives PyTorch as many threads as make `run` fastest: one, or all it would take.

    Its threads wait for each other, so that beside other programs one may be ten times
    as fast as two.

    Returns:
      a note, where one is faster.
    """
    import torch

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        run()
        start = time.perf_counter()
        run()
        run()
        return time.perf_counter() - start

    most = _all_threads()
    best = min(most, 1, key=seconds)
    torch.set_num_threads(best)
    return f"1 thread, faster here than {most}" if best < most else ""


@functools.cache
def _all_threads() -> int:
    """What PyTorch takes by itself."""
    import torch

    return torch.get_num_threads()


def make_peer(problem: Problem) -> Peer:
    """The same network, weights and data in PyTorch, and the ways of a step.

    * ``"torch"``: the gradient of the summed losses.
    * ``"backward"``: `torchjd.autojac.backward`, then `jac_to_grad`.
    * ``"backward_by_leaf"``: the same with ``optimize_gramian_computation=True``, which
      adds up Gramians leaf by leaf.
    * ``"autogram"``: `torchjd.autogram.Engine`, then a weighted backward pass.

    The last three combine gradients by the inverse of their lengths: next to nothing
    beside the Jacobian, so that the engine is what is measured.
    """
    from torchjd.aggregation import GramianWeightedAggregator, Weighting
    from torchjd.autogram import Engine
    from torchjd.autojac import backward, jac_to_grad

    class InverseNorm(Weighting):
        def forward(self, gramian: Any) -> Any:
            return gramian.diagonal().rsqrt()

    weighting = InverseNorm()
    aggregator = GramianWeightedAggregator(weighting)
    targets = _tensor(problem.batch["targets"])
    net = _make_net(problem)
    # The engine's hooks slow every forward pass, so it has a network of its own.
    hooked = _make_net(problem)
    engine = Engine(hooked.root, batch_dim=None)

    def losses(of: _Net) -> Any:
        return (of.outputs() - targets).square().mean(dim=0)

    def jacobian(by_leaf: bool) -> None:
        backward(losses(net))
        parameters = [p.tensor for p in net.parameters]
        jac_to_grad(parameters, aggregator, optimize_gramian_computation=by_leaf)

    def autogram() -> None:
        now = losses(hooked)
        now.backward(weighting(engine.compute_gramian(now)))

    ways = (
        _way(net, lambda: losses(net).sum().backward()),
        _way(net, functools.partial(jacobian, by_leaf=False)),
        _way(net, functools.partial(jacobian, by_leaf=True)),
        _way(hooked, autogram),
    )
    return Peer(
        losses=lambda: np.asarray(losses(net).detach()),
        gramian=lambda: np.asarray(engine.compute_gramian(losses(hooked)).detach()),
        ways=dict(zip(WAYS, ways, strict=True)),
    )


def make_aggregator(name: str, rows: Numbers) -> Callable[[], Numbers]:
    """TorchJD's aggregator of that name on fixed rows ``[T, P]``, as ``() -> [P]``.

    With its defaults, or those of our method where it has none.
    """
    from torchjd import aggregation

    options: dict[str, dict[str, Any]] = {
        "CAGrad": {"c": 0.4},
        "ExcessMTL": {"n_warmup_steps": 1},
        "FairGrad": {"alpha": 1.0},
        "Krum": {"n_byzantine": 0},
        "NashMTL": {"n_tasks": len(rows)},
        "TrimmedMean": {"trim_number": 1},
    }
    aggregator = getattr(aggregation, name)(**options.get(name, {}))
    matrix = _tensor(rows)

    def aggregate() -> Numbers:
        with warnings.catch_warnings():  # NashMTL's solver warns at every call
            warnings.simplefilter("ignore")
            return np.asarray(aggregator(matrix))

    return aggregate


def _way(net: _Net, step: Callable[[], None]) -> PeerWay:
    def run() -> None:
        net.root.zero_grad(set_to_none=True)
        step()

    def gradient() -> list[Numbers]:
        return [p.to_jax(np.asarray(p.tensor.grad)) for p in net.parameters]

    return PeerWay(run, gradient)


def _tensor(array: Any) -> Any:
    import torch

    array = np.array(array)  # a copy: PyTorch wants memory that it may write to
    floating = np.issubdtype(array.dtype, np.floating)
    return torch.as_tensor(array, dtype=torch.float32 if floating else torch.int64)


# ------------------------------------------------------------------------------- layers
# Modules that hold parameters are PyTorch's own, and are called, as TorchJD's engine
# wants; what lies between them are plain functions, as in the JAX models.


def _with(module: Any, **values: Any) -> Any:
    """The module with these values in its parameters."""
    import torch

    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(_tensor(value))
    return module


def _keep(array: Numbers) -> Numbers:
    return array


def _dense(p: Mapping[str, Any]) -> _Layer:
    from torch import nn

    kernel = np.asarray(p["kernel"])
    module = _with(nn.Linear(*kernel.shape), weight=kernel.T, bias=p["bias"])
    kernel_of = _Parameter(module.weight, lambda weight: weight.T)
    return _Layer(module, {"bias": _Parameter(module.bias, _keep), "kernel": kernel_of})


def _convolution(p: Mapping[str, Any]) -> _Layer:
    from torch import nn

    kernel = np.asarray(p["kernel"]).transpose(3, 2, 0, 1)
    outputs, inputs, side, _ = kernel.shape
    module = nn.Conv2d(inputs, outputs, side, padding="same")
    _with(module, weight=kernel, bias=p["bias"])
    kernel_of = _Parameter(module.weight, lambda weight: weight.transpose(2, 3, 1, 0))
    return _Layer(module, {"bias": _Parameter(module.bias, _keep), "kernel": kernel_of})


def _layer_norm(p: Mapping[str, Any]) -> _Layer:
    from torch import nn

    module = nn.LayerNorm(p["scale"].shape[0], eps=EPSILON)
    _with(module, weight=p["scale"], bias=p["bias"])
    scale_of = _Parameter(module.weight, _keep)
    return _Layer(module, {"bias": _Parameter(module.bias, _keep), "scale": scale_of})


def _embedding(table: Any) -> _Layer:
    from torch import nn

    module = _with(nn.Embedding(*table.shape), weight=table)
    return _Layer(module, _Parameter(module.weight, _keep))


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mapping) and bool({"kernel", "scale"} & set(node))


def _make_layer(node: Any) -> _Layer:
    if not isinstance(node, Mapping):
        return _embedding(node)
    if "scale" in node:
        return _layer_norm(node)
    return _dense(node) if node["kernel"].ndim == 2 else _convolution(node)


# ----------------------------------------------------------------------------- networks


def _make_net(problem: Problem) -> _Net:
    from torch import nn

    def each(pick: Callable[[_Layer], Any]) -> PyTree[Any]:
        return jax.tree.map(pick, layers, is_leaf=lambda n: isinstance(n, _Layer))

    layers = jax.tree.map(_make_layer, problem.params, is_leaf=_is_layer)
    modules = each(lambda layer: layer.module)
    parameters = jax.tree.leaves(
        each(lambda layer: layer.parameters),
        is_leaf=lambda node: isinstance(node, _Parameter),
    )
    batch = {name: _tensor(value) for name, value in problem.batch.items()}
    encoder = _ENCODERS[problem.model]

    def outputs() -> Any:
        return modules["heads"](encoder(modules, batch, problem.sizes))

    return _Net(nn.ModuleList(jax.tree.leaves(modules)), parameters, outputs)


def _mlp(modules: Any, batch: Mapping[str, Any], sizes: Any) -> Any:
    del sizes
    x = batch["x"]
    for layer in modules["layers"]:
        x = layer(x).tanh()
    return x


def _cnn(modules: Any, batch: Mapping[str, Any], sizes: Any) -> Any:
    from torch.nn import functional

    del sizes
    x = batch["images"].permute(0, 3, 1, 2).contiguous()
    for layer in modules["convs"]:
        x = functional.avg_pool2d(layer(x).relu(), 2)
    # In JAX's order, which the dense layer's weights have.
    return modules["dense"](x.permute(0, 2, 3, 1).flatten(1)).relu()


def _attention(layer: Any, x: Any, num_heads: int) -> Any:
    split = (*x.shape[:2], num_heads, x.shape[2] // num_heads)
    query, key, value = (
        layer[name](x).reshape(split).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    logits = query @ key.transpose(2, 3) / split[-1] ** 0.5
    mixed = (logits.softmax(-1) @ value).transpose(1, 2)
    return layer["out"](mixed.reshape(x.shape))


def _transformer(modules: Any, batch: Mapping[str, Any], sizes: Any) -> Any:
    import torch
    from torch.nn import functional

    places = torch.arange(sizes.length)
    x = modules["tokens"](batch["tokens"]) + modules["places"](places)
    for layer in modules["layers"]:
        x = x + _attention(layer["attention"], layer["norm_1"](x), sizes.num_heads)
        hidden = layer["up"](layer["norm_2"](x))
        x = x + layer["down"](functional.gelu(hidden, approximate="tanh"))
    return modules["norm"](x).mean(1)


def _gnn(modules: Any, batch: Mapping[str, Any], sizes: Any) -> Any:
    import torch

    x = modules["embed"](batch["nodes"]).relu()
    for layer in modules["rounds"]:
        messages = layer["message"](x).relu()[batch["senders"]]
        received = torch.zeros_like(x).index_add(0, batch["receivers"], messages)
        own = layer["from_node"](x)
        x = (own + layer["from_edges"](received / sizes.degree)).relu()
    return x.reshape(sizes.batch, sizes.nodes, -1).mean(1)


_ENCODERS = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer, "gnn": _gnn}
