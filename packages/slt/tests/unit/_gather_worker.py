"""One rank of the gathering test: its own rows, the gradients averaged over ranks, written to a file."""

import sys

import torch
import torch.distributed as dist
from slt.ops.contrastive import contrastive_loss, gather_with_gradient

COUNTS = (3, 1)
IDS = torch.tensor([4, 9, 4, 9])


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x, y, ids, variant):
        a, b = gather_with_gradient(x @ self.first), gather_with_gradient((y @ self.second).tanh())
        return contrastive_loss(a, b, self.scale, variant, gather_with_gradient(ids))


def data():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(4, width, generator=generator, dtype=torch.float64) for width in (5, 6))


def gradients(module, *batch):
    result = {}
    for variant in ("infonce", "gfslt", "multi"):
        module.zero_grad()
        loss = module(*batch, variant)
        loss.backward()
        result[variant] = {name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters()}
        result[variant]["loss"] = loss.detach()
    return result


def averaged(found):
    """What DistributedDataParallel does to gradients."""
    for values in found.values():
        for value in values.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return found


def main(rank, store, out, wrap):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(COUNTS))
    rows = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    x, y = data()
    if wrap:
        found = gradients(torch.nn.parallel.DistributedDataParallel(Pair()), x[rows], y[rows], IDS[rows])
    else:
        found = averaged(gradients(Pair(), x[rows], y[rows], IDS[rows]))
    nothing = gather_with_gradient(torch.full((0 if rank == 0 else 2, 3), 7.0))
    torch.save({"gradients": found, "uneven": nothing}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "ddp")
