"""Keras `fit`: the optimizer clips, and a logger tells what each epoch's clipper saw.

One target in a hundred is a hundred times too large. Run it:
`python examples/keras_fit.py`. Half of the epochs are trained, then the model is saved
and loaded, and its clipper goes on with the history.
"""

import argparse
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from autoclip_tf import QuantileClip
from autoclip_tf.callbacks import ClipLogger
from autoclip_tf.optimizers import SGD


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 8)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    y[::100] *= 100
    return x, y


def make_model(clip: bool) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    clippers = [QuantileClip(quantile=0.5, scope="global")] if clip else []
    model.compile(SGD(0.05, gradient_transformers=clippers), loss="mse")
    return model


def fit(model: keras.Model, epochs: int, first: int = 0) -> dict[str, list[float]]:
    """Train up to epoch `epochs`; return the history."""
    callbacks = [ClipLogger()] if model.optimizer.gradient_transformers else []
    return model.fit(
        *data(), epochs=epochs, initial_epoch=first, callbacks=callbacks, verbose=0
    ).history


def clean_loss(model: keras.Model) -> float:
    """The mean squared error where the targets are right."""
    x = np.random.default_rng(1).normal(size=(500, 8)).astype("float32")
    predicted = model.predict(x, verbose=0)
    return float(np.mean((predicted - x.sum(axis=1, keepdims=True)) ** 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    free, model = make_model(clip=False), make_model(clip=True)
    fit(free, epochs)
    history = fit(model, epochs // 2)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/half.keras")
        model = keras.models.load_model(f"{folder}/half.keras")
    more = fit(model, epochs, first=epochs // 2)
    print("epoch  last norm  threshold  clipped")
    names = ("clip/norm", "clip/threshold", "clip/clip_rate")
    rows = zip(*(history[name] + more[name] for name in names), strict=True)
    for epoch, (norm, threshold, rate) in enumerate(rows, start=1):
        print(f"{epoch:5} {norm:10.2f} {threshold:10.2f} {rate:8.0%}")
    print(f"loss on clean data: unclipped {clean_loss(free):.3f}")
    print(f"loss on clean data: clipped {clean_loss(model):.3f}")


if __name__ == "__main__":
    main()
