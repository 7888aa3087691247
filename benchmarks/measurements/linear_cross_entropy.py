"""The fused loss of the head beside torch's own `linear_cross_entropy`: why ours stays.

    python -m benchmarks.measurements.linear_cross_entropy [--rows 256] [--hidden 768] [--classes 50257] [--width 16]

Both compute loss and gradients of the shortcut's design `[rows, K]` and table `[K, classes]` beside a frozen head.
torch's function knows one linear layer: the head's weight and the table are put side by side for it, and so are
features and design, which leaves it to compute gradients of the frozen weight and the features as well. CPU time, one
thread, alternating; the differences of loss and gradients are printed, too.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lreg_peft.core.fused_loss import fused_cross_entropy


def ours(base: nn.Linear, features: Tensor, targets: Tensor, design: Tensor, table: Tensor) -> Tensor:
    return fused_cross_entropy(base, features, targets, design, table)


def by_torch(chunked: bool) -> Callable[..., Tensor]:
    options = nn.LinearCrossEntropyOptions() if chunked else None

    def loss(base: nn.Linear, features: Tensor, targets: Tensor, design: Tensor, table: Tensor) -> Tensor:
        weight = torch.cat((base.weight, table.T), dim=1)
        inputs = torch.cat((features, design), dim=1)
        return F.linear_cross_entropy(inputs, weight, targets, options=options)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 256), ("hidden", 768), ("classes", 50257), ("width", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = nn.Linear(options.hidden, options.classes, bias=False).requires_grad_(False)
    features, targets = torch.randn(options.rows, options.hidden), torch.randint(options.classes, (options.rows,))
    design = torch.randn(options.rows, options.width, requires_grad=True)
    table = (0.01 * torch.randn(options.width, options.classes)).requires_grad_()
    ways = {"fused_cross_entropy": ours, "torch, chunked": by_torch(True), "torch, reference": by_torch(False)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            design.grad = table.grad = None
            began = time.process_time()
            loss = way(base, features, targets, design, table)
            loss.backward()
            seconds[name].append(time.process_time() - began)
            results[name] = loss.detach(), design.grad, table.grad
    reference = results["torch, reference"]
    own = statistics.median(seconds["fused_cross_entropy"])
    for name, values in seconds.items():
        worst = [f"{(a - b).abs().max():.1e}" for a, b in zip(results[name], reference, strict=True)]
        median = statistics.median(values)
        print(f"{name:22} {median:7.3f} s, {median / own:5.2f} of ours; loss, d design, d table differ by {worst}")


if __name__ == "__main__":
    main()
