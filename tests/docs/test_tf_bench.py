"""The Keras benchmark runs and makes its table."""

from ..support.trials import numbers, trial


def test_a_trial_measures_steps_in_fit(scripts, tmp_path, monkeypatch):
    saved = trial("keras_steps", tmp_path, monkeypatch)
    import tables

    made = tables.make_tables(saved)
    assert list(made) == ["Keras", "share", "fixed cost"]
    assert [len(row) for row in made["share"]] == [7, 7]
    reference, _, ours = saved["results"]
    assert reference["contender"] == "global_clipnorm=1.0"
    assert numbers(reference["ratio"]) == [1.0, 1.0, 1.0]
    assert reference["rounds"] == ours["rounds"] >= 5
    assert all(number > 0 for number in numbers(ours))


def test_the_first_steps_of_a_fit_are_not_timed(scripts):
    import keras_steps

    watch = keras_steps.Stopwatch()
    watch.ends = [0.0, 7.0, 9.0, 10.0, 12.0, 15.0]  # the third ends at 9
    assert watch.seconds() == 2.0
