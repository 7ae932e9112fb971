"""`read_norms` on what training scripts print; one rule reads them all.

Each example has the format of the project's source at the version that is named.
"""

import tracemalloc

import pytest

from autoclip_core import read_norms
from autoclip_core.cli.main import main
from autoclip_core.files.formats.log_rows import read_log_rows

TITAN = (
    "[rank0]:[titan] 2025-08-01 10:00:0{i},123 - root - INFO - \x1b[31mstep: {s:2}  "
    "\x1b[32mloss: 12.25740  \x1b[38;2;180;60;0mgrad_norm: {n:7.4f}  "
    "\x1b[38;2;54;234;195mmemory:  9.53GiB(10.03%)  \x1b[34mtps: 1,234  "
    "\x1b[36mtflops: 7.10  \x1b[35mmfu: 2.00%\x1b[39m\n"
)

LOGS = {
    # megatron/training/training.py, training_log, core_v0.13
    "Megatron-LM": " [2025-08-01 10:00:0{i}] iteration {s:8d}/     100 | consumed "
    "samples:          320 | elapsed time per iteration (ms): 87.0 | learning rate: "
    "1.638000E-08 | global batch size:     2 | lm loss: 1.086954E+01 | loss scale: "
    "4294967296.0 | grad norm: {n:.3f} | num zeros: 0 | params norm: 99.100 | number "
    "of skipped iterations:   0 | number of nan iterations:   0 |\n",
    # train.py at commit 3adf61e prints no norm; its forks add it in this place
    "nanoGPT": "iter {s}: loss 3.2000, grad_norm {n:.4f}, time 101.00ms, mfu 20.00%\n",
    # train_gpt2.py of build-nanogpt
    "build-nanogpt": "step {s:5d} | loss: 3.2 | lr 6.0000e-04 | norm: {n:.4f} | "
    "dt: 9ms\n",
    # train_gpt.py, print0 of 2025, with the norm that its forks add
    "modded-nanogpt": "step:{s}/5100 train_loss:3.28 grad_norm:{n:.4f} "
    "train_time:243ms step_avg:2.43ms\n",
    # torchtitan/components/metrics.py, MetricsProcessor.log, v0.2
    "torchtitan": TITAN,
    # torchtune/training/metric_logging.py, DiskLogger.log_dict, v0.6
    "torchtune": "Step {s} | loss:1.5 lr:2e-05 tokens_per_second_per_gpu:11 "
    "grad_norm:{n} \n",
    # nanotron/logging: LoggerWriter.add_scalars_from_list, v0.4
    "nanotron": "08/01/2025 10:00:00 [INFO|DP=0|PP=0|TP=0]: iteration: {s} / 1000 | "
    "consumed_tokens: 1.05M | elapsed_time_per_iteration_ms: 1.2K | lm_loss: 10.5 | "
    "lr: 0.0001 | model_tflops_per_gpu: 7.1 | grad_norm: {n} | \n",
    # olmo/train.py, log_metrics_to_console, v0.6
    "OLMo": "2025-08-01 10:00:0{i}.000 host:0 olmo.train:966 INFO "
    "[step={s}/739328,epoch=0]\n    train/CrossEntropyLoss=11.21\n    "
    "train/Perplexity=73,500\n    optim/total_grad_norm={n}\n    "
    "System/Peak GPU Memory (MB)=9,000\n",
    # composer/loggers/console_logger.py, v0.30, with OptimizerMonitor
    "Composer": "[batch={s}/50]:\n\t Train time/batch: 3\n"
    "\t Train l2_norm/grad/global: {n:.4f}\n"
    "\t Train l2_norm/grad/model.layernorm.weight: 0.1000\n"
    "\t Train l2_norm/param/global: 51.1981\n\t Train l2_norm/moment/global: 0.0001\n"
    "\t Train loss/train/total: 2.0000\n",
    # llmc train_gpt2.cu, main
    "llm.c": "step {s:4d}/19560 | loss 11.009529 (+nanz)| norm {n:6.4f} (+nanz)| lr "
    "9.09e-07 | 1234.00 ms | 40.1% bf16 MFU | 425000 tok/s\n",
    # fairseq/logging/make_progress_bar.py, v0.12.2: --log-format json, and simple
    "fairseq json": "2025-08-01 10:00:0{i} | INFO | train_inner | "
    '{{"epoch": 3, "update": 2.174, "loss": "9.368", "ppl": "460.11", '
    '"wpb": "28201.6", "num_updates": "{s}", "lr": "3.75e-05", "gnorm": "{n}", '
    '"clip": "0", "train_wall": "93"}}\n',
    "fairseq simple": "2025-08-01 10:00:0{i} | INFO | train_inner | epoch 003:    "
    "100 / 138 loss=9.368, nll_loss=8.846, ppl=460.11, num_updates={s}, lr=3.75e-05, "
    "gnorm={n}, clip=0, loss_scale=4, train_wall=93\n",
    # verl/utils/logger, concat_dict_to_str, v0.4
    "verl": "step:{s} - actor/entropy:1.459 - actor/grad_norm:{n} - actor/lr:1e-06\n",
    # a dict of Python, with tensors
    "printed dict": "step {s} {{'loss': tensor(2.5), 'grad_norm': tensor({n}, "
    "device='cuda:0'), 'lr': 1e-4}}\n",
    "words": "At step {s} the gradient norm is {n}.\n",
}

# Lines of real runs, from public threads and files.
LOGS |= {
    # github.com/epfLLM/Megatron-LLM/issues/11
    "Megatron-LLM": " iteration {s:8d}/  250000 | consumed samples:       124928 | "
    "elapsed time per iteration (ms): 86545.2 | learning rate: 9.150E-06 | global "
    "batch size:  1024 | lm loss: 2.504220E+00 | loss scale: 1.0 | grad norm: {n:.3f} "
    "| number of skipped iterations:   0 | number of nan iterations:   0 |\n",
    # github.com/bigscience-workshop/Megatron-DeepSpeed, a log of BLOOM
    "Megatron-DeepSpeed": "[default7]: iteration    {s}/  115311 | consumed samples:  "
    "   47770544 | consumed tokens:  97834074112 | elapsed time per iteration (s): "
    "105.90 | lm loss: 2.220424E+00 | grad norm: {n:.3f} | num zeros: 0.0 |\n",
    # github.com/pytorch/torchtitan/pull/2389: eight ranks print the same step
    "torchtitan, two ranks": 2 * "[titan] 2026-02-24 19:46:17,508 - root - INFO - step:"
    "  {s}  loss:  7.62585  grad_norm: {n:7.4f}  memory: 66.91GiB(37.51%)  tps: 10,050"
    "  tflops: 314.71  mfu: 13.99%\n",
    # github.com/allenai/OLMo/issues/692
    "OLMo 0.4": "2024-08-06 09:59:26.181 intern-studio-160750:0  olmo.train:908  INFO "
    "   [step={s}/739328,epoch=0]\n    optim/total_grad_norm={n}\n    "
    "train/CrossEntropyLoss=1.7872662283480167e-06\n    train/Perplexity=195,153\n",
    # github.com/facebookresearch/fairseq/issues/940, 2201 and 1955
    "fairseq 0.8": "| epoch 001:    450 / 1891 loss=11.521, nll_loss=10.881, "
    "ppl=1886.05, wps=52922, ups=0.5, num_updates={s}, lr=8.90889e-05, gnorm={n}, "
    "clip=0%, oom=0, loss_scale=2.000, wall=882, train_wall=756\n"
    "| epoch 001 | valid on 'valid' subset | valid_loss 8.1 | num_updates 600\n",
    "fairseq tqdm": 2 * "81989/88743 [10:51:46<53:53,  2.09it/s, loss=5.72711e-14, "
    "wps=8.90638e+19, num_updates={s}, lr=0.00020708, gnorm={n}, clip=0, wall=166]\r",
    # a log of llm.c in a public repository; z-scores are negative too
    "llm.c with z-scores": "| gelu_fusion           | 1   |\nstep {s}/19560 | loss "
    "3.252871 (-1.21z)| norm {n:.4f} (+0.02z)| lr 0.00e+00 | 4367.96 ms | -100.0% bf16 "
    "MFU | 124285 tok/s\n",
    # github.com/espnet/espnet/pull/5147
    "ESPnet": "2023-04-22 13:52:12,339 (trainer:732) INFO: step {s}: iter_time=0.070, "
    "si_snr_loss=-17.036, backward_time=0.294, grad_norm={n:.3f}, clip=100.000, "
    "loss_scale=1.000, optim0_lr0=3.765e-04, train_time=1.137\n",
    # MaxText's line with the norm that a fork of it adds
    "MaxText": "completed step: {s}, seconds: 20.585, TFLOP/s/device: 97.566, "
    "Tokens/s/device: 1989.820, total_weights: 31457280, loss: 12.409, lr: 3.000e-04, "
    "grad_norm: {n:.3e}\n",
    # github.com/NVIDIA-NeMo/Automodel/pull/3473
    "NeMo Automodel": "2026-08-10 15:48:59 | INFO | root | step {s} | epoch 0 | loss "
    "0.6407 | grad_norm {n:.4f} | lr 1.00e-05 | mem 31.55 GiB | tps 6574.51(821.81/gpu)"
    " | num_label_tokens 26779\n",
    # github.com/karpathy/nanochat/pull/242
    "nanochat": "step {s:05d}/05000 (0.20%) | loss: 10.812345 | grad_norm: {n:.5f} | "
    "lrm: 1.00 | dt: 350.11ms | tok/sec: 1,497,000 | mfu: 45.1 | total time: 0.00m\n",
    # github.com/ml-explore/mlx-lm/pull/326
    "MLX": "[GRAD-DBG] it={s} micro=7/10 loss=3.2387 toks=108 grad_l2={n:.3e} "
    "grad_absmax=1.424e+00 accum_l2=7.331e+01 accum_absmax=8.643e+00\n",
    # a trainer that prints its dict with tensors
    "dict behind a logger": "2026-08-02 08:40:57 | INFO | pretrain_trainer.py:124 | "
    "{{'duration': '444.656min', 'step_size': 100, 'step_loss': 4.024149417877197, "
    "'global_step': {s}, 'grad_norm': tensor({n}), 'num_classes': 16000}}\n",
    # github.com/DLR-RM/stable-baselines3, a logger's table with a callback's norm
    "Stable-Baselines3": "step {s}\n----------------------------\n| train/       |   "
    "        |\n|    grad_norm | {n:<9} |\n|    loss      | 3.7       |\n"
    "----------------------------\n",
    # github.com/inclusionAI/AReaL, a table of its tracker
    "AReaL": "step {s}\n╭──┬─╮\n│ actor/grad_norm │ {n:.4e} │\n│ actor/lr │ 1e-06 │\n",
    # github.com/google-research/big_vision, its writer of metrics
    "big_vision": "step {s}\nI0301 utils.py:3] \x1b[35m[7]\x1b[0m l2_params = 77.5\n"
    "I0301 utils.py:3] \x1b[35m[7]\x1b[0m l2_grads = {n}\n",
    # github.com/Modalities/modalities: the mean of an interval, and the last norm
    "Modalities": "step: {s} | train loss avg: 3.5 | grad norm avg: 7.25 | grad norm "
    "last: {n} | lr mean: 1e-4\n",
    # github.com/modelscope/ms-swift
    "ms-swift": "{{'loss': 0.7, 'grad_norm': {n}, 'lr': 2e-06, 'epoch': 0.3, "
    "'global_step/max_steps': '{s}/900', 'train_speed(iter/s)': 0.06}}\n",
    # github.com/PrimeIntellect-ai/prime-rl
    "prime-rl": "SUCCESS Step {s} | Time: 3.50s | Loss: 0.7 | Mismatch KL: 0.02 | Grad."
    " Norm: {n:.4f} | LR: 2.00e-06 | Peak Mem.: 30.1 GiB\n",
    "a norm before and after clipping": "step {s}\npre-clip grad norm: {n}\n"
    "post-clip grad norm: 0.9994\n",
}

# A step in brackets, without a name.
LOGS |= {
    # clu/metric_writers/logging_writer.py, v0.0.12; T5X has it too
    "CLU": "I0801 10:00:0{i}.123456 139872 logging_writer.py:48] [{s}] grad_norm={n}, "
    "loss=2.3, learning_rate=0.01\n",
    # mmengine/runner/log_processor.py, v0.10
    "MMEngine": "2025/08/01 10:00:0{i} - mmengine - INFO - Epoch(train)  [1]"
    "[  {s}/1000]  base_lr: 1.0000e-04  memory: 12345  grad_norm: {n}  loss: 12.3\n",
}

NORMS, STEPS = [1.5, 2.25, 12.125], [10, 20, 30]
NOISE = (
    "WARNING: using RMSNorm eps=1e-05, --clip-grad-norm 1.0, max_grad_norm: 1.0\n"
    "max gradient norm = 10, embedding weight norm 3.5\n"
    "layernorm 12 weight norm: 7.5 normalized 3 norm_type 2.0 norm 5%\n"
)


def write_log(tmp_path, form, norms=NORMS, newline="\n"):
    path = tmp_path / "run.log"
    lines = [
        form.format(i=i, s=s, n=n)
        for i, (s, n) in enumerate(zip(STEPS, norms, strict=True))
    ]
    text = NOISE + "".join(lines) + "Training is done.\n"
    path.write_bytes(text.replace("\n", newline).encode())
    return path


@pytest.mark.parametrize("project", LOGS)
def test_a_log_is_read(tmp_path, project):
    read = read_norms(write_log(tmp_path, LOGS[project]))
    assert read.norms.tolist() == pytest.approx(NORMS, rel=1e-3)
    assert (read.steps.tolist(), read.kind, read.empty) == (STEPS, "text log", 0)


def test_a_list_of_epoch_and_step_is_no_step(tmp_path):
    """DLLogger of NVIDIA's examples; the epoch was the step of all its lines."""
    form = 'DLLL {{"type": "LOG", "step": [0, {s}], "data": {{"grad_norm": {n}}}}}\n'
    read = read_norms(write_log(tmp_path, form))
    assert (read.norms.tolist(), read.steps.tolist()) == (NORMS, [0, 1, 2])


@pytest.mark.parametrize("project", ["Megatron-LM", "torchtitan", "torchtune", "OLMo"])
def test_norms_that_are_not_finite_are_read(tmp_path, project):
    read = read_norms(
        write_log(tmp_path, LOGS[project], [1.5, float("nan"), float("inf")])
    )
    assert list(map(str, read.norms)) == ["1.5", "nan", "inf"]


def test_hugging_face_dicts_are_read(tmp_path):
    """transformers 4 prints numbers, transformers 5 prints text."""
    path = tmp_path / "run.log"
    path.write_text(
        "{'loss': 2.5, 'grad_norm': 1.5, 'learning_rate': 5e-05, 'epoch': 0.1}\n"
        "{'loss': '2.5', 'grad_norm': '2.25', 'learning_rate': '5e-05'}\n"
        "{'eval_loss': '2.5', 'epoch': '1'}\n"
    )
    read = read_norms(path)
    assert (read.norms.tolist(), read.steps.tolist()) == ([1.5, 2.25], [0, 1])


@pytest.mark.parametrize(
    "form", ["'{}'", "{}", "tensor({})", "np.float32({})"], ids="{}".format
)
@pytest.mark.parametrize("others", ["", ", 'learning_rate': '5e-05', 'epoch': '0.1'"])
def test_dicts_with_equally_many_commas_are_no_table(tmp_path, form, others):
    path = tmp_path / "run.log"
    norms = [1.5, 2.25, 0.5]
    lines = ["{'loss': '2.5', 'grad_norm': " + form + others + "}\n"] * len(norms)
    path.write_text("".join(map(str.replace, lines, ["{}"] * 3, map(str, norms))))
    assert read_norms(path).norms.tolist() == norms


def test_large_numbers_have_units_or_commas(tmp_path):
    for form, text in (("nanotron", "1.23K"), ("OLMo", "1,230")):
        path = write_log(tmp_path, LOGS[form], [text] * 3)
        assert read_norms(path).norms.tolist() == [1230.0] * 3


def test_lines_that_end_in_a_carriage_return_are_lines(tmp_path):
    path = write_log(tmp_path, LOGS["llm.c"], newline="\r")
    assert read_norms(path).steps.tolist() == STEPS


def test_a_step_that_each_rank_prints_counts_once(tmp_path):
    form = LOGS["torchtitan"] + LOGS["torchtitan"].replace("rank0", "rank1")
    assert read_norms(write_log(tmp_path, form)).norms.tolist() == NORMS


def test_ranks_may_print_their_steps_one_after_the_other(tmp_path):
    path = tmp_path / "run.log"
    steps = [10, 20, 10, 20, 30, 30]
    path.write_text("".join(f"step {s} | grad norm: {s}.5\n" for s in steps))
    assert read_norms(path).norms.tolist() == [10.5, 20.5, 30.5]


@pytest.mark.parametrize(
    "form",
    [
        "Epoch {e} | Batch {b}/2 | loss 2.5 | grad_norm 0.43\n",
        "Batch {b}/2 | loss 2.{e}5 | grad_norm 0.43\n",
        "Epoch {e}:\nstep {b}\ngrad_norm 0.43\n",
        "ep {e} it {b} gnorm 0.43\n",
        "10:00:01 [{e}/9][{b}/2] grad_norm 0.43\n",
        "INFO - Epoch(train)  [{e}][ {b}/1000]  grad_norm: 0.43\n",
    ],
)
def test_lines_of_other_epochs_are_no_repetition(tmp_path, form):
    """A norm that is rounded, or clipped, is often the same in two epochs."""
    path = tmp_path / "run.log"
    path.write_text("".join(form.format(e=e, b=b) for e in range(9) for b in range(2)))
    read = read_norms(path)
    assert (len(read.norms), read.steps.tolist()) == (18, [0, 1] * 9)


def test_other_numbers_of_a_rank_are_a_repetition_in_neighbouring_lines(tmp_path):
    path = tmp_path / "run.log"
    form = "[rank{r}]: step {s} | tps 1{r} | grad norm: 1.5\n"
    path.write_text("".join(form.format(s=s, r=r) for s in STEPS for r in range(3)))
    assert read_norms(path).steps.tolist() == STEPS


@pytest.mark.needs("stacks")
@pytest.mark.parametrize("is_updated_first", [False, True])
def test_a_progress_bar_shows_each_norm_once(tmp_path, is_updated_first):
    """tqdm draws the bar again when it advances, with the numbers of the last step."""
    from tqdm import tqdm

    norms = [1.5, 1.25, 1.25, 1.25, 2.0, 0.5, 0.5]
    path = tmp_path / "run.log"
    with open(path, "w") as file:
        for _ in range(2):  # two epochs
            options = {"file": file, "mininterval": 0, "miniters": 1, "ascii": True}
            bar = tqdm(total=len(norms), **options)
            for norm in norms:
                if is_updated_first:
                    bar.update(1)
                bar.set_postfix(loss=2.5, grad_norm=norm)
                if not is_updated_first:
                    bar.update(1)
            bar.close()
    assert path.read_text().count("grad_norm") > 2 * len(norms)
    assert read_norms(path).norms.tolist() == 2 * norms


def test_norms_of_two_kinds_in_a_log_are_listed(tmp_path):
    path = tmp_path / "run.log"
    path.write_text("first grad norm: 1.5, second grad norm: 2.5, cos_sim: 0.5\n" * 3)
    with pytest.raises(ValueError, match=r"'first grad norm', 'second grad norm'"):
        read_norms(path)
    assert read_norms(path, "second grad norm").norms.tolist() == [2.5] * 3


def test_a_log_gives_any_number_that_is_named(tmp_path):
    path = write_log(tmp_path, LOGS["Megatron-LM"])
    assert read_norms(path, "params norm").norms.tolist() == [99.1] * 3
    assert read_norms(path, "lm loss").steps.tolist() == STEPS
    with pytest.raises(ValueError, match="no number stands behind"):
        read_norms(path, "x norm")


def test_a_log_without_a_gradient_norm_lists_its_names(tmp_path, capsys):
    path = tmp_path / "run.log"
    path.write_text("iter 0: loss 2.5, time 3ms\niter 1: loss 2.4, time 3ms\n" + NOISE)
    assert main(["suggest", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "it looks like a text log" in err
    assert "--column, with one of its names: " in err
    assert "'loss'" in err


def test_two_gradient_norms_in_a_log_are_listed(tmp_path):
    form = "step:{s} - actor/grad_norm:{n} - critic/grad_norm:1.5\n"
    path = write_log(tmp_path, form)
    with pytest.raises(ValueError, match=r"2 columns .*'actor/grad_norm', 'critic/"):
        read_norms(path)
    assert read_norms(path, "actor/grad_norm").norms.tolist() == NORMS


@pytest.mark.parametrize(
    ("line", "norms"),
    [
        ("grad_norm: 1.5 (clipped to 1.0)", {"grad_norm": "1.5"}),
        ("norm of the gradient: 1.5", {"norm of the gradient": "1.5"}),
        ("total_norm=1.5 grad_norm_after_clip=1", {"total_norm": "1.5"}),
        ("grad norm:\t1.5e-3", {"grad norm": "1.5e-3"}),
        ("Grad Norm: .5", {"Grad Norm": ".5"}),
        ("gnorm -> 3", {"gnorm": "3"}),
        ("grad_norm: None", {"grad_norm": "None"}),
        ("feature norm: 1.5, loss 2", {}),
        ("max gradient norm = 10", {}),
        ("max grad_norm: 10", {}),
        ("grad norm before clipping: 15.5", {"grad norm before clipping": "15.5"}),
        ("gradient norm clip: 1.0", {}),
        ("pre-clip grad norm: 15.5", {"pre-clip grad norm": "15.5"}),
        ("embedding grad norm: 1.5", {"embedding grad norm": "1.5"}),
        ("the current grad norm: 1.5", {"grad norm": "1.5"}),
        ("lr 1e-4 grad_norm 1.5", {"grad_norm": "1.5"}),
        ("grad-norm quartiles 2.6e-03 3.4e-03, threshold=1.5e-02", {}),
        ("norm took 1.5 ms", {}),
        ("grad_norm: 15ms", {}),
        ("gradient_accumulation_steps: 8", {}),
        ("saved grad_norm_1.5.png", {}),
        ('"grad_norm": [1.5, 2.5]', {}),
    ],
)
def test_only_a_gradient_norm_before_a_number_counts(line, norms):
    rows = list(read_log_rows([line])) or [{}]
    assert {k: v for k, v in rows[0].items() if "after" not in k} == norms


@pytest.mark.parametrize("kind", ["log", "jsonl", "csv"])
def test_a_large_file_is_read_in_little_memory(tmp_path, kind):
    """The file has 6 MB; the norms and steps of its lines need 0.1 MB."""
    count, filler = 6_000, "x" * 1000
    header, line = {
        "log": ("", f"step {{i}} | {filler} | grad norm: {{i}}.5 | params norm: 3\n"),
        "jsonl": (
            "",
            f'{{{{"step": {{i}}, "a": "{filler}", "grad_norm": {{i}}.5}}}}\n',
        ),
        "csv": ("step,a,grad_norm\n", f"{{i}},{filler},{{i}}.5\n"),
    }[kind]
    path = tmp_path / "large"
    with open(path, "w") as file:
        file.write(header)
        file.writelines(line.format(i=i) for i in range(count))
    read_norms(path)  # imports and caches
    tracemalloc.start()
    read = read_norms(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(read.norms), read.norms[-1]) == (count, count - 0.5)
    assert path.stat().st_size > 5_000_000
    assert peak < 1_500_000


def test_a_norm_takes_at_most_forty_bytes(tmp_path):
    """Both arrays have 16 bytes per step; a list of numbers would have 80."""
    path = tmp_path / "norms.csv"
    path.write_text("grad_norm\n" + "1.2345\n" * 100_000)
    tracemalloc.start()
    read_norms(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    "line",
    [
        "norm" + " " * 100_000 + "x",
        "a" * 100_000 + " norm: 1.5",
        "step" + " " * 100_000 + "grad_norm",
        "norm" + "(" * 100_000,
        "norm" * 20_000 + "x",
    ],
    ids=["spaces", "letters", "step", "brackets", "names"],
)
def test_a_long_line_is_read_without_trying_all_pairs_of_places(line):
    """Each takes milliseconds. A search that tries all pairs would take minutes."""
    assert len(list(read_log_rows([line]))) <= 1
