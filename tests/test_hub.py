"""Names on the hub, asked once: against a real HTTP server on this machine that answers as the hub does."""

import http.server
import threading

import pytest
from huggingface_hub import constants

from fastsae.errors import ArtifactError
from fastsae.hub import check_repository, looks_local


class Hub(http.server.BaseHTTPRequestHandler):
    requests: list = []  # noqa: RUF012

    def do_GET(self):
        if self.path.startswith(("/api/models", "/api/datasets")):  # the client asks for other things at its start
            self.requests.append((self.path, self.headers.get("authorization")))
        found = "known" in self.path
        body = b'{"id": "org/known", "siblings": []}' if found else b"{}"
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Hub.requests = []
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_one_question_is_enough(hub, tmp_path, monkeypatch, kind):
    check_repository(kind, "org/known", token="hf_x")
    assert Hub.requests == [(f"/api/{kind}s/org/known", "Bearer hf_x")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ArtifactError, match=rf"{kind}: .*got 'my-modle', which neither .*; did you mean my-model\?"):
        check_repository(kind, "my-modle")
    assert len(Hub.requests) == 2


def test_what_is_cached_is_not_asked_for(hub, tmp_path):
    (tmp_path / "models--org--mine/snapshots").mkdir(parents=True)
    check_repository("model", "org/mine")
    assert Hub.requests == []


def test_an_unreachable_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="got 'org/known', which is not here, and the hub did not answer: "):
        check_repository("model", "org/known")


def test_what_can_only_be_a_path():
    assert [looks_local(name) for name in ("./a", "/a", "~/a", "a/b/c", "a/b", "gpt2")] == [True] * 4 + [False] * 2
