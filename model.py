"""The 3D U-Net of Video Diffusion Models (Ho et al. 2022, arXiv 2204.03458) with an exchangeable temporal layer:
bidirectional S4D (arXiv 2403.07711), attention, linear attention, GSS, BiGS, Mamba, LSTM, or none.

    net = UNet3D(UNetConfig(temporal="ssm"))
    eps = net(torch.randn(2, 3, 16, 32, 32), torch.tensor([0, 255]))     # (b, c, f, h, w), (b,) -> (b, c, f, h, w)

Needs torch, einops and s4d.py.

Glossary
    b, c, f, h, w   batch, channels, frames, height, width
    x, t, ε         the noised video, its diffusion step, its noise
    spatial, temporal layer   one that treats each frame, or each position (h, w), independently
The network takes and returns (b, c, f, h, w); between its layers a video is (b, f, h, w, c).
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from s4d import (S6, DiagonalSSM, TemporalSSM, at_least_float32, by_positions, by_rows, check_frames, checkpointed,
                 chunk_size, in_chunks, layer_norm)

TEMPORAL_LAYERS = ("ssm", "attention", "linear-attention", "gss", "mamba", "lstm", "none")
CAUSAL_LAYERS = ("ssm", "gss")  # whose past is a state of fixed size
SSMS, ATTENTION_IMPLS = ("s4d", "s6"), ("sdpa", "math")
MAX_SEQUENCES = 2 ** 15  # per call of attention: its fused CUDA kernels fail beyond 65,535
MAX_LOGITS = 2 ** 29  # of temporal attention at once: the gradient of its bias exists for each of them


@dataclass(unsafe_hash=True)  # so that functools.cache takes it; nothing changes after __post_init__
class UNetConfig:
    """Every architecture setting. The defaults are those of the paper's Table 5. Raises ValueError."""
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
    causal: bool = False                # one direction, and group norms of each frame alone
    classes: int = 0                    # labels 0 .. classes - 1, and `classes` for no class; 0: no labels

    def __post_init__(self):
        if self.state_size is None:
            self.state_size = 16 if self.temporal == "mamba" and self.ssm == "s6" else 512
        if self.mlp_dim is None and self.temporal not in ("gss", "mamba"):
            self.mlp_dim = 512
        for name, choices in [("temporal", TEMPORAL_LAYERS), ("ssm", SSMS), ("attention_impl", ATTENTION_IMPLS)]:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.causal and self.temporal not in CAUSAL_LAYERS:
            raise ValueError(f"causal with temporal {self.temporal!r}; expected one of {', '.join(CAUSAL_LAYERS)}")
        self.bidirectional = self.bidirectional and not self.causal


# ---------------------------------------------------------------------------------------- the network


class UNet3D(nn.Module):
    """The denoising network ε_θ(x_t, t).

    config: UNetConfig. grad_checkpoint: recompute every block in the backward pass instead of keeping its activations.
    forward: x (b, c, f, h, w) float, t int, (b,) or, one for each frame, (b, f) -> (b, c, f, h, w). Any f >= 1; h and w
        divisible by 2^(levels - 1). With config.causal a frame of the output depends on itself and those before it.
        labels (b,) int, 0 .. classes: of a network with classes; None: of no class.
    Raises ValueError for other shapes.
    """

    def __init__(self, config, grad_checkpoint=False):
        super().__init__()
        self.config, self.grad_checkpoint = config, grad_checkpoint
        base, time_dim = config.base_channels, config.time_dim
        widths = [base * m for m in config.channel_mults]
        pairs = list(zip([base] + widths[:-1], widths))

        self.time_mlp = nn.Sequential(nn.Linear(base, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        # shared by all attention layers; absent otherwise, because DDP rejects parameters without gradients
        self.position_bias = RelativePositionBias(config.heads) if config.temporal == "attention" else None

        self.stem = nn.Conv2d(config.video_channels, base, 7, padding=3)
        self.stem_temporal = make_temporal_layer(config, base)
        # the last level of each half keeps its resolution
        self.down = nn.ModuleList(Level(config, c_in, c_out, nn.Conv2d) for c_in, c_out in pairs[:-1])
        self.down.append(Level(config, *pairs[-1]))
        self.mid_res1 = ResNetBlock(widths[-1], widths[-1], time_dim, config.causal)
        self.mid_spatial = SpatialAttention(widths[-1], config.heads)
        self.mid_temporal = make_temporal_layer(config, widths[-1])
        self.mid_res2 = ResNetBlock(widths[-1], widths[-1], time_dim, config.causal)
        self.up = nn.ModuleList(Level(config, 2 * deep, upper, nn.ConvTranspose2d) for upper, deep in pairs[:0:-1])
        self.up.append(Level(config, 2 * base * config.channel_mults[0], base))
        self.final_res = ResNetBlock(2 * base, base, causal=config.causal)
        self.final_conv = nn.Linear(base, config.video_channels)
        # last, so that the other first weights are those of a network without classes
        self.class_embedding = nn.Embedding(config.classes + 1, time_dim) if config.classes else None

    def forward(self, x, t, labels=None):
        self.check_shapes(x, t, labels)
        run = checkpointed if self.grad_checkpoint else nn.Module.__call__
        temporal_args = () if self.position_bias is None else (self.position_bias(x.shape[2]),)  # (heads, f, f)
        t = t if t.dim() == 2 else t[:, None]                                               # b 1, or b f
        time_embedding = self.time_mlp(sinusoidal_embedding(t, self.config.base_channels).to(x.dtype))  # b 1|f time_dim
        if self.class_embedding is not None:
            labels = torch.full_like(t[:, 0], self.config.classes) if labels is None else labels
            time_embedding = time_embedding + self.class_embedding(labels)[:, None]

        x = rearrange(x, "b c f h w -> b f h w c").contiguous()
        x = conv_per_frame(self.stem, x)                                                    # b f h w base
        x = stem = run(self.stem_temporal, x, *temporal_args)
        skips = []
        for level in self.down:
            x, skip = level(x, time_embedding, temporal_args, run)                          # b f h/2 w/2 c, b f h w c
            skips.append(skip)

        x = run(self.mid_res1, x, time_embedding)
        x = run(self.mid_spatial, x)
        x = run(self.mid_temporal, x, *temporal_args)
        x = run(self.mid_res2, x, time_embedding)

        for level in self.up:
            x = torch.cat([x, skips.pop()], dim=-1)                                         # b f h w 2c
            x, _ = level(x, time_embedding, temporal_args, run)                             # b f 2h 2w c/2

        x = run(self.final_res, torch.cat([x, stem], dim=-1))                               # b f h w base
        return rearrange(self.final_conv(x), "b f h w c -> b c f h w").contiguous()         # b video_channels f h w

    def check_shapes(self, x, t, labels):
        channels, factor = self.config.video_channels, 2 ** len(self.down) // 2
        if x.dim() != 5 or x.shape[1] != channels or 0 in x.shape or x.shape[3] % factor or x.shape[4] % factor:
            raise ValueError(f"video has shape {tuple(x.shape)}; expected (batch, {channels}, frames, height, width), "
                             f"height and width divisible by {factor}")
        b, f = x.shape[0], x.shape[2]
        if t.shape not in ((b,), (b, f)):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({b},), or ({b}, {f}), one per frame")
        if labels is not None and (self.class_embedding is None or labels.shape != (b,)):
            raise ValueError(f"labels of shape {tuple(labels.shape)}: expected ({b},), only for a network with classes")


class Level(nn.Module):
    """One resolution of the U-Net: two ResNet blocks, spatial linear attention, temporal layer -> what the skip
    connection takes; then a convolution that halves or doubles height and width, if any -> the output."""

    def __init__(self, config, c_in, c_out, resample=None):
        super().__init__()
        self.res1 = ResNetBlock(c_in, c_out, config.time_dim, config.causal)
        self.res2 = ResNetBlock(c_out, c_out, config.time_dim, config.causal)
        self.spatial = SpatialLinearAttention(c_out, config.heads)
        self.temporal = make_temporal_layer(config, c_out)
        self.resample = resample(c_out, c_out, 4, 2, 1) if resample else nn.Identity()

    def forward(self, x, time_embedding, temporal_args, run):
        x = run(self.res1, x, time_embedding)
        x = run(self.res2, x, time_embedding)
        x = run(self.spatial, x)
        skip = run(self.temporal, x, *temporal_args)
        return conv_per_frame(self.resample, skip), skip


def sinusoidal_embedding(t, dim):
    """t: (...) diffusion steps -> (..., dim), sines then cosines of t at dim/2 frequencies from 1 to 1/10,000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t[..., None].float() * freqs
    return torch.cat([angle.sin(), angle.cos()], -1)


def compile_tails(backend="inductor"):
    """Compile the functions that hold the elementwise work of all networks; once per process, before their first step.
    (Whole networks would take many minutes.) What does not compile, or has over 256 shapes, raises an error."""
    import torch._dynamo.config as dynamo
    dynamo.cache_size_limit = 256  # an alias of later names; beyond it, fullgraph raises
    dynamo.optimize_ddp = False  # it would cut the functions into pieces, and PyTorch 2.5 would fail
    for owner, name in [(TemporalSSM, "tail"), (Block, "norm_act"), (SpatialLinearAttention, "attend")]:
        setattr(owner, name, torch.compile(getattr(owner, name), backend=backend, fullgraph=True, dynamic=False))


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------- spatial layers


class ResNetBlock(nn.Module):
    """Two `Block`s and a shortcut; the time embedding (b, 1 or f, time_dim), if any, scales and shifts the first."""

    def __init__(self, c_in, c_out, time_dim=None, causal=False):
        super().__init__()
        self.to_scale_shift = nn.Linear(time_dim, 2 * c_out) if time_dim else None
        self.block1 = Block(c_in, c_out, causal)
        self.block2 = Block(c_out, c_out, causal)
        self.shortcut = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, time_embedding=None):
        scale_shift = self.to_scale_shift(F.silu(time_embedding)).chunk(2, -1) if self.to_scale_shift else ()
        return self.block2(self.block1(x, *scale_shift)) + self.shortcut(x)


class Block(nn.Module):
    """1×3×3 convolution, GroupNorm (statistics over all frames; causal: of each frame alone), scale and shift, SiLU."""

    def __init__(self, c_in, c_out, causal=False):
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = nn.GroupNorm(8, c_out)

    def forward(self, x, scale=None, shift=None):
        y = conv_per_frame(self.conv, x)
        if not self.causal:
            return self.norm_act(y, scale, shift)
        if scale is not None:  # the frames become videos of one frame
            scale, shift = (z.expand(*x.shape[:2], -1).flatten(0, 1)[:, None] for z in (scale, shift))
        return self.norm_act(y.flatten(0, 1)[:, None], scale, shift).view(y.shape)

    def norm_act(self, x, scale, shift):
        """SiLU(GroupNorm(x) (scale + 1) + shift), like x: (b, f, h, w, c); scale, shift: (b, 1 or f, c), or None."""
        group_norm = native_group_norm if x.device.type == "cpu" else framewise_group_norm
        with torch.autocast(x.device.type, enabled=False):
            return F.silu(group_norm(x, self.norm, scale, shift).to(x.dtype))


def conv_per_frame(conv, x):
    """A 2D convolution of each frame alone, channels last: (b, f, h, w, c) -> (b, f, h', w', c')."""
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)                                            # b·f c h w, a view
    if x.device.type == "cpu" and x.shape[2] * x.shape[3] <= 16:
        frames = frames.contiguous()  # with frames so small oneDNN is up to twice as fast channels first
    return conv(frames).permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


def native_group_norm(x, norm, scale, shift):
    """For CPUs, a third faster there; on a GPU it would leave all the frames of a group to one block of threads."""
    y = norm(x.flatten(1, 2).permute(0, 3, 1, 2))                                           # b c f·h w
    y = y.permute(0, 2, 3, 1).reshape(x.shape)
    return y if scale is None else torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None] + 1)


def framewise_group_norm(x, norm, scale, shift):
    """The same from sums over each frame, which keep all of a GPU busy; in float32, with no copy of x in float32."""
    parts, dtype = x.unflatten(-1, (norm.num_groups, -1)), at_least_float32(norm.weight).dtype  # b f h w g c/g
    size = math.prod(parts.shape[2:4]) * parts.shape[5]
    mean = parts.mean((2, 3, 5), dtype=dtype).mean(1)                                       # b g
    square = torch.linalg.vector_norm(parts, dim=(2, 3, 5), dtype=dtype).square().mean(1) / size
    gain = ((square - mean.square()).clamp(min=0) + norm.eps).rsqrt()   # 1/σ, σ² = E x² - (E x)²; b g
    mean, gain = (z.repeat_interleave(parts.shape[5], 1)[:, None] for z in (mean, gain))    # b 1 c
    gain = gain * norm.weight
    offset = norm.bias - mean * gain                        # GroupNorm(x) = x · gain + offset
    if scale is not None:
        gain, offset = gain * (scale + 1), offset * (scale + 1) + shift
    gain, offset = (z.to(x.dtype)[:, :, None, None] for z in (gain, offset))                # b 1 1 1 c
    return torch.addcmul(offset, x, gain)


class Attention(nn.Module):
    """What every attention has: a norm before it, queries, keys and values without biases, several heads."""
    output_bias = False

    def __init__(self, channels, heads, head_dim=32):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels, bias=self.output_bias)

    def qkv(self, x):
        """(n, p, c) -> q, k, v (n, heads, p, d) each."""
        return (rearrange(part, "n p (heads d) -> n heads p d", heads=self.heads)
                for part in self.to_qkv(layer_norm(x, self.norm.weight)).chunk(3, dim=-1))

    def output(self, out):
        """(n, heads, p, d) -> (n, p, c)."""
        return self.to_out(rearrange(out, "n heads p d -> n p (heads d)"))


class SpatialAttention(Attention):
    """Full attention over the positions of each frame, residual."""

    def forward(self, x):
        frames = rearrange(x, "b f h w c -> (b f) (h w) c")
        size = max(1, min(MAX_SEQUENCES, chunk_size(x.device) // frames.shape[1]))
        return in_chunks(self.attend, frames, size=size).view_as(x)

    def attend(self, x):
        """x: n frames of p positions, (n, p, c) -> (n, p, c)."""
        return x + self.output(F.scaled_dot_product_attention(*self.qkv(x)))


class SpatialLinearAttention(SpatialAttention):
    """Linear attention (Shen et al. 2018) over the positions of each frame, residual."""
    output_bias = True

    def attend(self, x):
        return x + self.output(linear_attention(*self.qkv(x)))


def linear_attention(q, k, v):
    """softmax of q over its features, of k over the sequence; q, k, v: (..., n, d) -> (..., n, d)."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.softmax(-1) * q.shape[-1] ** -0.5, k.softmax(-2)
    return q @ (k.mT @ v)


# ---------------------------------------------------------------------------------------- temporal layers


def make_temporal_layer(config, channels):
    """The temporal layer that config.temporal names: (b, f, ..., channels) -> the same."""
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
    if config.temporal == "lstm":
        return TemporalLSTM(channels, config.heads * config.head_dim, config.bidirectional)
    return nn.Identity()


class TemporalAttention(Attention):
    """Attention over the frames at each position, as in VDM: residual, rotary embedding, relative position bias.

    head_dim: even. forward: X (b, f, ..., c), bias (heads, f, f) -> the shape of X.
    impl: "sdpa", some positions at a time, recomputed in the backward pass, by PyTorch's fused attention, or by the
        formula where no fused kernel gives the bias a gradient: but for the bias, memory is linear in the frames.
        "math", the formula with all logits kept: the memory that the paper reports, quadratic in the frames.
    """

    def __init__(self, channels, heads, head_dim, impl="sdpa"):
        super().__init__(channels, heads, head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; expected an even number: the rotary embedding turns pairs")
        self.impl = impl
        rotary_dim = min(32, head_dim)  # only the first 32 features are rotated
        freqs = 10_000 ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)            # angle per frame
        self.register_buffer("rotary_freqs", freqs, persistent=False)

    def forward(self, X, bias=None):
        check_frames(X, self.norm)
        f = X.shape[1]
        # half as many rows as elsewhere: queries, keys and values are wide
        size = max(1, min(MAX_SEQUENCES, chunk_size(X.device) // (2 * f), MAX_LOGITS // (self.heads * f * f)))
        attend = functools.partial(self.attend, bias=bias)
        return X + by_positions(attend, X, size=None if self.impl == "math" else size)

    def attend(self, x, bias):
        """Everything but the residual; x: (p, f, c) -> (p, f, c)."""
        q, k, v = self.qkv(x)                                                               # p heads f d
        q, k = rotary_embedding(q, self.rotary_freqs), rotary_embedding(k, self.rotary_freqs)
        return self.output(self.attention(q, k, v, bias))

    def attention(self, q, k, v, bias):
        """q, k, v: (p, heads, f, d) -> (p, heads, f, d)."""
        if self.impl == "sdpa" and (q.is_cuda or not bias.requires_grad):
            # [None]: the CPU's fused kernel takes no mask of three dimensions
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias.to(q.dtype)                        # p heads f f
        return logits.softmax(dim=-1).to(v.dtype) @ v


class TemporalLinearAttention(TemporalAttention):
    """Attention over the frames whose cost is linear in them: softmax of q over features, of k over frames; no bias."""

    def attention(self, q, k, v, bias):
        return linear_attention(q, k, v)                                                    # p heads f d


def rotary_embedding(x, freqs):
    """Rotary embedding (Su et al. 2021) of the first 2·len(freqs) features of x, in adjacent pairs; x: (..., f, d)."""
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), freqs)          # f rotary_dim/2
    angle = F.pad(angle, (0, x.shape[-1] // 2 - len(freqs)))                                # f d/2
    # each pair as a complex number: a slice for each half, and the rest, would cost as much as the attention itself
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


class RelativePositionBias(nn.Module):
    """T5's relative position bias (Raffel et al. 2020), one learned number per bucket and head: 16 buckets for the past
    and 16 for the future, of one distance each below 8, then logarithmically wider, the last from 27 frames on.

    forward: f frames -> bias (heads, f, f), added to the attention logits of query frame i and key frame j.
    """

    def __init__(self, heads):
        super().__init__()
        self.table = nn.Embedding(32, heads)

    def forward(self, f):
        position = torch.arange(f, device=self.table.weight.device)
        offset = position[None, :] - position[:, None]                                      # j - i
        distance = offset.abs()
        far = 8 + (torch.log(distance.clamp(min=1).float() / 8) / math.log(32 / 8) * 8).long()
        bucket = torch.where(distance < 8, distance, far.clamp(max=15))
        bias = rearrange(self.table(bucket + 16 * (offset > 0)), "i j heads -> heads i j")
        return bias.contiguous()  # CUDA's fused kernels take no other


class TemporalLSTM(nn.Module):
    """The recurrent layer of Table 1, at each position: X + Linear(GELU(LSTM(LayerNorm(X)))).

    hidden: width of each direction. bidirectional: False leaves the backward one out, and the layer is causal.
    forward: X (b, f, ..., c) -> the same shape.
    """

    def __init__(self, channels, hidden, bidirectional=True):
        super().__init__()
        self.norm = nn.LayerNorm(channels, bias=False)
        self.lstm = nn.LSTM(channels, hidden, batch_first=True, bidirectional=bidirectional)
        self.out = nn.Linear((1 + bidirectional) * hidden, channels)

    def forward(self, X):
        check_frames(X, self.norm)
        # 32: fewer sequences would leave too little for the matrix product of each frame
        return X + by_positions(self.recur, X, size=max(32, chunk_size(X.device) // X.shape[1]))

    def train(self, mode=True):
        super().train(mode)
        self.lstm.train()  # without dropout it is the same, and only then does cuDNN take gradients of its input
        return self

    def recur(self, x):
        """x: (p, f, c) -> (p, f, c); the recurrence itself in the precision of its weights."""
        with torch.autocast(x.device.type, enabled=False):
            H = layer_norm(x, self.norm.weight).to(self.lstm.weight_hh_l0.dtype)
            states = self.lstm(H)[0]                                                        # p f hidden
        return self.out(F.gelu(states.to(x.dtype)))


class TemporalGSS(nn.Module):
    """Gated state space (GSS; Mehta et al. 2023) or, bidirectional, BiGS (Wang et al. 2022), on S4D, with a residual:

        H = LayerNorm(X)
        F = W_f SSM_fwd(GELU(V_f H)),  B = Flip(W_b SSM_bwd(GELU(V_b Flip(H))))          all of width c
        O = W_o (GELU(W_u (F · B)) · GELU(W_s H)) + X                                    inside of width m

    channels: c. state_size: N. mlp_dim: m; None: 3c. bidirectional: False leaves B out (GSS), and the layer is causal.
    forward: X (b, f, ..., c) -> the same shape.
    """

    def __init__(self, channels, state_size=512, mlp_dim=None, bidirectional=True):
        super().__init__()
        hidden = mlp_dim or 3 * channels
        reverses = [False, True] if bidirectional else [False]
        self.norm = nn.LayerNorm(channels, bias=False)
        self.before = nn.ModuleList(nn.Linear(channels, channels) for _ in reverses)             # V
        self.directions = nn.ModuleList(DiagonalSSM(channels, state_size, reverse) for reverse in reverses)
        self.after = nn.ModuleList(nn.Linear(channels, channels) for _ in reverses)              # W
        self.shortcut = nn.Linear(channels, hidden)                                              # W_s
        self.up = nn.Linear(channels, hidden)                                                    # W_u
        self.out = nn.Linear(hidden, channels)                                                   # W_o

    def forward(self, X):
        check_frames(X, self.norm)
        us = by_rows(self.inputs, X).chunk(len(self.directions), -1)
        return by_rows(self.output, X, *(ssm(u) for ssm, u in zip(self.directions, us)))

    def inputs(self, X):
        H = layer_norm(X, self.norm.weight)
        return torch.cat([F.gelu(V(H)) for V in self.before], -1)

    def output(self, X, *ys):
        product = math.prod(W(y) for W, y in zip(self.after, ys))                                # F · B
        shortcut = F.gelu(self.shortcut(layer_norm(X, self.norm.weight)))
        return self.out(F.gelu(self.up(product)) * shortcut) + X


class TemporalMamba(nn.Module):
    """Mamba (Gu & Dao 2023) or, bidirectional, Bi-Mamba (Zhu et al. 2024), with a residual:

        H = LayerNorm(X)
        A, G = W_in H                                                                    of width 2c each
        F = SSM_fwd(SiLU(Conv_fwd(A))),  B = Flip(SSM_bwd(SiLU(Conv_bwd(Flip(A)))))      Conv: causal, of 4 frames
        O = W_out ((F + B) · SiLU(G)) + X

    mlp_dim: hidden width of an MLP, Linear, SiLU, Linear, in the place of W_out; None: without.
    ssm: "s4d", as in the paper, or "s6", Mamba's own. The rest as in `TemporalGSS`.
    """

    def __init__(self, channels, state_size=512, mlp_dim=None, bidirectional=True, ssm="s4d"):
        super().__init__()
        width, reverses = 2 * channels, [False, True] if bidirectional else [False]
        self.norm = nn.LayerNorm(channels, bias=False)
        self.to_input = nn.Linear(channels, width)
        self.to_gate = nn.Linear(channels, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 4, groups=width) for _ in reverses)
        new_ssm = functools.partial(S6, dt_rank=math.ceil(channels / 16)) if ssm == "s6" else DiagonalSSM
        self.directions = nn.ModuleList(new_ssm(width, state_size, reverse=reverse) for reverse in reverses)
        widths = [width, mlp_dim, channels] if mlp_dim else [width, channels]
        self.out = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, X):
        check_frames(X, self.norm)
        A = by_rows(lambda x: self.to_input(layer_norm(x, self.norm.weight)), X)                 # b f ... 2c
        ys = (ssm(F.silu(short_conv(A, conv, ssm.reverse))) for conv, ssm in zip(self.convs, self.directions))
        return by_rows(self.output, X, *ys)

    def output(self, X, *ys):
        gate = F.silu(self.to_gate(layer_norm(X, self.norm.weight)))
        out = self.out[0](sum(ys) * gate)
        return (self.out[1](F.silu(out)) if len(self.out) == 2 else out) + X


def short_conv(u, conv, reverse):
    """y_k = Σ_j w_j u_{k-3+j}, or backward in time, Σ_j w_j u_{k+3-j}; conv: Conv1d, u: (b, f, ..., c)."""
    return by_positions(lambda x: conv(F.pad(x.mT, (conv.kernel_size[0] - 1, 0))).mT, u, None, reverse)  # x: p f c
