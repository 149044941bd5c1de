"""Language models with a memory, written out token by token in fp64 under the names of their published files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Layer = Callable[[Any, Any, Tensor], Tensor]


class Part:
    """The weights under a name."""

    def __init__(self, weights: Weights, at: str) -> None:
        self.weights, self.at = weights, at

    def __call__(self, name: str) -> Tensor:
        return self.weights[f"{self.at}.{name}"]

    def product(self, name: str, x: Tensor) -> Tensor:
        return x @ self(f"{name}.weight").T

    def rms(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self(f"{name}.weight")

    def layernorm(self, name: str, x: Tensor, eps: float) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return y * self(f"{name}.weight") + self.weights.get(f"{self.at}.{name}.bias", 0)

    def convolved(self, name: str, x: Tensor) -> Tensor:
        """x W through a convolution, and silu; T C → T D."""
        y, w = self.product(f"{name}_proj", x), self(f"{name}_conv1d.weight")[:, 0]
        k = w.shape[1]
        before = torch.cat((y.new_zeros(k - 1, y.shape[1]), y))
        return silu(torch.stack([(before[t : t + k] * w.T).sum(0) for t in range(len(x))]))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turned(x: Tensor) -> Tensor:
    """T H K, each half-pair turned by t 10000^(−2i/K)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin, a, b = angle.cos()[:, None], angle.sin()[:, None], x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def remembered(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """q, k: T H K, v: T H V, decay: T H K, beta: T H → T H V, one token and one head after the other."""
    out, scale = torch.zeros_like(v), k.shape[-1] ** -0.5
    for h in range(v.shape[1]):
        S = k.new_zeros(k.shape[-1], v.shape[-1])
        for t in range(len(k)):
            S = decay[t, h][:, None] * S
            new = v[t, h] if beta is None else beta[t, h] * (v[t, h] - k[t, h] @ S)
            S = S + torch.outer(k[t, h], new)
            out[t, h] = scale * q[t, h] @ S
    return out


def finished(
    c: dict[str, Any], p: Part, norm: str, o: Tensor, gate: Callable[[Tensor], Tensor] | None, x: Tensor
) -> Tensor:
    o = p.rms(norm, o, c["norm_eps"]).flatten(1)
    return p.product("o_proj", o if gate is None else o * gate(p.product("g_proj", x)))


def retnet(c: dict[str, Any], p: Part, x: Tensor) -> Tensor:
    H = c["num_heads"]
    q, k, v = (p.product(f"{n}_proj", x).unflatten(1, (H, -1)) for n in "qkv")
    if c["feature_map"] == "relu":
        q, k = q.clamp(min=0), k.clamp(min=0)
    q, k = turned(q), turned(k)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))
    out = torch.zeros_like(v)
    for n in range(len(x)):
        for m in range(n + 1):
            share = gamma ** (n - m) * (q[n] * k[m]).sum(-1) * k.shape[-1] ** -0.5
            out[n] += share[:, None] * v[m]
    gated = c["use_output_gate"]
    return finished(c, p, "g_norm_swish_gate" if gated else "g_norm", out, silu if gated else None, x)


def gla(c: dict[str, Any], p: Part, x: Tensor) -> Tensor:
    H, stream = c["num_heads"], p.convolved if c["use_short_conv"] else lambda n, x: p.product(f"{n}_proj", x)
    q, k, v = (stream(n, x).unflatten(1, (H, -1)) for n in "qkv")
    g = p.product("gk_proj.1", p.product("gk_proj.0", x)) + p("gk_proj.1.bias")
    out = remembered(q, k, v, torch.sigmoid(g).pow(1 / 16).unflatten(1, (H, -1)))
    gated = c["use_output_gate"]
    return finished(c, p, "g_norm_swish_gate" if gated else "g_norm", out, silu if gated else None, x)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_net(c: dict[str, Any], p: Part, x: Tensor) -> Tensor:
    q, k, v = (p.convolved(n, x).unflatten(1, (c["num_heads"], -1)) for n in "qkv")
    beta = torch.sigmoid(p.product("b_proj", x)) * (2 if c["allow_neg_eigval"] else 1)
    return finished(
        c, p, "o_norm", remembered(unit(q), unit(k), v, torch.ones_like(k), beta), silu if c["use_gate"] else None, x
    )


def gated_deltanet(c: dict[str, Any], p: Part, x: Tensor) -> Tensor:
    groups, heads = c["num_heads"], c["num_v_heads"] or c["num_heads"]
    q, k = (unit(p.convolved(n, x).unflatten(1, (groups, -1))).repeat_interleave(heads // groups, 1) for n in "qk")
    step = torch.log1p(torch.exp(p.product("a_proj", x) + p("dt_bias")))
    decay = torch.exp(-p("A_log").exp() * step)[..., None].expand_as(k)
    beta = torch.sigmoid(p.product("b_proj", x)) * (2 if c["allow_neg_eigval"] else 1)
    act = None if not c["use_gate"] else torch.sigmoid if c["output_gate_activation"] == "sigmoid" else silu
    v = p.convolved("v", x).unflatten(1, (heads, -1))
    return finished(c, p, "o_norm", remembered(q, k, v, decay, beta), act, x)


def rwkv6(c: dict[str, Any], p: Part, x: Tensor) -> Tensor:
    H, R, out, before = c["num_heads"], c["proj_low_rank_dim"], [], torch.zeros_like(x[0])
    S = x.new_zeros(H, x.shape[1] // H, x.shape[1] // H)
    for now in x:
        back, ups = before - now, p("x_proj.2.weight").split(R, 1)
        low = torch.tanh(p.product("x_proj.0.linear", now + back * p("x_proj.0.mu"))).split(R)
        xs = {n: now + back * (p("x_bias")[s] + ups[s] @ low[s]) for s, n in enumerate("rwkvg")}
        w = p.product("w_proj.linear.lora.2", torch.tanh(p.product("w_proj.linear.lora.0", xs["w"])))
        decay = torch.exp(-torch.exp(w + p("w_proj.linear.lora.2.bias"))).view(H, -1)
        r, k, v = (p.product(f"{n}_proj.linear", xs[n]).view(H, -1) for n in "rkv")
        outer = k[:, :, None] * v[:, None]
        o = (r[:, :, None] * (S + p("bonus")[:, :, None] * outer)).sum(1)
        S = decay[:, :, None] * S + outer
        o = (o - o.mean(1, keepdim=True)) / (o.var(1, keepdim=True, unbiased=False) + c["norm_eps"]).sqrt()
        o = o.flatten() * p("g_norm.weight") + p("g_norm.bias")
        out.append(p.product("o_proj", o * silu(p.product("g_proj.linear", xs["g"]))))
        before = now
    return torch.stack(out)


LAYERS: dict[str, Layer] = {
    "retnet": retnet, "gla": gla, "delta_net": delta_net, "gated_deltanet": gated_deltanet, "rwkv6": rwkv6,
}  # fmt: skip


def feedforward(c: dict[str, Any], p: Part, x: Tensor) -> Tensor:
    if c["model_type"] != "rwkv6":
        return p.product("down_proj", silu(p.product("gate_proj", x)) * p.product("up_proj", x))
    back = torch.cat((torch.zeros_like(x[:1]), x[:-1])) - x
    key = p.product("key.linear", x + back * p("key.mu")).clamp(min=0).square()
    gate = p.product("receptance.linear", x + back * p("receptance.mu"))
    return torch.sigmoid(gate) * p.product("value", key)


def logits(c: dict[str, Any], weights: Weights, ids: Tensor) -> Tensor:
    """ids: T → T × vocabulary."""
    weights = {name: value.double() for name, value in weights.items()}
    model, eps, finch = Part(weights, "model"), c["norm_eps"], c["model_type"] == "rwkv6"
    x = model("embeddings.weight")[ids]
    for n in range(c["num_hidden_layers"]):
        p = Part(weights, f"model.layers.{n}")
        norm, ffn = (p.layernorm, "ffn") if finch else (p.rms, "mlp")
        if finch and n == 0 and c["norm_first"]:
            x = norm("pre_norm", x, eps)
        x = x + LAYERS[c["model_type"]](c, Part(weights, f"{p.at}.attn"), norm("attn_norm", x, eps))
        x = x + feedforward(c, Part(weights, f"{p.at}.{ffn}"), norm(f"{ffn}_norm", x, eps))
    x = (model.layernorm if finch else model.rms)("norm", x, eps)
    return x @ weights["model.embeddings.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T


# --- what a file holds ---


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file of this configuration."""
    C, V, finch = c["hidden_size"], c["vocab_size"], c["model_type"] == "rwkv6"
    norms = ["weight", "bias"] if finch and c["norm_bias"] else ["weight"]
    found: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (V, C)}
    found |= {f"model.norm.{leaf}": (C,) for leaf in norms}
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, C)
    for n in range(c["num_hidden_layers"]):
        at, ffn = f"model.layers.{n}", "ffn" if finch else "mlp"
        named = ["attn_norm", f"{ffn}_norm", *(["pre_norm"] if finch and n == 0 and c["norm_first"] else [])]
        found |= {f"{at}.{name}.{leaf}": (C,) for name in named for leaf in norms}
        found |= {f"{at}.attn.{name}": shape for name, shape in (finch_shapes if finch else memory_shapes)(c).items()}
        F_ = c["intermediate_size"]
        wide = {"key.linear": (F_, C), "value": (C, F_), "receptance.linear": (C, C)}
        wide = wide if finch else {"gate_proj": (F_, C), "up_proj": (F_, C), "down_proj": (C, F_)}
        found |= {f"{at}.{ffn}.{name}.weight": shape for name, shape in wide.items()}
        if finch:
            found |= {f"{at}.ffn.{name}.mu": (C,) for name in ("key", "receptance")}
    return found


def finch_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    C, H, R, D = c["hidden_size"], c["num_heads"], c["proj_low_rank_dim"], c["gate_low_rank_dim"]
    return {
        "x_proj.0.mu": (C,), "x_proj.0.linear.weight": (5 * R, C), "x_proj.2.weight": (C, 5 * R), "x_bias": (5, C),
        "w_proj.linear.lora.0.weight": (D, C), "w_proj.linear.lora.2.weight": (C, D), "w_proj.linear.lora.2.bias": (C,),
        "bonus": (H, C // H), "g_norm.weight": (C,), "g_norm.bias": (C,), "o_proj.weight": (C, C),
        **{f"{name}_proj.linear.weight": (C, C) for name in "rkvg"},
    }  # fmt: skip


def memory_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    C, H, kind = c["hidden_size"], c["num_heads"], c["model_type"]
    if kind == "gated_deltanet":
        heads, keys = c["num_v_heads"] or H, c["head_dim"] * H
        values = int(heads * c["head_dim"] * c["expand_v"])
    else:
        heads, keys, values = H, int(C * c["expand_k"]), int(C * c["expand_v"])
    gated = c["use_output_gate"] if kind in ("retnet", "gla") else c["use_gate"]
    norm = ("g_norm_swish_gate" if gated else "g_norm") if kind in ("retnet", "gla") else "o_norm"
    wide = {"q": keys, "k": keys, "v": values}
    found: dict[str, tuple[int, ...]] = {f"{name}_proj.weight": (size, C) for name, size in wide.items()}
    found |= {"o_proj.weight": (C, values), f"{norm}.weight": (values // heads,)}
    if gated:
        found["g_proj.weight"] = (values, C)
    if c["use_short_conv"]:
        found |= {f"{name}_conv1d.weight": (size, 1, c["conv_size"]) for name, size in wide.items()}
    if kind == "gla":
        found |= {"gk_proj.0.weight": (16, C), "gk_proj.1.weight": (keys, 16), "gk_proj.1.bias": (keys,)}
    if kind in ("delta_net", "gated_deltanet"):
        found["b_proj.weight"] = (heads, C)
    if kind == "gated_deltanet":
        found |= {"a_proj.weight": (heads, C), "dt_bias": (heads,), "A_log": (heads,)}
    return found


def random(c: dict[str, Any]) -> Weights:
    """Weights of standard deviation 0.3, norms about 1."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes(c).items()
    }
