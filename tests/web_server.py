"""A web server for tests that serves a folder on 127.0.0.1, in ranges of bytes as storage services do."""
import functools
import http.server
import re
import threading
from contextlib import contextmanager
from pathlib import Path


class Ranges(http.server.SimpleHTTPRequestHandler):
    "Answers `Range: bytes=a-b`, and says that it does; `asked` lists (path, range) of what was read."
    asked = []
    def log_message(self, *_): pass
    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()
    def do_GET(self):
        found, path = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")), Path(self.translate_path(self.path))
        if not (found and path.is_file()): return super().do_GET()
        self.asked.append((self.path, found[0]))
        data, first = path.read_bytes(), int(found[1])
        if first >= len(data): return self.send_error(416)
        last = min(int(found[2] or len(data) - 1), len(data) - 1)
        self.send_response(206)
        for name, value in {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Content-Length": last + 1 - first, "Last-Modified": self.date_time_string(path.stat().st_mtime)}.items(): self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data[first:last + 1])


@contextmanager
def served(folder): # (address of the folder, list of what was asked for)
    "Serve a folder within the block."
    asked = []
    handler = type("Handler", (Ranges,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(); server.server_close()
