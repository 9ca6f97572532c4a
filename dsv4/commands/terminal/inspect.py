"""The summary as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from dsv4.commands.terminal.amounts import counted
from dsv4.commands.terminal.wide_table import figures_table
from dsv4.config import ModelConfig

_LABELS = {
    "embed": "embedding",
    "head": "head",
    "norms": "norms",
    "mhc": "hyper-connections",
    "attention": "attention",
    "compressors": "compressors",
    "indexers": "indexers",
    "router": "router",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "mtp_projections": "e_proj, h_proj",
}


def print_summary(name: str, config: ModelConfig, report: dict[str, Any]) -> None:
    """Print the tables of `report`: analysis.summary(config), with "stored" if the model's files were read."""
    title = f"[bold]{name}[/bold]  [dim]{_schedule(config)}[/dim]"
    left = Group(_parameters(report["parameters"]), "")
    right = Group(_checkpoint(report["checkpoint"], report.get("stored")), "", _cache(report), "", _flops(report))
    Console().print(Panel(Columns([left, right], padding=(0, 4)), title=title, expand=False, padding=(1, 2)))


def _schedule(config: ModelConfig) -> str:
    kinds = ((kind.upper(), len(config.layers_of_kind(kind))) for kind in ("swa", "csa", "hca"))
    parts = [f"{count} {kind}" for kind, count in kinds if count]
    return f"{config.num_hidden_layers} layers: {', '.join(parts)}; {config.num_nextn_predict_layers} MTP"


def _table(title: str, *columns: str) -> Table:
    table = figures_table(*columns)
    table.title, table.title_justify, table.title_style, table.pad_edge = title, "left", "bold cyan", True
    return table


def _parameters(counts: dict[str, Any]) -> Table:
    table = _table("Parameters", "", "main", "MTP")
    for key, label in _LABELS.items():
        table.add_row(
            label,
            f"{counts['main'][key]:,}" if counts["main"][key] else "",
            f"{counts['mtp'][key]:,}" if counts["mtp"][key] else "",
        )
    table.add_section()
    table.add_row("[bold]total[/bold]", f"[bold]{counts['total']:,}[/bold]", f"{sum(counts['mtp'].values()):,}")
    table.add_row("total with MTP", f"{counts['total_with_mtp']:,}", "")
    table.add_row("[bold]active a token[/bold]", f"[bold]{counts['active']:,}[/bold]", f"{counts['mtp_active']:,}")
    table.add_row("... with the embedding", f"{counts['active_with_embed']:,}", "")
    return table


def _checkpoint(checkpoint: dict[str, Any], stored: dict[str, Any] | None) -> Table:
    table = _table(f"Checkpoint, layout {checkpoint['layout']}", "dtype", "tensors", "bytes")
    for dtype, tensors in sorted(checkpoint["by_dtype"].items()):
        table.add_row(dtype, f"{tensors:,}", f"{checkpoint['bytes_by_dtype'][dtype]:,}")
    table.add_section()
    table.add_row(
        "[bold]all[/bold]", f"[bold]{checkpoint['tensors']:,}[/bold]", f"[bold]{checkpoint['bytes']:,}[/bold]"
    )
    if stored is not None:
        table.add_row(f"in {counted(stored['files'], 'file')}", f"{stored['tensors']:,}", f"{stored['bytes']:,}")
    return table


def _cache(report: dict[str, Any]) -> Table:
    table = _table("KV cache, FP8 with FP4 index", "context", "bytes")
    table.add_row("each token", f"{report['kv_bytes_per_token']:,.2f}")
    for context, size in report["kv_bytes"].items():
        table.add_row(f"{int(context):,}", f"{size:,}")
    table.add_row("fixed windows + states", f"{sum(report['state_bytes'].values()):,}")
    table.add_row("of V3.2 at 1,048,576", f"[bold]{report['vs_v3_2']['kv_ratio_1m']:.1%}[/bold]")
    return table


def _flops(report: dict[str, Any]) -> Table:
    table = _table("Decode, FLOPs a token", "context", "plain", "FP8-equivalent")
    for context, flops in report["decode_flops"].items():
        table.add_row(f"{int(context):,}", f"{flops:.3e}", f"{report['decode_flops_eq_fp8'][context]:.3e}")
    table.add_row("of V3.2 at 1,048,576", "", f"[bold]{report['vs_v3_2']['flops_ratio_1m']:.1%}[/bold]")
    return table
