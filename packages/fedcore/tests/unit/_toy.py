"""Small clients and models for the unit tests."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def clients(sizes=(7, 12, 5, 9), inputs=6, classes=3, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    data = []
    for size in sizes:
        x = torch.randn(size, inputs, generator=draw, dtype=dtype)
        data.append(TensorDataset(x, torch.randint(classes, (size,), generator=draw)))
    return data


def mlp(inputs=6, hidden=5, classes=3, seed=1, dropout=0.0):
    torch.manual_seed(seed)
    parts = [nn.Linear(inputs, hidden), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*parts, nn.Linear(hidden, classes))


class Normed(nn.Module):
    """BatchNorm (buffers, a counter), a frozen layer, tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.frozen(self.norm(self.again(torch.tanh(self.first(x))))))
