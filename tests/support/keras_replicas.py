"""The child process of `tests/tf/test_strategy.py`: two replicas on one machine.

It is a separate process because virtual devices must be set up before TensorFlow is
used, and because a failed collective breaks its process. It prints one line of JSON.
"""

import json
import warnings

import keras
import numpy as np
import tensorflow as tf

from autoclip_core import ParamRatio
from autoclip_tf import NormClip, QuantileClip, TrustClip, UpdateClipper
from autoclip_tf.optimizers import SGD


def two_replicas():
    [cpu] = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [device, device])
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def network(library):
    library.utils.set_random_seed(0)
    x, ids = library.Input((3,)), library.Input((2,), dtype="int32")
    words = library.layers.Flatten()(library.layers.Embedding(5, 2)(ids))
    joined = library.layers.Concatenate()([x, words])
    return library.Model([x, ids], library.layers.Dense(1)(joined))


def train(library, optimizer, **compiled):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype("float32")
    ids = rng.integers(0, 5, size=(64, 2))
    model = network(library)
    model.compile(optimizer, loss="mse", **compiled)
    y = 3 * x.sum(1, keepdims=True)
    settings = {"batch_size": 16, "epochs": 3, "shuffle": False, "verbose": 0}
    model.fit([x, ids], y, **settings)
    return [variable.numpy().tolist() for variable in model.trainable_variables]


def find_metric(clip, name):
    metrics = clip.metrics()
    return metrics.get(f"clip/update_{name}", metrics.get(f"clip/{name}"))


def compare(library, strategy, make, **compiled):
    """Train on one device and on two replicas; return the results of each clipper.

    The run on one device is not compiled: a graph would take longer than its 12 steps.
    """
    results = {}
    for name in ("one", "two"):
        scope = strategy.scope() if name == "two" else tf.name_scope("")
        with scope:
            clips, optimizer = make()
            how = {"run_eagerly": True} if name == "one" else compiled
            weights = train(library, optimizer, **how)
        results[name] = [
            {
                "weights": weights,
                "threshold": clip.decision.threshold.tolist(),
                "steps": find_metric(clip, "steps"),
                "clip_rate": find_metric(clip, "clip_rate"),
            }
            for clip in clips
        ]
    pairs = zip(results["one"], results["two"], strict=True)
    return [{"one": one, "two": two} for one, two in pairs]


def opposed_gradients(strategy):
    """Return a weight after a step with gradients of +10 and -8 on two replicas.

    The sum is clipped to 1, and the weight starts at 0.
    """
    with strategy.scope():
        weight = keras.Variable(0.0)
        optimizer = SGD(1.0, gradient_transformers=[NormClip(1.0)])
        optimizer.build([weight])

    @tf.function(autograph=False)
    def step():
        def step_of_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tf.where(replica == 0, 10.0, -8.0)], [weight])

        strategy.run(step_of_replica)

    step()
    return float(weight.numpy())


def clip_by_hand(strategy):
    """Return the warnings of a clipper that replicas call before and after the sum."""
    weight = tf.Variable(0.0)
    before, after = NormClip(1.0), NormClip(1.0)
    for clip in (before, after):
        clip.build([weight])

    def clip_sum(strategy, gradient):
        after([(strategy.reduce("sum", gradient, axis=None), weight)])

    def step():
        before([(tf.constant(10.0), weight)])
        context = tf.distribute.get_replica_context()
        context.merge_call(clip_sum, args=(tf.constant(10.0),))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy.run(step)
    texts = [str(each.message) for each in caught]
    return [text for text in texts if "replica function" in text], after.metrics()


def main():
    strategy = two_replicas()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {"opposed": opposed_gradients(strategy)}
    results["false warnings"] = [
        text for text in (str(w.message) for w in caught) if "replica function" in text
    ]
    results["by hand"] = clip_by_hand(strategy)
    scopes = ("global", "parameter", "unit")
    settings = {"momentum": 0.5, "weight_decay": 0.01}

    def make(*scopes):
        clips = [QuantileClip(0.2, history_length=20, scope=scope) for scope in scopes]
        clips.append(UpdateClipper(ParamRatio(0.01)))
        return clips, SGD(0.1, gradient_transformers=clips, **settings)

    compiled = compare(keras, strategy, lambda: make(*scopes))
    results |= dict(zip((*scopes, "update"), compiled, strict=True))

    def make_trust():
        clip = TrustClip(quantile=0.2, history_length=20)
        optimizer = clip.as_optimizer(keras.optimizers.SGD(0.1, **settings))
        return [clip.gradient, clip.update], optimizer

    results["trust"], results["trust update"] = compare(
        keras, strategy, make_trust, run_eagerly=True
    )
    try:
        import tf_keras
    except ImportError:
        pass
    else:

        def make_legacy():
            clip = QuantileClip(0.2, history_length=20, scope="global")
            kind = tf_keras.optimizers.legacy.SGD
            return [clip], kind(0.1, gradient_transformers=[clip])

        [results["legacy"]] = compare(tf_keras, strategy, make_legacy)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
