"""Message parts other than text: text documents are read, parts that the model cannot see are refused.

deepseek-recipe would replace some of them with a note, and the model would answer without having seen them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json, json_objects

# Type of a part -> its name in the refusal.
_UNSEEN = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "input_audio", "audio_url"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("file", "input_file", "container_upload"), "file"),
}


def refuse_parts(request: Json) -> None:
    """RequestError 400, with its place, for the first part that the model cannot see."""
    for place, part in _parts(request):
        kind = part.get("type")
        unseen = _UNSEEN.get(kind) if isinstance(kind, str) else None
        if unseen is not None:
            raise RequestError(400, f"This model does not support {unseen} ({place})", param=place)
        if kind == "document" and _text_of(part) is None:
            source = part.get("source")
            form = cast(Json, source).get("type") if isinstance(source, dict) else None
            raise RequestError(
                400,
                f"This model does not support document with source {form!r} ({place}); supported: text, or content of "
                "text blocks",
                param=place,
            )


def read_documents(request: Json) -> None:
    """Replaces documents and search results with text blocks, in messages and in tool results."""
    for message in json_objects(request.get("messages")):
        _read_blocks(message)
        for block in json_objects(message.get("content")):
            if block.get("type") == "tool_result":
                _read_blocks(block)


def _read_blocks(owner: Json) -> None:
    content = owner.get("content")
    if isinstance(content, list):
        owner["content"] = [_as_text(block) for block in cast("list[object]", content)]


def _as_text(block: object) -> object:
    if not isinstance(block, dict):
        return block
    text = _text_of(cast(Json, block))
    return cast(Json, block) if text is None else {"type": "text", "text": text}


def _text_of(block: Json) -> str | None:
    """Title, context and text of a document or search result; None for any other block."""
    kind, source = block.get("type"), block.get("source")
    if kind == "document" and isinstance(source, dict):
        fields = cast(Json, source)
        body = fields.get("data") if fields.get("type") == "text" else None
        if fields.get("type") == "content":
            body = _joined(fields.get("content"))
        head = (block.get("title"), block.get("context"))
    elif kind == "search_result":
        body = _joined(block.get("content"))
        head = (block.get("title"), source)
    else:
        return None
    if not isinstance(body, str):
        return None
    return "\n\n".join([*(text for text in head if isinstance(text, str) and text), body])


def _joined(content: object) -> str | None:
    """Text of a string or of a list of text blocks; None for other content."""
    if isinstance(content, str):
        return content
    blocks = json_objects(content)
    texts = [block.get("text") for block in blocks if block.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    whole = isinstance(content, list) and len(strings) == len(cast("list[object]", content))
    return "\n\n".join(strings) if whole else None


def _parts(request: Json) -> Iterator[tuple[str, Json]]:
    """Every part of system, messages and input items with its place, parts inside tool results included."""
    yield from _inside(request.get("system"), "system")
    messages = request.get("messages")
    for index, message in enumerate(cast("list[object]", messages) if isinstance(messages, list) else []):
        if isinstance(message, dict):
            yield from _inside(cast(Json, message).get("content"), f"messages[{index}].content")
    items = request.get("input")
    for index, item in enumerate(cast("list[object]", items) if isinstance(items, list) else []):
        for field in ("content", "output") if isinstance(item, dict) else ():
            yield from _inside(cast(Json, item).get(field), f"input[{index}].{field}")


def _inside(content: object, place: str) -> Iterator[tuple[str, Json]]:
    for index, item in enumerate(cast("list[object]", content) if isinstance(content, list) else []):
        if not isinstance(item, dict):
            continue
        part, here = cast(Json, item), f"{place}[{index}]"
        yield here, part
        if part.get("type") == "tool_result":
            yield from _inside(part.get("content"), f"{here}.content")
