"""lm-evaluation-harness: how it comes to know our models, and what it may tell them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

import fairseq_lite_autoload as hook
from fairseq_lite import lm_eval_hook
from fairseq_lite.errors import ConfigError, MissingDependency
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS
from fairseq_lite.hub.lm_eval_args import GenerationArgs, ModelArgs
from fairseq_lite_cli import lm_eval as command
from tests.helpers.commands import REPOSITORY

# -- how the harness comes to know them -----------------------------------------------------------


def test_torch_is_told_of_the_hook():
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    (value,) = re.findall(r'"torch\.backends"\]\nfairseq_lite = "(.*)"', text)
    assert EntryPoint("fairseq_lite", value, "torch.backends").load() is hook.autoload
    # Editable installations that were made before have another one.
    old = EntryPoint("fairseq_lite", "fairseq_lite.lm_eval_hook:autoload", "torch.backends")
    assert old.load() is lm_eval_hook.autoload


@pytest.mark.parametrize("name", ["fairseq_lite_autoload", "fairseq_lite.lm_eval_hook"])
def test_the_hook_imports_nothing_where_there_is_no_harness(name):
    code = (
        f"import sys, {name} as hook; hook.autoload();"
        "print(sorted({'torch', 'numpy', 'lm_eval'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.stdout == "[]\n", done.stderr


AUTOLOADS = [hook.autoload, lm_eval_hook.autoload]


def _pretend(monkeypatch, **modules):
    """A harness of some kind instead of the one that may be installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


@pytest.mark.parametrize("autoload", AUTOLOADS)
def test_the_hook_never_fails(autoload, monkeypatch):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("half imported")

    with monkeypatch.context() as patched:
        _pretend(patched, lm_eval=Broken("lm_eval"))
        autoload()
    old = {"lm_eval": ModuleType("lm_eval"), "lm_eval__api": ModuleType("lm_eval.api")}
    old["lm_eval__api__registry"] = ModuleType("lm_eval.api.registry")  # of 0.4.9
    for modules in ({"lm_eval": ModuleType("lm_eval")}, old):
        with monkeypatch.context() as patched:
            _pretend(patched, **modules)
            autoload()
            with pytest.raises(ImportError):
                lm_eval_hook.register()
            with pytest.raises(MissingDependency, match=r"pip install 'fairseq-lite\[lm-eval\]'"):
                command.main([])


@pytest.mark.parametrize("autoload", AUTOLOADS)
def test_the_hook_leaves_the_harness_its_own_models(autoload):
    registry = pytest.importorskip("lm_eval.api.registry", reason="lm-eval is not installed")
    autoload()
    autoload()
    assert {lm_eval_hook.NAME, "hf", "dummy"} <= set(registry.model_registry)


def test_a_harness_that_is_not_installed(monkeypatch):
    _pretend(monkeypatch, lm_eval=None)
    monkeypatch.delitem(sys.modules, "fairseq_lite.hub.lm_eval", raising=False)
    hook.autoload()
    with pytest.raises(MissingDependency, match=r"pip install 'fairseq-lite\[lm-eval\]'"):
        import fairseq_lite.hub.lm_eval  # noqa: F401


# -- what it may say ------------------------------------------------------------------------------


def test_model_args():
    assert ModelArgs.of({"path": "a.pt", "bf16": True, "batch_size": 1}).bf16
    for text in ('{"dropout": 0}', {"dropout": 0}):
        assert ModelArgs.of({"path": "a", "overrides": text}).model_overrides() == {"dropout": 0}
    assert ModelArgs.of({"path": "a"}).model_overrides() is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "path=CHECKPOINT is missing"),
        ({"pretrained": "gpt2", "path": "a"}, "pretrained: not known; expected path, device"),
        ({"path": "a", "trust_remote_code": True}, "trust_remote_code: not known"),
        ({"path": 7}, "path=7: expected str"),
        ({"path": "a", "bf16": "yes"}, "bf16='yes': expected bool"),
        ({"path": "a", "max_length": True}, "max_length=True: expected int"),
    ],
)
def test_model_args_that_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        ModelArgs.of(given)


@pytest.mark.parametrize("text", ["dropout", "[1]", "{dropout: 0}"])
def test_overrides_are_an_object(text):
    with pytest.raises(ConfigError, match="expected a JSON object; from a command line"):
        ModelArgs.of({"path": "a", "overrides": text}).model_overrides()


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 100),
        ({"batch_size": "8"}, 800),
        ({"batch_size": "auto"}, DEFAULT_MAX_TOKENS),
        ({"batch_size": "auto:4"}, DEFAULT_MAX_TOKENS),
        ({"batch_size": "auto", "max_batch_size": 16}, 1600),
        ({"max_tokens": 512, "batch_size": 1}, 512),
        ({"max_tokens": 512, "batch_size": 2}, "max_tokens=512 and batch_size=2: give one"),
        ({"max_tokens": 512, "batch_size": "auto"}, "give one"),
        ({"batch_size": "many"}, "batch_size='many': expected a number, or auto"),
        ({"batch_size": -1}, "batch_size=-1: expected a number"),
        ({"batch_size": 0}, "0 tokens in a batch: expected 1 or more"),
        ({"max_batch_size": 4}, "of use with batch_size=auto only"),
    ],
)
def test_the_size_of_batches(given, tokens):
    args = ModelArgs.of({"path": "a", **given})
    if isinstance(tokens, int):
        assert args.tokens_in_batch(100) == tokens
    else:
        with pytest.raises(ConfigError, match=tokens):
            args.tokens_in_batch(100)


@pytest.mark.parametrize(
    ("given", "until", "longest", "options"),
    [
        ({}, (), 256, {"beam": 1}),
        ({"until": "\n"}, ("\n",), 256, {"beam": 1}),
        ({"until": ["\n", None, "Q:"], "max_new_tokens": 8}, ("\n", "Q:"), 8, {"beam": 1}),
        ({"do_sample": False, "temperature": 0.0, "num_beams": 4}, (), 256, {"beam": 4}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, (), 256, {"beam": 1}),
        ({"temperature": 0.5}, (), 256, {"beam": 1, "sampling": True, "temperature": 0.5}),
        ({"do_sample": True}, (), 256, {"beam": 1, "sampling": True, "temperature": 1.0}),
        (
            {"do_sample": True, "top_k": 5, "top_p": 1.0, "max_gen_toks": 3},
            *((), 3, {"beam": 1, "sampling": True, "temperature": 1.0, "sampling_topk": 5}),
        ),
        (
            {"do_sample": True, "top_k": 0, "top_p": 0.9},
            *((), 256, {"beam": 1, "sampling": True, "temperature": 1.0, "sampling_topp": 0.9}),
        ),
    ],
)
def test_generation_args(given, until, longest, options):
    found = GenerationArgs.of(given, 256)
    assert (found.until, found.max_new_tokens, dict(found.options)) == (until, longest, options)
    assert found in {found}  # requests that are generated alike are found by it


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length_penalty": 1.0}, "length_penalty: not known; expected until, max_gen_toks"),
        ({"max_gen_toks": 3, "max_tokens": 4}, "give one of them"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: expected 1 or more"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 with do_sample"),
        ({"do_sample": True, "num_beams": 2}, "num_beams=2 with do_sample"),
        ({"do_sample": True, "top_k": 5, "top_p": 0.5}, "top_k=5 and top_p=0.5: give one"),
    ],
)
def test_generation_args_that_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        GenerationArgs.of(given, 256)
