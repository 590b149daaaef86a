import pytest

from keye_model.checkpoint.hub import locate, read_json


def test_locate_directory(tmp_path):
    assert locate(tmp_path, weights=True) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "nowhere", "a/b/c"])
def test_locate_missing_directory(name):
    with pytest.raises(FileNotFoundError, match="path_or_id must be an existing directory"):
        locate(name, weights=False)


def test_locate_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="path_or_id must be an existing directory"):
        locate(tmp_path / "file", weights=False)


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
