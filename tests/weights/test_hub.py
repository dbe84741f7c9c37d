"""`export --push`, without the network."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from ijepa_fast.errors import UsageError
from ijepa_fast.weights import export
from tests.weights.test_weights import SMALL, _pretrained


class _Hub:
    """Takes the place of `HfApi` and keeps what it is told."""

    calls: list[tuple]

    def __init__(self, **_):
        pass

    def create_repo(self, repo, **options):
        self.calls.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    _Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return _Hub


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")


def test_the_folder_goes_there_with_a_card_that_the_hub_reads(tmp_path, hub, token, capsys):
    export.export(_pretrained(SMALL), tmp_path / "a", format="timm", push="me/vit-1.0")
    assert hub.calls == [
        ("me/vit-1.0", {"private": True, "exist_ok": True}),
        ("me/vit-1.0", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert capsys.readouterr().out == "uploaded to https://hub/me/vit-1.0\n"
    card = huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-feature-extraction"
    # the licence is the user's to choose
    assert card.data.license is None
    assert '"hf-hub:me/vit-1.0"' in card.text


def test_a_dry_run_needs_no_token_and_uploads_nothing(tmp_path, hub, capsys):
    export.export(_pretrained(SMALL), tmp_path / "a", push="me/mine", push_dry_run=True)
    out = capsys.readouterr().out
    for path in (tmp_path / "a").iterdir():
        assert f"{path.stat().st_size:,} bytes  {path.name}\n" in out
    assert (tmp_path / "a" / "README.md").read_text() in out
    assert 'folder = "me/mine"' in out
    assert not hub.calls


def test_without_a_token_one_line_says_what_to_do(tmp_path, hub):
    with pytest.raises(UsageError, match=r"got none: type `hf auth login`, or set HF_TOKEN"):
        export.export("no such weights", tmp_path / "a", push="me/mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repo", ["mine", "", "a/b/c", "/b", "a/", "a/b--c", "a/b..c", "a/b c"])
def test_names_of_repositories(tmp_path, hub, repo):
    with pytest.raises(UsageError, match="push must be OWNER/NAME"):
        export.export(_pretrained(SMALL), tmp_path / "a", push=repo, push_dry_run=True)


def test_a_dry_run_of_nothing(tmp_path):
    with pytest.raises(UsageError, match="push_dry_run must be given with push"):
        export.export(_pretrained(SMALL), tmp_path / "a", push_dry_run=True)


def test_without_a_network_the_folder_is_kept(tmp_path, token, monkeypatch):
    """The library's own error: nobody listens there."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError) as caught:
        export.export(_pretrained(SMALL), tmp_path / "a", push="me/mine")
    assert str(caught.value).endswith(f": hf upload me/mine {tmp_path / 'a'} --private")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a" / "model.safetensors").is_file()
