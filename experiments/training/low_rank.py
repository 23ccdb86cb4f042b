"""Two other ways to fine-tune with a small optimizer state, to compare SGC with.

LoRA (arXiv 2106.09685): the weights stay, and each matrix gets a trained product of low rank.
GaLore (arXiv 2403.03507): the moments of a matrix live in a subspace from the gradient's SVD.
Both are short versions, written from the papers' formulas.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

class LowRankSum(nn.Module):
    """weight (m, n) -> weight + up @ down, with up (m, r), zero at first, and down (r, n)."""

    def __init__(self, weight, rank, rng):
        super().__init__()
        m, n = weight.shape
        self.up = nn.Parameter(weight.new_zeros(m, rank))
        self.down = nn.Parameter(torch.randn(rank, n, generator=rng).to(weight) * n ** -0.5)

    def forward(self, weight):
        return weight + self.up @ self.down

def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]

def add_lora(model, rank, seed):
    """Freeze the model and add LoRA to its linear layers -> the trained parameters."""
    rng = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    trained = []
    for linear in linear_layers(model):
        added = LowRankSum(linear.weight, rank, rng)
        parametrize.register_parametrization(linear, "weight", added)
        trained += [added.up, added.down]
    return trained

def merge_lora(model):
    """Make the sums of add_lora() plain weights again."""
    for linear in linear_layers(model):
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)

class GaLore(torch.optim.Optimizer):
    """AdamW in the subspace of the gradient's first `rank` singular vectors, for matrices.

    The subspace of the shorter side is computed anew every `period` steps; the moments stay as
    they are.
    """

    def __init__(self, params, lr=1e-2, rank=8, period=50, betas=(0.9, 0.98), eps=1e-8):
        defaults = dict(lr=lr, rank=rank, period=period, betas=betas, eps=eps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.shape[0] <= p.shape[1]:
                    change = self.projected(p.grad, self.state[p], group)
                else:
                    change = self.projected(p.grad.mT, self.state[p], group).mT
                p.add_(change, alpha=-group["lr"])

    def projected(self, gradient, state, group):
        """gradient (m, n), m <= n -> the change of the matrix, (m, n)."""
        if state.get("step", 0) % group["period"] == 0:
            left = torch.linalg.svd(gradient, full_matrices=False).U        # (m, m)
            state["subspace"] = left[:, :group["rank"]].clone()             # (m, r)
        subspace = state["subspace"]
        return subspace @ self.adam(subspace.mT @ gradient, state, group)

    def adam(self, gradient, state, group):
        """AdamW's change for this gradient, without the learning rate."""
        beta1, beta2 = group["betas"]
        state["step"] = state.get("step", 0) + 1
        first = state.setdefault("first", torch.zeros_like(gradient))
        second = state.setdefault("second", torch.zeros_like(gradient))
        first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square(), 1 - beta2)
        mean = first / (1 - beta1 ** state["step"])
        root = (second / (1 - beta2 ** state["step"])).sqrt()
        return mean / (root + group["eps"])
