"""A Hub on 127.0.0.1: the part of the Hub's HTTP protocol that a push and a pull speak, with faults on demand.

Repositories are dictionaries of commits, large files go through the LFS calls, a commit is atomic: what the real Hub
promises. `hub.fail(...)` makes the next matching requests go wrong. Every request is in `hub.requests`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml


TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path matches."""

    method: str
    path: str  # a regular expression
    status: int | None = None
    body: dict = field(default_factory=dict)
    drop_after: int | None = None  # read this many bytes of the request, then close the connection
    handle_first: bool = False  # do what was asked, and only then answer with `status`: a lost response
    flip: bool = False  # answer what was asked for, but for the last byte
    times: int = 1


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    pull_requests: int = 0

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class LoopbackHub:
    """The state behind the server. `token` is the only one that may write, or read what is private."""

    def __init__(self, token: str = TOKEN):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.endpoint = ""
        self.lock = threading.RLock()

    def fail(self, method: str, path: str, **what) -> None:
        """The next request `method` of a path that matches goes wrong; `what` are the fields of `Fault`."""
        self.faults.append(Fault(method, path, **what))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without the `.gitattributes` that every repository is created with."""
        repository = self.repositories[repo_id]
        files = dict(repository.commits[repository.sha(revision)])
        files.pop(".gitattributes", None)
        return files

    def create(self, repo_id: str, private: bool = False) -> Repository:
        repository = Repository(private, {}, {})
        self.repositories[repo_id] = repository
        self.commit(repository, "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return repository

    def commit(self, repository: Repository, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{id(repository)} {len(repository.commits)} {branch}".encode()).hexdigest()
        repository.commits[sha] = files
        repository.branches[branch] = sha
        return sha

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub that listens on a free port of 127.0.0.1 while the block runs."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Answer(Exception):
    """A status, a body (bytes, or what becomes JSON) and headers: returned, or raised where a call cannot go on."""

    def __init__(self, status: int, body=None, headers: dict[str, str] | None = None):
        self.status, self.headers = status, headers or {}
        self.content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


def _not_found(what: str, message: str) -> _Answer:
    return _Answer(404, {"error": message}, {"X-Error-Code": what, "X-Error-Message": message})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        url = urlparse(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, unquote(url.path)))
        fault = self.hub.take_fault(self.command, url.path)
        if fault is not None and fault.drop_after is not None:
            self.rfile.read(fault.drop_after)
            self.close_connection = True
            return
        self.content = self.read_body()
        if fault is None or fault.handle_first or fault.flip:
            try:
                answer = self.route(url.path)
            except _Answer as refusal:
                answer = refusal
        if fault is not None and fault.flip:
            answer.content = answer.content[:-1] + bytes([answer.content[-1] ^ 1])
        elif fault is not None:
            answer = _Answer(fault.status, fault.body)
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.content)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ------------------------------------------------------------------------------------------------- the calls

    def route(self, path: str) -> _Answer:
        for method, pattern, call in self.CALLS:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                with self.hub.lock:
                    return call(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
        raise _not_found("EntryNotFound", f"{self.command} {path} is not part of this Hub")

    def authorize(self):
        given = self.headers.get("Authorization")
        if given != f"Bearer {self.hub.token}":
            message = "Invalid credentials in Authorization header" if given else "Unauthorized"
            raise _Answer(401, {"error": message}, {"X-Error-Message": message})

    def repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None:
            raise _not_found("RepoNotFound", "Repository not found")
        if found.private:
            self.authorize()
        return found

    def revision(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        repository = self.repository(repo)
        sha = repository.sha(revision)
        if sha is None:
            raise _not_found("RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def create_repository(self):
        self.authorize()
        wanted = json.loads(self.content)
        repo = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            raise _Answer(409, {**answer, "error": "You already created this model repo"})
        self.hub.create(repo, private=wanted.get("visibility") == "private")
        return _Answer(200, answer)

    def validate_yaml(self):
        front = re.match(r"---\n(.*?)\n---", json.loads(self.content)["content"], re.DOTALL)
        metadata = yaml.safe_load(front[1]) if front else {}
        errors = [] if isinstance(metadata, dict) else [{"message": "the metadata must be a mapping"}]
        for result in metadata.get("model-index", []) if not errors else []:
            if not result.get("name") or not result.get("results"):
                errors.append({"message": '"model-index[0]" needs a name and results'})
        return _Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def information(self, repo: str, revision: str = "main"):
        sha, files = self.revision(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        private = self.hub.repositories[repo].private
        return _Answer(
            200, {"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []}
        )

    def tree(self, repo: str, revision: str):
        _, files = self.revision(repo, revision)
        entries = []
        for name, content in sorted(files.items()):
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return _Answer(200, entries)

    def branch(self, repo: str, branch: str):
        self.authorize()
        repository = self.repository(repo)
        if branch in repository.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        return _Answer(200)

    def preupload(self, repo: str, revision: str):
        self.authorize()
        _, files = self.revision(repo, revision)
        answers = []
        for wanted in json.loads(self.content)["files"]:
            name = wanted["path"]
            large = name.endswith(LFS_SUFFIXES)
            answer = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if name in files:
                answer["oid"] = hashlib.sha256(files[name]).hexdigest() if large else _git_oid(files[name])
            answers.append(answer)
        return _Answer(200, {"files": answers})

    def lfs_batch(self, repo: str):
        self.authorize()
        self.repository(repo)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, oid: str):
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise _Answer(400, {"error": "the content does not have this hash"})
        self.hub.blobs[oid] = self.content
        return _Answer(200)

    def commit(self, repo: str, revision: str):
        self.authorize()
        head, files = self.revision(repo, revision)
        repository, files, base = self.hub.repositories[repo], dict(files), revision
        for line in filter(None, self.content.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", head) != head:
                raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Answer(400, {"error": f"{value['path']}: its content was not uploaded"})
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        answer = {}
        if self.query.get("create_pr") == ["1"]:
            repository.pull_requests += 1
            base = f"refs/pr/{repository.pull_requests}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{repository.pull_requests}"
        sha = self.hub.commit(repository, base, files)
        return _Answer(
            200, {**answer, "success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}
        )

    def resolve(self, repo: str, revision: str, file: str):
        sha, files = self.revision(repo, revision)
        if file not in files:
            raise _Answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = files[file]
        etag = hashlib.sha256(content).hexdigest() if file.endswith(LFS_SUFFIXES) else _git_oid(content)
        return _Answer(
            200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        )

    REPO = r"(?P<repo>[^/]+/[^/]+)"
    CALLS = [
        ("POST", "/api/repos/create", create_repository),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("GET", f"/api/models/{REPO}", information),
        ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", information),
        ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", tree),
        ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", branch),
        ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", put_blob),
        ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", commit),
        ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", resolve),
    ]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
