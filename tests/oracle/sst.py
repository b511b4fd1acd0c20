"""SST on one weight, dense and in fp64: the paper's loop with explicit arrays, and gradients of U diag(sigma) V^T."""

import torch


class Sst:
    """U (m x k), sigma (k), V (n x k), the r active pairs first."""

    def __init__(self, U, sigma, V, rank, *, lr, swap_every, iterations, warmup, reset_sigma=False, betas=(0.9, 0.999),
                 eps=1e-8):  # fmt: skip
        self.held = {"U": U.clone(), "V": V.clone(), "sigma": sigma.clone()}
        self.rank, self.lr, self.betas, self.eps = rank, lr, betas, eps
        self.swap_every, self.iterations, self.warmup, self.reset_sigma = swap_every, iterations, warmup, reset_sigma
        self.t = 0
        self.clear("U", "V", "sigma")

    def clear(self, *names):
        self.__dict__.setdefault("moments", {})
        self.__dict__.setdefault("age", {})
        for name in names:
            self.moments[name] = [torch.zeros_like(self.held[name]) for _ in range(2)]
            self.age[name] = 0

    def weight(self):
        return (self.held["U"] * self.held["sigma"]) @ self.held["V"].T

    def step(self, D, draw):
        """D is dL/dW; ``draw(p, t)`` chooses the next pairs."""
        r, (U, V, sigma) = self.rank, (self.held[name] for name in ("U", "V", "sigma"))
        gradients = {"U": D @ V, "V": D.T @ U, "sigma": (U * (D @ V)).sum(0)}
        self.t += 1
        for name, gradient in gradients.items():
            self.age[name] += 1
            age, (M, S), (b1, b2) = self.age[name], self.moments[name], self.betas
            part = (...,) if name == "sigma" else (slice(None), slice(r))
            M[part] = b1 * M[part] + (1 - b1) * gradient[part]
            S[part] = b2 * S[part] + (1 - b2) * gradient[part] ** 2
            rising = name != "sigma" and self.t > self.swap_every
            lr = self.lr * (min(1, age / self.warmup) if rising else 1)
            self.held[name][part] -= lr * (M[part] / (1 - b1**age)) / ((S[part] / (1 - b2**age)).sqrt() + self.eps)
        sigma.clamp_(min=0)
        for columns in (U, V):
            columns[:, :r] /= columns[:, :r].norm(dim=0)
        if self.t % self.swap_every == 0:
            self.draw(draw)

    def draw(self, draw):
        anew = self.t % (self.swap_every * self.iterations) == 0
        if anew:
            U, sigma, Vh = torch.linalg.svd(self.weight(), full_matrices=False)
            self.held = {"U": U, "V": Vh.T.clone(), "sigma": sigma}
            self.clear("U", "V", "sigma")
        sigma = self.held["sigma"]
        chosen = draw(0.5 * (1 / len(sigma) + sigma / sigma.sum()), self.t).tolist()
        order = chosen + [i for i in range(len(sigma)) if i not in chosen]
        self.held = {name: value[..., order] for name, value in self.held.items()}
        self.moments["sigma"] = [moment[order] for moment in self.moments["sigma"]]
        self.clear("U", "V", *(["sigma"] if self.reset_sigma else []))
