"""A whole back end in NumPy, as docs/add-a-backend.md describes it: slow, float32, without dropout and biases."""

import copy
import math
from collections import defaultdict

import numpy as np
from scipy.special import erf, softmax

from nanogpt_mac.backends.base import Backend, Kind
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.capabilities import Capabilities

HERE = Capabilities("cpu", "numpy", compiles=False, memory="the process's resident set")
KIND = Kind("numpy", cls=f"{__name__}:NumPyBackend", label="NumPy", framework="numpy", devices=(HERE,))


class Twin:
    """GPT-2. Each layer returns its output and the function that takes the gradient back through it."""

    def __init__(self, spec):
        self.spec, self.weights, self.grads = spec, {}, defaultdict(float)

    def linear(self, name, x):  # (..., C) -> (..., out)
        def back(d):
            self.grads[name] += d.reshape(-1, d.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            return d @ self.weights[name]

        return x @ self.weights[name].T, back

    def norm(self, name, x):
        scale = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        z = (x - x.mean(-1, keepdims=True)) * scale

        def back(d):
            self.grads[name] += (d * z).reshape(-1, x.shape[-1]).sum(0)
            d = d * self.weights[name]
            return (d - d.mean(-1, keepdims=True) - z * (d * z).mean(-1, keepdims=True)) * scale

        return z * self.weights[name], back

    def attention(self, name, x):
        B, T, C = x.shape
        H, root = self.spec.n_head, math.sqrt(C // self.spec.n_head)
        qkv, back_in = self.linear(f"{name}.attn.c_attn.weight", x)
        q, k, v = qkv.reshape(B, T, 3, H, C // H).transpose(2, 0, 3, 1, 4)  # (B, n_head, T, head_size) each
        p = softmax(q @ k.swapaxes(2, 3) / root + np.triu(np.full((T, T), -np.inf, np.float32), 1), -1)
        y, back_out = self.linear(f"{name}.attn.c_proj.weight", (p @ v).swapaxes(1, 2).reshape(B, T, C))

        def back(d):
            d = back_out(d).reshape(B, T, H, C // H).swapaxes(1, 2)
            dp = d @ v.swapaxes(2, 3)
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / root
            dqkv = np.stack((ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d))
            return back_in(dqkv.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C))

        return y, back

    def mlp(self, name, x):
        h, back_in = self.linear(f"{name}.mlp.c_fc.weight", x)
        cdf = 0.5 * (1 + erf(h / math.sqrt(2)))  # GELU
        y, back_out = self.linear(f"{name}.mlp.c_proj.weight", h * cdf)
        return y, lambda d: back_in(back_out(d) * (cdf + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi)))

    def forward(self, idx):  # tokens (B, T) -> logits (B, T, vocab_size)
        wte, wpe = self.weights["transformer.wte.weight"], self.weights["transformer.wpe.weight"]
        x, backs = wte[idx] + wpe[: idx.shape[1]], []
        for i in range(self.spec.n_layer):
            for norm, branch in (("ln_1", self.attention), ("ln_2", self.mlp)):
                h, back_norm = self.norm(f"transformer.h.{i}.{norm}.weight", x)
                h, back_branch = branch(f"transformer.h.{i}", h)
                x = x + h
                backs.append((back_norm, back_branch))
        x, back_last = self.norm("transformer.ln_f.weight", x)
        logits, back_logits = self.linear("transformer.wte.weight", x)

        def back(d):
            d = back_last(back_logits(d))
            for back_norm, back_branch in reversed(backs):
                d = d + back_norm(back_branch(d))
            np.add.at(self.grads["transformer.wte.weight"], idx, d)  # it has what the logits need, and shares it
            self.grads["transformer.wpe.weight"] += np.pad(d.sum(0), ((0, len(wpe) - idx.shape[1]), (0, 0)))

        return logits, back

    def loss(self, idx, targets, share=0.0):  # mean cross entropy; `share` of its gradients is learnt
        logits, back = self.forward(idx)
        p, at = softmax(logits, -1), (*np.indices(targets.shape), targets)
        loss = float(-np.log(p[at]).mean())
        if share:
            p[at] -= 1
            back(p * np.float32(share / targets.size))
        return loss


class NumPyBackend(Backend):
    def __init__(self, spec, options, tokens):
        if options.dtype != "float32" or spec.dropout or spec.bias or spec.gelu != "exact":
            raise InputError("backend=numpy: use dtype=float32, model.dropout=0, model.bias=false and model.gelu=exact")
        self.options, self.tokens, self.twin = options, tokens, Twin(spec)
        self.capabilities, self.details = HERE, {"resident_data": []}

    def loss(self, split, starts, share=0.0):
        window = self.tokens.windows(split, starts)
        return self.twin.loss(window[:, :-1], window[:, 1:], share)

    def step(self, starts, lr):
        o, s, grads = self.options, self.now, self.twin.grads
        grads.clear()
        loss = np.mean([self.loss("train", micro, 1 / len(starts)) for micro in starts])
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        clip = min(1.0, o.grad_clip / (norm + 1e-6)) if o.grad_clip else 1.0
        s.iteration, s.optimizer_steps = s.iteration + 1, s.optimizer_steps + 1
        first, second = 1 - o.beta1**s.optimizer_steps, 1 - o.beta2**s.optimizer_steps
        for name, w in s.weights.items():
            g, m, v = grads[name] * clip, s.exp_avg[name], s.exp_avg_sq[name]
            m += (1 - o.beta1) * (g - m)
            v += (1 - o.beta2) * (g * g - v)
            w *= 1 - lr * o.weight_decay * (w.ndim >= 2)
            w -= lr * (m / first) / (np.sqrt(v / second) + 1e-8)
        return float(loss), norm

    def wait(self, handle):
        return handle

    def evaluate(self, split, starts):
        return float(np.mean([self.loss(split, batch) for batch in starts]))

    def logits(self, tokens):
        return self.twin.forward(tokens)[0]

    def gradients(self, tokens, targets):
        self.twin.grads.clear()
        return self.twin.loss(tokens, targets, 1.0), dict(self.twin.grads)

    def decode(self):
        seen = []  # no cache: every token is computed anew
        return lambda tokens: seen.extend(tokens) or self.logits(np.array([seen]))[0, -1]

    def state(self):
        return copy.deepcopy(self.now)

    def restore(self, state):
        self.now = copy.deepcopy(state)
        self.twin.weights = self.now.weights

    def matmul(self, shape, dtype):
        a, b = (np.random.default_rng(0).standard_normal(size, np.float32) for size in (shape[:2], shape[1:]))
        return lambda count: [a @ b for _ in range(count)]
