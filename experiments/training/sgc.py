"""Sparse gradient compression (SGC, arXiv 2502.00311): AdamW with moments in few dimensions.

We had the paper's abstract, not its full text. "Ours" marks what we chose, see docs/sgc.md.

Every parameter is cut into C chunks of n entries (the last one is padded with zeros). For the
gradient g (n,) of a chunk, the step number t computes

    h = the s largest entries of g, zero elsewhere          sparsify()
    p = A h                                                 A (k, n), p (k,)
    M = beta1 M + (1 - beta1) p                             the first moment, (k,)
    V = beta2 V + (1 - beta2) p * p                         the second moment, (k,)
    y = M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)
    x = an s-sparse vector with A x close to y              orthogonal_matching_pursuit()
    w = w - lr weight_decay w - lr sqrt(s / k) x

Ours: A has random signs / sqrt(k), so its columns have length 1; all chunks share it; every step
generates it anew. The factor sqrt(s / k), see SGC. And second="chunk", which replaces p * p in V by
its mean, one number per chunk. M is A m, where m is the moving mean of h. But y is A times a vector
only if sqrt(V) is the same for all k numbers. With V in R^k, y is only the signs of p in step 1.
Such a V does not know the large entries either: over random signs, every p_j^2 expects |h|^2 / k.
"""
import torch
import torch.nn.functional as F

from sentencekv import need

AT_ONCE = 256                           # chunks per call of OMP: bounds the memory of a step

def random_signs(k, n, seed, like):
    """The matrix A (k, n): independent signs / sqrt(k), of the dtype and device of `like`."""
    rng = torch.Generator().manual_seed(seed)           # on the CPU: the same A on every device
    bits = torch.randint(0, 2, (k, n), generator=rng)
    return (2 * bits - 1).to(like) * k ** -0.5

def chunks(g, n):
    """The entries of a tensor in rows of n, the last one padded with zeros: (C, n)."""
    return F.pad(g.flatten(), (0, -g.numel() % n)).view(-1, n)

def sparsify(g, s):
    """Keep the s largest magnitudes of each row of g (C, n); zero elsewhere.

    >>> sparsify(torch.tensor([[1., -3., 2.]]), 2).tolist()
    [[0.0, -3.0, 2.0]]
    """
    largest = g.abs().topk(s, dim=1).indices                            # (C, s)
    return torch.zeros_like(g).scatter(1, largest, g.gather(1, largest))

def orthogonal_matching_pursuit(A, y, s):
    """Sparse x with A x close to y, for all rows of y (C, k) at once.

    Returns the indices and the values of x, (C, s) each, and the residual y - A x, (C, k).
    A (k, n) has columns of length 1 (the atoms). Each of s rounds selects the atom with the
    largest correlation to the residual, and makes the residual orthogonal to it. The values solve
    the least squares problem on the selected atoms, by a QR decomposition that grows by one column
    per round. An atom that depends on those before it gets the value 0.
    """
    (C, k), residual = y.shape, y
    atoms = A.T.contiguous()                                            # (n, k)
    indices = torch.zeros(C, s, dtype=torch.long, device=y.device)
    Q = y.new_zeros(C, s, k)                                            # orthonormal rows
    R = y.new_zeros(C, s, s)                                            # selected atoms = R^T Q
    for i in range(s):
        correlation = (residual @ A).abs()                              # (C, n)
        correlation.scatter_(1, indices[:, :i], -1.0)                   # none is selected twice
        indices[:, i] = correlation.argmax(1)
        atom = atoms[indices[:, i]]                                     # (C, k)
        overlap = Q[:, :i] @ atom[:, :, None]                           # (C, i, 1)
        rest = atom - (Q[:, :i].mT @ overlap).squeeze(2)                # (C, k)
        length = rest.norm(dim=1, keepdim=True)                         # (C, 1)
        depends = length < 1e-4
        Q[:, i] = (rest / length).masked_fill(depends, 0)
        R[:, :i, i] = overlap.squeeze(2)
        R[:, i, i] = length.masked_fill(depends, 1).squeeze(1)
        along = (residual * Q[:, i]).sum(1, keepdim=True)               # (C, 1)
        residual = residual - along * Q[:, i]
    x = torch.linalg.solve_triangular(R, Q @ y[:, :, None], upper=True)     # (C, s, 1)
    return indices, x.squeeze(2), residual

class SGC(torch.optim.Optimizer):
    """AdamW with few numbers of state: for every chunk of a parameter, k + 1 or 2 k.

    k       numbers per chunk in the first moment
    s       entries of a chunk's gradient that are kept, and entries that a step changes
    chunk   entries per chunk
    second  "chunk": one number per chunk in the second moment; "number": k; seed: of A

    The factor sqrt(s / k): sqrt(V) is close to |h| / sqrt(k), so x to sqrt(k) m / |h|. If m is h,
    with s equal entries, those of x are sqrt(k / s). The factor makes them 1, as in AdamW.

    With A = identity, s = k = chunk and second = "number", this is AdamW. After step(), `residual`
    is |y - A x| / |y| over the last group. ValueError: the settings cannot work.
    """

    def __init__(self, params, lr=2e-2, k=61, s=6, chunk=256, second="chunk", seed=0,
                 betas=(0.5, 0.98), eps=1e-8, weight_decay=0.0):
        need(1 <= s <= k <= chunk, f"SGC needs 1 <= s <= k <= chunk, got s {s}, k {k}, chunk "
             f"{chunk}: OMP recovers at most k entries of a chunk from k numbers")
        need(second in ("chunk", "number"), f'second must be "chunk" or "number", got {second!r}')
        need(lr > 0 and all(0 <= beta < 1 for beta in betas),
             f"lr must be positive and betas in [0, 1), got {lr} and {betas}")
        super().__init__(params, dict(lr=lr, k=k, s=s, chunk=chunk, second=second, seed=seed,
                                      betas=betas, eps=eps, weight_decay=weight_decay))
        self.residual = 0.0

    def projection(self, group, like):
        return random_signs(group["k"], group["chunk"], group["seed"], like)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.step_group(params, group)

    def step_group(self, params, group):
        n, s = group["chunk"], group["s"]
        A = self.projection(group, params[0])                           # (k, n)
        targets = []
        for p in params:
            need(p.dtype in (torch.float32, torch.float64),
                 f"SGC needs float32 or float64, got {p.dtype}: train on float32 copies of weights")
            compressed = sparsify(chunks(p.grad, n), s) @ A.T           # (C, k)
            targets.append(self.normalize(self.state[p], compressed, group))
        y = torch.cat(targets)                                          # (all C, k)
        parts = [orthogonal_matching_pursuit(A, part, s) for part in y.split(AT_ONCE)]
        indices, values, residual = map(torch.cat, zip(*parts))
        self.residual = float(residual.norm() / y.norm().clamp(min=1e-30))
        counts = [len(target) for target in targets]
        for p, at, x in zip(params, indices.split(counts), values.split(counts)):
            change = x.new_zeros(len(x), n).scatter_(1, at, x)          # (C, n)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(change.flatten()[:p.numel()].view_as(p))

    def normalize(self, state, compressed, group):
        """Update the moments with compressed (C, k) -> -lr sqrt(s / k) y, (C, k)."""
        size = compressed                                               # (C, k)
        if group["second"] == "chunk":
            size = compressed.square().mean(1, keepdim=True).sqrt()     # (C, 1)
        if not state:
            state["step"] = 0
            state["first"] = torch.zeros_like(compressed)
            state["second"] = torch.zeros_like(size)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        M, V = state["first"], state["second"]
        M.lerp_(compressed, 1 - beta1)
        V.mul_(beta2).addcmul_(size, size, value=1 - beta2)
        root = V.sqrt() / (1 - beta2 ** state["step"]) ** 0.5 + group["eps"]
        scale = -group["lr"] / (1 - beta1 ** state["step"]) * (group["s"] / group["k"]) ** 0.5
        return torch.addcdiv(torch.zeros_like(M), M, root, value=scale)
