"""What a run does when its surroundings are not as expected: addresses, plans of other inputs, other processors, numbers that are too large."""
import functools
import http.server
import os
import threading

import fsspec
import pytest
import torch
from safetensors.torch import save, save_file

from tsv_nb.scale.checkpoints import open_checkpoint


# Addresses

class Service(fsspec.AbstractFileSystem):
    "A service with one file, and with words of its own for a version."
    protocol, cachable, data, said = "teststore", False, b"", {}
    def info(self, path, **_): return dict(name=path, size=len(self.data), type="file", **self.said)
    def cat_file(self, path, start=None, end=None, **_): return self.data[start:end]


@pytest.fixture
def service(monkeypatch):
    "The service, with a checkpoint in it."
    fsspec.register_implementation("teststore", Service, clobber=True)
    def holds(number, **said): monkeypatch.setattr(Service, "data", save({"w": torch.full((8, 6), number)})); monkeypatch.setattr(Service, "said", said)
    return holds


VERSIONS = { # what file systems put into `info`, of two versions of a file
    "http": ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "url": "x"}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:07 GMT", "url": "x"}),
    "http, digest": ({"Content-MD5": "a"}, {"Content-MD5": "b"}),
    "hf": (dict(blob_id="a1", lfs=None, xet_hash=None, last_commit=None, security=None), dict(blob_id="b2", lfs=None, xet_hash=None, last_commit=None, security=None)),
    "hf bucket": (dict(xet_hash="a1"), dict(xet_hash="b2")),
    "s3": (dict(ETag='"a"', VersionId=None, StorageClass="STANDARD"), dict(ETag='"b"', VersionId=None, StorageClass="STANDARD")),
    "gcs": (dict(generation="1", md5Hash="a"), dict(generation="2", md5Hash="b")),
    "az": (dict(etag="0x1", last_modified=1), dict(etag="0x2", last_modified=2)),
    "github": (dict(sha="a"), dict(sha="b"))}


@pytest.mark.parametrize("kind", VERSIONS)
def test_a_remote_file_that_was_replaced(service, kind):
    one, two = VERSIONS[kind]
    service(1., **one)
    c = open_checkpoint("teststore://a.safetensors")
    seen = c.fingerprint()
    c.check_unchanged(); assert open_checkpoint("teststore://a.safetensors").fingerprint() == seen
    service(2., **two)
    with pytest.raises(ValueError, match="has changed since it was opened"): c.check_unchanged()
    with pytest.raises(ValueError, match="has changed since it was opened"): c["w"]
    assert open_checkpoint("teststore://a.safetensors").fingerprint() != seen


def test_without_a_version_the_fingerprint_says_so(service):
    service(1., blob_id=None)
    [facts] = open_checkpoint("teststore://a.safetensors").fingerprint()["files"].values()
    assert facts["mtime_ns"] == "unknown: the service tells the size only"


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A web server that does not know ranges."
    def log_message(self, *_): pass


@pytest.fixture
def web(tmp_path):
    "(folder, its address)."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown(); server.server_close()


def test_a_web_server_without_ranges(web, monkeypatch):
    folder, url = web
    save_file({"w": torch.ones(8, 6)}, folder / "m.safetensors")
    with pytest.raises(ValueError, match="the server of .*m.safetensors' does not answer ranges of bytes.*download the file first"): open_checkpoint(f"{url}/m.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*n.safetensors'; check the address"): open_checkpoint(f"{url}/n.safetensors")
    end = Quiet.end_headers
    monkeypatch.setattr(Quiet, "end_headers", lambda self: (self.send_header("Accept-Ranges", "none"), end(self))[1])
    monkeypatch.setattr(Quiet, "do_GET", None) # nothing was asked for
    with pytest.raises(ValueError, match="does not answer ranges"): open_checkpoint(f"{url}/m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_nobody_at_an_address(name):
    with pytest.raises(ConnectionError, match=f"cannot reach 'http://127.0.0.1:9/{name}' .*check the address and the network, or download it and give the folder"): open_checkpoint(f"http://127.0.0.1:9/{name}")


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_errors_of_other_libraries_on_opening(service, monkeypatch, name):
    class ConnectError(Exception): "As httpx has it: no OSError."
    def down(self, path, **_): raise ConnectError("[Errno -2] Name or service not known")
    service(1.)
    monkeypatch.setattr(Service, "info", down); monkeypatch.setattr(Service, "ls", down)
    if name == "m.safetensors": monkeypatch.setattr(Service, "invalidate_cache", down) # as the hub's
    with pytest.raises(ConnectionError, match=rf"cannot reach 'teststore://{name}' \(ConnectError: .Errno -2. Name or service not known\)"): open_checkpoint(f"teststore://{name}")
    def broken(self, path, **_): raise RuntimeError("quota")
    for what in ("info", "ls", "invalidate_cache"): monkeypatch.setattr(Service, what, broken)
    with pytest.raises(OSError, match=rf"'teststore://{name}' cannot be read \(RuntimeError: quota\)"): open_checkpoint(f"teststore://{name}")
