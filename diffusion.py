"""Denoising diffusion with the cosine schedule: noising, the ε-prediction loss, ancestral (DDPM) sampling.

Needs torch alone. The network is an argument, never a member: any `net(x_t, t) -> ε` will do, wrapped or not.

    diffusion = Diffusion(T=256)
    loss = diffusion.loss(net, x_0, t, noise).mean()
    videos = diffusion.sample(net, (2, 3, 16, 32, 32), sample_generators(seed=0, indices=[0, 1]))

Glossary (Ho et al. 2020, "DDPM", arXiv 2006.11239, whose equation numbers stand below)
    T           number of diffusion steps; t runs from 0 (least noise) to T - 1, the paper's 1 .. T
    x_0, x_t    data in [-1, 1], and the same after t steps of noise
    ε           the standard normal noise in x_t, which the network predicts
    β_t, α_t    variance added at step t, α_t = 1 - β_t;  ᾱ_t = Π_{s≤t} α_s
    β̃_t, μ̃_t    variance and mean of the posterior q(x_{t-1} | x_t, x_0)
Every random number is a function of a key such as (seed, step, sample index): see `key_to_seed`.
"""
import hashlib
import math

import torch


def cosine_betas(T, s=0.008, beta_max=0.9999):
    """The cosine schedule (Nichol & Dhariwal 2021, Eq. 17) -> β (T,) float64."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max)


class Diffusion:
    """A diffusion process of T steps; its tables, (T,) float32 each, live on `device`.

    Raises ValueError for T < 1.
    """

    def __init__(self, T=256, device="cpu"):
        if T < 1:
            raise ValueError(f"T is {T}; expected at least one diffusion step")
        self.T, self.device = T, device
        betas = cosine_betas(T)
        alphas_cumprod = torch.cumprod(1 - betas, 0)                                        # ᾱ_t
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])     # ᾱ_{t-1}

        def table(values):
            return values.float().to(device)

        self.betas, self.alphas_cumprod = table(betas), table(alphas_cumprod)
        self.sqrt_alphas_cumprod = table(alphas_cumprod.sqrt())
        self.sqrt_one_minus_alphas_cumprod = table((1 - alphas_cumprod).sqrt())
        # Eq. 7
        self.posterior_mean_x0 = table(betas * previous.sqrt() / (1 - alphas_cumprod))
        self.posterior_mean_xt = table((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod))
        self.posterior_variance = table(betas * (1 - previous) / (1 - alphas_cumprod))

    def q_sample(self, x_0, t, noise):
        """x_t ~ q(x_t | x_0) for the given noise. x_0, noise: (b, ...), t: (b,) int -> (b, ...)."""
        # Eq. 4: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
        sqrt_alpha_bar = extract(self.sqrt_alphas_cumprod, t, x_0)
        sqrt_one_minus_alpha_bar = extract(self.sqrt_one_minus_alphas_cumprod, t, x_0)
        return sqrt_alpha_bar * x_0 + sqrt_one_minus_alpha_bar * noise

    def predict_x0(self, x_t, t, eps):
        """The x_0 that x_t and the noise ε imply, not clipped. Eq. 4 solved for x_0."""
        sqrt_alpha_bar = extract(self.sqrt_alphas_cumprod, t, x_t)
        sqrt_one_minus_alpha_bar = extract(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return (x_t - sqrt_one_minus_alpha_bar * eps) / sqrt_alpha_bar

    def posterior(self, x_0, x_t, t):
        """-> mean μ̃_t (b, ...) and variance β̃_t (b, 1, ...) of q(x_{t-1} | x_t, x_0)."""
        # Eq. 7: μ̃_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t) x_t
        mean = extract(self.posterior_mean_x0, t, x_t) * x_0 + extract(self.posterior_mean_xt, t, x_t) * x_t
        return mean, extract(self.posterior_variance, t, x_t)

    def loss(self, net, x_0, t, noise, kind="l2"):
        """‖ε - ε_θ(x_t, t)‖² per video, averaged over its values, Eq. 14 ("l1": the absolute difference) -> (b,)."""
        if kind not in ("l2", "l1"):
            raise ValueError(f"loss is {kind!r}; expected 'l2' or 'l1'")
        error = net(self.q_sample(x_0, t, noise), t).float() - noise
        return (error.square() if kind == "l2" else error.abs()).flatten(1).mean(1)

    @torch.no_grad()
    def sample(self, net, shape, generators, progress=None):
        """Draw videos by ancestral sampling, Algorithm 2, with x̂_0 clipped to [-1, 1] at every step.

        shape: (b, c, f, h, w). generators: b torch.Generators on the diffusion's device, one per video, so that a
        video does not depend on what else is in its batch. progress: wraps the iterable of steps (tqdm, say).
        Returns float32 (b, c, f, h, w) in [-1, 1].
        """
        if len(generators) != shape[0]:
            raise ValueError(f"{len(generators)} generators for {shape[0]} videos; expected one each")
        x = randn_each(shape[1:], generators)
        steps = range(self.T - 1, -1, -1)
        for step in progress(steps) if progress else steps:
            t = torch.full(shape[:1], step, device=x.device)
            x_0 = self.predict_x0(x, t, net(x, t).float()).clamp(-1, 1)
            mean, variance = self.posterior(x_0, x, t)
            # β̃_0 = 0: the last step adds no noise
            x = mean + variance.sqrt() * randn_each(shape[1:], generators) if step > 0 else mean
        return x


def extract(table, t, like):
    """table[t] as (b, 1, ..., 1), to be multiplied with `like` (b, ...)."""
    return table[t].view(-1, *[1] * (like.dim() - 1))


def key_to_seed(*key):
    """A 64-bit seed from a tuple of integers and strings; keys that differ give unrelated seeds.

    (PyTorch's CPU generator uses 32 of the bits: among 50,000 keys, one pair in three tries shares them.)
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little", signed=True)


def sample_generators(seed, indices, device="cpu"):
    """One generator per sample index, for `Diffusion.sample`: its numbers are a function of (seed, i) and the kind of
    device (CPU and CUDA generators differ)."""
    return [torch.Generator(device).manual_seed(key_to_seed("sample", seed, i)) for i in indices]


def training_noise(shape, seed, step, indices, T, device="cpu"):
    """The random numbers of a training step: t (b,) uniform over the T steps, and standard normal noise (b, *shape).

    Row j is a function of (seed, step, indices[j]) alone: neither rank, worker nor batch size enters.
    """
    generators = [torch.Generator(device).manual_seed(key_to_seed("train", seed, step, i)) for i in indices]
    t = torch.cat([torch.randint(T, (1,), generator=g, device=device) for g in generators])
    return t, randn_each(shape, generators)


def randn_each(shape, generators):
    """-> (len(generators), *shape) of standard normal noise, each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])
