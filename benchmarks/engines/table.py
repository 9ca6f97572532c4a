"""Rows of one model -> the table in the terminal."""

from __future__ import annotations

from rich.table import Table

from benchmarks.comparison.rows import Row
from benchmarks.engines.aims import AIMS, Aim, find, ratio, verdict
from benchmarks.engines.outcome import Outcome

# unit of a row -> (divisor, unit, digits) in the table
_UNITS = {
    "tok/s": (1.0, "tok/s", 1),
    "bytes": (1e9, "GB", 3),
    "bytes/s": (1e9, "GB/s", 1),
    "FLOP/s": (1e9, "GFLOP/s", 1),
}


def title(outcome: Outcome, threads: int, gated: bool) -> str:
    agree = "" if outcome.deviation is None else f"; logits agree to {outcome.deviation:.0e}"
    shape = f"{outcome.common()['parameters'] / 1e6:,.1f}M parameters, {outcome.common()['dtype']}, {threads} threads"
    return f"\n{outcome.model}: {shape}; medians ± half the range{agree}" + (
        "" if gated else "; UNGATED: tests not run"
    )


def make_table(outcome: Outcome) -> Table:
    if outcome.model == "million":
        return _by_length(outcome)
    peers = {row.peer.split()[0] for row in outcome.rows}
    return _versus(outcome) if len(peers) > 1 else _alone(outcome)


def figure(row: Row | None) -> str:
    """Median, and half the range of the rounds in percent of it."""
    if row is None:
        return "-"
    divisor, unit, digits = _UNITS[row.unit]
    value = row.median / divisor
    spread = f" ±{50 * row.spread:.0f} %" if len(row.samples) > 1 else ""
    return f"{value:,.{digits if value < 1000 else 0}f} {unit}{spread}"


def _versus(outcome: Outcome) -> Table:
    """One line a measure: every contender, times its floor, and dsv4's ratio to it; llama.cpp at its best."""
    rows = outcome.rows
    peers = [peer for peer in ("llama.cpp", "transformers") if any(row.peer.startswith(peer) for row in rows)]
    out = _columns("measure", "dsv4", "/floor", *(name for peer in peers for name in (peer, "/floor", "ratio")), "own")
    for measure, tokens in _keys(rows):
        ours, aim = find(rows, "dsv4", measure, tokens), _aim(outcome, measure, tokens)
        cells = [f"{measure}, {tokens:,}", figure(ours), _floor(ours)]
        for peer in peers:
            theirs, times = find(rows, peer, measure, tokens), ratio(rows, peer, measure, tokens)
            cells += [figure(theirs), _floor(theirs), "" if times is None else f"{times:.2f} x"]
        out.add_row(*cells, _value(rows, aim) if aim and aim.against == "itself" else "", *_mark(rows, aim))
    return out


def _alone(outcome: Outcome) -> Table:
    """One line a measure of dsv4 beside its floor, which is what the machine can do."""
    rows = outcome.rows
    out = _columns("measure", "dsv4", "floor", "share")
    for row in rows:
        divisor, unit, _ = _UNITS[row.unit]
        share = f"{row.over_floor:.2f} x" if row.unit == "bytes" else f"{100 / row.over_floor:.0f} %"
        floor, aim = f"{row.floor / divisor:,.1f} {unit}", _aim(outcome, row.measure, row.tokens)
        best = row is find(rows, "dsv4", row.measure, row.tokens)  # the aim is the better numerics' to reach
        what = f"{row.peer}: {row.measure}, {row.tokens:,}"
        out.add_row(what, figure(row), floor, share, *(_mark(rows, aim) if best else ()))
    return out


def _by_length(outcome: Outcome) -> Table:
    """One line a length: the prompt up to there, decoding there, the peak so far beside the KV formula's figure."""
    rows = outcome.rows
    out = _columns("tokens", "prefill", "decode", "peak memory", "KV formula", "above it")
    for tokens in sorted({row.tokens for row in rows}):
        prefill, decode, peak = (find(rows, "dsv4", what, tokens) for what in ("prefill", "decode", "peak memory"))
        assert peak is not None
        cells = [f"{tokens:,}", figure(prefill), figure(decode), figure(peak), f"{peak.floor / 1e9:.3f} GB"]
        above = f"{(peak.median - peak.floor) / 1e9:.3f} GB"
        out.add_row(*cells, above, *_mark(rows, _aim(outcome, "peak memory", tokens)))
    return out


def _columns(first: str, *names: str) -> Table:
    out = Table()
    out.add_column(first, no_wrap=True)
    for name in (*names, "aim"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("", no_wrap=True)
    return out


def _keys(rows: list[Row]) -> dict[tuple[str, int], None]:
    return dict.fromkeys((row.measure, row.tokens) for row in rows)


def _aim(outcome: Outcome, measure: str, tokens: int) -> Aim | None:
    key = (outcome.model, measure, tokens)
    return next((aim for aim in AIMS if (aim.model, aim.measure, aim.tokens) == key), None)


def _value(rows: list[Row], aim: Aim) -> str:
    reached = verdict(rows, aim)
    return "" if reached is None else f"{100 * reached[0]:.0f} %"


def _mark(rows: list[Row], aim: Aim | None) -> tuple[str, str]:
    reached = verdict(rows, aim) if aim else None
    mark = "" if reached is None else "[green]met[/]" if reached[1] else "[red]missed[/]"
    return aim.text() if aim else "", mark or ("not measured" if aim else "")


def _floor(row: Row | None) -> str:
    return "" if row is None else f"{row.over_floor:.1f} x"


def notes(outcome: Outcome) -> list[str]:
    """Which of llama.cpp's settings was its best, what failed, what the machine can do."""
    lines: list[str] = []
    best = [(key, find(outcome.rows, "llama.cpp", *key)) for key in _keys(outcome.rows) if key[0] != "peak memory"]
    named = [f"{measure} {tokens:,}: {row.peer.split(' ', 1)[1]}" for (measure, tokens), row in best if row]
    if named:
        lines.append("llama.cpp at its best (linears, fa: flash attention on): " + ", ".join(named))
    lines += [f"failed: {text}" for text in outcome.failures]
    for row in outcome.rows:
        if "prefill_s" in row.extra:
            cache = sum(row.extra["cache_num_bytes"].values()) / 1e9
            lines.append(
                f"{row.tokens:,} tokens read in {row.extra['prefill_s']:,.0f} s; cache.num_bytes() {cache:.3f} GB: "
                + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in row.extra["cache_num_bytes"].items())
            )
    giga = {name: value / 1e9 for name, value in outcome.ceilings.items()}
    lines.append(
        f"Machine: copy {giga['copy_bytes_per_s']:.1f} GB/s, read {giga['read_bytes_per_s']:.1f} GB/s, matrix product "
        f"fp32 {giga['fp32_flop_per_s']:.0f} and BF16 {giga['bf16_flop_per_s']:.0f} GFLOP/s. Floors: a token's weights "
        "as stored read once (decode), operations at the faster rate (prefill), stored weights (memory)."
    )
    return lines
