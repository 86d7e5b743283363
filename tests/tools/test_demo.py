"""The demo: its data, a run from end to end on a model of a few thousand weights, and what it says when it can't."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def docstrings():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import docstrings
    finally:
        sys.path.remove(str(EXAMPLES))
    return docstrings


@pytest.fixture(scope="module")
def examples(docstrings):
    return docstrings.collect()


def test_data_is_the_same_every_time(docstrings, examples):
    assert docstrings.collect() == examples
    assert docstrings.split(examples, seed=3) == docstrings.split(examples, seed=3)
    assert docstrings.split(examples, seed=3) != docstrings.split(examples, seed=4)


def test_data_is_worth_learning_from(docstrings, examples):
    families = Counter(example.label for example in examples)
    assert len(examples) >= 1500
    assert set(families) == set(range(len(docstrings.FAMILIES)))
    assert len(families) >= 5
    assert max(families.values()) < len(examples) / 3
    assert min(families.values()) >= 40
    assert all(len(example.text.split()) >= docstrings.MIN_WORDS for example in examples)


def test_no_module_has_two_families(docstrings):
    modules = " ".join(docstrings.FAMILIES.values()).split()
    assert len(modules) == len(set(modules))


@pytest.mark.parametrize("limit", [None, 64])
def test_no_docstring_is_on_both_sides(docstrings, examples, limit):
    train, held_out = docstrings.split(examples, limit=limit)
    assert len(train) + len(held_out) == (limit or len(examples))

    def words(side):
        return {"".join(filter(str.isalpha, example.text.lower())) for example in side}

    assert len(words(train)) == len(train)
    assert not words(train) & words(held_out)
    assert {example.label for example in held_out} <= {example.label for example in train}


def test_collecting_needs_neither_every_module_nor_valid_duplicates(docstrings, tmp_path):
    say = '"""{} is said here in as many words as are asked for."""'
    (tmp_path / "ftplib.py").write_text(say.format("Only this") + f"\nclass A:\n    {say.format('Both ways')}")
    (tmp_path / "heapq.py").write_text(say.format("both   Ways"))
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "tests" / "case.py").write_text(say.format("A test"))
    (tmp_path / "json" / "tool.py").write_text(say.format("A tool") + f"\ndef f():\n    {say.format('A tool')}")
    found = {example.text.split(" is ")[0]: example.module for example in docstrings.collect(tmp_path)}
    assert found == {"Only this": "ftplib", "A tool": "json"}


def run_demo(*options, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_demo.py"), "--device", "cpu", *map(str, options)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, docstrings, examples):
    """A folder with an untrained BERT of two layers and a tokenizer of the data's commonest words."""
    from tiny_bert import save_tiny_bert

    texts = [example.text for example in examples]
    return save_tiny_bert(tmp_path_factory.mktemp("tiny") / "model", texts, words=500, width=32)


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        ((), "torch.optim.AdamW, after clipping"),
        (("--optimizer", "fused"), "ComponentClipAdamW, which clips in its step"),
    ],
    ids=["torch", "fused"],
)
def test_demo_from_end_to_end(tiny_model, tmp_path, optimizer, named):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    options = ("--model", tiny_model, "--limit", 64, "--epochs", 2, "--batch-size", 8, "--max-norm", 0.01, *optimizer)
    done = run_demo(*options, "--out", "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for expected in (
        named,
        "41 components",  # 16 in each of two layers, 5 embeddings, pooler and classifier
        "epoch 2 of 2",
        "encoder.layer.*\n",
        "  attention.self.query.weight",
        "always the most common family",
        "after training",
        "median of 8 training steps",
        "ComponentClipAdamW",
        "Forward and backward pass take",
        "all components clipped",
        "no component clipped",
        "clip_grad_norm_ for each parameter",
        "clip_grad_norm_ of all (other rule)",
        "gradient_norms.png",
    ):
        assert expected in "\n".join(line.rstrip() for line in done.stdout.splitlines()), done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) < 100, "the progress bar floods a log"
    assert max(len(line) for line in lines if "gradient_norms.png" not in line) <= 80
    assert "…" not in done.stdout, "a table cell is cut off"
    picture = tmp_path / "pictures" / "gradient_norms.png"
    assert picture.stat().st_size > 10_000
    with image.open(picture) as opened:
        opened.load()
        assert min(opened.size) > 500


# What a user may get wrong: a model that is nowhere, a device that isn't there, a folder that can't be made.
@pytest.mark.parametrize(
    ("option", "value"), [("--model", "nobody/no-such-model"), ("--device", "abacus"), ("--out", os.devnull)]
)
def test_what_cannot_work_is_one_line_and_exit_code_2(option, value, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    done = run_demo(option, value, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("finetune_demo.py: error: ")
    assert option in error
    assert value in error
    assert "Traceback" not in done.stderr
