"""A Hugging Face Hub on the loopback interface: as much of its HTTP interface as an upload uses.

`python tests/fake_hub.py COMMAND` runs a command whose Hub this is, and fails unless it commits once.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """What it holds and what it was asked.

    Attributes:
        models: files by name, of each model.
        private: models that are not public.
        refuse: path of a request -> the status to answer it with.
        requests: method and path of each request.
        tokens: of all that would change something.
        commits: how many were made.
    """

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refuse: dict[str, int] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.commits = 0
        self.large: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        if path in self.refuse:
            return self.refuse[path], {"error": "you cannot do that here"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if method == "PUT":
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._large(json.loads(body)["objects"])
        return self._of_a_model(path, body)

    def _of_a_model(self, path: str, body: bytes) -> tuple[int, Any]:
        model = "/".join(path.split("/")[3:5])
        what = path.split("/")[5:6] or ["info"]
        if model not in self.models:
            return 404, {"error": "Repository not found"}
        return getattr(self, f"_{what[0]}")(model, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        model = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if model in self.models:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{model}"}
        self.models[model] = {".gitattributes": b""}
        if asked.get("visibility") == "private":
            self.private.add(model)
        return 200, {"url": f"{self.url}/{model}"}

    def _info(self, model: str, body: bytes) -> tuple[int, Any]:
        files = [{"rfilename": name} for name in self.models[model]]
        private = model in self.private
        return 200, {"id": model, "sha": "0" * 40, "private": private, "siblings": files, "tags": []}

    _revision = _info

    def _tree(self, model: str, body: bytes) -> tuple[int, Any]:
        return 200, [
            {"type": "file", "path": name, "size": len(data), "oid": "1" * 40}
            for name, data in self.models[model].items()
        ]

    def _preupload(self, model: str, body: bytes) -> tuple[int, Any]:
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _large(self, asked: list[dict[str, Any]]) -> tuple[int, Any]:
        where = [{"upload": {"href": f"{self.url}/large/{one['oid']}"}} for one in asked]
        objects = [{**one, "actions": actions} for one, actions in zip(asked, where, strict=True)]
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, model: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.models[model][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.models[model][value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.models[model][value["path"]]
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/{model}/commit/{'2' * 40}", "commitOid": "2" * 40}


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that answers for as long as the block runs."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if self.command == "POST":
                hub.tokens.add(self.headers.get("Authorization", ""))
            status, said = hub.answer(self.command, path, body)
            data = json.dumps(said).encode()
            self.send_response(status)
            if isinstance(said, dict) and "error" in said:
                self.send_header("X-Error-Message", said["error"])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: FakeHub) -> dict[str, str]:
    """What tells a process that this is the Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }


if __name__ == "__main__":
    with running() as hub:
        subprocess.run(sys.argv[1:], env={**os.environ, **environment(hub)}, check=True)
    sys.exit(hub.commits != 1)
