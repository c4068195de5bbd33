"""shared/serving/sites.py and page_paths.py over real sockets: what a web site gets to see through the
browser of somebody who runs the server.
"""

import httpx
import pytest

from shared.serving.__main__ import Settings
from shared.serving.api import CompletionServer, create_app
from shared.serving.engine import Engine
from shared.serving.page import add_page
from tests.helpers import serving
from tests.serving.helpers import TOKENIZER, check_error, client, complete, gpt

FOREIGN = "http://attacker.example"
PATHS = ["/", "/config", "/health", "/metrics", "/v1/models", "/gradio_api/startup-events"]


def with_page(**options):
    return add_page(CompletionServer(Engine(gpt()), TOKENIZER, name="tiny", **options))


@pytest.fixture(scope="module")
def http():
    with serving(with_page()) as url, httpx.Client(base_url=url) as found:
        yield found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:8000", "127.0.0.1.nip.io", "localhost.attacker.example", "[::1"],
)
def test_a_name_that_was_rebound_to_this_machine_gets_nothing(http, path, host):
    check_error(http.get(path, headers={"Host": host}), 403, "--hosts NAME", code="foreign_site")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "10.0.0.7:80", "[::1]:8000", "[::1]"]
)
def test_localhost_and_addresses_are_this_machines_names(http, path, host):
    assert http.get(path, headers={"Host": host}).status_code == 200


def test_with_a_key_or_beyond_this_machine_every_name_is_taken_unless_some_are_given():
    other = {"Host": "box.example"}
    with serving(create_app(gpt(), TOKENIZER, api_key="k")) as url:
        assert httpx.get(f"{url}/health", headers=other).status_code == 200
    with serving(create_app(gpt(), TOKENIZER, hosts=["Box.example"])) as url:
        assert httpx.get(f"{url}/health", headers=other).status_code == 200
        assert httpx.get(f"{url}/health", headers={"Host": "x.example"}).status_code == 403
    with client() as talk:  # which comes in at no address of this machine
        assert talk.get("/health", headers=other).status_code == 200
    with client(hosts=["box.example"]) as talk:
        assert talk.get("/health", headers={"Host": "x.example"}).status_code == 403


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("origin", [FOREIGN, "null", "http://localhost:1", "https://127.0.0.1"])
def test_a_page_of_another_site_is_told_nothing(http, path, origin):
    for method in ("GET", "POST"):
        answer = http.request(method, path, headers={"Origin": origin})
        check_error(answer, 403, "--origins ORIGIN", code="foreign_site")
        assert not [name for name in answer.headers if name.startswith("access-control")]
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    preflight = http.options(path, headers=asked)
    assert preflight.status_code == 400 and "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize("path", PATHS)
def test_the_servers_own_page_is_served_and_nobody_else_is_let_in_by_that(http, path):
    own = str(http.base_url).rstrip("/")
    for headers in ({"Origin": own}, {"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"}):
        answer = http.get(path, headers=headers)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control-allow-origin")]


def test_a_configured_origin_may_use_the_api_and_reads_its_errors_too():
    wanted = "https://chat.example"
    with client(origins=[wanted], api_key="secret") as talk:
        asked = {
            "Origin": wanted,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        preflight = talk.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        talk.headers["Origin"] = wanted
        for answer in (preflight, complete(talk), talk.get("/health")):
            assert answer.headers["access-control-allow-origin"] == wanted
            assert "access-control-allow-credentials" not in answer.headers
        assert complete(talk).status_code == 401
        talk.headers["Authorization"] = "Bearer secret"
        assert complete(talk).status_code == 200
        check_error(talk.get("/health", headers={"Origin": FOREIGN}), 403, "--origins", code="foreign_site")


@pytest.mark.parametrize(
    "path",
    [
        "upload",
        "process_recording",
        "proxy=http://127.0.0.1/",
        "file=/etc/hostname",
        "file=http://127.0.0.1/",
        "component_server",
        "info",
        "run/send",
        "call/send",
        "vibe-edit",
        "stream/x",
        "deep_link",
    ],
)
def test_what_gradio_offers_and_the_page_does_not_use_is_closed(http, path):
    for method in ("GET", "POST"):
        files = {"files": ("a", b"a")} if method == "POST" else None
        check_error(http.request(method, f"/gradio_api/{path}", files=files), 404, "Not Found")


def test_the_page_does_not_hide_what_the_api_says_of_unknown_paths(http):
    check_error(http.get("/v1/nothing"), 404, "Not Found")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/"])
def test_a_probe_may_ask_for_the_head_alone(http, path):
    head = http.head(path)
    assert head.status_code == http.get(path).status_code == 200 and head.content == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": ("box:80",)}, "hosts: 'box:80' is no host name"),
        ({"hosts": ("http://box",)}, "is no host name"),
        ({"origins": ("chat.example",)}, "origins: 'chat.example' is no origin"),
        ({"origins": ("https://chat.example/",)}, "is no origin"),
        ({"origins": ("*",)}, "is no origin"),
    ],
    ids=str,
)
def test_names_and_origins_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)
    with pytest.raises(ValueError, match=message):
        create_app(gpt(), TOKENIZER, **options)
