"""Every row of the pages about other clippers is driven, or is marked as prose.

`CASES` names the test of each row and of each block "before". `FILES` are the files of
these tests.
"""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
MARKS = {"migration.md": "##", "codebases.md": "#"}
"""The pages, and what stands before the heading of a section."""

PROSE = "prose: "
"""A row without a test; the reason follows."""

CASES = {
    "`clip_grad_norm_`": {
        "before 1": "torch::a_constant_is_that_of_torch",
        "`norm_type=inf`": "torch::a_constant_is_that_of_torch",
        "`error_if_nonfinite=True`": "torch::both_raise_at_a_norm_that_is_not_finite",
        "a NaN makes every": "torch::a_nan_spreads_in_torch_alone",
        "`clip_grad_value_(": "torch::a_limit_of_elements_is_that_of_torch",
    },
    "pseeth/autoclip": {
        "before 1": "history::a_percentile_is_that_of_the_paper",
    },
    "`autoclip` from PyPI": {
        "before 1": "history::a_quantile_is_that_of_autoclip",
    },
    "smartclip": {
        "before 1": "history::a_window_is_that_of_smartclip",
        '`history="ema"`': "core::a_tracked_quantile_of_smartclip_never_falls",
        '`mode="auto"`': PROSE + "there is no equal; its median is wrong by up to 38 %",
        "`ZScoreClip(zmax=": "core::moving_moments_are_those_of_smartclip",
        "`AGC(clipping=0.01": "agc::whole_tensors_are_those_of_smartclip",
    },
    "zclip": {
        "before 1": "history::a_z_score_is_that_of_zclip",
        "`max_grad_norm=1.0`": "history::a_z_score_is_that_of_zclip",
        '`clip_option="ada': "history::a_z_score_is_that_of_zclip",
        '`mode="percentile': "history::a_z_score_is_that_of_zclip",
        "records the clipped": "history::a_z_score_is_that_of_zclip",
        "`skip_update_on_sp": "history::a_z_score_is_that_of_zclip",
    },
    "timm and other AGC": {
        "before 1": "agc::units_are_those_of_timm",
        "each index of axis": "agc::units_are_those_of_timm",
        "the last two param": "agc::timm_leaves_out_the_last_two_parameters",
        "`dispatch_clip_gra": "agc::the_modes_of_timm",
        "`AGC(optimizer, 0": "agc::kernels_are_those_of_jaychanhoi",
        "`AGC(model.parame": "agc::kernels_are_those_of_jaychanhoi",
        "Composer": "agc::units_are_those_of_composer",
    },
    "Keras `clipnorm`, `global_clipnorm`, `clipvalue`": {
        "before 1": "tf::a_constant_is_that_of_keras",
        "`clipnorm=1.0`, e": "tf::a_constant_is_that_of_keras",
        "`clipvalue=0.5`": "tf::a_constant_is_that_of_keras",
    },
    "optax": {
        "before 1": "jax::a_constant_is_that_of_optax",
        "`adaptive_grad_clip(c, eps)`": "jax::units_are_those_of_optax",
        "the same with the": "jax::units_are_those_of_optax",
        "`clip_by_block_rms": "jax::a_root_mean_square_is_that_of_optax",
        "`apply_if_finite(": "jax::steps_that_are_not_finite_are_those_of_optax",
    },
    "bitsandbytes' percentile clipping": {
        "before 1": "core::an_entry_of_bitsandbytes",
    },
    "`pytorch_optimizer.AdaGC`": {
        "before 1": "history::a_training_is_that_of_pytorch_optimizer",
    },
    "Others": {
        "`AdaptiveGradientNormClipper(p": "core::windows_are_those_of_both_classes",
        "`AdaptiveGradientNormClipper` (": "core::windows_are_those_of_both_classes",
    },
    "Training codebases": {
        "OLMo-core": "core::skipped_steps_are_those_of_olmo_core",
        "MaxText": "jax::skipped_steps_are_those_of_maxtext",
        "OLMo `max": "core::a_ratio_is_that_of_olmo",
        "Levanter": "jax::clipped_updates_are_those_of_levanter",
        "Megatron-LM, xtuner": "torch::constants_to_clip_and_to_skip",
        "axlearn": "jax::steps_clipped_and_skipped_are_those_of_axlearn",
        "lingvo": "core::skipped_steps_are_those_of_lingvo",
    },
}
"""By section and by the beginning of a row: the test, "file::name", or why none."""

FILES = {
    "core": "test_migration_rules.py",
    "torch": "test_torch_migration.py",
    "history": "test_torch_migration_history.py",
    "agc": "test_torch_migration_agc.py",
    "tf": "test_tf_migration.py",
    "jax": "test_jax_migration.py",
}


def read_rows():
    """Return the first cells of each section, and its blocks "before"."""
    rows = {}
    parts = []
    for page, mark in MARKS.items():
        text = (DOCS / page).read_text("utf-8")
        parts += re.split(rf"^{mark} (.*)\n", text, flags=re.MULTILINE)[1:]
    for section, text in zip(parts[::2], parts[1::2], strict=True):
        cells = re.findall(r"^\| (.+?) \|", text, flags=re.MULTILINE)
        cells = [cell for cell in cells if cell != "there"]
        before = range(1, text.count('title="before"') + 1)
        rows[section] = cells + [f"before {number}" for number in before]
    return rows


@pytest.mark.parametrize("section", list(read_rows()))
def test_every_row_has_one_case_and_every_case_a_row(section):
    cases = dict(CASES[section])
    for cell in read_rows()[section]:
        fits = [start for start in cases if cell.startswith(start)]
        assert len(fits) == 1, cell
        del cases[fits[0]]
    assert cases == {}


def test_every_case_names_a_test():
    assert list(CASES) == list(read_rows())
    text = {key: (HERE / name).read_text("utf-8") for key, name in FILES.items()}
    for case in {case for cases in CASES.values() for case in cases.values()}:
        if not case.startswith(PROSE):
            key, name = case.split("::")
            assert f"\ndef test_{name}(" in text[key], case
