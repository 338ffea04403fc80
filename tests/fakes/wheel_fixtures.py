"""A cache folder of its own for every test, and a package index on loopback."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fakes import fake_wheels

from nanogpt_mac.operators import table, wheel


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wheel.cache_folder()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Two torches: in 9.2.0 gamma and the SVD have MPS kernels, and beta has none any more."""
    folder = tmp_path_factory.mktemp("wheels")
    newer = fake_wheels.OPERATORS.replace("    MPS: beta_mps\n", "").replace(
        "CPU: _linalg_svd_out", "CPU, MPS: _linalg_svd_out"
    )
    newer = newer.replace("CPU: gamma_cpu", "CPU: gamma_cpu\n    MPS: gamma_mps")
    return [fake_wheels.wheel(folder), fake_wheels.wheel(folder, "9.2.0", operators=newer)]


@pytest.fixture(scope="session")
def tables(wheels, tmp_path_factory):
    """The tables of the two, read with their binaries. The second's binary still is the first's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return [table.load(str(wheels[0]), binary=True), table.load(str(wheels[1]))]


class Index:
    """A package index that serves `files` and remembers what it was asked for."""

    def __init__(self):
        self.files, self.ranges, self.cut, self.sha256, self.page = {}, True, None, {}, None
        self.requests = []  # (path, Range header, bytes sent)
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, path):
        """Serves a wheel, and its METADATA beside it as an index does."""
        version = path.name.split("-")[1]
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n".encode()
        self.files |= {f"/{path.name}": path.read_bytes(), f"/{path.name}.metadata": metadata}

    def _page(self):
        if self.page is not None:  # a saved one
            return self.page.encode()
        links = []
        for name in (n.removeprefix("/") for n in self.files if n.endswith(".whl")):
            digest = self.sha256.get(name, hashlib.sha256(self.files[f"/{name}"]).hexdigest())
            meta = hashlib.sha256(self.files[f"/{name}.metadata"]).hexdigest()
            core = f"data-dist-info-metadata='sha256={meta}' data-core-metadata='sha256={meta}'"
            links.append(f"<a href='/{name}#sha256={digest}' {core}>{name}</a>")
        return f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()

    def answer(self, request):
        asked = request.headers.get("Range")
        content = self._page() if request.path == "/simple/torch/" else self.files.get(request.path)
        if content is None:
            request.send_error(404)
            return
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "") if self.ranges else None
        start, end, total = 0, len(content), len(content)
        if found:
            start = int(found[1]) if found[1] else max(0, total - int(found[2]))
            end = min(total, int(found[2]) + 1) if found[1] and found[2] else total
        request.send_response(206 if found else 200)
        if found:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        kind = "text/html" if request.path.startswith("/simple") else "application/octet-stream"
        kind = "application/vnd.pypi.simple.v1+json" if content.startswith(b'{"meta"') else kind
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(end - start))
        request.end_headers()
        body = content[start:end]
        if self.cut is not None and request.path.endswith(".whl"):
            body = body[: self.cut]
        self.requests.append((request.path, asked, len(body)))
        request.wfile.write(body)


@pytest.fixture
def index(monkeypatch):
    """The user's package index, as pip is set to it."""
    served = Index()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield served
    served.server.shutdown()
    served.server.server_close()
