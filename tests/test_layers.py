"""Task-specific batch norm, against Flax's own and a recurrence in NumPy."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mtl_optax as mtl
from mtl_optax.layers import TaskBatchNorm
from mtl_optax.layers import linen as tasks_linen

T, C = 3, 4


def batches(steps=5, shape=(6, 5, 5)):
    return np.random.default_rng(0).normal(2.0, 3.0, (steps, *shape, C))


class Nnx:
    """The NNX layer, stepping by hand."""

    def __init__(self, **options):
        self.norm = TaskBatchNorm(C, T, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, task, **options):
        return self.norm(jnp.asarray(x), task, **options)

    def stats(self):
        return self.norm.running_mean[...], self.norm.var

    def set(self, task, scale, bias):
        self.norm.scales[task][...] = scale
        self.norm.biases[task][...] = bias


class Linen:
    """The linen layer, likewise."""

    def __init__(self, **options):
        self.norm = tasks_linen.TaskBatchNorm(C, T, **options)
        self.variables = self.norm.init(jax.random.key(0), jnp.ones((2, C)), 0)

    def __call__(self, x, task, **options):
        y, new = self.norm.apply(
            self.variables, jnp.asarray(x), task, mutable=["batch_stats"], **options
        )
        self.variables = {**self.variables, **new}
        return y

    def stats(self):
        stats = self.variables["batch_stats"]
        return stats["mean"], stats["var"]

    def set(self, task, scale, bias):
        params = dict(self.variables["params"])
        params[f"scale_{task}"] = jnp.asarray(scale)
        params[f"bias_{task}"] = jnp.asarray(bias)
        self.variables = {**self.variables, "params": params}


KINDS = pytest.mark.parametrize("make", [Nnx, Linen], ids=["nnx", "linen"])


@KINDS
def test_statistics_follow_the_recurrence(x64, make):
    layer = make(param_dtype=jnp.float64)
    mean, var = np.zeros((T, C)), np.ones((T, C))
    for step, x in enumerate(batches()):
        task = (0, 2, 2, 0, 2)[step]
        layer(x, task)
        flat = x.reshape(-1, C)
        mean[task] = 0.9 * mean[task] + 0.1 * flat.mean(0)
        var[task] = 0.9 * var[task] + 0.1 * flat.var(0, ddof=1)
        found_mean, found_var = layer.stats()
        np.testing.assert_allclose(found_mean, mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found_var, var, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(var[1], 1)  # nobody asked for task 1


@KINDS
def test_training_output_is_that_of_flax_and_of_numpy(x64, make):
    rng = np.random.default_rng(1)
    scale, bias = rng.normal(size=C), rng.normal(size=C)
    layer = make(param_dtype=jnp.float64)
    layer.set(1, scale, bias)
    x = batches(1)[0]
    y = layer(x, 1)
    flax = nnx.BatchNorm(C, momentum=0.9, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    flax.scale[...], flax.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    np.testing.assert_allclose(y, flax(jnp.asarray(x)), rtol=0, atol=1e-12)
    flat = x.reshape(-1, C)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("how", ["call", "layer"])
def test_running_average_mode_reads_and_leaves_alone(x64, make, how):
    layer = make(param_dtype=jnp.float64)
    xs = batches(3)
    layer(xs[0], 2)
    layer(xs[1], 2)
    mean, var = (np.array(s) for s in layer.stats())
    if how == "call":
        y = layer(xs[2], 2, use_running_average=True)
    else:
        other = make(param_dtype=jnp.float64, use_running_average=True)
        if make is Nnx:
            other.norm.running_mean[...] = jnp.asarray(mean)
            other.norm.running_var[...] = jnp.asarray(var)
        else:
            other.variables = layer.variables
        y, layer = other(xs[2], 2), other
    expected = (xs[2] - mean[2]) / np.sqrt(var[2] + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    for found, kept in zip(layer.stats(), (mean, var), strict=True):
        np.testing.assert_array_equal(found, kept)


def test_the_switch_of_nnx_modules_is_heard():
    norm = TaskBatchNorm(C, T, rngs=nnx.Rngs(0))
    x = jnp.asarray(batches(1)[0], jnp.float32)
    norm.eval()
    np.testing.assert_allclose(norm(x, 0), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(norm.running_mean[...], 0)
    norm.train()
    norm(x, 0)
    assert norm.running_mean[0].any()


@KINDS
def test_a_single_element_has_no_unbiased_variance(make):
    layer = make()
    y = layer(np.full((1, C), 3.0, np.float32), 0)
    np.testing.assert_array_equal(y, 0)
    mean, var = layer.stats()
    np.testing.assert_allclose(mean[0], 0.3, rtol=1e-6)
    np.testing.assert_allclose(var[0], 0.9, rtol=1e-6)


@KINDS
@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        (jnp.bfloat16, {}, jnp.float32),  # together with float32 parameters
        (jnp.bfloat16, {"param_dtype": jnp.bfloat16}, jnp.bfloat16),
        (jnp.float16, {"dtype": jnp.float16}, jnp.float16),
        (jnp.float32, {"dtype": jnp.bfloat16}, jnp.bfloat16),
    ],
)
def test_statistics_are_taken_in_float32_at_least(make, given, options, expected):
    layer = make(**options)
    x = jnp.asarray(100 + batches(1)[0], given)  # half precision would lose it
    assert layer(x, 0).dtype == expected
    mean, var = layer.stats()
    assert mean.dtype == var.dtype == jnp.float32
    flat = np.asarray(x, np.float64).reshape(-1, C)
    np.testing.assert_allclose(mean[0], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var[0], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-4)


@KINDS
@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (T, ValueError, "between 0 and 2"),
        (-1, ValueError, "got -1"),
        (True, TypeError, "an int, got True"),
        (1.0, TypeError, "an int, got 1.0"),
        (np.array(1.7), TypeError, "an int, got"),
        (jnp.array(1.7), TypeError, "an int, got"),
        (jnp.array(True), TypeError, "an int, got"),
        (np.array([1]), TypeError, "an int, got"),
    ],
)
def test_a_wrong_task_is_refused(make, task, error, message):
    with pytest.raises(error, match=message):
        make()(np.ones((2, C)), task)


@KINDS
def test_a_traced_task_and_wrong_inputs_are_refused(make):
    layer = make()
    with pytest.raises(TypeError, match="must be a Python int, got a traced"):
        laws.quick_jit(lambda task: layer(jnp.ones((2, C)), task))(0)
    with pytest.raises(ValueError, match=r"\[\.\.\., 4\].*got \(2, 3\)"):
        layer(np.ones((2, 3)), 0)
    with pytest.raises(ValueError, match="empty"):
        layer(np.ones((0, C)), 0)
    for options in ({"momentum": 1.5}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match="momentum"):
            make(**options)
    for epsilon in (-1.0, 0.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            make(epsilon=epsilon)
    assert layer(np.ones((2, C)), np.int64(1)).shape == (2, C)


def test_sizes_below_one_are_refused():
    for features, tasks in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            TaskBatchNorm(features, tasks, rngs=nnx.Rngs(0))


def test_a_stack_of_layers_keeps_tasks_before_channels():
    graph, state = nnx.split(TaskBatchNorm(C, T, rngs=nnx.Rngs(0)))
    # As many layers as tasks: a wrong order would fit.
    layers = nnx.merge(graph, jax.tree.map(lambda x: jnp.stack([x] * T), state))
    layers.scales[1][...] = 2 * layers.scales[1][...]
    assert layers.scale.shape == layers.var.shape == (T, T, C)
    np.testing.assert_array_equal(layers.scale[:, 1], 2)
    np.testing.assert_array_equal(layers.scale[:, 0], 1)
    variables = {f"scale_{t}": layers.scales[t][...] for t in range(T)}
    np.testing.assert_array_equal(tasks_linen.stacked_scale(variables), layers.scale)


def test_every_task_has_leaves_of_its_own():
    graph = nnx.split(TaskBatchNorm(C, T, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    _, params, stats = graph
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(C,)] * 2 * T
    assert [leaf.shape for leaf in jax.tree.leaves(stats)] == [(T, C)] * 2
    variables = Linen().variables
    assert sorted(variables["params"]) == [
        f"{name}_{t}" for name in ("bias", "scale") for t in range(T)
    ]


def test_what_connection_strength_reads():
    norm = TaskBatchNorm(C, T, rngs=nnx.Rngs(0))
    layer = Linen()
    rows = np.random.default_rng(2).normal(size=(T, C)).astype(np.float32)
    for task, row in enumerate(rows):
        norm.scales[task][...] = jnp.asarray(row)
        layer.set(task, row, row)
    np.testing.assert_array_equal(norm.scale, rows)
    stacked = tasks_linen.stacked_scale(layer.variables["params"])
    np.testing.assert_array_equal(stacked, rows)
    assert mtl.connection_strength(jnp.ones((2, C)), norm.scale, norm.var).shape == (
        T,
        C,
    )
    with pytest.raises(KeyError, match="expected the parameters of one TaskBatchNorm"):
        tasks_linen.stacked_scale({"kernel": rows})


class Net(nnx.Module):
    """One shared layer, a norm a task."""

    def __init__(self, rngs):
        self.shared = nnx.Linear(3, C, use_bias=False, rngs=rngs)
        self.norm = TaskBatchNorm(C, 2, rngs=rngs)

    def __call__(self, x, task):
        return self.norm(self.shared(x), task)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, task):
        x = nn.Dense(C, use_bias=False, name="shared")(x)
        return tasks_linen.TaskBatchNorm(C, 2, name="norm")(x, task)


def functional(kind):
    """``init(key)`` and ``loss_fn(params, stats, x) -> (losses, stats)``."""

    def losses(forward, x):
        return tuple(jnp.mean((forward(x, t) - x[:, :1] - t) ** 2) for t in range(2))

    if kind == "nnx":
        graph = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)[0]

        def init(key):
            return nnx.split(Net(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)[1:]

        def loss_fn(params, stats, x):
            model = nnx.merge(graph, params, stats, copy=True)
            found = losses(model, x)
            return found, nnx.split(model, nnx.Param, nnx.BatchStat)[2]

        return init, loss_fn

    net = LinenNet()

    def init_linen(key):
        variables = net.init(key, jnp.ones((2, 3)), 0)
        return variables["params"], variables["batch_stats"]

    def loss_fn_linen(params, stats, x):
        now = {"stats": stats}

        def forward(x, task):
            variables = {"params": params, "batch_stats": now["stats"]}
            y, new = net.apply(variables, x, task, mutable=["batch_stats"])
            now["stats"] = new["batch_stats"]
            return y

        return losses(forward, x), now["stats"]

    return init_linen, loss_fn_linen


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_task_jacobians_scans_and_seeds(kind):
    init, loss_fn = functional(kind)
    tx = mtl.mgda(2)
    xs = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8, 3)), jnp.float32)

    def train(key):
        params, stats = init(key)

        def step(carry, x):
            params, stats, state = carry
            (losses, stats), rows = mtl.task_jacobian(loss_fn, has_aux=True)(
                params, stats, x
            )
            updates, state = tx.update(rows, state, params)
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
            return (params, stats, state), losses

        return jax.lax.scan(step, (params, stats, tx.init(params)), xs)

    keys = jax.random.split(jax.random.key(0), 3)
    (params, stats, _), losses = laws.quick_jit(jax.vmap(train))(keys)
    assert losses.shape == (3, 4, 2)
    assert np.isfinite(losses).all()
    (alone, own, _), _ = laws.quick_jit(train)(keys[1])
    for many, one in zip(
        jax.tree.leaves((params, stats)), jax.tree.leaves((alone, own)), strict=True
    ):
        np.testing.assert_allclose(many[1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_norms_are_task_specific_parameters(kind):
    init, loss_fn = functional(kind)
    params, stats = init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    touched = mtl.task_touches(loss_fn, params, stats, x, has_aux=True)
    found = {
        "/".join(str(getattr(k, "key", "")) for k in path): tasks.tolist()
        for path, tasks in jax.tree_util.tree_leaves_with_path(touched)
    }
    kernel = [tasks for name, tasks in found.items() if "kernel" in name]
    assert kernel == [[True, True]]
    others = sorted(tasks for name, tasks in found.items() if "kernel" not in name)
    assert others == [[False, True]] * 2 + [[True, False]] * 2


def test_the_core_does_not_import_flax():
    code = "import sys, mtl_optax; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
