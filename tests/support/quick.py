"""Run the tests that belong to the changed folders, without the slow ones.

`make quick` runs it. The changed files come from git; `FOLDER=autoclip_core/log` names
a folder instead. A changed test file runs itself.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

ALWAYS = "project/layout project/imports"
TESTS = {
    "autoclip_core": "core/decide core/scale core/checks core/golden core/policies",
    "autoclip_core/history": "core/window core/full_history core/moments core/golden "
    "core/validation core/policies",
    "autoclip_core/policies": "core/policies core/combinators core/oracles core/golden "
    "core/decide core/laws",
    "autoclip_core/clipper": "core/settings core/patterns core/units core/checks "
    "core/metrics core/norms core/parts core/by_value core/fixed_settings",
    "autoclip_core/clipper/metrics_checks.py": "core/clipped_before core/metrics "
    "torch/watch/clipped_before tf/clipped_before jax/clipped_before",
    "autoclip_core/policy.py": "core/decide core/golden core/faults core/parity",
    "autoclip_core/decision.py": "core/decide core/golden core/faults core/loss",
    "autoclip_core/loss.py": "core/loss torch/loss jax/loss",
    "autoclip_core/scale.py": "core/decide core/scale core/faults core/laws",
    "autoclip_core/files": "core/read_tables core/read_logs core/cli core/clip_log "
    "core/files/other_files core/replace_file",
    "autoclip_core/files/formats": "core/read_tables core/read_logs core/clip_log "
    "core/files/other_files",
    "autoclip_core/log": "core/clip_log core/log_bounded core/log_step "
    "core/log_summary core/log_totals core/row_counts core/plot_rows "
    "core/log/red_lights core/clipped_before core/log/updates core/log/largest "
    "core/log/repeats core/metrics_logger core/report",
    "autoclip_core/plots": "core/clip_log core/plot_rows core/report core/replay",
    "autoclip_core/record": "core/clip_log core/log_bounded core/log_step "
    "core/log_totals core/row_counts core/log/repeats",
    "autoclip_core/planning": "core/replay core/suggest core/cli",
    "autoclip_core/series": "core/series/spikes core/series/diagnosis "
    "core/series/damage core/series/shifts "
    "core/series/labelled core/replay core/suggest",
    "autoclip_core/cli": "core/cli",
    "autoclip_torch": "torch/clipper torch/observe torch/optim torch/value "
    "torch/errors torch/agreement torch/find_threshold torch/uses torch/reference",
    "autoclip_torch/clipper.py": "torch/clipper torch/errors torch/changes "
    "torch/compile torch/threads torch/uses",
    "autoclip_torch/find_threshold.py": "torch/find_threshold torch/threshold_first",
    "autoclip_torch/named.py": "torch/clipper torch/errors torch/oracles torch/uses",
    "autoclip_torch/lightning.py": "torch/trainers/lightning_runs",
    "autoclip_torch/trainers": "torch/trainers/lightning_runs torch/transformers",
    "autoclip_torch/transformers.py": "torch/transformers",
    "autoclip_torch/rows": "torch/groups torch/units torch/errors torch/edges "
    "torch/exclude torch/scale_only torch/parameters/follow "
    "torch/parameters/surgery torch/state/by_name",
    "autoclip_torch/gradients": "torch/gradients torch/device torch/reference "
    "torch/units torch/value torch/edges torch/norms",
    "autoclip_torch/kernels": "torch/device",
    "autoclip_torch/optimizer_steps": "torch/attach torch/sharded torch/watch/loop",
    "autoclip_torch/gradients/dtensor.py": "torch/sharded torch/agreement",
    "autoclip_torch/gradients/ranks.py": "torch/sharded torch/agreement",
    "autoclip_torch/gradients/replicas.py": "torch/sharded",
    "autoclip_torch/gradients/sharded.py": "torch/sharded torch/agreement",
    "autoclip_torch/gradients/step_counter.py": "torch/sharded torch/agreement",
    "autoclip_torch/state": "torch/checkpoint torch/load_state torch/state/by_name "
    "torch/resume "
    "torch/optim_state torch/observe torch/device torch/faults",
    "autoclip_torch/step": "torch/scale_only torch/clipper torch/nonfinite torch/amp "
    "torch/errors",
    "autoclip_torch/loop": "torch/watch/loop torch/watch/loop_beside "
    "torch/watch/unused_clip torch/watch/two_optimizers torch/parameters/coverage "
    "torch/amp",
    "autoclip_torch/hooks/backward_in_step.py": "torch/hooks/other_optimizers",
    "autoclip_torch/step/callbacks.py": "torch/watch/callbacks torch/compile",
    "autoclip_torch/step/uncleared.py": "torch/watch/uncleared torch/sharded",
    "autoclip_torch/step/zero_norms.py": "torch/watch/zero_norms torch/sharded",
    "autoclip_torch/step/unwrap.py": "torch/accelerate",
    "autoclip_torch/hooks": "torch/attach torch/fused torch/optim torch/new_parameters "
    "torch/amp torch/accelerate torch/in_backward torch/hooks/other_optimizers "
    "torch/hooks/timm torch/loss",
    "autoclip_torch/observer": "torch/watch/callbacks torch/observe torch/clipper "
    "torch/errors torch/loss "
    "torch/parameters/follow torch/parameters/surgery torch/parameters/flat_parts",
    "autoclip_torch/coverage": "torch/parameters/swapped torch/parameters/coverage "
    "torch/parameters/parts",
    "autoclip_torch/update_step": "torch/update/agreement_with_numpy "
    "torch/update/cpu torch/update/device torch/update/optimizers torch/update/trust "
    "torch/update/update_clipper torch/update/weights_at_zero",
    "autoclip_torch/optim.py": "torch/optim torch/optim_state torch/errors "
    "torch/update/larc",
    "autoclip_tf": "tf/gradients tf/layouts tf/clipper tf/scale_only",
    "autoclip_tf/callbacks.py": "tf/callbacks",
    "autoclip_tf/find_clippers.py": "tf/callbacks tf/legacy",
    "autoclip_tf/clipper.py": "tf/clipper tf/faults tf/loops",
    "autoclip_tf/legacy.py": "tf/legacy",
    "autoclip_tf/policy_clipper.py": "tf/clipper tf/update tf/faults",
    "autoclip_tf/trust.py": "tf/update tf/callbacks",
    "autoclip_tf/update.py": "tf/update",
    "autoclip_tf/optimizers.py": "tf/optimizers tf/changes",
    "autoclip_tf/gradients": "tf/gradients tf/layouts tf/clipper tf/scale_only "
    "tf/update",
    "autoclip_tf/state": "tf/resume tf/clipper tf/clipped_before",
    "autoclip_tf/step": "tf/optimizers tf/update tf/resume tf/loops",
    "autoclip_jax": "jax/row_names jax/clipper jax/scale_only jax/arguments "
    "jax/find_threshold",
    "autoclip_jax/clipper.py": "jax/clipper jax/arguments jax/faults jax/uses "
    "jax/loops",
    "autoclip_jax/factories.py": "jax/arguments jax/oracles jax/uses",
    "autoclip_jax/gradients": "jax/compilation jax/sharding jax/row_names "
    "jax/scale_only jax/other_shapes",
    "autoclip_jax/trust.py": "jax/trust",
    "autoclip_jax/opt_state": "jax/resume jax/clipped_before jax/update",
    "autoclip_jax/metrics.py": "jax/row_names jax/update jax/clipped_before",
    "autoclip_jax/skip.py": "jax/clipper jax/changes",
    "benchmarks": "docs/torch_bench",
    "benchmarks/controller.py": "docs/controller",
    "benchmarks/jax_steps.py": "docs/jax_bench",
    "benchmarks/keras_steps.py": "docs/tf_bench",
    "docs": "docs/pages docs/readme",
    "docs/codebases.md": "docs/pages docs/migration docs/migration_rules "
    "docs/torch_migration docs/jax_migration",
    "docs/jax.md": "docs/pages docs/jax_docs",
    "docs/keras.md": "docs/pages docs/tf_docs",
    "docs/migration.md": "docs/pages docs/migration docs/migration_rules "
    "docs/torch_migration docs/torch_migration_agc docs/torch_migration_history "
    "docs/tf_migration docs/jax_migration",
    "docs/evidence": "docs/pages docs/torch_experiments",
    "docs/evidence.md": "docs/pages docs/torch_experiments",
    "examples": "docs/examples",
    "examples/demo.py": "docs/demo",
    "examples/experiments": "docs/torch_experiments docs/torch_no_tuning",
    "examples/find_threshold_keras.py": "docs/examples tf/find_threshold",
    "examples/threshold_first.py": "docs/examples torch/threshold_first",
    "tests": "project/conftest core/never",
    "tests/support/faults.py": "core/faults torch/faults",
    "tests/support/mutants.py": "project/mutants",
    "tests/support/quick.py": "project/quick",
    "tests/support/torch_reference.py": "torch/reference",
    "": "project/citation project/packaging docs/readme",
}
"""Each folder or file, and the tests that belong to it; "" is the root. The entry of a
file replaces the entry of its folder."""

LEFT_OUT = {
    "docs/docstrings": "it imports every framework",
    "docs/doctests": "it imports every framework",
    "tf/backends": "all of it is slow",
    "tf/strategy": "all of it is slow",
    "torch/cuda": "it needs a CUDA device",
    "torch/lightning": "all of it is slow",
    "trainers/deepspeed_trainer": "`make trainers` runs it",
    "trainers/engines": "`make trainers` runs it",
    "trainers/optimizers": "`make trainers` runs it",
    "trainers/peft": "`make trainers` runs it",
    "trainers/trl": "`make trainers` runs it",
    "trainers/triton_scale": "`make trainers` runs it",
}
"""The test files that belong to no entry, with the reason."""


def tests_for(path):
    """Return the test files for a changed file or folder, relative to the root."""
    if path.startswith("tests/") and Path(path).name.startswith("test_"):
        return [path] if (ROOT / path).is_file() else []
    folders = [path, *map(str, Path(path).parents)]
    folder = next(folder for folder in [*folders, ""] if folder in TESTS)
    return [file_of(name) for name in TESTS[folder].split()]


def file_of(name):
    folder, _, name = name.rpartition("/")
    return f"tests/{folder}/test_{name}.py"


def changed_files():
    """Return what differs from the last commit, and what git does not know yet."""
    commands = ["diff --name-only HEAD", "ls-files --others --exclude-standard"]
    outputs = [
        subprocess.check_output(["git", *command.split()], cwd=ROOT, text=True)
        for command in commands
    ]
    return "".join(outputs).splitlines()


def main():
    folder = os.environ.get("FOLDER", "").rstrip("/")
    if folder and not (ROOT / folder).is_dir():
        sys.exit(f"quick: FOLDER must be a folder of this project, got {folder!r}")
    paths = [folder] if folder else changed_files()
    files = [test for path in paths for test in tests_for(path)]
    files += [file_of(name) for name in ALWAYS.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow"]
    command += ["--numprocesses=auto", "--dist=loadfile", "--no-loadscope-reorder"]
    sys.exit(subprocess.call([*command, *dict.fromkeys(files)], cwd=ROOT))


if __name__ == "__main__":
    main()
