"""S4D state-space layers and the temporal SSM layer of "SSM Meets Video Diffusion Models" (arXiv 2403.07711).

Needs torch alone: copy this file into any project. `TemporalSSM(channels)` is a drop-in temporal layer for videos
(batch, channels, frames, height, width) or sequences (batch, channels, frames); channels come second, as in nn.Conv3d.

    layer = TemporalSSM(64)
    y = layer(torch.randn(2, 64, 400, 8, 8))        # the same shape; memory is linear in the 400 frames

Glossary                                              Shapes
    u, y    input and output of the SSM                   d   channels of an SSM (each has its own scalar SSM)
    A, B, C, D   state, input, output, feedthrough        N   state size; N/2 conjugate pairs are stored
    Δ (dt)  time step of the discretisation               L   frames
    K       convolution kernel of the SSM                 p   positions: batch · height · width
    Ā, B̄    A and B after the zero-order hold

The SSM (Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"):
    s_k = Ā s_{k-1} + B̄ u_k,    y_k = 2 Re(C s_k) + D u_k,    Ā = exp(ΔA),  B̄ = (Ā - 1)/A  (B = 1)
and unrolled, y = K * u + D u with K_l = 2 Re Σ_n C_n (exp(ΔA_n) - 1)/A_n · exp(ΔA_n l).

`S6` is the selective SSM (Gu & Dao 2023, "Mamba"), whose Δ, B and C depend on its input, for the layers that want it.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def at_least_float32(x):
    """Half precision to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_off(device):
    """A context in which float32 stays float32; the meta device, where there are only shapes, has no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def powers(z, count):
    """1, z, z², ... (count, *z.shape), by doubling: four times as fast as complex exponentials, and as exact."""
    result = torch.stack([torch.ones_like(z), z])
    while len(result) < count:
        result = torch.cat([result, result * (result[-1] * z)])
    return result[:count]


class S4DKernel(nn.Module):
    """The convolution kernel of d independent diagonal SSMs, initialised as S4D-Lin (Gu et al. 2022, Sec. 4).

    d: channels. state_size: N, even. dt_min, dt_max: range of the log-uniform initial time steps Δ, in frames.
    Every parameter is a real tensor (C has a last axis of 2): NCCL cannot all-reduce complex ones.
    """

    def __init__(self, d, state_size=512, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size is {state_size}; expected an even number, N/2 conjugate pairs")
        pairs = state_size // 2
        self.log_dt = nn.Parameter(torch.rand(d) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d, pairs, dtype=torch.cfloat)))
        # A_n = -1/2 + iπn
        self.log_A_real = nn.Parameter(torch.full((d, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs).float().repeat(d, 1))

    def forward(self, L):
        """L: length in frames -> K (d, L), float32 under autocast too (float64 for float64 parameters)."""
        with autocast_off(self.C.device):
            log_dt, C, log_A_real, A_imag = map(at_least_float32, (self.log_dt, self.C, self.log_A_real, self.A_imag))
            A = torch.complex(-log_A_real.exp(), A_imag)                                    # d n
            dtA = log_dt.exp()[:, None] * A                                                 # d n
            CB = 2 * torch.view_as_complex(C) * torch.expm1(dtA) / A                        # d n   2 C B̄
            # With l = a·S + b, exp(ΔA l) = exp(ΔA S)^a · exp(ΔA)^b: two thin factors and a matmul over n, so that
            # the Vandermonde tensor exp(ΔA l), (d, n, L), never exists.
            S = math.isqrt(L - 1) + 1
            left = CB * powers(torch.exp(S * dtA), math.ceil(L / S))                        # a d n
            right = powers(torch.exp(dtA.conj()), S)                                        # b d n
            # Σ_n Re(left · right) = Σ_n Re·Re - Im·Im: one real matmul, conjugated above for the sign
            left, right = (torch.view_as_real(factor.resolve_conj()).flatten(2) for factor in (left, right))
            return (left.transpose(0, 1) @ right.permute(1, 2, 0)).flatten(1)[:, :L]        # d L


def toeplitz_conv(u, kernels):
    """Long convolutions of one input: y_k = Σ_{j≤k} K_{k-j} u_j, or backward in time, y_k = Σ_{j≥k} K_{j-k} u_j.

    u: (d, L, p); kernels: list of (K, reverse) with K (d, L) -> list of outputs (d, L, p), one per kernel, by the
    (L, L) Toeplitz matrix of each kernel.
    """
    L = u.shape[1]
    ys = []
    for K, reverse in kernels:
        lags = F.pad(K.flip(-1), (0, L - 1)) if reverse else F.pad(K, (L - 1, 0))   # d 2L-1: lags -(L-1) .. L-1
        T = lags.to(u.dtype).unfold(-1, L, 1).flip(-1)                              # d L L: T[k, j] = lag k-j
        ys.append(torch.bmm(T, u))                                                  # d L p
    return ys


def fft_conv(u, kernels):
    """The same by FFT, frames last: u (d, p, L) -> list of (d, p, L). The one FFT of u serves all kernels.

    Never in half precision: cuFFT takes only powers of two there, and 200 or 400 frames are none.
    """
    L = u.shape[-1]
    n = fast_fft_length(2 * L - 1)
    with autocast_off(u.device):
        U = torch.fft.rfft(at_least_float32(u), n)                                  # d p n/2+1
        ys = []
        for K, reverse in kernels:
            K = torch.fft.rfft(K, n)[:, None]                                       # d 1 n/2+1
            # a kernel reversed in time has the conjugate spectrum
            y = torch.fft.irfft(U * (K.conj() if reverse else K), n)[..., :L]       # d p L
            ys.append(y.to(u.dtype))
    return ys


def fast_fft_length(n):
    """The smallest length >= n with no prime factor above 5: FFT libraries are slow at large primes."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def choose_toeplitz(L, positions):
    """Whether `toeplitz_conv` is to be used for videos of L frames with so many positions, or `fft_conv`.

    Up to as many frames as positions the matrix (d, L, L) is no larger than the input, so memory stays linear in the
    frames. The choice does not rest on the batch: a video comes out the same whatever else is in it.
    Measured on a CPU only, forward and backward pass of both directions on one thread (AVX-512), matrix product against
    FFT, in ms: L 64, p 1024, d 64: 47, 476. L 200, p 64, d 256: 218, 182. L 400, p 1024, d 64: 1867, 4545. L 400, p 16,
    d 512: 1379, 190.
    """
    return L <= min(positions, 1024)


def chunk_size(device):
    """Frames x positions that `in_chunks` should take at once: as many as a CPU's cache holds, or as fill a GPU."""
    return 2 ** 12 if device.type == "cpu" else 2 ** 17


def in_chunks(function, *tensors, dim, size, keep=8):
    """function(*tensors), computed for `size` entries along `dim` at a time; it must treat each of them alone.

    Beyond `keep` chunks, what the function computes on the way is not kept but computed again in the backward pass: a
    hidden layer much wider than the input never exists whole. (Computing it twice costs a fifth of such a layer's time.
    For long videos on a CPU the memory saved is worth more even in time.)
    """
    entries = tensors[0].shape[dim]
    if entries <= size:
        return function(*tensors)
    parts = zip(*(tensor.split(size, dim) for tensor in tensors))
    if torch.is_grad_enabled() and entries > keep * size:
        outs = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        outs = [function(*part) for part in parts]
    return torch.cat(outs, dim)


def linear(x, layer):
    """An nn.Linear along the first axis: x (c_in, columns) -> (c_out, columns). One matrix product, no transposes."""
    return torch.addmm(layer.bias[:, None], layer.weight, x)


def convolve(u, ssms, toeplitz):
    """What each of `ssms` makes of the same input: u (d, L, p) if `toeplitz`, else (d, p, L) -> list of the same."""
    if toeplitz:
        return toeplitz_conv(u, [(ssm.impulse_response(u.shape[1]), ssm.reverse) for ssm in ssms])
    return fft_conv(u, [(ssm.impulse_response(u.shape[2]), ssm.reverse) for ssm in ssms])


class DiagonalSSM(nn.Module):
    """The SSM alone: K * u + D u, forward in time or, with `reverse`, backward.

    d: channels. state_size: N. forward: u (d, p, L) -> (d, p, L).
    """

    def __init__(self, d, state_size=512, reverse=False):
        super().__init__()
        self.reverse = reverse
        self.kernel = S4DKernel(d, state_size)
        self.D = nn.Parameter(torch.randn(d))
        self.kept = None  # an impulse response, see `kernels_once`

    def impulse_response(self, L):
        """-> K (d, L) with D added at lag 0, so that the convolution with it is K * u + D u."""
        if self.kept is not None and self.kept.shape[1] == L and not (torch.is_grad_enabled() and self.D.requires_grad):
            return self.kept
        K = self.kernel(L)
        return torch.cat([K[:, :1] + self.D[:, None], K[:, 1:]], 1)

    def forward(self, u):
        [y] = fft_conv(u, [(self.impulse_response(u.shape[2]), self.reverse)])
        return y


class S4D(DiagonalSSM):
    """The S4D layer: GLU(Linear(GELU(K * u + D u))), forward in time or, with `reverse`, backward.

    d: channels. state_size: N. forward: u (d, p, L) -> (d, p, L).
    """

    def __init__(self, d, state_size=512, reverse=False):
        super().__init__(d, state_size, reverse)
        self.output_linear = nn.Linear(d, 2 * d)

    def output(self, y):
        """y: (d, columns), the output of the SSM -> GLU(Linear(GELU(y))), (d, columns)."""
        # contiguous: a CPU's GELU of strided chunks is half as fast, and in bf16 it rounds otherwise
        return F.glu(linear(F.gelu(y.contiguous()), self.output_linear), dim=0)

    def forward(self, u):
        return self.output(super().forward(u).flatten(1)).unflatten(1, u.shape[1:])


@contextlib.contextmanager
def kernels_once(net, L):
    """In this context every SSM inside `net` computes its kernel for L frames once, not in every call: for sampling.

    Enter it anew when parameters have changed: the kernels are dropped at its end. Where gradients of the parameters are
    asked for they are not used.
    """
    ssms = [module for module in net.modules() if isinstance(module, DiagonalSSM)]
    try:
        with torch.no_grad():
            for ssm in ssms:
                ssm.kept = ssm.impulse_response(L)
        yield
    finally:
        for ssm in ssms:
            ssm.kept = None


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of (b, c, ...), with a gain and no bias, as in VDM."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x):
        gain = self.gain.view(-1, *[1] * (x.dim() - 2))
        # two means: torch.var_mean over a strided dimension is ten times slower on a CPU
        centred = at_least_float32(x)
        centred = centred - centred.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps) * gain).to(x.dtype)


class TemporalLayer(nn.Module):
    """A residual layer along the frames that has SSMs in it. Subclasses give a `norm`, a LayerNorm, and

        inputs(X):                what the SSMs take, from the layer's input; (c, columns) -> (any, columns)
        over_time(u, toeplitz):   the SSMs; u (any, f, p) if `toeplitz`, else (any, p, f) -> list of outputs, such as u
        output(X, *ys):           all that comes after; X (c, columns), such outputs (any, columns) -> (c, columns)

    A column holds the channels of one frame at one position. Only `over_time` mixes columns, so the other two see some
    of them at a time (`in_chunks`).

    forward: X (b, channels, f, ...) -> the same shape. Every frame count f >= 1 goes, whatever it was trained on.
    """

    def forward(self, x):
        return x + self.mix(x)                                                      # b c f ...

    def mix(self, x):
        """Everything but the skip: (b, c, f, ...) -> (b, c, f, ...)."""
        b, c, f = x.shape[:3]
        X = x.reshape(b, c, f, -1)                                                  # b c f n
        # the frames of all positions in the order that the convolution wants
        toeplitz = choose_toeplitz(f, X.shape[3])
        order = (1, 2, 0, 3) if toeplitz else (1, 0, 3, 2)
        X = X.permute(order)                                                        # c f b n or c b n f
        shape = X.shape
        X = X.flatten(1)                                                            # c columns
        size = chunk_size(x.device)
        u = in_chunks(self.inputs, X, dim=1, size=size)                             # any columns
        ys = self.over_time(u.unflatten(1, (f, -1) if toeplitz else (-1, f)), toeplitz)
        U = in_chunks(self.output, X, *(y.flatten(1) for y in ys), dim=1, size=size).view(shape)
        order = (2, 0, 1, 3) if toeplitz else (1, 0, 3, 2)
        return U.permute(order).reshape(x.shape)                                    # b c f ...


class TemporalSSM(TemporalLayer):
    """The paper's temporal layer (Sec. 3.2, Fig. 1): bidirectional S4D along the frames, then an MLP.

        H = LayerNorm(X)
        F = GLU(SSM_fwd(H)),  B = GLU(SSM_bwd(Flip(H)))
        U = F + Flip(B),      O = MLP(U) + skip

    The text prints H for the skip; the authors' code, whose numbers the paper reports, has X. No flip is computed: the
    backward SSM is a convolution with its kernel reversed in time, and GLU acts on each frame alone.

    channels:      width of X.
    state_size:    N of each SSM, "SSM hidden dims" in Table 5.
    mlp_dim:       hidden width of the two-layer MLP.
    mlp_layers:    2: Linear, GELU, Linear. 1: GELU(Linear). 0: none.
    mlp_position:  "post", on U as above, or "pre", on H before both directions.
    bidirectional: False leaves the backward SSM out, and the layer is causal.
    skip:          "input", X, or "norm", H.

    forward: X (b, channels, f, ...) -> the same shape. Every frame count f >= 1 goes, whatever it was trained on.
    Raises ValueError for settings other than these.
    """

    def __init__(self, channels, state_size=512, mlp_dim=512, mlp_layers=2, mlp_position="post", bidirectional=True,
                 skip="input"):
        super().__init__()
        if mlp_layers not in (0, 1, 2):
            raise ValueError(f"mlp_layers is {mlp_layers}; expected 0, 1 or 2")
        if mlp_position not in ("post", "pre"):
            raise ValueError(f"mlp_position is {mlp_position!r}; expected 'post' or 'pre'")
        if skip not in ("input", "norm"):
            raise ValueError(f"skip is {skip!r}; expected 'input' or 'norm'")
        self.mlp_position, self.skip = mlp_position, skip
        self.norm = LayerNorm(channels)
        directions = [S4D(channels, state_size)]
        if bidirectional:
            directions.append(S4D(channels, state_size, reverse=True))
        self.directions = nn.ModuleList(directions)
        widths = {0: [], 1: [channels, channels], 2: [channels, mlp_dim, channels]}[mlp_layers]
        self.mlp = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, x):
        return (x if self.skip == "input" else self.norm(x)) + self.mix(x)          # b c f ...

    def inputs(self, X):
        """LayerNorm(X), and the MLP if it comes first."""
        H = self.norm(X[None])[0]
        return self.apply_mlp(H) if self.mlp_position == "pre" else H

    def over_time(self, H, toeplitz):
        return convolve(H, self.directions, toeplitz)

    def output(self, X, *ys):
        """F + Flip(B), and the MLP if it comes last."""
        U = sum(ssm.output(y) for ssm, y in zip(self.directions, ys))
        return self.apply_mlp(U) if self.mlp_position == "post" else U

    def apply_mlp(self, x):
        """x: (c, columns) -> (c, columns)."""
        if len(self.mlp) == 1:
            return F.gelu(linear(x, self.mlp[0]))
        if len(self.mlp) == 2:
            return linear(F.gelu(linear(x, self.mlp[0])), self.mlp[1])
        return x


# ---------------------------------------------------------------------------------------- the selective SSM


class Recurrence(torch.autograd.Function):
    """h_k = a_k h_{k-1} + b_k, with h_{-1} = 0, along the first axis; a, b, h: (L, ...).

    A loop over the frames, in place; a parallel scan in log2(L) steps would write all frames in each of them.
    Forward and backward pass on one CPU thread (AVX-512), this, the loop by autograd's own operations, and the scan, in
    ms: L 64 of 16,384 numbers: 1.7, 2.8, 28. L 256 of 4,096: 3.3, 7.4, 37. L 256 of 16,384: 8.6, 16, 231.
    """

    @staticmethod
    def forward(ctx, a, b):
        h = b.clone()
        for k in range(1, 0 if h.is_meta else len(h)):  # no loop where there are only shapes
            h[k].addcmul_(a[k], h[k - 1])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        grad_b = grad.clone()
        for k in reversed(range(0 if h.is_meta else len(h) - 1)):
            grad_b[k].addcmul_(a[k + 1], grad_b[k + 1])
        return torch.cat([torch.zeros_like(h[:1]), grad_b[1:] * h[:-1]]), grad_b


@functools.cache
def fused_selective_scan():
    """The CUDA kernel of the package mamba-ssm; None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


class S6(nn.Module):
    """The selective SSM of Mamba (Gu & Dao 2023, Algorithm 2), forward in time or, with `reverse`, backward.

        Δ = softplus(dt_proj(dt_rank numbers linear in u)),  B, C linear in u        Δ: one per channel and frame
        h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k u_k,   y_k = C_k h_k + D u_k,   A = -exp(A_log)

    d: channels. state_size: N. dt_rank: through how many numbers Δ is made. dt_min, dt_max: range of the log-uniform
    initial Δ at input 0, in frames.
    forward: u (d, p, L) -> (d, p, L). By the kernel of the package mamba-ssm where it is installed and u is on CUDA;
    else by a loop over the frames, some positions at a time and computed again in the backward pass: the states of all
    positions, N times as large as u, never exist at once.
    """

    def __init__(self, d, state_size=16, dt_rank=1, reverse=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        self.sizes = [dt_rank, state_size, state_size]
        self.reverse = reverse
        self.x_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1).float()).repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-dt_rank ** -0.5, dt_rank ** -0.5)
            dt = torch.exp(torch.rand(d) * math.log(dt_max / dt_min) + math.log(dt_min))
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def forward(self, u):
        u = u.flip(2) if self.reverse else u
        if u.is_cuda and fused_selective_scan():
            y = self.fused(u)
        else:
            d, _, L = u.shape
            # numbers in the states that exist at once; 2^16, 2^19, 2^22, 2^24 on one CPU thread with d 128, p 1024,
            # L 16, forward and backward pass: 1.5, 0.72, 1.0, 3.0 s
            numbers = 2 ** 19 if u.device.type == "cpu" else 2 ** 25
            y = in_chunks(self.scan, u, dim=1, size=max(1, numbers // (d * L * self.A_log.shape[1])), keep=1)
        return y.flip(2) if self.reverse else y

    def scan(self, u):
        """u: (d, p, L) -> (d, p, L)."""
        with autocast_off(u.device):
            weights = self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D
            U, x_proj, dt_weight, dt_bias, A_log, D = map(at_least_float32, (u.permute(2, 1, 0), *weights))
            # channels last: A belongs to channels, B and C to frames and positions
            U = U.contiguous()                                                              # L p d
            dt, B, C = F.linear(U, x_proj).split(self.sizes, -1)                            # L p rank, L p N, L p N
            dt = F.softplus(F.linear(dt, dt_weight, dt_bias))                               # L p d
            A = -torch.exp(A_log.T[:, None])                                                # N 1 d
            h = Recurrence.apply(torch.exp(dt[:, None] * A), (dt * U)[:, None] * B.mT[..., None])  # L N p d
            y = (h * C.mT[..., None]).sum(1) + D * U                                        # L p d
        return y.permute(2, 1, 0).to(u.dtype)

    def fused(self, u):
        """The same for u (d, p, L) by `fused_selective_scan`, whose tensors have positions first."""
        p, L = u.shape[1:]
        dt, B, C = (self.x_proj.weight @ u.flatten(1)).split(self.sizes)                    # rank p·L, N p·L, N p·L
        dt = self.dt_proj.weight @ dt                                                       # d p·L
        tensors = (x.to(u.dtype).unflatten(1, (p, L)).transpose(0, 1).contiguous() for x in (u.flatten(1), dt, B, C))
        u, dt, B, C = tensors                                                               # p d L, p d L, p N L, p N L
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float()
        y = fused_selective_scan()(u, dt, A, B, C, D, delta_bias=bias, delta_softplus=True)
        return y.transpose(0, 1)
