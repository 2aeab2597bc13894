"""A small PyTorch model learns the same compiled and eager."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import parallax_core.frameworks.torch as plt

STEPS, LENGTH, HEADS, HEAD_DIM, WORDS = 200, 24, 2, 8, 12
WIDTH = HEADS * HEAD_DIM


@pytest.fixture(autouse=True)
def _one_thread():
    """PyTorch's own threads spin while they wait, which costs these small tensors more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Layer(nn.Module):
    """Parallax attention and a multilayer perceptron, each behind a norm and beside a skip."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        q, r, k, v = self.project(self.norms[0](x)).unflatten(-1, (4, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.out(plt.parallax_attention(q, r, k, v).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Two layers that predict the next token."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers, self.head = nn.Sequential(Layer(), Layer()), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight
        logits = self.head(self.layers(x))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(compiled):
    """The losses of learning to repeat a random half of each sequence."""
    torch.manual_seed(0)
    model = Model()
    step = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(STEPS):
        half = torch.randint(WORDS, (16, LENGTH // 2))
        loss = step(half.repeat(1, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_model_trains_to_the_same_loss_compiled_and_eager():
    eager, compiled = train(False), train(True)
    assert eager[-1] < 0.8 * eager[0]
    # The compiler adds in another order outside of the attention, and 200 steps amplify that.
    assert abs(eager[-1] - compiled[-1]) < 1e-4
