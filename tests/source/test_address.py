"""What may be given for a model: addresses of the hub, paths as they are pasted, single files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import OptionError, OutputError, SourceError, SurgeryError
from surgery.source.address import Address, address_of
from surgery.source.open import open_source
from tests.loopback_hub import LoopbackHub
from tests.models import save_llama, tensors_of

HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("gpt2", ("gpt2", None, None, None)),
        ("owner/name/", ("owner/name", None, None, None)),
        ("  owner/name\n", ("owner/name", None, None, None)),
        ("'owner/name'", ("owner/name", None, None, None)),
        ("\u201cowner/name\u201d", ("owner/name", None, None, None)),
        (f"<{HUB}/owner/name>", ("owner/name", None, None, None)),
        ("owner/name@v1.0", ("owner/name", "v1.0", None, None)),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3", None, None)),
        ("owner/name@main/unet", ("owner/name", "main", "unet", None)),
        ("gpt2@main", ("gpt2", "main", None, None)),
        (f"{HUB}/owner/name", ("owner/name", None, None, None)),
        (f"{HUB}/owner/name/", ("owner/name", None, None, None)),
        (f"{HUB}/owner/name.git", ("owner/name", None, None, None)),
        (f"{HUB}/owner/na.me-1_x?library=transformers#files", ("owner/na.me-1_x", None, None, None)),
        (f"{HUB}/gpt2", ("gpt2", None, None, None)),
        (f"{HUB}/gpt2/tree/main", ("gpt2", "main", None, None)),
        (f"{HUB}/owner/name/tree/main", ("owner/name", "main", None, None)),
        (f"{HUB}/owner/name/tree/v1/a/b/", ("owner/name", "v1", "a/b", None)),
        (f"{HUB}/owner/name/tree/refs%2Fpr%2F4/unet", ("owner/name", "refs/pr/4", "unet", None)),
        (f"{HUB}/owner/name/tree/refs/pr/4", ("owner/name", "refs/pr/4", None, None)),
        (f"{HUB}/owner/name/tree/feature%2Fx", ("owner/name", "feature/x", None, None)),
        (f"{HUB}/owner/name/blob/main/model.safetensors", ("owner/name", "main", None, "model.safetensors")),
        (f"{HUB}/owner/name/blob/main/unet/config.json", ("owner/name", "main", "unet", None)),
        (f"{HUB}/owner/name/resolve/main/model.safetensors?download=true", ("owner/name", "main", None, "model.safetensors")),
        (f"{HUB}/owner/name/raw/main/README.md", ("owner/name", "main", None, None)),
        (f"{HUB}/owner/name/commit/0123abc", ("owner/name", "0123abc", None, None)),
        (f"{HUB}/owner/name/commits/main", ("owner/name", "main", None, None)),
        (f"{HUB}/api/models/owner/name", ("owner/name", None, None, None)),
        (f"{HUB}/api/models/owner/name/revision/v1", ("owner/name", "v1", None, None)),
        ("http://hf.co/owner/name", ("owner/name", None, None, None)),
        ("huggingface.co/owner/name/tree/main", ("owner/name", "main", None, None)),
        ("HTTPS://HuggingFace.co/owner/name", ("owner/name", None, None, None)),
        ("git@hf.co:owner/name.git", ("owner/name", None, None, None)),
        ("git@huggingface.co:owner/name.git", ("owner/name", None, None, None)),
        ("ssh://git@hf.co/owner/name.git", ("owner/name", None, None, None)),
        (f"git+{HUB}/owner/name", ("owner/name", None, None, None)),
        ("owner/file.safetensors", ("owner/file.safetensors", None, None, None)),
        ("hf://owner/name", ("owner/name", None, None, None)),
        ("hf://models/owner/name/", ("owner/name", None, None, None)),
        ("hf://owner/name@v1/unet", ("owner/name", "v1", "unet", None)),
        ("hf://owner/name@refs/pr/3/unet/x.safetensors", ("owner/name", "refs/pr/3", "unet", "x.safetensors")),
        ("hf://owner/name/unet", ("owner/name", None, "unet", None)),
        ("hf://gpt2@main", ("gpt2", "main", None, None)),
    ],
)
def test_of_the_hub(text: str, expected: tuple[str | None, ...]) -> None:
    found = address_of(text)
    assert (found.repo_id, found.revision, found.subfolder, found.file) == expected
    assert found.folder is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no folder ''"),
        ("   ", "there is no folder"),
        ("./owner/name", "there is no folder"),
        ("/no/such", "there is no folder"),
        ("llama/", "there is no folder 'llama/'"),
        ("owner/name/unet", "owner/name --subfolder unet"),
        ("owner/name/unet/x.safetensors", "for a hub model: owner/name --subfolder unet"),
        ("owner/name/model.safetensors", "for a hub model: owner/name"),
        ("models/owner/name", "for a hub model: owner/name"),
        ("git@github.com:owner/name.git", "neither here nor on the Hugging Face hub"),
        ("ssh://git@github.com/owner/name.git", "neither here nor on the Hugging Face hub"),
        ("model.safetensors", "there is no file 'model.safetensors'"),
        ("./gone.safetensors", "there is no file './gone.safetensors'"),
        ("owner/name@", "there is no folder"),
        ("owner/name:Q4_K_M", "there is no folder"),
        (HUB, "is the hub itself"),
        (f"{HUB}/models?search=llama", "is a page of models"),
        (f"{HUB}/datasets/owner/name", "is a page of datasets"),
        (f"{HUB}/spaces/owner/name/tree/main", "is a page of spaces"),
        (f"{HUB}/owner/name/discussions/3", "--revision refs/pr/3"),
        (f"{HUB}/owner/name/settings", "give owner/name"),
        (f"{HUB}/owner/name/blob/main/model.Q4_K_M.gguf", "another format than safetensors"),
        (f"{HUB}/owner/../tree/main", "names no model"),
        ("hf://datasets/owner/name", "is a page of datasets"),
        ("https://example.org/owner/name", "neither here nor on the Hugging Face hub"),
        ("https://[huggingface.co/owner/name", "names no model"),
        ("file:///no/such", "there is no folder '/no/such'"),
        ("s3://bucket/a model", "aws s3 sync 's3://bucket/a model' FOLDER"),
        ("gs://bucket/model", "gcloud storage cp -r"),
        ("abfss://x@y/model", "fetch it into a folder first"),
        ("C:\\models\\llama", "in WSL: /mnt/c/models/llama"),
        ("D:/models/my llama", "in WSL: '/mnt/d/models/my llama'"),
        ("models\\llama", "with slashes: models/llama"),
        ("\\\\server\\share", "as Windows writes it"),
    ],
)
def test_what_names_no_model(text: str, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        address_of(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["owner/name/../other", "owner/name/model.safetensors", "datasets/owner/name"])
def test_no_subfolder_is_made_of_what_is_none(text: str) -> None:
    with pytest.raises(SourceError, match="there is no folder") as caught:
        address_of(text)
    assert "--subfolder" not in str(caught.value)


def test_what_is_not_there_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link and a file of a folder that is here are not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to("gone")
    for text in ("here/link", "here/link/", "./here/link", str(tmp_path / "here/link"), "'here/link'"):
        with pytest.raises(SourceError, match="is a link that leads nowhere") as caught:
            address_of(text)
        assert "got:      gone" in str(caught.value)
    with pytest.raises(SourceError, match=r"there is no file 'here/gone\.safetensors'"):
        address_of("here/gone.safetensors")


def test_an_address_as_a_path() -> None:
    assert address_of(Path(f"{HUB}/owner/name/tree/v1/unet")) == address_of("owner/name@v1/unet")
    assert address_of(Path("hf://owner/name@v1")) == address_of("owner/name@v1")
    with pytest.raises(SourceError, match="fetch it into a folder first"):
        address_of(Path("s3://bucket/model"))


def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name@v1", "owner/name", " spaces ", "'quoted'", "a\\b"):
        Path(name).mkdir(parents=True)
        assert address_of(name) == Address(folder=Path(name))  # what is there comes first
    assert address_of("owner/name/").folder == Path("owner/name")
    assert address_of(f" '{tmp_path}/owner/name' ").folder == tmp_path / "owner/name"
    assert address_of(f"file://{tmp_path}/%27quoted%27").folder == tmp_path / "'quoted'"


def test_revision_and_subfolder_beside_an_address() -> None:
    address = address_of(f"{HUB}/owner/name/tree/main/unet")
    assert address.with_options("main", "unet/") == address
    assert address_of("owner/name").with_options("v1", "unet") == address_of("owner/name@v1/unet")
    for revision, subfolder, said in (("v2", None, "--revision"), (None, "vae", "--subfolder")):
        with pytest.raises(SourceError, match=f"another one than {said}") as caught:
            address.with_options(revision, subfolder)
        assert f"{revision or subfolder!r}" in str(caught.value)


def test_revisions_and_subfolders_that_a_folder_does_not_have(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a local folder: it has no revisions\n.*leave --revision out"):
        open_source(llama, revision="main")
    shutil.copytree(llama, tmp_path / "pipeline/transformer")
    with pytest.raises(SourceError, match=r"has no subfolder 'vae'\n  expected: transformer\n"):
        open_source(tmp_path / "pipeline", subfolder="vae")
    with pytest.raises(SourceError, match=r"has no subfolder 'vae'\n  expected: a model without subfolders\n"):
        open_source(llama, subfolder="vae")
    with pytest.raises(OptionError, match="a path that leaves its folder"):
        open_source(tmp_path / "pipeline/transformer", subfolder="..")
    with pytest.raises(SourceError, match="there is no folder '~nobody-of-this-name/model'"):
        open_source("~nobody-of-this-name/model")


def test_addresses_wherever_a_model_is_given(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(llama, both / "unet")
    hub.publish("me/addressed", both)
    commit = hub.repos["me/addressed"].commit
    page = f"{hub.url}/me/addressed/tree/main/unet"  # the hub that HF_ENDPOINT names
    manifest = surgery.factorize(page, tmp_path / "f", rank=2, layout="overlay").manifest
    assert (manifest.source.kind, manifest.source.repo_id) == ("hub", "me/addressed")
    assert (manifest.source.commit, manifest.source.subfolder) == (commit, "unet")
    assert surgery.plan("me/addressed@main/unet").targets == surgery.plan(llama).targets
    scales = tmp_path / "f/surgery/scales.safetensors"
    for i, base in enumerate((page, f"me/addressed@{commit}", "me/addressed/", f" {llama}")):
        surgery.fold(tmp_path / "f", scales, tmp_path / f"folded {i}", base=base)
        assert {name: value.tolist() for name, value in tensors_of(tmp_path / f"folded {i}").items()} == {
            name: value.tolist() for name, value in tensors_of(llama).items()
        }
    with pytest.warns(surgery.errors.SurgeryWarning, match="the same weights"):
        surgery.project(tmp_path / "f", f"hf://me/addressed@{commit}/unet", tmp_path / "s.safetensors")
    with pytest.raises(SourceError, match="another one than --revision"):
        surgery.plan(page, revision=commit)
    with pytest.raises(SourceError, match=r"one of the 3 weight files of me/addressed/unet"):
        surgery.plan(f"{hub.url}/me/addressed/blob/main/unet/model-00001-of-00003.safetensors")


def test_the_source_is_not_written_to_whatever_it_is_called(llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(llama, model)
    for name in (f"'{model}' ", f"file://{model}"):
        with pytest.raises(OutputError, match="lies in one"):
            surgery.recommend(name, budget=100, out=model / "recipe.toml")
        with pytest.raises(OutputError, match="one lies in the other"):
            surgery.factorize(name, model / "f", rank=2)


def test_a_weight_file_as_the_model(tmp_path: Path) -> None:
    single = save_llama(tmp_path / "single", torch.bfloat16, shard_size="1GB")
    assert surgery.plan(single / "model.safetensors").targets == surgery.plan(single).targets
    assert open_source(single / "model.safetensors").name == str(single)
    shutil.copy(single / "model.safetensors", single / "other.safetensors")
    with pytest.raises(SourceError, match=r"other\.safetensors is not one of the weight files that surgery reads of .*single"):
        surgery.plan(single / "other.safetensors")
    sharded = save_llama(tmp_path / "sharded", torch.bfloat16)
    with pytest.raises(SourceError, match=r"is one of the 3 weight files of .*sharded"):
        surgery.plan(sharded / "model-00001-of-00003.safetensors")
    with pytest.raises(SourceError, match="is a file") as caught:
        surgery.plan(single / "config.json")
    assert f"give {single}" in str(caught.value)
    (tmp_path / "lone").mkdir()
    save_file({"layers.0.a.weight": torch.randn(32, 32)}, tmp_path / "lone/anything.safetensors")
    assert len(surgery.plan(tmp_path / "lone/anything.safetensors").targets) == 1


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "is a GGUF file"),
        ("pytorch_model.bin", b"PK\3\4\x14\0\0\0\0\0..................archive/data.pkl", "torch.save"),
        ("old.bin", b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
            "git-lfs pull|git lfs pull",
        ),
        ("model.safetensors", b"", "is an empty file"),
        ("README.md", b"# A model", "is a file"),
    ],
)
def test_files_in_other_formats_as_the_model(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SurgeryError, match=said) as caught:
        surgery.plan(tmp_path / name)
    assert "try:" in str(caught.value)
