"""Models of a Hub that is a small server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qkv.checkpoints.hub import parse, pull, wanted
from qkv.checkpoints.pull import pull as pull_any
from qkv.checkpoints.pull import resolve
from qkv.errors import QkvError

SMALL = {
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "LICENSE": b"all of it",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "vocab.txt": b"a\n",
    "chat_template.jinja": b"",
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
}
CODE = {"modeling_own.py": b"raise SystemExit", "configuration_own.py": b"", "setup.py": b""}
OTHER = {
    "onnx/model.onnx": b"o",
    "onnx/config.json": b"{}",
    "tf_model.h5": b"h",
    "training_args.bin": b"p",
    "optimizer.bin": b"p",
    "model.fp16.safetensors": b"half",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
    ".gitattributes": b"",
}
WHOLE = {"model.safetensors": b"weights" * 1000}
SHARDS = {
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": b"one" * 1000,
    "model-00002-of-00002.safetensors": b"two" * 1000,
}
PICKLE = {"pytorch_model.bin": b"pickle"}
GGUFS = {"model-q4_0.gguf": b"GGUF4", "model-q8_0.gguf": b"GGUF8"}


class Hub:
    """The few answers of the Hub that a download needs; `models` maps owner/name to files, `asked` lists requests."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.models: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0].strip("/")
        self.asked.append(path)
        self.tokens.add(token)
        parts = path.removeprefix("api/models/").split("/")
        repo, verb, rest = "/".join(parts[:2]), *(parts[2:3] or [""]), parts[3:]
        if repo not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit, files = self.commit(repo), self.models[repo]
        if rest and rest[0] not in ("main", "v2", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if verb == "tree":
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return 200, {}, json.dumps(tree).encode()
        if verb == "resolve":
            if repo in self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            name = "/".join(rest[1:])
            if name in self.broken:
                return 400, {}, b""  # what the client does not try again
            data = files[name]
            return 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}, data
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        card = self.cards.get(repo, {"license": "apache-2.0"})
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "cardData": card, "tags": []}
        return 200, {}, json.dumps(info | {"private": False, "gated": False, "downloads": 0}).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    served = Hub(address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def said() -> list[str]:
    return []


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("weights", [WHOLE, WHOLE | SHARDS, SHARDS, {"adapter_model.safetensors": b"lora"}, PICKLE])
def test_what_a_text_model_needs_comes_and_nothing_else(hub: Hub, said: list[str], weights: dict[str, bytes]) -> None:
    """A pickle, a second copy and code stay away; whole weights win over shards."""
    hub.models["ann/tiny"] = SMALL | CODE | OTHER | weights | PICKLE | GGUFS
    folder = pull("hf:ann/tiny", said.append)
    assert tree(folder) == SMALL | (WHOLE if weights == WHOLE | SHARDS else weights)


def test_the_licence_is_told_before_anything_is_fetched(hub: Hub) -> None:
    hub.models["ann/tiny"] = SMALL | WHOLE
    told: dict[str, bool] = {}
    pull("hf:ann/tiny", lambda line: told.update({line: any("resolve" in path for path in hub.asked)}))
    assert told == {"hf:ann/tiny: 10 files, 0.0 MB; licence: apache-2.0": False}
    assert any("resolve" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"license": ["mit", "cc0-1.0"]}, "licence: mit, cc0-1.0"),
        ({"license": "other", "license_name": "own", "license_link": "LICENSE"}, "licence: own, LICENSE"),
        ({"license": "other"}, "licence: other"),
        ({}, "its model card names no licence"),
    ],
)
def test_licences_of_other_forms(hub: Hub, said: list[str], card: dict[str, Any], words: str) -> None:
    hub.models["ann/tiny"], hub.cards["ann/tiny"] = SMALL | WHOLE, card
    pull("hf:ann/tiny", said.append)
    assert said[0].endswith(f"; {words}")


def test_a_pickle_comes_with_a_word_on_what_opens_it(hub: Hub, said: list[str]) -> None:
    hub.models["ann/tiny"] = SMALL | OTHER | PICKLE
    assert "pytorch_model.bin" in tree(pull("hf:ann/tiny", said.append))
    assert "`qkv convert --allow-pickle` reads one with torch's loader for weights" in said[1]


def test_one_gguf_file(hub: Hub, said: list[str]) -> None:
    hub.models["ann/tiny"] = SMALL | WHOLE | GGUFS
    path = pull("hf:ann/tiny/model-q8_0.gguf", said.append)
    assert path.read_bytes() == b"GGUF8"
    assert set(tree(path.parent)) == {"model-q8_0.gguf", "README.md", "LICENSE"}
    with pytest.raises(QkvError, match=r"ann/tiny has no file model-q8_1.gguf; did you mean 'model-q8_0.gguf'\?"):
        pull("hf:ann/tiny/model-q8_1.gguf", said.append)


def test_models_without_weights_to_read(hub: Hub, said: list[str]) -> None:
    hub.models["ann/gguf"], hub.models["ann/bare"] = SMALL | GGUFS, SMALL | OTHER | CODE
    with pytest.raises(QkvError, match="to be named: hf:ann/gguf/model-q4_0.gguf, hf:ann/gguf/model-q8_0.gguf"):
        pull("hf:ann/gguf", said.append)
    with pytest.raises(QkvError, match="ann/bare holds no weights that qkv reads"):
        pull("hf:ann/bare", said.append)
    assert not any("resolve" in path for path in hub.asked)


def test_a_revision(hub: Hub, said: list[str]) -> None:
    hub.models["ann/tiny"] = SMALL | WHOLE
    pull("hf:ann/tiny@v2", said.append)
    assert "api/models/ann/tiny/revision/v2" in hub.asked
    with pytest.raises(QkvError, match="^ann/tiny has no revision v3$"):
        pull("hf:ann/tiny@v3", said.append)


@pytest.mark.parametrize("weights", [WHOLE, SHARDS, PICKLE])
def test_the_cache_is_enough_without_a_network(
    hub: Hub, said: list[str], monkeypatch: pytest.MonkeyPatch, weights: dict[str, bytes]
) -> None:
    from huggingface_hub import constants

    hub.models["ann/tiny"] = SMALL | OTHER | weights | GGUFS
    folder, file = pull("hf:ann/tiny", said.append), pull("hf:ann/tiny/model-q4_0.gguf", said.append)
    with monkeypatch.context() as cut:
        unreachable(cut)
        assert pull("hf:ann/tiny", said.append) == folder
        assert pull("hf:ann/tiny/model-q4_0.gguf", said.append) == file
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("hf:ann/tiny", said.append) == folder and resolve("hf:ann/tiny/model-q4_0.gguf", said.append) == file
    assert hub.asked == []
    with pytest.raises(QkvError, match="^ann/tiny is not in the Hub's cache on this machine, and HF_HUB_OFFLINE"):
        pull("hf:ann/tiny/model-q8_0.gguf", said.append)


def test_a_download_that_is_cut_off(hub: Hub, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What came is not fetched again; offline, a part is not taken for the whole."""
    hub.models["ann/tiny"] = SMALL | SHARDS
    hub.broken.add("model-00002-of-00002.safetensors")
    sentence = "^ann/tiny could not be fetched from the Hub .*; what came before is kept, and with a network the same"
    with pytest.raises(QkvError, match=sentence) as caught:
        pull("hf:ann/tiny", said.append)
    assert "\n" not in str(caught.value)
    with monkeypatch.context() as cut:
        unreachable(cut)
        with pytest.raises(QkvError, match=sentence):
            pull("hf:ann/tiny", said.append)
    hub.broken.clear()
    hub.asked.clear()
    assert tree(pull("hf:ann/tiny", said.append)) == SMALL | SHARDS
    assert {path.split("/")[-1] for path in hub.asked if "resolve" in path} == {"model-00002-of-00002.safetensors"}


def test_who_may_not(hub: Hub, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models["ann/tiny"], hub.gated = SMALL | WHOLE, {"ann/tiny"}
    with pytest.raises(QkvError, match="^ann/tiny is gated: accept its terms .* HF_TOKEN"):
        pull("hf:ann/tiny", said.append)
    with pytest.raises(QkvError, match="^the Hub has no model ann/tinny, or it is private and HF_TOKEN"):
        pull("hf:ann/tinny", said.append)
    assert hub.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_of_ann")
    hub.gated.clear()
    hub.tokens.clear()
    pull("hf:ann/tiny", said.append)
    assert hub.tokens == {"Bearer hf_of_ann"}


def test_no_network_and_nothing_there(hub: Hub, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable(monkeypatch)
    with pytest.raises(QkvError, match=r"^ann/tiny could not be fetched from the Hub \(.+\); .* goes on") as caught:
        pull("hf:ann/tiny", said.append)
    assert "\n" not in str(caught.value) and said == []


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:tiny", "hf:ann/", "hf:ann/tiny/", "hf:ann/tiny/model.bin", "hf:ann/tiny@", "hf:a n/tiny", "hf:a/b--c"],
)
def test_bad_names(hub: Hub, name: str) -> None:
    for opens in (pull_any, resolve):
        with pytest.raises(QkvError, match="names no model of the Hub; the form is hf:owner/name"):
            opens(name)
    assert hub.asked == []


def test_parts_of_a_name() -> None:
    asked = parse("hf:ann/tiny-1.0/sub/model.gguf@refs/pr/1")
    assert (asked.repo, asked.file, asked.revision) == ("ann/tiny-1.0", "sub/model.gguf", "refs/pr/1")


def test_names_with_brackets_are_names() -> None:
    assert wanted(parse("hf:a/b/m[1].gguf"), ["m1.gguf", "m[1].gguf"]) == ["m[1].gguf"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(QkvError, match=r'pip install "qkv\[hub\]"'):
        pull("hf:ann/tiny", said.append)


def test_the_command(hub: Hub, tmp_path: Path) -> None:
    """As a user has it: variables of the Hub in the environment; progress bars stay off where no terminal is."""
    hub.models["ann/tiny"] = SMALL | WHOLE
    switches = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", "from qkv.cli import main; main()", "pull", "hf:ann/tiny"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(command, env=kept | switches, capture_output=True, text=True)
    assert tree(Path(done.stdout.strip())) == SMALL | WHOLE
    assert tmp_path / "home" / "hub" in Path(done.stdout.strip()).parents
    assert done.stderr == "hf:ann/tiny: 10 files, 0.0 MB; licence: apache-2.0\n"
