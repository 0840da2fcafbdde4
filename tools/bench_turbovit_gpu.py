"""Time the networks of bench_turbovit.py on a GPU: one call, some minutes.

    python tools/bench_turbovit_gpu.py envelope --peers FOLDER --json turbovit_gpu.json

torch in float16 at batch 1, 16 and 256: called as it is, which launches each kernel from Python, and replayed as a CUDA
graph, which launches all of them at once; and ONNX Runtime in float32 if its CUDA provider is here. All in turns. The
paper's ratio of 3.21 to FasterViT-0 is of another GPU. `--device cpu` tries the program without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bench_turbovit import IMAGE, PAPER, bars, found_networks, graph, networks_of
from peer_networks import use
from torch import nn

from edgekit.cost.timing import Timed, in_turns, timed


def eager(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a call that ends when the GPU has."""

    def call() -> None:
        with torch.inference_mode():
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return call


def replayed(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a call of the network as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured), torch.inference_mode():
        model(images)

    def call() -> None:
        captured.replay()
        torch.cuda.synchronize()

    return call


def in_onnxruntime(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a call of ONNX Runtime's CUDA provider, with the images on the GPU."""
    session = onnxruntime.InferenceSession(graph(model, 17).SerializeToString(), providers=["CUDAExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("ONNX Runtime took another provider than CUDA")
    binding = session.io_binding()
    binding.bind_ortvalue_input("image", onnxruntime.OrtValue.ortvalue_from_numpy(images.numpy(), "cuda", 0))
    binding.bind_output("logits", "cuda")
    return functools.partial(session.run_with_iobinding, binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="the folder of a finished search, such as --preset turbovit-this-cpu")
    parser.add_argument("--peers", type=Path, required=True, help="the folder that timm and fastervit are in")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 16, 256))
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls for each network and way")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; `--device cpu` tries the program without one")
    versions = use(options.peers)
    found, study = found_networks(options.study)
    models = networks_of(found)
    has_provider = on_gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    dtype = torch.float16 if on_gpu else torch.float32
    rows = []
    for batch in options.batch:
        images = torch.randn(batch, 3, IMAGE, IMAGE)
        ways: dict[str, dict[str, Callable[[], object]]] = {"torch, called": {}}
        for name, model in models.items():
            ready, given = model.to(options.device, dtype), images.to(options.device, dtype)
            ways["torch, called"][name] = eager(ready, given)
            if on_gpu:
                ways.setdefault("torch, CUDA graph", {})[name] = replayed(ready, given)
        for way, calls in ways.items():
            rows.append(row(way, batch, calls, options.seconds))
        if has_provider:
            cpu = {name: model.to("cpu", torch.float32) for name, model in models.items()}
            calls = {name: in_onnxruntime(model, images) for name, model in cpu.items()}
            rows.append(row("ONNX Runtime, CUDA", batch, calls, options.seconds))
    if options.json:
        content: dict[str, Any] = {
            "machine": {"gpu": torch.cuda.get_device_name() if on_gpu else "none"}, "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__, **versions, "study": study["study"], "dtype": str(dtype),
            "keys": {name: list(item.depths) for name, item in found.items()}, "paper": PAPER, "times": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def row(way: str, batch: int, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Return the median milliseconds of each call, in turns, and the verdicts at batch 1."""
    clocks: list[Timed] = [timed(call, time.perf_counter) for call in calls.values()]
    taken = in_turns(clocks, seconds=seconds * len(clocks), least=11, most=2000, warmup=3)
    middle = 1e3 * np.median(taken[:, :, 0], axis=0)
    times = {name: round(float(value), 4) for name, value in zip(calls, middle, strict=True)}
    found = {"way": way, "batch": batch, "milliseconds": times, **({"bars": bars(times)} if batch == 1 else {})}
    print(json.dumps(found, indent=1), flush=True)
    return found


if __name__ == "__main__":
    main()
