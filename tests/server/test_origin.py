"""A web page of another origin cannot use the server: Host, Origin and content type."""

import json

import pytest

from dsv4.server.origin import OriginPolicy, split_host

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


def post(server, path: str = CHAT, **headers: str):
    return server.http().post(path, json=BODY, headers=headers)


def port(server) -> str:
    return server.url.rpartition(":")[2]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", "", "a b"]
)
def test_a_rebound_name_reaches_nothing(server, host: str) -> None:
    """DNS rebinding: the page's own name resolves to the server, so Host and Origin agree, but are not the server's."""
    host = host.format(port=port(server))
    for path in (CHAT, "/v1/messages", "/v1/messages/count_tokens"):
        answer = post(server, path, Host=host, Origin=f"http://{host}")
        assert answer.status_code == 403 and "--allowed-host" in answer.json()["error"]["message"]
    for path in ("/", "/v1/models", "/health"):
        assert server.http().get(path, headers={"Host": host}).status_code == 403
    assert server.model.prompts == []


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "chat.localhost", "LOCALHOST.", "127.0.0.2"],
)
def test_loopback_names_are_the_servers_own(server, host: str) -> None:
    assert post(server, Host=host.format(port=port(server))).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://evil.example:{port}", "null", "http://localhost:1", "http://localhost", "file://"],
)
def test_a_page_of_another_origin_is_refused(server, origin: str) -> None:
    origin = origin.format(port=port(server))
    for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        answer = post(server, Origin=origin, **{"Content-Type": content_type})
        assert answer.status_code == 403 and "--allowed-origin" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = server.http().options(CHAT, headers=preflight)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert server.model.prompts == []


def test_a_sandboxed_frame_reads_the_page_s_files_and_nothing_else(server) -> None:
    http, null = server.http(), {"Origin": "null"}
    answer = http.get("/web/js/diagram-frame.js", headers=null)
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    assert http.get("/v1/models", headers=null).status_code == 403
    assert http.get("/", headers=null).status_code == 403
    assert http.post("/web/js/diagram-frame.js", headers=null).status_code == 403
    assert http.get("/web/js/app.js", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_request_of_another_site_without_an_origin_is_refused(server) -> None:
    assert post(server, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert post(server, **{"Sec-Fetch-Site": "same-origin"}).status_code == 200
    # A link from another site to the page is a harmless GET.
    assert server.http().get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_the_servers_own_page_may_use_it_by_every_loopback_name(server) -> None:
    for name in ("127.0.0.1", "localhost", "[::1]"):
        assert post(server, Origin=f"http://{name}:{port(server)}").status_code == 200


def test_listed_hosts_and_origins_pass_and_pages_may_read_the_answers(model, serve) -> None:
    listed = {"allowed_hosts": ["chat.example"], "allowed_origins": ["https://pages.example"]}
    with serve(model, **listed, api_keys=["sk-1"]) as served:
        key = {"Authorization": "Bearer sk-1"}
        assert post(served, Host="chat.example:443", Origin="https://chat.example", **key).status_code == 200
        assert post(served, Host="other.example", **key).status_code == 403
        answer = post(served, Origin="https://pages.example", **key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://pages.example"
        assert post(served, Origin="https://pages.example").headers["access-control-allow-origin"]  # a 401 is read too
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = served.http().options(CHAT, headers={"Origin": "https://pages.example"} | asked)
        assert preflight.status_code == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert served.http().options(CHAT, headers={"Origin": "https://evil.example"} | asked).status_code == 403


def test_a_network_server_takes_programs_by_any_name_and_pages_by_its_own_names() -> None:
    policy = OriginPolicy(bound_host="0.0.0.0", loopback=False, allowed_hosts=("box.lan",))
    assert policy.host_error("dsv4:8000") is None  # a container by its service name
    assert policy.origin_error("http://192.168.1.5:8000", "192.168.1.5:8000") is None
    assert policy.origin_error("http://box.lan:8000", "box.lan:8000") is None
    assert policy.origin_error("http://localhost:8000", "127.0.0.1:8000") is None
    assert policy.origin_error("http://evil.example:8000", "evil.example:8000") is not None
    assert policy.origin_error("http://192.168.1.6:8000", "192.168.1.5:8000") is not None
    with_key = OriginPolicy(bound_host="0.0.0.0", loopback=False, needs_key=True)
    assert with_key.origin_error("https://chat.example", "chat.example") is None
    assert with_key.origin_error("https://evil.example", "chat.example") is not None


def test_a_star_disables_a_check() -> None:
    policy = OriginPolicy(allowed_hosts=("*",), allowed_origins=("*",))
    assert policy.host_error("evil.example") is None
    assert policy.origin_error("https://evil.example", "evil.example") is None


@pytest.mark.parametrize("host", ["http://a.example", "a.example:80", "a b", ""])
def test_a_host_that_cannot_be_allowed_is_named(host: str) -> None:
    with pytest.raises(ValueError, match=f"allowed host is '{host}'; allowed: a name or an address"):
        OriginPolicy(allowed_hosts=(host,))


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://a.example/path", ""])
def test_an_origin_that_cannot_be_allowed_is_named(origin: str) -> None:
    with pytest.raises(ValueError, match=f"allowed origin is '{origin}'; allowed: scheme://host"):
        OriginPolicy(allowed_origins=(origin,))


def test_hosts_are_split_as_browsers_write_them() -> None:
    assert split_host("LocalHost.:80") == ("localhost", 80)
    assert split_host("[::1]:8000") == ("::1", 8000)
    assert split_host("user@localhost") == (None, None)
    assert split_host("localhost:80:80") == (None, None)


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
    ],
)
def test_content_types_without_a_preflight_are_refused(server, kind: str) -> None:
    for path in (CHAT, "/v1/messages", "/v1/messages/count_tokens"):
        answer = server.http().post(path, content=json.dumps(BODY), headers={"Content-Type": kind})
        assert answer.status_code == 415 and answer.headers["x-should-retry"] == "false"
        assert "Send the header Content-Type: application/json" in answer.json()["error"]["message"]
    assert server.model.prompts == []


def test_curl_is_told_which_option_to_add(server) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = server.http().post(CHAT, content=json.dumps(BODY), headers=form)
    assert "curl: add -H 'Content-Type: application/json', or use --json instead of -d" in answer.text


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json", None]
)
def test_json_types_and_a_missing_type_are_accepted(server, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}  # requests.post(data="...") sends no Content-Type
    assert server.http().post(CHAT, content=json.dumps(BODY), headers=headers).status_code == 200
