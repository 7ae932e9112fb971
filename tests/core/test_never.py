"""Promises of the library, and the tests that check each of them.

`NEVER` lists what the library never does, `DEFECTS` lists defects of similar packages.
Each line names tests by file and function. A test checks that these functions exist.
"""

import ast
import pathlib
import re
import subprocess
import sys
from functools import cache

import pytest

from ..project.test_imports import MAY_IMPORT, folder

TESTS = pathlib.Path(__file__).parents[1]

NEVER = {
    "never lets a non-finite norm into a history": [
        "core/test_window.py::test_a_norm_that_is_not_finite_is_not_recorded",
        "core/test_parity.py::test_a_norm_that_is_not_finite_changes_no_state",
        "torch/test_nonfinite.py::test_zero_removes_the_row_and_no_other",
        "torch/test_nonfinite.py::test_a_run_with_a_batch_of_nan_equals_the_run_without_it",
        "torch/test_observe.py::test_a_negative_norm_counts_as_not_finite",
    ],
    "never turns a finite gradient into NaN": [
        "torch/test_clipper.py::test_a_finite_gradient_stays_finite",
        "torch/test_gradients.py::test_finite_gradients_whose_squares_are_not_in_range",
        "torch/test_nonfinite.py::test_zero_removes_the_row_and_no_other",
    ],
    "never reads a device value back to the host in step() on an accelerator": [
        "torch/test_device.py::test_a_step_reads_nothing_and_decides_as_on_the_cpu",
        "torch/test_cuda.py::test_on_cuda_a_step_does_not_synchronise",
        "core/test_policies.py::test_a_policy_uses_the_documented_verbs_and_never_looks",
    ],
    "never stores an id, a pickled object or a NumPy scalar in a checkpoint": [
        "torch/test_checkpoint.py::test_a_state_is_tensors_and_plain_python",
        "torch/test_checkpoint.py::test_a_state_holds_no_identity",
        "torch/test_resume.py::test_all_runs_resume_in_a_new_process_bit_for_bit",
    ],
    "never monkey-patches a framework object": [
        "core/test_never.py::test_torch_is_after_a_run_as_it_was_before",
    ],
    "never changes a gradient that is within its limit": [
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
        "torch/test_gradients.py::test_a_row_within_its_limit_is_unchanged",
    ],
    "never swallows an exception": [
        "core/test_never.py::test_no_exception_is_swallowed",
    ],
}

DEFECTS = {
    # Statistics.
    "the deviation of one norm is NaN, and so is every gradient": [
        "core/test_window.py::test_no_deviation_of_one_norm_and_no_nan",
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
    ],
    "k deviations without the mean: constant norms are clipped to 0": [
        "core/test_golden.py::test_numpy_answers_as_the_oracle",
        "torch/test_uses.py::test_a_clipper_for_each_half_of_a_model",
    ],
    "a quantile by another formula, 38 % off on skewed norms": [
        "core/test_window.py::test_quantiles_are_exact",
        "torch/test_clipper.py::test_quantiles_are_those_of_numpy_bit_for_bit",
    ],
    "a tracked quantile that can only rise": [
        "core/test_laws.py::test_the_streaming_quantile_keeps_its_account",
        "core/test_laws.py::test_every_policy_follows_a_level_shift",
    ],
    "a variance in which one spike counts forever": [
        "core/test_laws.py::test_every_policy_follows_a_level_shift",
    ],
    "clipped norms fed back, so that a new level is never followed": [
        "core/test_laws.py::test_every_policy_follows_a_level_shift",
        "core/test_laws.py::test_known_exceptions_do_not",
    ],
    "another interpolation, order or scale in another framework": [
        "core/test_parity.py::test_a_framework_answers_as_numpy",
        "core/test_parity.py::test_quantiles_are_those_of_numpy_bit_for_bit",
    ],
    "each tensor clipped to the threshold of all of them": [
        "torch/test_clipper.py::test_tensors_of_one_row_keep_their_direction",
    ],
    "the norm recorded before the threshold is taken from the history": [
        "core/test_laws.py::test_a_threshold_does_not_depend_on_its_norm",
    ],
    # Norms that are not finite.
    "a NaN that stays in the history forever, or for its length": [
        "core/test_window.py::test_a_norm_that_is_not_finite_is_not_recorded",
        "torch/test_nonfinite.py::test_a_run_with_a_batch_of_nan_equals_the_run_without_it",
        "torch/test_nonfinite.py::test_nan_in_one_layer_changes_no_other_row",
    ],
    "overflows at the start of an fp16 run that poison it": [
        "torch/test_nonfinite.py::test_a_run_that_starts_with_overflows_is_not_harmed",
        "torch/test_nonfinite.py::test_with_a_loss_scaler_the_weights_stay_finite",
    ],
    "one bad gradient that makes all of them NaN": [
        "torch/test_nonfinite.py::test_zero_removes_the_row_and_no_other",
    ],
    "a non-finite norm that silently switches clipping off, or skips every step": [
        "torch/test_nonfinite.py::test_a_run_with_a_batch_of_nan_equals_the_run_without_it",
        "torch/test_nonfinite.py::test_too_many_skips_in_a_row_are_an_error",
    ],
    "NaN replaced by a number, which is then recorded": [
        "torch/test_clipper.py::test_a_rough_run_follows_the_formulas_too",
    ],
    "no choice between zero, skip, raise and propagate": [
        "core/test_scale.py::test_zero_is_the_default",
        "torch/test_nonfinite.py::test_propagate_leaves_the_row_unchanged",
        "torch/test_nonfinite.py::test_raise_changes_nothing_and_names_the_row",
        "torch/test_nonfinite.py::test_a_skipped_update_leaves_the_optimizer_bit_for_bit",
    ],
    # Warm-up.
    "a threshold of 1e-8 before the first norm: the first gradients become 0": [
        "core/test_scale.py::test_zero_is_the_default",
        "torch/test_observe.py::test_one_number_is_one_step",
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
    ],
    "a warm-up that counts the norms of all rows together": [
        "core/test_laws.py::test_rows_do_not_know_of_each_other",
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
    ],
    "a warm-up that clips in another mode, or to a maximum that is not set": [
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
        "torch/test_uses.py"
        "::test_percentile_90_of_all_history_after_a_hundred_steps_of_warm_up",
    ],
    # Missing gradients.
    "a missing gradient counts as a norm of 0, or is an error": [
        "torch/test_nonfinite.py"
        "::test_a_step_without_any_gradient_counts_and_changes_nothing_else",
        "torch/test_nonfinite.py"
        "::test_an_unfrozen_parameter_continues_with_its_history",
    ],
    "a generator that is used up after the first step": [
        "torch/test_groups.py::test_a_generator_lasts_for_the_whole_run",
        "torch/test_errors.py::test_the_message_says_what_is_wrong_and_what_to_do",
    ],
    # Precision.
    "norms in half precision, infinite from 256 on": [
        "torch/test_gradients.py::test_a_narrow_type_does_not_limit_the_norm",
        "torch/test_gradients.py::test_a_large_gradient_is_measured_to_five_digits",
    ],
    "something added to the divisor, so that tiny norms are shrunk": [
        "core/test_scale.py::test_nothing_is_added_to_the_divisor",
        "torch/test_uses.py::test_a_plain_norm_clip_returns_the_norm",
    ],
    "the norm of a sparse gradient's duplicates, or an error on a sparse one": [
        "torch/test_gradients.py::test_the_norm_of_duplicates_is_that_of_their_sum",
    ],
    # AGC.
    "one axis for every kernel: norms per input, an error on five dimensions": [
        "torch/test_units.py::test_a_unit_is_what_one_output_depends_on",
        "torch/test_units.py"
        "::test_bare_parameters_of_a_transposed_convolution_would_be_cut_by_input",
        "torch/test_units.py::test_the_rule_nfnets_takes_norms_over_the_axes_of_optax",
    ],
    "a layer that starts at zero and never moves": [
        "torch/test_units.py::test_a_layer_that_starts_at_zero_trains",
    ],
    "a method called AGC that does not clip by units": [
        "torch/test_units.py::test_agc_in_a_training_loop",
    ],
    "an exclusion that excludes nothing, or everything: the root module": [
        "torch/test_exclude.py::test_the_root_module_cannot_be_excluded",
        "torch/test_exclude.py::test_what_is_excluded_is_neither_measured_nor_scaled",
    ],
    "the last two tensors taken for the head, which has no bias": [
        "torch/test_exclude.py::test_excluding_the_head_by_name_spares_no_other_tensor",
    ],
    # Integration.
    "clipped before the closure computes the gradients, or after it ran twice": [
        "torch/test_optim.py::test_with_a_closure_it_clips_what_the_closure_computed",
        "torch/test_optim.py::test_lbfgs_is_clipped_after_each_backward",
    ],
    "an optimizer that schedulers and loss scalers refuse": [
        "torch/test_optim.py::test_a_scheduler_sets_the_learning_rate",
        "torch/test_optim.py::test_a_grad_scaler_steps_it",
    ],
    "clipping and eps that land in other arguments": [
        "torch/test_optim.py::test_clipping_and_eps_by_position",
    ],
    "gradients that are not cleared, or groups that become one": [
        "torch/test_optim.py::test_zero_grad_is_that_of_torch",
        "torch/test_optim.py::test_a_group_of_the_optimizer_is_a_group_of_the_clipper",
    ],
    "framework objects changed: methods replaced, attributes added": [
        "core/test_never.py::test_torch_is_after_a_run_as_it_was_before",
    ],
    "an import that needs packages which have nothing to do with it": [
        "project/test_imports.py::test_every_import_is_in_the_table",
        "project/test_imports.py::test_no_framework_and_no_slow_module_is_loaded",
    ],
    "models are recognised by the name of their module: others are refused": [
        "torch/test_exclude.py::test_what_is_excluded_is_neither_measured_nor_scaled",
    ],
    "clip_grad_norm_ called on gradients, which clips nothing": [
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
    ],
    # Arguments.
    "a positional parameter put in front of another": [
        "torch/test_errors.py::test_all_arguments_but_the_first_two_are_keywords",
    ],
    "an example in the README that does not run": [
        "docs/test_readme.py::test_the_code_runs",
        "torch/test_clipper.py::test_global_clipping_is_the_older_spelling",
    ],
    "an argument that a mode ignores": [
        "torch/test_errors.py::test_the_message_says_what_is_wrong_and_what_to_do",
        "torch/test_groups.py::test_an_unknown_key_of_a_group_is_refused",
        "torch/test_groups.py::test_group_settings_are_refused_at_scope_global",
    ],
    "a scope that a clipper ignores": [
        "torch/test_clipper.py::test_a_run_follows_the_formulas",
    ],
    "what the constructor accepts and the first step refuses": [
        "torch/test_errors.py::test_valid_arguments_are_accepted",
    ],
    "the settings of an optimizer's groups lost, or taken for the clipper's": [
        "torch/test_groups.py::test_a_group_may_have_settings_of_its_own",
        "torch/test_groups.py::test_an_optimizer_s_own_settings_are_never_read",
    ],
    "norm, threshold and decision are not returned": [
        "torch/test_clipper.py::test_a_decision_is_of_tensors_with_one_entry_per_row",
        "torch/test_uses.py::test_a_plain_value_clip_returns_the_norm",
    ],
    # State.
    "a state without the settings behind the threshold: quantile, scope, mode": [
        "torch/test_load_state.py::test_a_state_that_does_not_fit_is_refused",
    ],
    "keys that mean nothing in another process": [
        "torch/test_checkpoint.py::test_a_state_holds_no_identity",
        "torch/test_resume.py::test_all_runs_resume_in_a_new_process_bit_for_bit",
    ],
    "keys by position, so that a parameter that is unfrozen shifts histories": [
        "torch/test_nonfinite.py"
        "::test_an_unfrozen_parameter_continues_with_its_history",
        "torch/test_groups.py::test_a_later_group_may_have_the_policy_of_an_earlier_one",
    ],
    "a state that does not match, or is not a state, loaded without an error": [
        "torch/test_load_state.py::test_a_broken_part_is_refused",
        "torch/test_load_state.py::test_a_value_that_is_not_a_state_is_refused",
    ],
    "a state that is lost: the warm-up starts again after a restart": [
        "torch/test_resume.py::test_all_runs_resume_in_a_new_process_bit_for_bit",
    ],
    "a clipper that cannot be copied or pickled": [
        "torch/test_checkpoint.py::test_a_copy_of_a_run_continues_like_the_run",
        "torch/test_optim_state.py::test_a_copy_of_what_a_scheduler_drives",
    ],
    # Speed.
    "a synchronisation for each parameter": [
        "torch/test_device.py::test_a_step_reads_nothing_and_decides_as_on_the_cpu",
    ],
    "a history that is sorted, or grows, in every step": [
        "core/test_window.py::test_the_ring_holds_the_last_norms_and_the_count_stays_small",
        "core/test_policies.py::test_tables_are_the_same_objects_in_every_step",
    ],
    # Tests.
    "tests of one step, without a number": [
        "core/test_golden.py::test_a_wrong_answer_is_found",
        "torch/test_reference.py::test_the_reference_agrees_with_a_calculation_by_hand",
        "torch/test_checkpoint.py::test_without_loading_the_bits_would_differ",
    ],
}


def find_missing(guards):
    """Return the tests that are not defined."""
    pairs = [guard.split("::") for guard in guards]
    return [
        guard
        for guard, (file, name) in zip(guards, pairs, strict=True)
        if name not in functions_of(TESTS / file)
    ]


@cache
def functions_of(path):
    """Return the names of the functions of a file, or no name if it does not exist."""
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_of_promises_names_tests_that_exist():
    path = TESTS / "promises.md"
    page = path.read_text(encoding="utf-8")
    guards = re.findall(r"`((?:\w+/)+test_\w+\.py::test_\w+)`", page)
    assert len(guards) > 25
    assert find_missing(guards) == []


@pytest.mark.parametrize("line", [*NEVER, *DEFECTS])
def test_each_line_has_its_test(line):
    guards = (NEVER | DEFECTS)[line]
    assert guards
    assert find_missing(guards) == []


def test_a_removed_test_is_noticed():
    existing = "core/test_never.py::test_each_line_has_its_test"
    removed = ["core/test_never.py::test_removed", "test_removed.py::test_x"]
    assert find_missing([existing, *removed]) == removed


# No exception is swallowed.

BROAD = {"Exception", "BaseException"}


def find_swallowed(source):
    """Yield the lines of a source at which an exception may be lost.

    A handler of all exceptions must end with `raise`. A handler of certain exceptions
    must do something. `suppress` is never allowed.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(part).rpartition(".")[2] for part in caught if part}
            is_broad = node.type is None or names & BROAD
            if is_broad and not isinstance(node.body[-1], ast.Raise):
                yield node.lineno
            elif all(map(does_nothing, node.body)):
                yield node.lineno
        elif isinstance(node, ast.Try) and any(map(leaves_finally, node.finalbody)):
            yield node.lineno
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func).rpartition(".")[2] == "suppress":
                yield node.lineno


def does_nothing(statement):
    is_constant = isinstance(statement, ast.Expr) and isinstance(
        statement.value, ast.Constant
    )
    return is_constant or isinstance(statement, ast.Pass | ast.Continue | ast.Break)


def leaves_finally(statement):
    """Return whether a statement in `finally` drops the exception."""
    return any(
        isinstance(node, ast.Return | ast.Break | ast.Continue)
        for node in ast.walk(statement)
    )


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_exception_is_swallowed(package):
    files = sorted(folder(package).rglob("*.py"))
    assert files
    lines = [
        f"{package}/{path.name}:{line}"
        for path in files
        for line in find_swallowed(path.read_text(encoding="utf-8"))
    ]
    assert lines == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept:\n    x = 1",
        "try:\n    f()\nexcept Exception:\n    log()",
        "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    print(e)",
        "try:\n    f()\nexcept builtins.Exception:\n    if x:\n        raise",
        "try:\n    f()\nexcept KeyError:\n    pass",
        "while x:\n    try:\n        f()\n    except KeyError:\n        continue",
        "try:\n    f()\nexcept* ValueError:\n    ...",
        "with contextlib.suppress(KeyError):\n    f()",
        "def g():\n    try:\n        f()\n    finally:\n        return 1",
    ],
)
def test_an_exception_that_is_lost_is_noticed(source):
    assert len(list(find_swallowed(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept Exception:\n    undo()\n    raise",
        "try:\n    f()\nexcept BaseException as e:\n    raise ValueError from e",
        "try:\n    f()\nexcept KeyError:\n    x = None",
        "try:\n    f()\nfinally:\n    close()",
    ],
)
def test_an_exception_that_is_handled_is_accepted(source):
    assert list(find_swallowed(source)) == []


# A run changes nothing in torch.


def run_of_torch(torch, wrap):
    """Train a model; return all objects on which a hook could be registered."""
    nn, optim = torch.nn, torch.optim
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = optim.Adam(model.parameters())
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clip, stepper = wrap(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(5, 3)).square().sum()).backward()
        scaler.unscale_(optimizer)
        clip()
        scaler.step(optimizer)
        scaler.update()
        stepper.step()
        scheduler.step()
        optimizer.state_dict()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [*model.modules(), optimizer, scaler, *model.parameters(), *gradients]


def use_everything(model, optimizer):
    """Use every clipper in the run, and all of its methods."""
    import autoclip_torch

    arguments = {"NormClip": {"max_norm": 0.1}, "ValueClip": {"clip_value": 0.1}}
    names = ["QuantileClip", "StandardClip", "AGC", "ZClip", "AdaGC", *arguments]
    clippers = [
        getattr(autoclip_torch, name)(model, scope=scope, **arguments.get(name, {}))
        for name in names
        for scope in ("parameter", "unit", "global")
    ]
    clippers[0].add_param_group({"params": [model[0].weight.detach().clone()]})

    def clip():
        for clipper in clippers:
            clipper.step()
            clipper.threshold()
            clipper.metrics(per_row=True)
            clipper.load_state_dict(clipper.state_dict())

    return clip, autoclip_torch.QuantileClip.as_optimizer(optimizer)


def attributes(torch, objects):
    """Return the identity of each attribute of torch's classes and modules.

    The attributes of the given objects count by name only.
    """
    optim, nn = torch.optim, torch.nn
    owners = [
        *(torch.Tensor, nn.Parameter, nn.Module, nn.Linear, nn.LayerNorm),
        *(optim.Optimizer, optim.Adam, optim.lr_scheduler.StepLR),
        *(optim.lr_scheduler.LRScheduler, torch.amp.GradScaler),
        *(nn.utils, nn.utils.clip_grad, nn.functional, torch.autograd),
    ]
    identities = {
        f"{owner.__name__}.{name}": id(value)
        for owner in owners
        for name, value in vars(owner).items()
    }
    for place, item in enumerate(objects):
        kind = f"{place} {type(item).__name__}"
        identities[kind] = id(type(item))
        identities |= {f"{kind}.{name}": 0 for name in getattr(item, "__dict__", {})}
        for hooks in ("_forward_hooks", "_backward_hooks", "_optimizer_step_pre_hooks"):
            identities[f"{kind}.{hooks}()"] = len(getattr(item, hooks, None) or ())
    return identities


def probe(*patches):
    """Print the attributes that a run with our clippers changed, then with patches.

    It runs in a new interpreter. A run without clippers comes first, because torch
    patches its optimizers when they are constructed. The patches are statements; they
    show that a change is noticed.
    """
    import torch

    class NoOptimizer:
        def step(self):
            """Stand in for a second optimizer."""

    def use_nothing(model, optimizer):
        return lambda: None, NoOptimizer()

    def print_changes():
        after = attributes(torch, objects)
        changed = {name for name, value in before.items() if after.get(name) != value}
        print(*sorted(changed | (after.keys() - before.keys())), sep="\n")

    run_of_torch(torch, use_nothing)
    before = attributes(torch, run_of_torch(torch, use_nothing))
    objects = run_of_torch(torch, use_everything)
    print_changes()
    print(PATCHED)
    for patch in patches:
        exec(patch, {"torch": torch, "model": objects[0]})
    print_changes()


PATCHED = "-- patched --"
PATCHES = {
    "torch.Tensor.clip_ = torch.Tensor.mul_": "Tensor.clip_",
    "torch.optim.Adam.step = lambda self: None": "Adam.step",
    "model.clipper = 3": "0 Sequential.clipper",
    "model.register_forward_hook(len)": "0 Sequential._forward_hooks()",
    "torch.nn.utils.clip_grad_norm_ = None": "torch.nn.utils.clip_grad_norm_",
}


@pytest.fixture(scope="module")
def changes():
    """The changed attributes after a run, and after the patches."""
    run = subprocess.run(
        [sys.executable, "-c", f"import {__name__} as t; t.probe(*t.PATCHES)"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return [part.strip().splitlines() for part in run.stdout.split(PATCHED)]


@pytest.mark.needs("torch")
def test_torch_is_after_a_run_as_it_was_before(changes):
    """No attribute is new or different, no hook is left, gradients are plain."""
    assert changes[0] == []


@pytest.mark.needs("torch")
def test_a_patch_is_noticed(changes):
    assert changes[1] == sorted(PATCHES.values())
