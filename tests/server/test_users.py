"""Users of requests: the key that let it in, and the user that its body names."""

import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("keys", [[], ["key-a", "key-b"]])
def test_the_engine_is_told_the_key_that_was_checked_and_the_user(model, serve, keys: list[str], monkeypatch) -> None:
    with serve(model, api_keys=keys) as served:
        told, stream = [], served.engine.stream
        monkeypatch.setattr(served.engine, "stream", lambda *args: told.append(args[2]) or stream(*args))
        for key in ("key-a", "key-b"):
            headers = {"Authorization": f"Bearer {key}"}
            for path, extra in (
                ("/v1/chat/completions", {"user_id": "ann"}),
                ("/v1/messages", {"max_tokens": 9, "metadata": {"user_id": "ann"}}),
            ):
                assert served.http(headers=headers).post(path, json=CHAT | extra).status_code == 200
        names = ["key-a", "key-a", "key-b", "key-b"] if keys else [""] * 4
        assert told == [(name, "ann") for name in names]
