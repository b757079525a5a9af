"""Denoising diffusion with the cosine schedule: noising, loss, DDPM and DDIM sampling, given frames, streams, guidance.

Needs torch alone. The network is an argument, never a member: any `net(x_t, t) -> ε` will do, wrapped or not.

    diffusion = Diffusion(T=256)
    loss = diffusion.loss(net, x_0, t, noise).mean()
    videos = diffusion.sample(net, (2, 3, 16, 32, 32))
    videos = diffusion.sample(net, (2, 3, 16, 32, 32), steps=50, eta=0)     # DDIM

Glossary (Ho et al. 2020, "DDPM", arXiv 2006.11239, whose equation numbers stand below where no other paper is named)
    T           number of diffusion steps; t runs from 0 (least noise) to T - 1, the paper's 1 .. T
    x_0, x_t    data in [-1, 1], and the same after t + 1 steps of noise; x_{-1}, what sampling ends with, is x_0
    ε           the standard normal noise in x_t, which the network predicts
    v           √ᾱ_t ε - √(1 - ᾱ_t) x_0, which it may predict instead (Salimans & Ho 2022, arXiv 2202.00512)
    β_t, α_t    variance added at step t, α_t = 1 - β_t;  ᾱ_t = Π_{s≤t} α_s, and ᾱ_{-1} = 1
    β̃_t, μ̃_t    variance and mean of the posterior q(x_{t-1} | x_t, x_0)
    x^a, x^b    of a video some of whose frames are given: those, and the others (Ho et al. 2022, arXiv 2204.03458)
    η           noise that DDIM adds (Song et al. 2021, arXiv 2010.02502): 0 none, 1 as much as the posterior has
With `sample_generators` and `training_noise`, every random number is a function of a key: see `key_to_seed`.
"""
import functools
import hashlib
import itertools
import math

import torch

PREDICTIONS = ("eps", "v")


def cosine_betas(T, s=0.008, beta_max=0.9999):
    """The cosine schedule (Nichol & Dhariwal 2021, Eq. 17) -> β (T,) float64."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max)


class Diffusion:
    """A diffusion process of T steps; its tables, (T,) float32 each, live on `device`.

    prediction: what the network's output is, "eps" or "v". Raises ValueError for another, or T < 1.
    """

    def __init__(self, T=256, device="cpu", prediction="eps"):
        if T < 1 or prediction not in PREDICTIONS:
            raise ValueError(f"T {T}, prediction {prediction!r}; expected 1 or more, and one of {PREDICTIONS}")
        self.T, self.device, self.prediction = T, device, prediction
        betas = cosine_betas(T)
        alphas_cumprod = torch.cumprod(1 - betas, 0)                                        # ᾱ_t
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])     # ᾱ_{t-1}
        self.alpha_bars = [*alphas_cumprod.tolist(), 1.0]  # ᾱ_t as numbers; the last, at t = -1, is ᾱ_{-1}
        float32 = functools.partial(torch.Tensor.to, device=device, dtype=torch.float32)
        self.betas, self.alphas_cumprod = float32(betas), float32(alphas_cumprod)
        self.sqrt_alphas_cumprod = float32(alphas_cumprod.sqrt())
        self.sqrt_one_minus_alphas_cumprod = float32((1 - alphas_cumprod).sqrt())
        # Eq. 7
        self.posterior_mean_x0 = float32(betas * previous.sqrt() / (1 - alphas_cumprod))
        self.posterior_mean_xt = float32((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod))
        self.posterior_variance = float32(betas * (1 - previous) / (1 - alphas_cumprod))

    def levels(self, t, like):
        """-> √ᾱ_t and √(1 - ᾱ_t), to be multiplied with `like`: of t (b,) and like (b, ...) each is (b, 1, ..., 1); of
        t (b, f), one for each frame, and like (b, c, f, h, w) it is (b, 1, f, 1, 1)."""
        t = t[:, None] if t.dim() == 2 else t
        t = t.view(*t.shape, *[1] * (like.dim() - t.dim()))
        return self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]

    def q_sample(self, x_0, t, noise):
        """x_t ~ q(x_t | x_0) for the given noise. x_0, noise: (b, ...), t: (b,) or (b, f) int -> (b, ...)."""
        # Eq. 4: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
        signal, noise_level = self.levels(t, x_0)
        return signal * x_0 + noise_level * noise

    def v(self, x_0, t, noise):
        """-> v of shape (b, ...), for which x_0 = √ᾱ_t x_t - √(1 - ᾱ_t) v (Salimans & Ho, App. D)."""
        signal, noise_level = self.levels(t, x_0)
        return signal * noise - noise_level * x_0

    def loss(self, net, x_0, t, noise):
        """‖ε - ε_θ(x_t, t)‖² per video, averaged over its values, Eq. 14; with prediction "v" that of v -> (b,)."""
        target = noise if self.prediction == "eps" else self.v(x_0, t, noise)
        return (net(self.q_sample(x_0, t, noise), t).float() - target).square().flatten(1).mean(1)

    def denoise(self, net, x_t, t):
        """The network's x̂_0 for x_t (b, ...) at step t, an int, not clipped -> (b, ...). Gradients pass."""
        t = torch.full(x_t.shape[:1], t, device=x_t.device)
        output = net(x_t, t).float()
        if self.prediction == "v":
            return self.v(output, t, x_t)  # the rotation is its own inverse: x_0 = √ᾱ x_t - √(1 - ᾱ) v
        signal, noise_level = self.levels(t, x_t)
        return (x_t - noise_level * output) / signal  # Eq. 4 solved for x_0

    def timesteps(self, steps=None, eta=None):
        """-> [(t, s), ...]: `steps` (None: T) steps of sampling from t to s, evenly spaced from T - 1 down to 0, then
        -1, which is x_0. eta: as in `sample`; None, ancestral sampling, takes all T. Raises ValueError for others."""
        steps = self.T if steps is None else steps
        if not 1 <= steps <= self.T or eta is None and steps < self.T:
            raise ValueError(f"{steps} sampling steps: expected 1 to {self.T}, or, without eta, all {self.T}")
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; expected a number from 0 to 1, or None")
        times = [self.T - 1 - round(i * (self.T - 1) / max(1, steps - 1)) for i in range(steps)]
        return list(zip(times, [*times[1:], -1]))

    def step(self, x_t, x_0, t, s, generators=None, eta=None):
        """One step of sampling: x_t (b, ...) and its x̂_0 -> x_s. t > s: ints, see `timesteps`.

        eta: η of DDIM; None: ancestral, where s = t - 1. generators: of the noise that the step adds, see `randn`.
        """
        if eta is None:
            # Eq. 7: μ̃_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t) x_t
            mean = self.posterior_mean_x0[t] * x_0 + self.posterior_mean_xt[t] * x_t
            deviation = self.posterior_variance[t].sqrt()
            # β̃_0 = 0: the last step adds no noise
            return mean + deviation * randn(x_t.shape, generators, x_t.device) if t > 0 else mean
        bar_t, bar_s = self.alpha_bars[t], self.alpha_bars[s]                               # ᾱ_t, ᾱ_s
        eps = (x_t - bar_t ** 0.5 * x_0) / (1 - bar_t) ** 0.5                               # the ε of x_t and x̂_0
        # Song et al., Eq. 16: σ, and Eq. 12: x_s = √ᾱ_s x_0 + √(1 - ᾱ_s - σ²) ε + σ z
        sigma = eta * ((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)) ** 0.5
        x_s = bar_s ** 0.5 * x_0 + max(0, 1 - bar_s - sigma ** 2) ** 0.5 * eps
        return x_s + sigma * randn(x_t.shape, generators, x_t.device) if sigma > 0 else x_s

    def denoise_given(self, net, x_t, t, x_a, given, weight):
        """`denoise` of videos x_t (b, c, f, ...) whose frames `given` (f,), bools, are those of x_a (b, c, f, ...)
        -> (b, c, f, ...), not clipped. weight: w_r of reconstruction guidance; 0: the network's x̂^b as it is."""
        if weight == 0:
            x_0 = self.denoise(net, x_t, t)
        else:
            with torch.enable_grad():
                x_t = x_t.detach().requires_grad_()
                x_0 = self.denoise(net, x_t, t)
                error = (x_a - x_0)[:, :, given].square().sum()
            [gradient] = torch.autograd.grad(error, x_t)
            # Ho et al. 2022, Eq. 7, whose α_t is √ᾱ_t: x̃^b = x̂^b - w_r α_t / 2 ∇_{x_t^b} ‖x^a - x̂^a‖²
            x_0 = x_0.detach() - weight * self.alpha_bars[t] ** 0.5 / 2 * gradient
        return torch.where(given.view(-1, *[1] * (x_t.dim() - 3)), x_a, x_0)

    @torch.no_grad()
    def sample(self, net, shape, generators=None, progress=None, steps=None, eta=None, known=None, weight=10.0):
        """Draw videos by ancestral sampling, Algorithm 2, or DDIM, with x̂_0 clipped to [-1, 1] at every step.

        shape: (b, c, f, h, w). generators: b torch.Generators on the diffusion's device, one per video, so that a
            video does not depend on its batch; None: PyTorch's own. progress: wraps the iterable of steps (tqdm, say).
        eta: η of DDIM, from 0 to 1; None: ancestral sampling. steps: how many, of DDIM, from 1 to T; None: T.
        known: x_a (b, c, f, h, w) and given (f,), whether a frame is that of x_a; None: all are drawn. At every step
            the given frames have the noise of the forward process (the "replacement method" of Ho et al. 2022).
        weight: w_r of the reconstruction guidance that draws the others towards them; 0: the replacement method alone.
        Returns float32 (b, c, f, h, w) in [-1, 1]. Raises ValueError for settings that do not fit.
        """
        if generators is not None and len(generators) != shape[0]:
            raise ValueError(f"{len(generators)} generators for {shape[0]} videos; expected one each")
        times = self.timesteps(steps, eta)
        x = randn(shape, generators, self.device)
        if known is not None:
            x_a, given = known
            x[:, :, given] = self.q_sample(x_a, torch.full(shape[:1], self.T - 1, device=x.device), x)[:, :, given]
        for t, s in progress(times) if progress else times:
            x_0 = self.denoise(net, x, t) if known is None else self.denoise_given(net, x, t, *known, weight)
            x_0 = x_0.clamp(-1, 1)  # of a given frame it is x_a: `step` gives it the forward process's noise of s
            x = self.step(x, x_0, t, s, generators, eta)
        return x

    @torch.no_grad()
    def stream(self, net, advance, shape, generators=None, steps=16, eta=0.5, x_a=None):
        """Draw videos a frame at a time, without end, with a causal network, by DDIM (eta None: ancestral sampling).

            with streaming(net) as advance:                                                 # see s4d.py
                for frame in diffusion.stream(net, advance, (b, c, h, w)): ...

        shape: (b, c, h, w), of one frame of each video.
        advance: called after each frame's last call of the network, which has seen it finished, at its lowest t.
        generators, steps, eta: as in `sample`; the first frames are the same however many are drawn.
        x_a: (b, c, k, h, w), the given frames that the videos begin with, or None; they come out first.
        Yields float32 (b, c, 1, h, w) in [-1, 1]. Raises ValueError for settings that do not fit.
        """
        times, (b, c, h, w) = self.timesteps(steps, eta), shape
        for k in itertools.count():
            if x_a is not None and k < x_a.shape[2]:
                x = x_a[:, :, k:k + 1]
            else:
                x = randn((b, c, 1, h, w), generators, self.device)
                for t, s in times:
                    x = self.step(x, self.denoise(net, x, t).clamp(-1, 1), t, s, generators, eta)
            net(x, torch.zeros(b, dtype=torch.long, device=self.device))
            advance()
            yield x


def with_guidance(net, labels, null, guidance=1.0):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): a network (x_t, t) -> output for `sample`.
    net: (x_t, t, labels) -> output, of any prediction. labels: (b,) int. null: the label of no class.
    guidance: w; 1: the network's own output for the labels, 0: for no class.
    """
    if guidance == 1:
        return functools.partial(net, labels=labels)
    both = torch.cat([labels, torch.full_like(labels, null)])

    def guided(x_t, t):
        # Eq. 6, whose own w is ours - 1: ε̃ = ε_∅ + w (ε_c - ε_∅)
        of_class, of_none = net(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
        return of_none + guidance * (of_class - of_none)

    return guided


def key_to_seed(*key):
    """A 64-bit seed from a tuple of integers and strings; keys that differ give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little", signed=True)


def sample_generators(seed, indices, device="cpu"):
    """One generator per sample index, for `Diffusion.sample`: its numbers are a function of (seed, i) and the kind of
    device (CPU and CUDA generators differ)."""
    return [torch.Generator(device).manual_seed(key_to_seed("sample", seed, i)) for i in indices]


def training_noise(shape, seed, step, indices, T, device="cpu", per_frame=False):
    """The random numbers of a training step: t (b,) uniform over the T steps, and standard normal noise (b, *shape).

    per_frame: t is (b, f), one for each frame of shape (c, f, h, w) ("Diffusion Forcing", Chen et al. 2024, arXiv
    2407.01392); in half of the rows the frames before a random one are nearly clean, as the past of a stream is. Row j
    is a function of (seed, step, indices[j]) alone, whatever the rank, worker and batch size.
    """
    generators = [torch.Generator(device).manual_seed(key_to_seed("train", seed, step, i)) for i in indices]
    t = torch.stack([torch.randint(T, shape[1:2] if per_frame else (), generator=g, device=device) for g in generators])
    if per_frame:  # in half of the rows k <= 0, and no frame is before it
        k = torch.stack([torch.randint(-shape[1], shape[1], (1,), generator=g, device=device) for g in generators])
        t = torch.where(torch.arange(shape[1], device=device) < k, t // 20, t)
    return t, randn((len(indices), *shape), generators)


def label_dropped(rate, seed, step, index):
    """Whether a training step hides a sample's label: a function of (seed, step, index), true at the given rate."""
    return key_to_seed("label dropout", seed, step, index) % 2 ** 32 < rate * 2 ** 32


def randn(shape, generators=None, device=None):
    """-> (b, ...) of standard normal noise: each row from its own generator, or all of it from the default one."""
    if generators is None:
        return torch.randn(shape, device=device)
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators])
