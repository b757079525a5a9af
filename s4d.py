"""S4D state-space layers and the temporal SSM layer of "SSM Meets Video Diffusion Models" (arXiv 2403.07711).

Needs torch alone: copy this file into any project. `TemporalSSM(channels)` is a drop-in temporal layer for videos or
sequences whose channels come last, (batch, frames, ..., channels), as most temporal attention layers take them.

    layer = TemporalSSM(64)
    y = layer(torch.randn(2, 400, 8, 8, 64))             # the same shape; memory is linear in the 400 frames
    y = layer(x.movedim(1, -1)).movedim(-1, 1)           # of x (batch, channels, frames, height, width)

Glossary                                              Shapes
    X, H    input of the layer, and normalised            b   batch
    u, y    input and output of an SSM                    L   frames
    A, B, C, D   state, input, output, feedthrough        p   positions: height · width
    Δ (dt)  time step of the discretisation               d   channels of an SSM (each has its own scalar SSM)
    K       convolution kernel of the SSM                 N   state size; n = N/2 conjugate pairs are stored
    Ā, B̄    A and B after the zero-order hold             k   SSMs that share an input, both directions; s_k: frame k

The SSM (Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models"):
    s_k = Ā s_{k-1} + B̄ u_k,    y_k = 2 Re(C s_k) + D u_k,    Ā = exp(ΔA),  B̄ = (Ā - 1)/A  (B = 1)
and unrolled, y = K * u + D u with K_l = 2 Re Σ_n C_n (exp(ΔA_n) - 1)/A_n · exp(ΔA_n l).
"""
import contextlib
import importlib.util
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class TemporalSSM(nn.Module):
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
    forward: X (b, f, ..., channels) -> the same shape, for every frame count f >= 1, whatever it was trained on.
    Raises ValueError for settings other than these, and for X of another shape.
    """

    def __init__(self, channels, state_size=512, mlp_dim=512, mlp_layers=2, mlp_position="post", bidirectional=True,
                 skip="input"):
        super().__init__()
        if mlp_layers not in (0, 1, 2) or mlp_position not in ("post", "pre") or skip not in ("input", "norm"):
            raise ValueError(f"mlp_layers {mlp_layers!r}, mlp_position {mlp_position!r}, skip {skip!r}; expected 0 to "
                             "2, 'post' or 'pre', 'input' or 'norm'")
        self.mlp_position, self.skip = mlp_position, skip
        self.norm = nn.LayerNorm(channels, bias=False)
        reverses = [False, True] if bidirectional else [False]
        self.directions = nn.ModuleList(S4D(channels, state_size, reverse) for reverse in reverses)
        widths = {0: [], 1: [channels, channels], 2: [channels, mlp_dim, channels]}[mlp_layers]
        self.mlp = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, X):
        check_frames(X, self.norm)
        H = layer_norm(X, self.norm.weight)                                                 # b f ... c
        skip = X if self.skip == "input" else H
        if self.mlp_position == "pre":
            H = by_rows(self.apply_mlp, H)
        ys = convolve(H, self.directions)               # SSM_fwd(H), Flip(SSM_bwd(Flip(H))): each b f ... c
        return by_rows(self.tail, skip, *ys)                                                # b f ... c

    def tail(self, skip, *ys):
        """O = MLP(F + Flip(B)) + skip, of skip and the SSMs' outputs y, (rows, c) each."""
        U = sum(F.glu(ssm.output_linear(F.gelu(y))) for y, ssm in zip(ys, self.directions))
        return (self.apply_mlp(U) if self.mlp_position == "post" else U) + skip

    def apply_mlp(self, x):
        """Linear, GELU, Linear; or GELU(Linear); or x."""
        x = F.gelu(self.mlp[0](x)) if self.mlp else x
        return self.mlp[1](x) if len(self.mlp) == 2 else x


def check_frames(X, norm):
    """Raises ValueError unless X is (batch, frames, ..., channels), with at least one frame, as the layer wants it."""
    if X.dim() < 3 or X.shape[-1:] != norm.weight.shape or X.shape[1] == 0:
        raise ValueError(f"input has shape {tuple(X.shape)}; expected (batch, frames >= 1, ..., {len(norm.weight)})")


def layer_norm(x, gain):
    """LayerNorm in x's dtype (its sums are float32): under autocast it would make a float32 copy of x and keep it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, gain.shape, gain.to(x.dtype))


def at_least_float32(x):
    """Half precision to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunk_size(device):
    """Rows (one position of one frame) that `in_chunks` should take at once: as a CPU's cache holds, or fill a GPU."""
    return 2 ** 12 if device.type == "cpu" else 2 ** 19


def in_chunks(function, *tensors, size):
    """function(*tensors), for `size` entries of the first axis at a time, each of which it must treat alone.
    All chunks, on a CPU all but the first, are `checkpointed`: a hidden layer much wider than the input never exists
    whole, and memory grows evenly with the frames. (The first costs a CPU little memory, and saves short clips time.)
    A graph that is captured whole (torch.export) has all entries at once: it is for any number of them."""
    if torch.compiler.is_compiling():
        return function(*tensors)
    kept = 1 if tensors[0].device.type == "cpu" else 0
    parts = zip(*(tensor.split(size) for tensor in tensors))
    outs = [function(*part) if i < kept else checkpointed(function, *part) for i, part in enumerate(parts)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def checkpointed(function, *args):
    """function(*args), not random; what it computes on the way is computed again in the backward pass, instead of being
    kept, with the parameters as they are then."""
    # inside torch.func's transforms there are no saved tensors that could be recomputed
    if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def by_rows(function, *tensors):
    """function(*tensors), in chunks, of tensors (..., c) to a tensor (..., c'), where each row (c,) stands alone."""
    rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)
    out = in_chunks(function, *rows, size=chunk_size(tensors[0].device))
    return out.view(*tensors[0].shape[:-1], -1)


def by_positions(function, X, size, reverse=False):
    """X (b, f, ..., c) -> the same shape, by a function (p, f, c) -> (p, f, c) in which each position stands alone, in
    chunks of `size` positions (None: all at once); with `reverse` it goes through the frames backward."""
    X = X.flip(1) if reverse else X
    sequences = X.reshape(*X.shape[:2], -1, X.shape[-1]).transpose(1, 2).flatten(0, 1)      # p f c
    out = in_chunks(function, sequences, size=size) if size else function(sequences)
    out = out.unflatten(0, (X.shape[0], -1)).transpose(1, 2).reshape(X.shape)
    return out.flip(1) if reverse else out


# ---------------------------------------------------------------------------------------- S4D


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

    def forward(self, L, *others):
        """L: length in frames -> K (d, L), float32 under autocast too (float64 for float64 parameters). Of `others`, of
        the same state size, they are below it, and d counts theirs too: all take no more operations than one."""
        with torch.autocast(self.C.device.type, enabled=False):
            dtA, CB = self.discretised(*others)
            # With l = a·S + b, exp(ΔA l) = exp(ΔA S)^a · exp(ΔA)^b: two thin factors and a matmul over n, so that
            # the Vandermonde tensor exp(ΔA l), (d, n, L), never exists.
            S = math.isqrt(L - 1) + 1
            left = CB * powers(torch.exp(S * dtA), math.ceil(L / S))                        # a d n
            right = powers(torch.exp(dtA.conj()), S)                                        # b d n
            # Σ_n Re(left · right) = Σ_n Re·Re - Im·Im: one real matmul, conjugated above for the sign
            left, right = (torch.view_as_real(factor.resolve_conj()).flatten(2) for factor in (left, right))
            return (left.transpose(0, 1) @ right.permute(1, 2, 0)).flatten(1)[:, :L]        # d L

    def discretised(self, *others):
        """The zero-order hold -> ΔA, whose exponential is Ā, and 2 C B̄, (d, n) each, then those of the `others`."""
        log_dt, C, log_A_real, A_imag = (at_least_float32(torch.cat(parts)) for parts in zip(
            *((kernel.log_dt, kernel.C, kernel.log_A_real, kernel.A_imag) for kernel in (self, *others))))
        A = torch.complex(-log_A_real.exp(), A_imag)
        dtA = log_dt.exp()[:, None] * A
        return dtA, 2 * torch.view_as_complex(C) * torch.expm1(dtA) / A


def powers(z, count):
    """1, z, z², ... (count, *z.shape), by doubling: four times as fast as complex exponentials, and as exact."""
    result = torch.stack([torch.ones_like(z), z])
    while len(result) < count:
        result = torch.cat([result, result * (result[-1] * z)])
    return result[:count]


class DiagonalSSM(nn.Module):
    """The SSM alone, K * u + D u, forward in time or, with `reverse`, backward: u (b, L, ..., d) -> the same shape."""

    def __init__(self, d, state_size=512, reverse=False):
        super().__init__()
        self.reverse = reverse
        self.kernel = S4DKernel(d, state_size)
        self.D = nn.Parameter(torch.randn(d))
        self.kept, self.past = None, None  # set by `cached_kernels`, an impulse response, and by `streaming`, a Past

    def impulse_response(self, L, *others):
        """-> (k, d, L), K of this SSM and k - 1 others with D added at lag 0: convolution with it is K * u + D u."""
        ssms = self, *others
        if self.kept is not None and self.kept.shape[1] == L and not (torch.is_grad_enabled() and self.D.requires_grad):
            return torch.stack([ssm.kept for ssm in ssms])
        K = self.kernel(L, *(ssm.kernel for ssm in others)).view(len(ssms), -1, L)
        D = torch.stack([ssm.D for ssm in ssms])[..., None]
        return torch.cat([K[..., :1] + D, K[..., 1:]], -1)

    def forward(self, u):
        return convolve(u, [self])[0]


class S4D(DiagonalSSM):
    """The S4D layer, GLU(Linear(GELU(K * u + D u))), of u's shape; `TemporalSSM` uses its parts, not this forward."""

    def __init__(self, d, state_size=512, reverse=False):
        super().__init__(d, state_size, reverse)
        self.output_linear = nn.Linear(d, 2 * d)

    def forward(self, u):
        return F.glu(self.output_linear(F.gelu(super().forward(u))))


def convolve(u, ssms):
    """K * u + D u of the same u (b, L, ..., d), for each of `ssms` -> list of tensors of u's shape."""
    if ssms[0].past is not None:
        return [ssm.past.step(u) for ssm in ssms]
    videos = u.reshape(*u.shape[:2], -1, u.shape[-1])
    _, L, p, d = videos.shape
    K = ssms[0].impulse_response(L, *ssms[1:])                                              # k d L
    # Toeplitz matrices, of d·L² entries, are faster than the FFT on a GPU while they fit, and on a CPU if frames are no
    # more than positions. The batch has no say: a video must not depend on others.
    longest = min(1024, p if u.device.type == "cpu" else math.isqrt(2 ** 27 // d))
    convolution = toeplitz_conv if L <= longest else fft_conv
    return [y.reshape(u.shape) for y in convolution(videos, K, [ssm.reverse for ssm in ssms])]


@contextlib.contextmanager
def cached_kernels(net, L):
    """In this context every SSM inside `net` computes its kernel for L frames once, not in every call: for sampling.
    Re-enter it after an optimiser step. Where gradients of the parameters are asked for, the kernels are not used."""
    with contextlib.ExitStack() as stack:
        for ssm in [module for module in net.modules() if isinstance(module, DiagonalSSM)]:
            stack.callback(setattr, ssm, "kept", None)
            [ssm.kept] = ssm.impulse_response(L).detach()
        yield


@contextlib.contextmanager
def streaming(net, window=None):
    """In this context a causal `net` takes one frame at a time, and its SSMs carry those before in a state of fixed
    size: frame by frame they compute what they would of all frames at once.

        with streaming(net) as advance:
            y = net(frame)      # as often as wanted: the past is read and stays as it is
            advance()           # what the last call was given becomes part of the past

    window: of the past only so many frames count; None: all. Raises ValueError if an SSM runs backward in time.
    """
    ssms = [module for module in net.modules() if isinstance(module, DiagonalSSM)]
    if not ssms or any(ssm.reverse for ssm in ssms):
        raise ValueError("streaming takes a network with SSMs, all of them forward in time")
    with contextlib.ExitStack() as stack:
        for ssm in ssms:
            stack.callback(setattr, ssm, "past", None)
            ssm.past = Past(ssm, window)
        yield lambda: [ssm.past.advance() for ssm in ssms]


class Past:
    """What an SSM remembers of the frames before frame k, for its output y_k = K_0 u_k + p_k: of all of them a state s,
    without the factor B̄, which C B̄ has; of the last W what they add to later outputs, sums p_{k+1} .. p_{k+W}.
        p_k = 2 Re(C B̄ Ā s_{k-1}),    s_k = Ā s_{k-1} + u_k                                   s_k: b 1 ... d n
        p_k = Σ_{j=1..W} K_j u_{k-j}                                                          sums: W b·1·... d
    """

    @torch.no_grad()
    def __init__(self, ssm, window):
        dtA, CB = ssm.kernel.discretised()                                                  # d n
        K = ssm.impulse_response(1 + (window or 0))[0]                                      # d 1+W
        self.K_0, self.K, self.A_bar, self.CBA = K[:, 0], K[:, 1:].T[:, None], dtA.exp(), CB * dtA.exp()
        self.window, self.s, self.sums, self.p = window, torch.zeros_like(CB), torch.zeros_like(self.K), 0

    def step(self, u):
        if u.shape[1] != 1:
            raise ValueError(f"{u.shape[1]} frames in one call; streaming takes one at a time")
        self.u = at_least_float32(u)
        return (self.K_0 * self.u + self.p).to(u.dtype)

    @torch.no_grad()
    def advance(self):
        if self.window:
            rows = self.u.reshape(-1, self.u.shape[-1])                                     # b·1·... d
            self.sums = torch.addcmul(F.pad(self.sums[1:], (0, 0, 0, 0, 0, 1)), self.K, rows)
            self.p = self.sums[0].view_as(self.u)
        else:  # in place, once it has the shape that u gives it: a new tensor costs more time than the arithmetic
            self.s = self.s.expand(*self.u.shape, -1).contiguous().mul_(self.A_bar).add_(self.u[..., None])
            self.p = (self.s * self.CBA).sum(-1).real


def toeplitz_conv(u, K, reverse):
    """Long convolutions of one input: y_k = Σ_{j≤k} K_{k-j} u_j, or backward in time, y_k = Σ_{j≥k} K_{j-k} u_j.

    u: (b, L, p, d), K: (k, d, L), reverse: k bools -> (k, b, L, p, d), by the (L, L) Toeplitz matrix of each kernel.
    """
    b, L, p, d = u.shape
    lags = torch.stack([F.pad(K_i.flip(-1), (0, L - 1)) if backward else F.pad(K_i, (L - 1, 0))
                        for K_i, backward in zip(K, reverse)], 1)                           # d k 2L-1: -(L-1) .. L-1
    # to u's dtype last: the gradient of K, a sum of L terms, stays float32
    T = lags.unfold(-1, L, 1).flip(-1).to(u.dtype).flatten(1, 2)                            # d k·L L: lag i-j at i, j
    u = transposed(u.transpose(0, 1).reshape(-1, d)).view(d, L, -1)                         # d L b·p
    y = transposed(torch.bmm(T, u).view(d, -1)).view(-1, L, b, p, d)                        # k L b p d
    return y.transpose(1, 2).contiguous()


def transposed(x):
    """A matrix, and in the backward pass its gradient, transposed in memory: strides alone would cost much more."""
    if x.requires_grad:
        x.register_hook(lambda grad: grad if grad is None else grad.contiguous())
    return x.T.contiguous()


def fft_conv(u, K, reverse):
    """The same by FFT along the frames; the one FFT of u serves all kernels. -> list of k (b, L, p, d).
    Never in half precision: cuFFT takes only powers of two there, and 200 or 400 frames are none.
    """
    b, L, p, d = u.shape
    # no prime factor above 5, at which FFT libraries are slow: a power of 30 is a multiple of exactly those lengths
    n = next(n for n in range(2 * L - 1, 4 * L) if 30 ** 64 % n == 0)
    with torch.autocast(u.device.type, enabled=False):
        u_by_frames = transposed(at_least_float32(u).transpose(0, 1).reshape(L, -1)).view(b, p, d, L)
        U = torch.fft.rfft(u_by_frames, n)                                                  # b p d n/2+1
        ys = []
        for spectrum, backward in zip(torch.fft.rfft(K, n), reverse):                       # d n/2+1
            # a kernel reversed in time has the conjugate spectrum
            y = torch.fft.irfft(U * (spectrum.conj() if backward else spectrum), n)         # b p d n
            y = transposed(y[..., :L].reshape(-1, L)).view(L, b, p, d)
            ys.append(y.transpose(0, 1).to(u.dtype))                                        # b L p d
    return ys


# ---------------------------------------------------------------------------------------- the selective SSM


class Recurrence(torch.autograd.Function):
    """h_k = a_k h_{k-1} + b_k, with h_{-1} = 0, along the frames; a, b, h: (p, L, ...). A loop in place: the many small
    tensors of a loop of autograd's own operations would take twice the memory, in a fragmented heap."""

    @staticmethod
    def forward(ctx, a, b):
        h = b.clone()
        for k in range(1, h.shape[1]):
            h[:, k].addcmul_(a[:, k], h[:, k - 1])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        # the same recurrence, backward in time: g_k = a_{k+1} g_{k+1} + grad_k
        g = Recurrence.apply(a.roll(-1, 1).flip(1), grad.flip(1)).flip(1)
        return torch.cat([torch.zeros_like(g[:, :1]), g[:, 1:] * h[:, :-1]], 1), g


class S6(nn.Module):
    """The selective SSM of Mamba (Gu & Dao 2023, Algorithm 2), forward in time or, with `reverse`, backward:

        Δ = softplus(dt_proj(dt_rank numbers linear in u)),  B, C linear in u        Δ: one per channel and frame
        h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k u_k,   y_k = C_k h_k + D u_k,   A = -exp(A_log)

    d: channels. state_size: N. dt_rank: through how many numbers Δ is made. dt_min, dt_max: see `S4DKernel`.
    forward: u (b, L, ..., d) -> the same shape. On CUDA by the kernel of the package mamba-ssm, if installed; else by a
    loop over the frames, in chunks: the states of all positions, N times u, never exist at once.
    """
    has_kernel = importlib.util.find_spec("mamba_ssm") is not None
    recurrence = Recurrence.apply

    def __init__(self, d, state_size=16, dt_rank=1, reverse=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        self.sizes, self.reverse = [dt_rank, state_size, state_size], reverse
        self.x_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1).float()).repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        nn.init.uniform_(self.dt_proj.weight, -dt_rank ** -0.5, dt_rank ** -0.5)
        dt = torch.exp(torch.rand(d) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.dt_proj.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def forward(self, u):
        if self.has_kernel and u.is_cuda:
            return by_positions(self.fused, u, None, self.reverse)
        numbers = 2 ** 19 if u.device.type == "cpu" else 2 ** 27  # in the states that exist at once
        return by_positions(self.scan, u, max(1, numbers // (self.A_log.numel() * u.shape[1])), self.reverse)

    def scan(self, u):
        """u: (p, L, d) -> (p, L, d)."""
        with torch.autocast(u.device.type, enabled=False):
            U, A_log, D = map(at_least_float32, (u, self.A_log, self.D))
            dt, B, C = self.x_proj(U.to(self.x_proj.weight.dtype)).split(self.sizes, -1)    # p L rank, p L N, p L N
            dt, B, C = map(at_least_float32, (self.dt_proj(dt), B, C))
            dt = F.softplus(dt)                                                             # p L d
            A = -torch.exp(A_log.T)                                                         # N d
            h = self.recurrence((dt[:, :, None] * A).exp(), (dt * U)[:, :, None] * B[..., None])    # p L N d
            return ((h * C[..., None]).sum(2) + D * U).to(u.dtype)

    def fused(self, u):
        """`scan` by the kernel of mamba-ssm, whose tensors have frames last."""
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # here: not everybody has it
        dt, B, C = self.x_proj(u).split(self.sizes, -1)                                     # p L rank, p L N, p L N
        u, dt, B, C = (x.to(u.dtype).mT.contiguous() for x in (u, self.dt_proj(dt), B, C))  # p d L, p d L, p N L, p N L
        return selective_scan_fn(u, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), delta_softplus=True).mT
