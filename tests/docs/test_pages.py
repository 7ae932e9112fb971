"""The pages of the site are true: code runs; pictures and public names exist."""

import importlib.util
import pathlib
import re
import textwrap

import numpy as np
import pytest

import autoclip_core
from autoclip_core import Cap, Quantile, Warmup, ZScore, replay
from autoclip_core.policy import NAMESPACE_NAMES

DOCS = pathlib.Path(__file__).parents[2] / "docs"
# Other tests run the code of these, except trainers.md, which shows lines of engines.
ELSEWHERE = {"jax.md", "keras.md", "many_gpus.md", "trainers.md", "watching.md"}
NEEDED = {"jax_checkpoints.md": ["stacks"]}  # besides a framework
PAGES = {
    page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md"))
}
FENCE = re.compile(
    r'^(?P<indent> *)```python(?: title="(?P<title>\w+)")?\n(?P<code>.*?)^ *```$',
    re.DOTALL | re.MULTILINE,
)


def fences(text):
    """Return title and code of each block."""
    return [(f["title"], textwrap.dedent(f["code"])) for f in FENCE.finditer(text)]


def blocks(text):
    """Return the code to run, block by block, without another library's ("before")."""
    return [code for title, code in fences(text) if title != "before"]


def by_framework(sources):
    """Return the blocks of each framework.

    A block that imports no framework belongs to the framework of the block above. The
    first blocks, of the core, belong to all frameworks.
    """
    grouped, framework = {"core": []}, "core"
    for source in sources:
        adapter = re.search(r"\bautoclip_(torch|tf|jax)\b", source)
        framework = adapter[1] if adapter else framework
        grouped.setdefault(framework, list(grouped["core"])).append(source)
    return grouped


def runs():
    """Yield a case for each page and framework that has code."""
    for page, text in PAGES.items():
        if page not in ELSEWHERE:
            for framework, sources in by_framework(blocks(text)).items():
                mark = pytest.mark.needs(framework, *NEEDED.get(page, ()))
                if sources:
                    case = (page, sources)
                    yield pytest.param(*case, id=f"{page}-{framework}", marks=mark)


@pytest.mark.parametrize(("page", "sources"), list(runs()))
def test_the_code_runs(page, sources, tmp_path, monkeypatch):
    # In order and in one namespace, as a reader runs it. It may write files.
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for source in sources:
        exec(compile(source, page, "exec"), namespace)


def test_there_is_code_for_every_framework():
    assert {"core", "torch", "tf", "jax"} <= set(
        by_framework(blocks(PAGES["index.md"]))
    )
    assert len(blocks(PAGES["migration.md"])) >= 11


START = """
import torch
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 4)).sum().backward()
"""


@pytest.mark.needs("torch")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process
def test_a_distributed_checkpoint_has_the_clipper(tmp_path, monkeypatch):
    import torch

    from autoclip_torch import QuantileClip

    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = QuantileClip.as_optimizer(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    names = {"model": model, "optimizer": optimizer, "path": tmp_path}
    [code] = blocks(PAGES["many_gpus.md"])
    save, load = code.split("state = parts()")
    exec(compile(save, "many_gpus.md", "exec"), names)
    optimizer.clipper.reset()
    exec(compile(f"state = parts(){load}", "many_gpus.md", "exec"), names)
    assert optimizer.clipper.metrics()["clip/steps"] == 1


# timm imports torchvision, but this file of it does not.
TIMM = """
import importlib.util, pathlib, types
folder = importlib.util.find_spec("timm").submodule_search_locations[0]
path = pathlib.Path(folder, "utils", "agc.py")
spec = importlib.util.spec_from_file_location("timm_agc", path)
utils = importlib.util.module_from_spec(spec)
spec.loader.exec_module(utils)
timm = types.SimpleNamespace(utils=utils)
"""

ADAGC = """
import pytorch_optimizer
"""


def needs(id, *names, start=START):
    """A section whose block "before" runs after `start`."""
    return pytest.param(id, start, id=id, marks=pytest.mark.needs(*names))


@pytest.mark.parametrize(
    ("section", "start"),
    [
        needs("`clip_grad_norm_`", "torch"),
        needs("`autoclip` from PyPI", "torch", "peers"),
        needs("smartclip", "torch", "peers"),
        needs("zclip", "torch", "peers"),
        needs("timm and other AGC", "torch", "peers", start=START + TIMM),
        needs("`pytorch_optimizer.AdaGC`", "torch", "peers", start=START + ADAGC),
        needs("Keras `clipnorm`", "tf", start="import keras"),
        needs("optax", "jax", start="import optax"),
    ],
)
def test_the_code_of_another_library_runs_too(section, start):
    text = re.split(r"^## ", PAGES["migration.md"], flags=re.MULTILINE)
    parts = [part for part in text if part.startswith(section)]
    before = [code for title, code in fences(parts[0]) if title == "before"]
    assert before
    for code in before:
        exec(compile(start + "\n" + code, section, "exec"), {"__name__": "page"})


def test_a_block_of_another_library_is_not_run():
    text = '```python title="before"\nimport zclip\n```\n\n```python\nx = 1\n```\n'
    assert blocks(text) == ["x = 1\n"]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_its_links_lead_to_files(page):
    # The build of the site also checks anchors. This test needs none of its packages.
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[page])
    folder = (DOCS / page).parent
    assert [link for link in links if not (folder / link).is_file()] == []


def test_the_pictures_of_the_policies_are_shown_and_small():
    pages = [text for page, text in PAGES.items() if page.startswith("policies/")]
    shown = {name for text in pages for name in re.findall(r"\((\w+\.png)\)", text)}
    drawn = {picture.name for picture in (DOCS / "policies").glob("*.png")}
    assert shown == drawn
    for name in drawn:
        assert (DOCS / "policies" / name).stat().st_size < 60_000


def test_the_page_lists_the_names_a_policy_may_use():
    [listed] = re.findall(
        r"these names alone: (.*?)\. A", PAGES["extend.md"], re.DOTALL
    )
    assert tuple(re.findall(r"`(\w+)`", listed)) == NAMESPACE_NAMES


@pytest.mark.needs("jax")
def test_the_policy_of_the_page_runs_in_jax():
    import jax
    import jax.numpy as jnp

    from autoclip_jax import clip_by_policy

    namespace = {"__name__": "page"}
    exec(blocks(PAGES["extend.md"])[0], namespace)
    tx = clip_by_policy(namespace["GeometricMean"]())
    state = tx.init(jnp.zeros(1))
    update = jax.jit(tx.update)
    for norm in [1.0, 1.0, 100.0]:
        updates, state = update(jnp.full(1, norm), state)
    assert jnp.allclose(updates, 2.0)  # twice the mean: clipped


def is_policy(value):
    """Return whether a public name of the core is a policy."""
    return isinstance(value, type) and hasattr(value, "limit")


@pytest.mark.parametrize(
    "name",
    [n for n, v in vars(autoclip_core).items() if is_policy(v) and n != "Policy"],
)
def test_every_policy_has_a_page_with_formula_source_and_picture(name):
    heading = rf"^#+ {name}\b"
    matches = [
        text
        for page, text in PAGES.items()
        if page.startswith("policies/") and re.search(heading, text, re.MULTILINE)
    ]
    assert len(matches) == 1
    for part in (
        r"```text\nC? ?.*[TR] =",
        r"\[Arguments[ \w]*\]\(\.\./reference/core",
        r"\.png\)",
        "## Source",
    ):
        assert re.search(part, matches[0], re.MULTILINE | re.DOTALL), part


@pytest.mark.parametrize("package", ["core", "torch", "tf", "jax"])
def test_the_reference_lists_every_public_name_once(package):
    spec = importlib.util.find_spec(f"autoclip_{package}")
    source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
    public = set(re.findall(r" import \w+ as ([a-zA-Z]\w*)", source))
    public -= {"optimizers"}
    page = PAGES[f"reference/{package}.md"]
    paths = re.findall(rf"^::: autoclip_{package}\.([\w.]+)$", page, re.M)
    assert len(paths) == len(set(paths))
    modules = ("optim.", "lightning.", "transformers.")  # they have names of their own
    listed = [p.split(".")[-1] for p in paths if not p.startswith(modules)]
    assert public
    assert {name: listed.count(name) for name in public} == dict.fromkeys(public, 1)
    # A path that names a module, too, would list the internals of the module.
    files = [pathlib.Path(spec.origin).parent.joinpath(*p.split(".")) for p in paths]
    assert not [file for file in files if file.with_suffix(".py").exists()]


def test_what_the_guide_says_of_the_policies_is_in_the_one_table():
    page = PAGES["controller.md"]
    rows = dict(re.findall(r"^\| `(\S+)`.*? \|(.*)$", page, re.MULTILINE))
    assert re.search(r" 1\.6 \|.* 7\.1 \|", rows["ZScore()"])
    assert re.search(r" 42\.2 \|.* 90\.1 \|", rows["EmaRatio()"])
    assert "| 129 | 950 |" in rows["Quantile(0.9)"]
    assert "| 44 | 473 |" in rows["StreamingQuantile(0.9)"]


def test_percentile_5_of_bitsandbytes_is_that_entry_of_the_last_100_norms():
    norms = np.exp(np.random.default_rng(0).standard_normal(300)).astype(np.float32)
    policy = Quantile(5 / 99, history_length=100, include_current=True)
    expected = [np.sort(norms[end - 100 : end])[5] for end in range(100, 301)]
    np.testing.assert_allclose(replay(norms, policy).thresholds[99:], expected, 1e-6)


def test_zclip_with_its_cap_is_the_mapped_policy():
    norms = np.exp(0.3 * np.random.default_rng(1).standard_normal(400))
    norms[[60, 200]] = 9.0
    policy = Cap(ZScore(2.5, record="applied"), max_norm=1.5)
    done = replay(norms, policy)
    after = done.norms * done.scales
    mean, var, alpha = norms[:25].mean(), norms[:25].var(), 0.97
    np.testing.assert_allclose(after[:25], np.minimum(norms[:25], 1.5), 1e-5)
    for norm, ours in zip(norms[25:], after[25:], strict=True):
        z = (norm - mean) / np.sqrt(var)
        if z > 2.5:
            norm = mean + 2.5 * np.sqrt(var) / (z / 2.5)
        np.testing.assert_allclose(ours, min(norm, 1.5), 1e-4)
        mean = alpha * mean + (1 - alpha) * norm
        var = alpha * var + (1 - alpha) * (norm - mean) ** 2


def test_100_warm_up_steps_of_smartclip_are_99():
    norms = np.linspace(1.0, 2.0, 150)
    policy = Quantile(0.95, history_length=1024, include_current=True)
    done = replay(norms, Warmup(policy, steps=99))
    assert np.flatnonzero(done.clipped)[0] == 99  # their 100th step
    np.testing.assert_allclose(done.thresholds[99], np.quantile(norms[:100], 0.95))
