"""Data card of a corpus: card.json and card.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dsv4.data.corpus.build import Made
from dsv4.data.corpus.debian import write_text
from dsv4.data.corpus.unique_lines import LEAST_CHARACTERS

_TEXT = f"""# Data card

Text of packages of Debian's {{suite}}, main section. The text is not part of this repository: a command makes it from
the mirror. Each package's debian/copyright is in `licences/`.

- HTML was reduced to its text without navigation by resiliparse, man pages were rendered by groff, POD by pod2text;
  info files, dictd dictionaries and Metamath databases were read as such (Metamath without proofs).
- A line of {LEAST_CHARACTERS} or more letters and digits is kept the first time only, within and across packages.
  Source files and dictionary entries are kept whole, each once. Shorter lines are kept: they are the form of a text.
- Held-out packages were read first: no such line of theirs is in the training texts.

"""


def write_card(folder: Path, made: Sequence[Made], suite: str, mirror: str) -> None:
    """Write card.json and card.md to the corpus's folder."""
    totals = {
        split: {
            "packages": sum(entry.split == split for entry in made),
            "documents": sum(entry.documents for entry in made if entry.split == split),
            "bytes": sum(entry.bytes for entry in made if entry.split == split),
        }
        for split in ("train", "validation")
    }
    card = {"suite": suite, "mirror": mirror, "totals": totals, "packages": [asdict(entry) for entry in made]}
    write_text(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    rows = [
        "| package | version | group | split | licences | documents | text bytes | unique bytes |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for entry in made:
        licences = ", ".join(entry.licences[:6]) + (", ..." if len(entry.licences) > 6 else "")
        rows.append(
            f"| {entry.name} | {entry.version} | {entry.group} | {entry.split} | {licences.replace('|', '/')} | "
            f"{entry.documents:,} | {entry.bytes_before:,} | {entry.bytes:,} |"
        )
    for split, sums in totals.items():
        rows.append(f"| all {split} | | | {split} | | {sums['documents']:,} | | {sums['bytes']:,} |")
    write_text(folder / "card.md", _TEXT.format(suite=suite) + "\n".join(rows) + "\n")
