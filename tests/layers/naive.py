"""The layer one query at a time, straight from the definition: slow, and independent of ops, states and spans."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt import HybridMemory
from hqlt.layers import Schedule


def turn(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary encoding of one token [H, K]."""
    half = x.shape[-1] // 2
    angle = position * base ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1
    )  # fmt: skip


def convolve(layer: HybridMemory, mixed: Tensor) -> Tensor:
    if layer.convolution is None:
        return mixed
    weight = layer.convolution.weight[:, 0]
    taps = weight.shape[-1]
    padded = torch.cat([mixed.new_zeros(taps - 1, mixed.shape[-1]), mixed])
    return torch.stack([(weight.T * padded[t : t + taps]).sum(0) for t in range(len(mixed))])


def softmax_read(query: Tensor, keys: Tensor, values: Tensor, start: int, layer: HybridMemory) -> Tensor:
    """KV memory holds keys[start:], the last one being the query's own token."""
    config, now = layer.config, len(keys) - 1
    held = list(range(start, now + 1))
    if config.position_encoding == "rope":
        query = turn(query, now, config.rope_base)
        chosen = torch.stack([turn(keys[s], s, config.rope_base) for s in held])
    else:
        chosen = keys[start:]
    scores = torch.einsum("hk,shk->sh", query, chosen) / config.key_dim**0.5
    return torch.einsum("sh,shv->hv", scores.softmax(0), values[start:])


def delta_read(layer: HybridMemory, x: Tensor, query: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
    """FW memory rewritten from nothing with tokens 0 … end − 1, then read."""

    def feature(z: Tensor) -> Tensor:
        z = F.silu(z)
        return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    rule, config = layer.update_rule, layer.config
    beta = torch.sigmoid(x @ rule.beta_proj.weight.T) * (2 if config.allow_negative_eigenvalues else 1)
    delay = 0 if layer.schedule.anchored else layer.schedule.delay
    state = x.new_zeros(config.num_heads, config.key_dim, config.value_dim)
    for s in range(end):
        now = s + delay  # a delayed write takes the gates of the token that has just arrived
        if config.update_rule == "gated_delta":
            step = F.softplus(x[now] @ rule.decay_proj.weight.T + rule.dt_bias)
            state = state * torch.exp(-rule.A_log.exp() * step)[:, None, None]
        key = feature(keys[s])
        recalled = torch.einsum("hk,hkv->hv", key, state)
        state = state + torch.einsum("hk,hv->hkv", key, beta[now][:, None] * (values[s] - recalled))
    return torch.einsum("hk,hkv->hv", feature(query), state) / config.key_dim**0.5


def linear_read(layer: HybridMemory, query: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
    query, written = F.elu(query) + 1, F.elu(keys[:end]) + 1
    scale = layer.config.key_dim**-0.5
    weight = torch.einsum("hk,shk->sh", query, written) * scale
    if layer.config.linear_normaliser == "published":  # over the heads up to this one, at the query's own token
        over_heads = (F.elu(keys[-1]) + 1).cumsum(0)
        total = scale * (query * over_heads).sum(-1)
    else:
        total = weight.sum(0)
    return torch.einsum("sh,shv->hv", weight, values[:end]) / (total[:, None] + 1e-10)


def mix(layer: HybridMemory, x: Tensor, fw: Tensor, kv: Tensor) -> Tensor:
    """One token: x [D], reads [H, V]."""
    kind, heads = layer.config.mixer, layer.config.num_heads
    if kind == "sum":
        return fw + kv
    if kind == "static_scalar":
        return layer.mixer.fw_scale * fw + layer.mixer.kv_scale * kv
    gate = torch.sigmoid(layer.mixer.gate_proj.weight @ x)
    if kind == "dynamic_scalar":
        return gate[:heads, None] * fw + gate[heads:, None] * kv
    gate = gate.reshape(heads, -1)
    if kind == "dynamic_vector":
        return gate * fw + (1 - gate) * kv
    width = layer.config.value_dim
    return gate[:, :width] * fw + gate[:, width:] * kv


def naive_layer(layer: HybridMemory, x: Tensor) -> Tensor:
    """Outputs [T, D] for one document [T, D]."""
    config, schedule = layer.config, Schedule.of(layer.config)
    projections = [layer.query_proj, layer.key_proj, layer.value_proj]
    mixed = convolve(layer, torch.cat([p(x) for p in projections], -1))
    query, keys, values = mixed.split([p.out_features for p in projections], -1)
    values = values if config.update_rule is None else F.silu(values)
    query, keys, values = (z.unflatten(-1, (config.num_heads, -1)) for z in (query, keys, values))
    outputs = []
    for t in range(len(x)):
        seen_keys, seen_values = keys[: t + 1], values[: t + 1]
        kv = softmax_read(query[t], seen_keys, seen_values, schedule.kv_start(t), layer) if config.kv_memory else None
        if config.update_rule is None:
            read = kv
        else:
            end = schedule.fw_end(t)
            if config.update_rule == "linear":
                fw = linear_read(layer, query[t], seen_keys, seen_values, end)
            else:
                fw = delta_read(layer, x[: t + 1], query[t], seen_keys, seen_values, end)
            read = fw if kv is None else mix(layer, x[t], fw, kv)
            read = read / (read.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * layer.output_norm.weight
        read = read.flatten()
        if layer.gate_proj is not None:
            read = read * F.silu(layer.gate_proj(x[t]))
        outputs.append(layer.output_proj(read))
    return torch.stack(outputs)
