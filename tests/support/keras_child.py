"""The checks of `tests/tf/test_backends.py` on the current backend of Keras.

As a script it prints one line of JSON: the result of each check by its name.
"""

import functools
import json
import sys
from pathlib import Path

import keras
import numpy as np

from autoclip_core import Quantile
from autoclip_tf import (
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
    ValueClip,
    ZClip,
)
from autoclip_tf.callbacks import ClipLogger
from autoclip_tf.optimizers import SGD, Adam

from . import update_reference

# One optimizer applies them one after the other. In this order each of them clips.
CLIPPERS = {
    "zscore": lambda: ZClip(0.1, warmup_steps=3),
    "quantile": lambda: QuantileClip(0.2, history_length=50),
    "global": lambda: QuantileClip(0.2, history_length=50, scope="global"),
    "norm": lambda: NormClip(1.0),
    "value": lambda: ValueClip(0.2),
    "unit": lambda: AGC(0.001),
    "update": lambda: UpdateClipper(Quantile(0.2, history_length=50), scope="unit"),
}


ROWS = 11
"""The most rows of a golden trace. Other traces are padded to compile a policy once."""

TRACED = [  # each policy is compiled, so one policy for each kind of state
    "Quantile(0.9, history_length=50)",
    "ZScore()",
    "StreamingQuantile(0.9)",
    "Cap(Warmup(Quantile(0.9), steps=20), max_norm=2.0)",
    "Warmup(Drop(Quantile(0.9), clip=Quantile(0.5, history_length=10)), steps=30,"
    " threshold=1.5)",
]


def network():
    """Return a model of two equal layers: eager steps compile each operation once."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    curved, straight = keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(5)
    model = keras.Model(x, keras.layers.add([curved(x), straight(x)]))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return model


def fit(model, epochs, callbacks=()):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 4)).astype("float32")
    y = np.repeat(3 * x.sum(1, keepdims=True), 5, axis=1)
    settings = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=[*callbacks], **settings).history


def weights_of(model):
    return [variable.numpy().tolist() for variable in model.trainable_variables]


def train(jit, epochs):
    """Train with all clippers; return the model and its results after each `fit`.

    Args:
      jit: whether the steps are compiled.
      epochs: the number of epochs of each `fit`.
    """
    model, clips = network(), [make() for make in CLIPPERS.values()]
    model.compile(SGD(0.01, gradient_transformers=clips), loss="mse", jit_compile=jit)
    return model, [fit_and_measure(model, clips, count) for count in epochs]


def fit_and_measure(model, clips, epochs):
    """Train, and return the weights and the metrics of each clipper."""
    history = fit(model, epochs, [ClipLogger()])
    results = {"weights": weights_of(model)}
    for index, (name, clip) in enumerate(zip(CLIPPERS, clips, strict=True)):
        metrics = clip.metrics()
        prefix = "clip/update_" if clip.clips_update else "clip/"
        logged = history[f"{prefix}norm" if clip.clips_update else f"clip/{index}/norm"]
        results[name] = {
            "norm": clip.decision.norm.tolist(),
            "threshold": clip.decision.threshold.tolist(),
            "steps": metrics[f"{prefix}steps"],
            "clip_rate": metrics[f"{prefix}clip_rate"],
            "logged": logged[-1] == metrics[f"{prefix}norm"],
        }
    return results


def resumes(model, folder):
    """Return whether the model and a saved copy train to the same weights."""
    model.save(folder / "model.keras")
    copy = keras.models.load_model(folder / "model.keras")
    fit(model, 1), fit(copy, 1)
    return weights_of(model) == weights_of(copy)


def accumulate(jit):
    """Return the number of observed updates in 8 batches, 4 batches per update.

    The optimizer also averages the weights and decays them.
    """
    model, clip = network(), TrustClip(ratio=0.005)
    settings = {"gradient_accumulation_steps": 4, "use_ema": True, "weight_decay": 0.1}
    optimizer = Adam(0.01, gradient_transformers=[clip], **settings)
    model.compile(optimizer, loss="mse", jit_compile=jit)
    fit(model, 2)
    metrics = clip.metrics()
    names = ("steps", "update_steps", "update_norm", "update_threshold")
    return [metrics[f"clip/{name}"] for name in names] + weights_of(model)


def count_stateless_traces():
    """Check golden traces with `stateless_apply` under `jax.jit`; count them."""
    import jax

    from tests.support.traces import check_traces

    @functools.cache
    def stepper(policy):
        """Return an optimizer's variables, a compiled step, and result indices."""
        weights = [keras.Variable([0.0], name=f"row{i}") for i in range(ROWS)]
        clip = Clipper(policy)
        optimizer = SGD(0.0, gradient_transformers=[clip])
        optimizer.build(weights)
        names = [variable.path for variable in optimizer.variables]
        places = [
            next(
                i for i, name in enumerate(names) if name.endswith(f"decision_{field}")
            )
            for field in ("threshold", "scale")
        ]

        @jax.jit
        def step(state, norms, param_norms):
            grads = [norms[row : row + 1] for row in range(ROWS)]
            params = [param_norms[row : row + 1] for row in range(ROWS)]
            return optimizer.stateless_apply(state, grads, params)[1]

        return [variable.value for variable in optimizer.variables], step, places

    def run(policy, series):
        rows, steps = series.norms.shape[1], []
        state, step, places = stepper(policy)
        padding = (0, 0), (0, ROWS - rows)
        padded = (
            np.pad(n, padding, "edge") for n in (series.norms, series.param_norms)
        )
        for norms, param_norms in zip(*padded, strict=True):
            state = step(state, norms, param_norms)
            steps.append([np.asarray(state[place])[:rows] for place in places])
        thresholds, scales = zip(*steps, strict=True)
        return np.stack(thresholds), np.stack(scales)

    for code in TRACED:
        check_traces(run, code)
    return len(TRACED)


def follow_reference():
    """Compare with the steps of `update_reference.py`; return their number."""
    case = update_reference.CASES["trust"]
    clip = UpdateClipper(case.policy, scope=case.scope, norm=case.norm)
    start = update_reference.weights()
    weights = [keras.Variable(value, name=name) for name, value in start.items()]
    rate, momentum = update_reference.LEARNING_RATE, update_reference.MOMENTUM
    optimizer = SGD(rate, momentum=momentum, gradient_transformers=[clip])
    optimizer.build(weights)

    def step(state, arrays, values):
        optimizer.apply(arrays, weights)
        return [weight.value for weight in weights], state

    if keras.backend.backend() == "jax":
        import jax

        step = jax.jit(optimizer.stateless_apply)
    values, state = ([v.value for v in each] for each in (weights, optimizer.variables))
    for gradients, expected in zip(
        update_reference.gradients(), update_reference.run(case), strict=True
    ):
        arrays = [keras.ops.convert_to_tensor(g) for g in gradients.values()]
        values, state = step(state, arrays, values)
        new = map(keras.ops.convert_to_numpy, values)
        update_reference.assert_agrees(dict(zip(start, new, strict=True)), expected)
    return update_reference.STEPS


def clip_sparse():
    """Return a weight after a step whose sparse gradient [3, 0, 4] is clipped to 1.

    The second index occurs twice.
    """
    places, values = np.array([[0], [2], [2]]), np.float32([3, 1, 3])
    if keras.backend.backend() == "jax":
        from jax.experimental import sparse

        gradient = sparse.BCOO((values, places), shape=(3,))
    else:
        import torch

        indices, values = torch.tensor(places.T), torch.tensor(values)
        gradient = torch.sparse_coo_tensor(indices, values, (3,))
    weight = keras.Variable(np.zeros(3, np.float32))
    SGD(1.0, gradient_transformers=[NormClip(1.0)]).apply([gradient], [weight])
    return weight.numpy().tolist()


def check_backend(folder):
    """Return the result of each check by its name."""
    # `fit` compiles by default on an accelerator. Other tests cover XLA on TensorFlow.
    jit = keras.backend.backend() == "jax"
    model, (first, last) = train(jit, epochs=(1, 2))
    results = last | {"resumed": resumes(model, folder), "accumulated": accumulate(jit)}
    if keras.backend.backend() != "tensorflow":  # `test_update.py` covers it
        results["recorded steps"] = follow_reference()
        results["sparse"] = clip_sparse()
    if jit:
        results["first epoch"] = first
        _, [results["uncompiled"]] = train(jit=False, epochs=(1,))
        results["traces"] = count_stateless_traces()
    return results


if __name__ == "__main__":
    print(json.dumps(check_backend(Path(sys.argv[1]))))
