"""The 3D U-Net of Video Diffusion Models (Ho et al. 2022, arXiv 2204.03458) with an exchangeable temporal layer:
bidirectional S4D (arXiv 2403.07711), its rivals there (attention, linear attention, GSS and BiGS, Mamba), or none.

    net = UNet3D(UNetConfig(temporal="ssm"))
    eps = net(torch.randn(2, 3, 16, 32, 32), torch.tensor([0, 255]))     # (b, c, f, h, w), (b,) -> (b, c, f, h, w)

Needs torch, einops and s4d.py.

Glossary: b batch, c channels, f frames, h, w height and width, t diffusion step, x the noised video, ε its noise.
A spatial layer treats every frame alone, a temporal layer every position (h, w) alone. `python model.py` prints the
parameter counts at the paper's width.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from s4d import (S6, DiagonalSSM, LayerNorm, TemporalLayer, TemporalSSM, at_least_float32, chunk_size, convolve,
                 in_chunks, linear)

TEMPORAL_LAYERS = ("ssm", "attention", "linear-attention", "gss", "mamba", "none")
SSMS = ("s4d", "s6")
ATTENTION_IMPLS = ("sdpa", "math")
SPATIAL_HEAD_DIM = 32
MAX_SEQUENCES = 2 ** 15  # per call of attention: its fused CUDA kernels fail beyond 65,535, a batch of 64 at 32x32


@dataclass
class UNetConfig:
    """Every architecture setting. The defaults are those of the paper's Table 5."""
    temporal: str = "ssm"               # one of TEMPORAL_LAYERS
    video_channels: int = 3
    base_channels: int = 64
    channel_mults: tuple = (1, 2, 4, 8)  # width of each level, in base channels
    time_dim: int = 1024                # width of the time embedding
    heads: int = 8                      # of every attention, spatial ones (32 wide per head) included
    head_dim: int = 64                  # of temporal attention
    attention_impl: str = "sdpa"        # of temporal attention, or "math": with all logits at once, as in the paper
    state_size: int | None = None       # N of each SSM; None: 512, of S6 16
    mlp_dim: int | None = None          # hidden width of an SSM layer; None: 512, of gss 3 x channels, of mamba no MLP
    mlp_layers: int = 2
    mlp_position: str = "post"
    bidirectional: bool = True
    skip: str = "input"                 # of the temporal SSM layer: its input, or the normalised input ("norm")
    ssm: str = "s4d"                    # of mamba, or "s6": selective
    classes: int = 0                    # labels 0 .. classes - 1, and `classes` for no class; 0: no labels

    def __post_init__(self):
        if self.state_size is None:
            self.state_size = 16 if self.ssm == "s6" else 512
        if self.mlp_dim is None and self.temporal not in ("gss", "mamba"):
            self.mlp_dim = 512


def make_temporal_layer(config, channels):
    """The temporal layer that config.temporal names, for `channels` channels: (b, c, f, h, w) -> the same.

    Raises ValueError for an unknown name.
    """
    if config.temporal == "ssm":
        return TemporalSSM(channels, config.state_size, config.mlp_dim, config.mlp_layers, config.mlp_position,
                           config.bidirectional, config.skip)
    if config.temporal == "attention":
        return TemporalAttention(channels, config.heads, config.head_dim, config.attention_impl)
    if config.temporal == "linear-attention":
        return TemporalLinearAttention(channels, config.heads, config.head_dim)
    if config.temporal == "gss":
        return TemporalGSS(channels, config.state_size, config.mlp_dim, config.bidirectional)
    if config.temporal == "mamba":
        return TemporalMamba(channels, config.state_size, config.mlp_dim, config.bidirectional, config.ssm)
    if config.temporal == "none":
        return nn.Identity()
    raise ValueError(f"temporal layer is {config.temporal!r}; expected one of {', '.join(TEMPORAL_LAYERS)}")


# ---------------------------------------------------------------------------------------- temporal layers


def rotary_frequencies(head_dim, theta=10_000, rotary_dim=32):
    """-> (rotary_dim / 2,) angular frequencies per frame; only the first `rotary_dim` features are rotated."""
    rotary_dim = min(rotary_dim, head_dim)
    return theta ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)


def rotary_embedding(x, freqs):
    """Rotary position embedding (Su et al. 2021) of x (..., f, d): the first 2·len(freqs) features, in adjacent pairs.

    -> (..., f, d).
    """
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), freqs)          # f rotary_dim/2
    angle = F.pad(angle, (0, x.shape[-1] // 2 - len(freqs)))                                # f d/2
    # each pair as a complex number: a slice for each half, and the rest, would cost as much as the attention itself
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


class RelativePositionBias(nn.Module):
    """T5's bidirectional relative position bias (Raffel et al. 2020): one learned number per bucket and head.

    Half of the buckets are for the past, half for the future; distances up to 8 have a bucket each, larger ones share
    logarithmically wider buckets, and all from `max_distance` on share the last.
    """

    def __init__(self, heads, buckets=32, max_distance=32):
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Embedding(buckets, heads)

    def forward(self, f):
        """-> bias (heads, f, f), added to the attention logits of query frame i and key frame j."""
        buckets = self.table.num_embeddings // 2
        exact = buckets // 2
        position = torch.arange(f, device=self.table.weight.device)
        offset = position[None, :] - position[:, None]                                      # j - i
        distance = offset.abs()
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
                       * (buckets - exact)).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
        return rearrange(self.table(bucket + buckets * (offset > 0)), "i j heads -> heads i j")


class TemporalAttention(nn.Module):
    """Attention over the frames at each position, as in VDM: pre-norm, residual, rotary, relative bias, no biases.

    head_dim: even.
    impl: "sdpa", PyTorch's fused attention (where it has it: not on a CPU in training, since the bias needs a gradient)
        on some positions at a time, recomputed in the backward pass: memory is linear in the frames, in training too.
        (Fused kernels alone would not do: the gradient of the bias is of the size of the logits, (p, heads, f, f), for
        all the positions that are treated at once.)
        "math", the formula with all logits kept: the memory that the paper reports, quadratic in the frames.
    forward: x (b, c, f, h, w), bias (heads, f, f) -> (b, c, f, h, w).
    """

    def __init__(self, channels, heads, head_dim, impl="sdpa"):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; expected an even number, since the rotary embedding turns "
                             "features in pairs")
        if impl not in ATTENTION_IMPLS:
            raise ValueError(f"attention_impl is {impl!r}; expected one of {', '.join(ATTENTION_IMPLS)}")
        self.heads, self.impl = heads, impl
        self.norm = LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels, bias=False)
        self.register_buffer("rotary_freqs", rotary_frequencies(head_dim), persistent=False)

    def forward(self, x, bias=None):
        return x + self.mix(x, bias)

    def mix(self, x, bias=None):
        """Everything but the residual: (b, c, f, h, w) -> (b, c, f, h, w)."""
        h, w = x.shape[-2:]
        x = rearrange(x, "b c f h w -> (b h w) f c")
        attend = functools.partial(self.attend, bias=bias)
        if self.impl == "math":
            out = attend(x)
        else:
            size = min(MAX_SEQUENCES, max(1, chunk_size(x.device) // x.shape[1]))
            out = in_chunks(attend, x, dim=0, size=size)
        return rearrange(out, "(b h w) f c -> b c f h w", h=h, w=w)

    def attend(self, x, bias):
        """x: (p, f, c) -> (p, f, c)."""
        x = self.norm(x.mT).mT
        q, k, v = (rearrange(part, "p f (heads d) -> p heads f d", heads=self.heads)
                   for part in self.to_qkv(x).chunk(3, dim=-1))
        q, k = rotary_embedding(q, self.rotary_freqs), rotary_embedding(k, self.rotary_freqs)
        out = self.attention(q, k, v, bias)                                                 # p heads f d
        return self.to_out(rearrange(out, "p heads f d -> p f (heads d)"))

    def attention(self, q, k, v, bias):
        """q, k, v: (p, heads, f, d) -> (p, heads, f, d)."""
        if self.impl == "sdpa":
            # [None]: the CPU's fused kernel takes no mask of three dimensions
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        logits = q @ k.mT * q.shape[-1] ** -0.5 + bias                                      # p heads f f
        return logits.softmax(dim=-1).to(v.dtype) @ v


class TemporalLinearAttention(TemporalAttention):
    """Attention over the frames whose cost is linear in them: softmax of q over features, of k over frames; no bias."""

    def attention(self, q, k, v, bias):
        q = q.softmax(dim=-1) * q.shape[-1] ** -0.5
        k = k.softmax(dim=-2)
        return q @ (k.mT @ v)                                                               # p heads f d


class TemporalGSS(TemporalLayer):
    """Gated state space (GSS; Mehta et al. 2023) or, bidirectional, BiGS (Wang et al. 2022), on S4D, with a residual:

        H = LayerNorm(X)
        F = W_f SSM_fwd(GELU(V_f H)),  B = Flip(W_b SSM_bwd(GELU(V_b Flip(H))))          all of width c
        O = W_o (GELU(W_u (F · B)) · GELU(W_s H)) + X                                    inside of width m

    channels: c. state_size: N. mlp_dim: m; None: 3c. bidirectional: False leaves B out (GSS), and the layer is causal.
    forward: X (b, channels, f, ...) -> the same shape.
    """

    def __init__(self, channels, state_size=512, mlp_dim=None, bidirectional=True):
        super().__init__()
        hidden = mlp_dim or 3 * channels
        self.norm = LayerNorm(channels)
        reverses = [False, True] if bidirectional else [False]
        self.before = nn.ModuleList(nn.Linear(channels, channels) for _ in reverses)             # V
        self.directions = nn.ModuleList(DiagonalSSM(channels, state_size, reverse) for reverse in reverses)
        self.after = nn.ModuleList(nn.Linear(channels, channels) for _ in reverses)              # W
        self.shortcut = nn.Linear(channels, hidden)                                              # W_s
        self.up = nn.Linear(channels, hidden)                                                    # W_u
        self.out = nn.Linear(hidden, channels)                                                   # W_o

    def inputs(self, X):
        H = self.norm(X[None])[0]
        return torch.cat([F.gelu(linear(H, layer)) for layer in self.before])

    def over_time(self, u, toeplitz):
        return [y for part, ssm in zip(u.chunk(len(self.directions)), self.directions)
                for y in convolve(part, [ssm], toeplitz)]

    def output(self, X, *ys):
        product = linear(ys[0], self.after[0])
        if len(ys) == 2:
            product = product * linear(ys[1], self.after[1])                                     # F · B
        shortcut = F.gelu(linear(self.norm(X[None])[0], self.shortcut))
        return linear(F.gelu(linear(product, self.up)) * shortcut, self.out)


class TemporalMamba(TemporalLayer):
    """Mamba (Gu & Dao 2023) or, bidirectional, Bi-Mamba (Zhu et al. 2024), with a residual:

        H = LayerNorm(X)
        A, G = W_in H                                                                    of width 2c each
        F = SSM_fwd(SiLU(Conv_fwd(A))),  B = Flip(SSM_bwd(SiLU(Conv_bwd(Flip(A)))))      Conv: causal, of 4 frames
        O = W_out ((F + B) · SiLU(G)) + X

    channels:      c.
    state_size:    N.
    mlp_dim:       hidden width of an MLP, Linear, SiLU, Linear, in the place of W_out; None: without.
    bidirectional: False leaves B out, and the layer is causal.
    ssm:           "s4d", as in the paper, or "s6", Mamba's own.
    forward: X (b, channels, f, ...) -> the same shape. Raises ValueError for another ssm.
    """

    def __init__(self, channels, state_size=512, mlp_dim=None, bidirectional=True, ssm="s4d"):
        super().__init__()
        if ssm not in SSMS:
            raise ValueError(f"ssm is {ssm!r}; expected one of {', '.join(SSMS)}")
        self.width, self.ssm = 2 * channels, ssm
        reverses = [False, True] if bidirectional else [False]
        self.norm = LayerNorm(channels)
        self.to_input = nn.Linear(channels, self.width)
        self.to_gate = nn.Linear(channels, self.width)
        self.convs = nn.ModuleList(nn.Conv1d(self.width, self.width, 4, groups=self.width) for _ in reverses)
        if ssm == "s6":
            directions = [S6(self.width, state_size, math.ceil(channels / 16), reverse) for reverse in reverses]
        else:
            directions = [DiagonalSSM(self.width, state_size, reverse) for reverse in reverses]
        self.directions = nn.ModuleList(directions)
        widths = [self.width, mlp_dim, channels] if mlp_dim else [self.width, channels]
        self.out = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def inputs(self, X):
        return linear(self.norm(X[None])[0], self.to_input)

    def over_time(self, u, toeplitz):
        ys = []
        for conv, ssm in zip(self.convs, self.directions):
            v = F.silu(self.short_conv(u, conv, ssm.reverse, toeplitz))
            if self.ssm == "s4d":
                ys += convolve(v, [ssm], toeplitz)
            else:
                ys.append(ssm(v.mT).mT if toeplitz else ssm(v))                                  # it takes frames last
        return ys

    def short_conv(self, u, conv, reverse, toeplitz):
        """y_k = Σ_j w_j u_{k-3+j}, or backward in time, y_k = Σ_j w_j u_{k+3-j}; u as in `over_time` -> the same."""
        weight = conv.weight.flip(2) if reverse else conv.weight                                 # 2c 1 4
        past = weight.shape[2] - 1
        # padded on both sides: of the outcome, the first f frames look back and the last f ahead
        if toeplitz:
            y = F.conv2d(u[None], weight[..., None], conv.bias, padding=(past, 0), groups=self.width)[0]
            return y[:, past:] if reverse else y[:, :-past]
        y = F.conv2d(u[None], weight[:, :, None], conv.bias, padding=(0, past), groups=self.width)[0]
        return y[..., past:] if reverse else y[..., :-past]

    def output(self, X, *ys):
        gate = F.silu(linear(self.norm(X[None])[0], self.to_gate))
        out = linear(sum(ys) * gate, self.out[0])
        return linear(F.silu(out), self.out[1]) if len(self.out) == 2 else out


# ---------------------------------------------------------------------------------------- spatial layers


class Block(nn.Module):
    """1×3×3 convolution, GroupNorm, scale and shift, SiLU."""

    def __init__(self, c_in, c_out, groups=8):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, (1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.GroupNorm(groups, c_out)

    def forward(self, x, scale_shift=None):
        x = self.norm(self.conv(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x)


class ResNetBlock(nn.Module):
    """Two `Block`s and a shortcut; the time embedding (b, time_dim), if any, scales and shifts the first."""

    def __init__(self, c_in, c_out, time_dim=None, groups=8):
        super().__init__()
        self.to_scale_shift = nn.Linear(time_dim, 2 * c_out) if time_dim else None
        self.block1 = Block(c_in, c_out, groups)
        self.block2 = Block(c_out, c_out, groups)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time_embedding=None):
        scale_shift = None
        if self.to_scale_shift is not None:
            scale_shift = rearrange(self.to_scale_shift(F.silu(time_embedding)), "b c -> b c 1 1 1").chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift)) + self.shortcut(x)


class SpatialLinearAttention(nn.Module):
    """Linear attention (Shen et al. 2018) over the positions of each frame, pre-norm, residual."""

    def __init__(self, channels, heads, head_dim=SPATIAL_HEAD_DIM):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(channels)
        self.to_qkv = nn.Conv3d(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Conv3d(heads * head_dim, channels, 1)

    def forward(self, x):
        return x + self.mix(x)

    def mix(self, x):
        """Everything but the residual: (b, c, f, h, w) -> the same, a few frames at a time (`in_chunks`)."""
        b, c, f, h, w = x.shape
        frames = x.transpose(0, 1).reshape(c, b * f, h * w)                                 # a view when b = 1
        out = in_chunks(self.attend, frames, dim=1, size=max(1, chunk_size(x.device) // (h * w)))
        return out.view(c, b, f, h, w).transpose(0, 1)

    def attend(self, x):
        """x: n frames of p positions, (c, n, p) -> (c, n, p)."""
        c, n, p = x.shape
        qkv = self.to_qkv.weight.flatten(1) @ self.norm(x.flatten(1)[None])[0]
        # apart before they are rearranged: the gradients are then put together in one copy, not two
        q, k, v = (rearrange(part, "(heads d) (n p) -> n heads d p", heads=self.heads, n=n) for part in qkv.chunk(3))
        q = q.softmax(dim=-2) * q.shape[-2] ** -0.5
        k = k.softmax(dim=-1)
        out = (k @ v.mT).mT @ q                                                             # n heads e p
        out = rearrange(out, "n heads e p -> (heads e) (n p)")
        return torch.addmm(self.to_out.bias[:, None], self.to_out.weight.flatten(1), out).view(c, n, p)


class SpatialAttention(nn.Module):
    """Full attention over the positions of each frame, pre-norm, residual, no biases."""

    def __init__(self, channels, heads, head_dim=SPATIAL_HEAD_DIM):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels, bias=False)

    def forward(self, x):
        h, w = x.shape[-2:]
        tokens = rearrange(self.norm(x), "b c f h w -> (b f) (h w) c")
        q, k, v = (rearrange(part, "n p (heads d) -> n heads p d", heads=self.heads)
                   for part in self.to_qkv(tokens).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v)                                       # (b f) heads p d
        out = self.to_out(rearrange(out, "n heads p d -> n p (heads d)"))
        return x + rearrange(out, "(b f) (h w) c -> b c f h w", b=len(x), h=h, w=w)


# ---------------------------------------------------------------------------------------- the network


def sinusoidal_embedding(t, dim):
    """t: (b,) diffusion steps -> (b, dim), sines then cosines of t at dim/2 frequencies from 1 to 1/10,000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t[:, None].float() * freqs
    return torch.cat([angle.sin(), angle.cos()], -1)


class Level(nn.Module):
    """One resolution of the U-Net: two ResNet blocks, spatial linear attention, temporal layer; then `resample`,
    which the network calls itself, since the skip connection is taken before it."""

    def __init__(self, config, c_in, c_out, resample):
        super().__init__()
        self.res1 = ResNetBlock(c_in, c_out, config.time_dim)
        self.res2 = ResNetBlock(c_out, c_out, config.time_dim)
        self.spatial = SpatialLinearAttention(c_out, config.heads)
        self.temporal = make_temporal_layer(config, c_out)
        self.resample = resample

    def forward(self, x, time_embedding, temporal_args, run):
        x = run(self.res1, x, time_embedding)
        x = run(self.res2, x, time_embedding)
        x = run(self.spatial, x)
        return run(self.temporal, x, *temporal_args)


class UNet3D(nn.Module):
    """The denoising network ε_θ(x_t, t).

    config: UNetConfig. grad_checkpoint: recompute every block in the backward pass instead of keeping its activations.

    forward: x (b, c, f, h, w) float, t (b,) int -> (b, c, f, h, w). Any f >= 1; h and w divisible by 2^(levels - 1).
        labels (b,) int, 0 .. classes: of a network with classes; None: of no class.
    Raises ValueError for other shapes.
    """

    def __init__(self, config, grad_checkpoint=False):
        super().__init__()
        self.config, self.grad_checkpoint = config, grad_checkpoint
        base = config.base_channels
        widths = [base * m for m in config.channel_mults]
        pairs = list(zip([base] + widths[:-1], widths))
        levels = len(pairs)

        self.time_mlp = nn.Sequential(nn.Linear(base, config.time_dim), nn.GELU(),
                                      nn.Linear(config.time_dim, config.time_dim))
        # one table for all attention layers, and none elsewhere: a parameter without gradient would stop DDP
        self.position_bias = RelativePositionBias(config.heads) if config.temporal == "attention" else None

        self.stem = nn.Conv3d(config.video_channels, base, (1, 7, 7), padding=(0, 3, 3))
        self.stem_temporal = make_temporal_layer(config, base)

        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairs):
            last = i == levels - 1
            resample = nn.Identity() if last else nn.Conv3d(c_out, c_out, (1, 4, 4), (1, 2, 2), (0, 1, 1))
            self.down.append(Level(config, c_in, c_out, resample))

        self.mid_res1 = ResNetBlock(widths[-1], widths[-1], config.time_dim)
        self.mid_spatial = SpatialAttention(widths[-1], config.heads)
        self.mid_temporal = make_temporal_layer(config, widths[-1])
        self.mid_res2 = ResNetBlock(widths[-1], widths[-1], config.time_dim)

        self.up = nn.ModuleList()
        for i, (c_out, c_in) in enumerate(reversed(pairs)):
            last = i == levels - 1
            resample = nn.Identity() if last else nn.ConvTranspose3d(c_out, c_out, (1, 4, 4), (1, 2, 2), (0, 1, 1))
            self.up.append(Level(config, 2 * c_in, c_out, resample))

        self.final_res = ResNetBlock(2 * base, base)
        self.final_conv = nn.Conv3d(base, config.video_channels, 1)
        # last, so that the other first weights are those of a network without classes
        self.class_embedding = nn.Embedding(config.classes + 1, config.time_dim) if config.classes else None

    def forward(self, x, t, labels=None):
        self.check_shapes(x, t, labels)
        run = self.run
        temporal_args = () if self.position_bias is None else (self.position_bias(x.shape[2]),)
        time_embedding = self.time_mlp(sinusoidal_embedding(t, self.config.base_channels))  # b time_dim
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.config.classes) if labels is None else labels
            time_embedding = time_embedding + self.class_embedding(labels)

        x = self.stem(x)                                                                    # b base f h w
        x = stem = run(self.stem_temporal, x, *temporal_args)
        skips = []
        for level in self.down:
            x = level(x, time_embedding, temporal_args, run)                                # b c f h w
            skips.append(x)
            x = level.resample(x)                                                           # b c f h/2 w/2

        x = run(self.mid_res1, x, time_embedding)
        x = run(self.mid_spatial, x)
        x = run(self.mid_temporal, x, *temporal_args)
        x = run(self.mid_res2, x, time_embedding)

        for level in self.up:
            x = torch.cat([x, skips.pop()], dim=1)                                          # b 2c f h w
            x = level(x, time_embedding, temporal_args, run)                                # b c/2 f h w
            x = level.resample(x)                                                           # b c/2 f 2h 2w

        x = run(self.final_res, torch.cat([x, stem], dim=1))                                # b base f h w
        return self.final_conv(x)                                                           # b video_channels f h w

    def run(self, block, *args):
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        return block(*args)

    def check_shapes(self, x, t, labels):
        channels, levels = self.config.video_channels, len(self.config.channel_mults)
        factor = 2 ** (levels - 1)
        if x.dim() != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"video has shape {tuple(x.shape)}; expected (batch, {channels}, frames, height, width)")
        if x.shape[3] % factor or x.shape[4] % factor:
            raise ValueError(f"video is {x.shape[3]}x{x.shape[4]}; a network of {levels} levels needs height and width "
                             f"divisible by {factor}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({x.shape[0]},), one step per video")
        if labels is not None and (self.class_embedding is None or labels.shape != t.shape):
            raise ValueError(f"labels have shape {tuple(labels.shape)}; this network of {self.config.classes} classes "
                             f"expected {tuple(t.shape) if self.config.classes else 'none'}")


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


if __name__ == "__main__":
    for name in TEMPORAL_LAYERS:
        print(f"{name:18s} {count_parameters(UNet3D(UNetConfig(temporal=name))) / 1e6:7.2f} M parameters")
