"""edgekit llm compress"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.console import note, output, print_json, print_table, steps

if TYPE_CHECKING:
    from runtimes.llm.compression.plan import Job
    from runtimes.llm.compression.result import Compressed

EXAMPLE = """\b
Examples:
  edgekit llm compress model-f16.gguf -o small.gguf
  edgekit llm compress model-f16.gguf -o small.gguf --format q4_1 --text manual.txt
  edgekit llm compress model-f16.gguf -o small.gguf --bits 5 --max-divergence 0.05
  edgekit llm compress model-f16.gguf -o small.gguf --format q8_0 --dry-run
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("-o", "--output", "target", type=Path, required=True, help="The file to write, such as small.gguf.")
@click.option("--format", "form", default="q4_0", show_default=True, help="Of the layers: q4_0, q4_1 or q8_0.")
@click.option(
    "--method",
    help="nearest, gptq, awq or awq+gptq  [default: awq+gptq; for q8_0 nearest, which loses almost nothing].",
)
@click.option("--head", default="q8_0", show_default=True, help="Format of the embedding and the head.")
@click.option("--bits", type=float, help="Average bits of a layer's weight; the most sensitive layers get 8.")
@click.option(
    "--text",
    "files",
    type=Path,
    multiple=True,
    help="A text to calibrate and measure on; may be repeated  [default: texts that ship with edgekit and Python].",
)
@click.option("--tokens", type=int, default=4096, show_default=True, help="Of calibration, and of measurement.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens that the model reads at once.")
@click.option(
    "--max-divergence", type=float, default=0.1, show_default=True, help="KL divergence allowed, nats per token."
)
@click.option(
    "--max-perplexity", type=float, default=0.05, show_default=True, help="Relative growth of the perplexity allowed."
)
@click.option(
    "--min-agreement", type=float, default=0.85, show_default=True, help="Share of tokens whose successor must stay."
)
@click.option("--dry-run", is_flag=True, help="Print what would happen to each matrix, and do nothing.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compress(
    model: str,
    target: Path,
    form: str,
    method: str | None,
    head: str,
    bits: float | None,
    files: tuple[Path, ...],
    tokens: int,
    window: int,
    max_divergence: float,
    max_perplexity: float,
    min_agreement: float,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Store the weights of MODEL (a .gguf file) in fewer bits, and write a smaller .gguf file.

    edgekit compares the result with MODEL on text that the calibration has not seen. If the result loses more than
    allowed, layers are rolled back, the most damaged first, and the report gives the reason. A run that was stopped
    continues after its last finished layer.
    """
    from runtimes.llm.compression.job import run
    from runtimes.llm.compression.plan import prepare

    job = prepare(
        model,
        target,
        text=files,
        force=force,
        format=form.upper(),
        method=method or "",
        head=head.upper(),
        bits=bits,
        tokens=tokens,
        window=window,
    )
    if dry_run:
        _show_plan(job, as_json)
        return
    from runtimes.llm.compression.guard import Budget

    budget = Budget(max_divergence, max_perplexity, min_agreement)
    note(f"calibrating and measuring on {', '.join(job.texts.sources)}")
    with steps() as show:
        found = run(job, budget, show)
    if as_json:
        print_json(found.to_json())
    else:
        _show_result(found)


def _show_plan(job: Job, as_json: bool) -> None:
    from runtimes.llm.compression.plan import plan

    changes = plan(job)
    if as_json:
        print_json([{"tensor": item.tensor, "before": item.before, "after": item.after} for item in changes])
        return
    print_table(["tensor", "before", "after"], [[item.tensor, item.before, item.after] for item in changes])
    output.print("\nNothing was changed: this was a dry run.")


def _show_result(found: Compressed) -> None:
    rows = [
        [
            layer.number,
            ", ".join(layer.formats),
            f"{layer.source_bytes:,}",
            f"{layer.bytes:,}",
            "" if layer.damage is None else f"{layer.damage:.4f}",
            layer.reason,
        ]
        for layer in found.layers
    ]
    print_table(["layer", "formats", "bytes before", "after", "damage", "reason"], rows)
    quality, budget = found.quality, found.budget
    print_table(
        ["against the source", "measured", "allowed"],
        [
            ["KL divergence, nats per token", quality.divergence, f"{budget.divergence:g}"],
            ["perplexity, relative change", quality.perplexity, f"{budget.perplexity:g}"],
            ["same most probable token", quality.agreement, f"{budget.agreement:g}"],
        ],
        title="",
    )
    output.print(f"\n{found.path}: {found.source_bytes:,} to {found.bytes:,} bytes, {found.bits:.2f} bits per weight")
