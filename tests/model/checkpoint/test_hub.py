import pytest

from keye_model.checkpoint.hub import locate, read_json
from keye_model.processing.tokenizer import load_tokenizer


def test_locate_directory(tmp_path):
    assert locate(tmp_path, weights=True) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "nowhere", "a/b/c"])
def test_locate_missing_directory(name):
    with pytest.raises(FileNotFoundError, match="path_or_id must be an existing directory"):
        locate(name, weights=False)


@pytest.mark.parametrize("name", ["file", "model.gguf", "config.json"])
def test_locate_file_is_no_directory(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(
        FileNotFoundError, match=rf"must be an existing dir.* got '/.*{name}', a file: give the dir"
    ):
        locate(tmp_path / name, weights=False)


@pytest.mark.parametrize(
    "name",
    ["a\0b", "a" * 5000, "https://huggingface.co/owner/name", "owner/name/", "~nobody/a", " "],
    ids=["null", "long", "url", "slash", "user", "blank"],
)
def test_locate_names_of_nothing(name):
    with pytest.raises(
        FileNotFoundError, match="must be an existing directory or a Hub id 'owner/"
    ):
        locate(name, weights=False)


def test_locate_empty_name():
    with pytest.raises(ValueError, match="path_or_id must be a directory or a Hub id, got ''"):
        locate("", weights=False)


@pytest.mark.parametrize("name", [None, 5])
def test_locate_other_kinds(name):
    with pytest.raises(TypeError, match="path_or_id must be a string or a path, got"):
        locate(name, weights=False)


def test_locate_name_that_no_repository_can_have():
    with pytest.raises(
        FileNotFoundError, match="'foo/bar baz' is no repository on the Hub that you may read"
    ):
        locate("foo/bar baz", weights=False, local_files_only=True)


def test_locate_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not in the local Hub cache"):
        locate("owner/name", weights=True, local_files_only=True)


def test_locate_fetches_data_only(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("keye_model.checkpoint.hub.snapshot_download", snapshot_download)
    assert locate("owner/name", weights=False) == tmp_path
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])
    locate("owner/name", weights=True)
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", "must be valid JSON"), ("[]", "must hold a JSON object, got a list"), ("\xff", "JSON")],
    ids=["broken", "list", "not text"],
)
def test_read_json_refuses(tmp_path, content, match):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=match):
        read_json(tmp_path, "config.json")


def test_read_json_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint must contain config\.json"):
        read_json(tmp_path, "config.json")
    assert read_json(tmp_path, "config.json", required=False) is None


def test_read_json_says_where_the_file_may_be(tmp_path):
    def refused(directory, filename="config.json"):
        with pytest.raises(FileNotFoundError) as caught:
            read_json(directory, filename)
        return str(caught.value)

    start = f"checkpoint must contain config.json, got none in {tmp_path}"
    assert refused(tmp_path) == f"{start}, which is empty"
    snapshot = tmp_path / "snapshots" / "0123"  # as the Hub's cache keeps a repository
    snapshot.mkdir(parents=True)
    assert refused(tmp_path) == start
    (snapshot / "config.json").write_text("{}")
    assert refused(tmp_path) == f"{start}; there is one in {snapshot}"
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "config.json").write_text("{}")
    assert refused(tmp_path) == f"{start}; there is one in {tmp_path / 'clone'}"
    (snapshot / "adapter_config.json").write_text("{}")
    (snapshot / "config.json").unlink()
    assert refused(snapshot).endswith(
        "which holds an adapter: give the directory of its base model"
    )
    assert refused(tmp_path / "nowhere").startswith("checkpoint must contain config.json, got none")


@pytest.mark.parametrize("required", [True, False])
def test_read_json_link_to_nothing(tmp_path, required):
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    with pytest.raises(
        FileNotFoundError, match=r"/config\.json must be a file, got a link to noth"
    ):
        read_json(tmp_path, "config.json", required=required)
    (tmp_path / "blob").write_text("{}")
    assert read_json(tmp_path, "config.json", required=required) == {}


def test_read_json_git_lfs_pointer(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 11422654\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(
        ValueError, match=r"/tokenizer\.json must be valid JSON, got a Git LFS poin"
    ):
        read_json(tmp_path, "tokenizer.json")
    with pytest.raises(
        ValueError, match=r"/tokenizer\.json must be a tokenizer, got a Git LFS poi"
    ):
        load_tokenizer(tmp_path)


def test_load_tokenizer_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must contain tokenizer\.json, got none in /"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "local_files_only"])
def test_locate_in_the_hub_cache(monkeypatch, tmp_path, offline):
    """A repository that was fetched before is found without the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    found = locate("owner/name", weights=True, local_files_only=not offline)
    assert read_json(found, "config.json") == {"a": 1}
    with pytest.raises(
        FileNotFoundError, match=r"'owner/nam' is no dir.* not in the local Hub cache"
    ):
        locate("owner/nam", weights=True, local_files_only=not offline)
