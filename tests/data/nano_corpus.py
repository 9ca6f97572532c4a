"""A corpus of a few packages, as recipes/corpus.py lays it out."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

NOUNS = ["".join(letters) for letters in product("bdfk", "aeo", "lmnr", "de")]  # 96 words of four letters


def write_corpus(folder: Path) -> Path:
    """Write the corpus to `folder`; returns it."""
    wordnet = [f"{noun}\n    n 1: a small tool for the {noun[::-1]} [syn: {{{noun}}}]\n" for noun in NOUNS]
    wordnet += [
        'glorp\n    v 1: move slowly and with care; "he glorped"\n    2: stay\n',
        "two words\n    n 1: no single word\n",
    ]
    foldoc = [
        "widget\n\n   <jargon> A part of a {window} that one can press.  More text.\n",
        "many\n\n   1. <x> One.\n\n   2. Two.\n",
    ]
    page = "frob(1)   frob(1)\n\nNAME\n       frob, frobber - turn the handle of a machine\n\nSYNOPSIS\n"
    parts = {
        "train/dictionaries/dict-wn": wordnet,
        "train/dictionaries/dict-foldoc": foldoc,
        "train/dictionaries/dict-vera": ["ABC\n       Always Be Careful (network, USA)\n"],
        "train/dictionaries/dict-elements": ["tin\nSymbol: Sn\nSoft and silvery metallic element. Found in ore.\n"],
        "train/manuals/manpages": [page],
        "train/prose/book": [
            f"Chapter {n}.\nThe {NOUNS[n]} is used by all of them,\nand so they went on.\n" * 8 for n in range(40)
        ],
        "validation/prose/other": [f"Part {n}: the {NOUNS[n]} again.\n" * 3 for n in range(20)],
    }
    for name, texts in parts.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder
