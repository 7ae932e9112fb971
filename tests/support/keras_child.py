"""What a child process of `tests/tf/test_backends.py` runs, on one of Keras's backends.

It prints one line of JSON: a name for each check, and what came out.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np

from autoclip_tf import AGC, Clipper, NormClip, QuantileClip, ValueClip, ZClip
from autoclip_tf.callbacks import ClipLogger
from autoclip_tf.optimizers import SGD, Adam

CLIPPERS = {
    "quantile": lambda: QuantileClip(0.2, history_length=50),
    "global": lambda: QuantileClip(0.2, history_length=50, scope="global"),
    "unit": lambda: AGC(0.001),
    "zscore": lambda: ZClip(1.0, warmup_steps=3),
    "norm": lambda: NormClip(1.0),
    "value": lambda: ValueClip(0.5),
}


TRACED = [  # one of each kind: each is compiled several times
    "Fixed(1.0)",
    "Quantile(0.9, history_length=50)",
    "MeanStd()",
    "ZScore()",
    "EmaRatio()",
    "StreamingQuantile(0.9)",
    "ParamRatio()",
    "Cap(Warmup(Quantile(0.9), steps=20), max_norm=2.0)",
    "Floor(Drop(Quantile(0.9)), min_norm=1.0)",
]


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return model


def fit(model, epochs=3, callbacks=()):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 4)).astype("float32")
    y = 3 * x.sum(1, keepdims=True)
    settings = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=[*callbacks], **settings).history


def weights_of(model):
    return [variable.numpy().tolist() for variable in model.trainable_variables]


def train(make, folder, jit):
    """Train, save, go on; load and go on from there as well."""
    model, clip = network(), make()
    model.compile(SGD(0.01, gradient_transformers=[clip]), loss="mse", jit_compile=jit)
    history = fit(model, callbacks=[ClipLogger()])
    found = {
        "norm": clip.decision.norm.tolist(),
        "threshold": clip.decision.threshold.tolist(),
        "weights": weights_of(model),
        "steps": clip.metrics()["clip/steps"],
        "logged": history["clip/norm"][-1] == clip.metrics()["clip/norm"],
    }
    model.save(folder / "model.keras")
    again = keras.models.load_model(folder / "model.keras")
    fit(model), fit(again)
    found["resumed"] = weights_of(model) == weights_of(again)
    return found


def accumulate():
    """Return how many updates were observed in 16 batches of which 4 make an update."""
    model, clip = network(), QuantileClip(0.5, scope="global")
    optimizer = Adam(0.01, gradient_transformers=[clip], gradient_accumulation_steps=4)
    model.compile(optimizer, loss="mse")
    fit(model, 4)
    return clip.metrics()["clip/steps"]


def statelessly():
    """Run golden traces through `stateless_apply` under `jax.jit`."""
    import jax

    from tests.support.cases import check_traces

    def run(policy, series):
        rows = series.norms.shape[1]
        weights = [keras.Variable([0.0], name=f"row{i}") for i in range(rows)]
        clip = Clipper(policy)
        optimizer = SGD(0.0, gradient_transformers=[clip])
        optimizer.build(weights)
        names = [variable.path for variable in optimizer.variables]
        places = [
            next(i for i, name in enumerate(names) if name.endswith(f"decision_{what}"))
            for what in ("threshold", "scale")
        ]

        @jax.jit
        def step(held, norms, param_norms):
            grads = [norms[row : row + 1] for row in range(rows)]
            params = [param_norms[row : row + 1] for row in range(rows)]
            return optimizer.stateless_apply(held, grads, params)[1]

        held, told = [variable.value for variable in optimizer.variables], []
        for norms, param_norms in zip(series.norms, series.param_norms, strict=True):
            held = step(held, norms, param_norms)
            told.append([np.asarray(held[place]) for place in places])
        thresholds, scales = zip(*told, strict=True)
        return np.stack(thresholds), np.stack(scales)

    for code in TRACED:
        check_traces(run, code)
    return len(TRACED)


def main(folder):
    backend = keras.backend.backend()
    # As `fit` does by default on an accelerator; XLA on TensorFlow is tested elsewhere.
    jit = backend == "jax"
    found = {name: train(make, folder, jit) for name, make in CLIPPERS.items()}
    found["accumulated"] = accumulate()
    if backend == "jax":
        found["uncompiled"] = train(CLIPPERS["global"], folder, False)
        found["traces"] = statelessly()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
