"""Peak memory and time of a training step, autochunk next to Inductor, in one interleaved run.

    python examples/measure.py head                  a head and its loss, 2048 × 512 × 128256
    python examples/measure.py head --dtype bfloat16
    python examples/measure.py model                 a Hugging Face Llama of 2 layers, labels inside
    python examples/measure.py loop                  the same, its loss outside of the compiled one

The methods take turns in one process. The peak is that of one forward and backward pass above what
the process held before it: on a CPU from the kernel's high-water mark (with
``MALLOC_MMAP_THRESHOLD_`` fixed, so that the heap has no holes), on CUDA from the allocator.
Exits with 1 if losses or gradient norms disagree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate

from autochunk.bench.memory import MIB, PEAK_ENVIRONMENT, PeakMemory


def main() -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["head", "model", "loop"])
    parser.add_argument(
        "--rows", type=int, default=2048, help="tokens (model, loop: in 2 sequences)"
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each method")
    args = parser.parse_args()
    if not args.device.startswith("cuda") and not PEAK_ENVIRONMENT.keys() <= os.environ.keys():
        # Holes in the C library's heap would count as memory of a step; only a new process obeys.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PEAK_ENVIRONMENT})
    torch.manual_seed(0)
    steps, parameters = {"head": head, "model": model, "loop": loop}[args.what](args)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, tuple[float, float]] = {}
    memory = PeakMemory(torch.device(args.device))
    for repeat in range(args.steps + 1):  # the first compiles
        for name, step in steps.items():
            for parameter in parameters:
                parameter.grad = None
            memory.start()
            begin = time.perf_counter()
            loss = step()
            loss.backward()
            synchronize(args.device)
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
                peaks[name].append(memory.stop()[0] / MIB)
            norm = parameters[0].grad.float().norm().item()
            results[name] = (loss.item(), norm)
            del loss
    first = next(iter(steps))
    rows = []
    for name in steps:
        middle = statistics.median(seconds[name])
        rows.append(
            [
                name,
                f"{results[name][0]:.6f}",
                f"{max(peaks[name]):.0f}",
                f"{max(peaks[name]) / max(peaks[first]):.3f}",
                f"{middle:.2f}",
                f"{min(seconds[name]):.2f} – {max(seconds[name]):.2f}",
                f"{middle / statistics.median(seconds[first]):.2f}",
            ]
        )
    print(
        f"{args.what}: {args.rows} × {args.hidden} × {args.vocabulary}, {args.dtype}, {args.device}"
    )
    headers = ["method", "loss", "peak MiB", "ratio", "median s", "range s", "ratio"]
    print(tabulate(rows, headers, disable_numparse=True))
    tolerance = 1e-5 if args.dtype == "float32" else 5e-3
    for name, (loss, norm) in results.items():
        reference_loss, reference_norm = results[first]
        if not (
            abs(loss - reference_loss) <= tolerance * abs(reference_loss)
            and abs(norm - reference_norm) <= 10 * tolerance * abs(reference_norm)
        ):
            print(f"{name} disagrees with {first}: loss {loss}, gradient norm {norm}")
            return 1
    return 0


def head(args):
    """A linear layer and cross entropy."""
    dtype, device = getattr(torch, args.dtype), args.device
    x = torch.randn(args.rows, args.hidden, device=device).to(dtype).requires_grad_()
    w = (torch.randn(args.vocabulary, args.hidden, device=device) * 0.02).to(dtype).requires_grad_()
    y = torch.randint(0, args.vocabulary, (args.rows,), device=device)

    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w).float(), y)

    compiled = {name: torch.compile(loss, backend=name) for name in ("inductor", "autochunk")}
    return {name: (lambda f=f: f(x, w, y)) for name, f in compiled.items()}, [w, x]


def llama(args):
    """A Hugging Face Llama, and tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
    )
    net = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    return net, torch.randint(0, args.vocabulary, (2, args.rows // 2), device=args.device)


def model(args):
    """A Llama with labels, and for Inductor also a step that returns nothing but the loss."""
    net, ids = llama(args)

    def loss_only(ids):
        return net(input_ids=ids, labels=ids).loss

    compiled = {name: torch.compile(net, backend=name) for name in ("inductor", "autochunk")}
    alone = torch.compile(loss_only, backend="inductor")
    steps = {
        "inductor": lambda: compiled["inductor"](input_ids=ids, labels=ids).loss,
        "inductor, loss only": lambda: alone(ids),
        "autochunk": lambda: compiled["autochunk"](input_ids=ids, labels=ids).loss,
    }
    return steps, list(net.parameters())


def loop(args):
    """Most training loops: the model is compiled, the loss is plain Python."""
    net, ids = llama(args)
    labels = ids.roll(-1, 1)
    compiled = {name: torch.compile(net, backend=name) for name in ("inductor", "autochunk")}

    def loss(logits):
        return F.cross_entropy(logits.view(-1, args.vocabulary), labels.view(-1))

    compiled_loss = torch.compile(loss, backend="autochunk")
    steps = {
        "inductor": lambda: loss(compiled["inductor"](input_ids=ids).logits),
        "autochunk": lambda: loss(compiled["autochunk"](input_ids=ids).logits),
        "autochunk, loss compiled": lambda: compiled_loss(compiled["autochunk"](ids).logits),
    }
    return steps, list(net.parameters())


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
