"""A child of the parity gate that plants faults: what tests pass as `check(child=...)`.

The task's `wandb.name` says what to plant, so that variants that differ in it share one reference:

- a name in MUTANTS: that source text is changed before the back end is made;
- `op:NAME`: the simulated device's operator is off by 1.01;
- `crash`, `hang`, `killed`, `raise`: this process ends so;
- `all:a,b,...`: check the variant once for each of these in this process; the result is {"mutants": {name: checks}}.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

TORCH_GPT, MLX_GPT = "nanogpt_mac.gpt.torch_gpt", "nanogpt_mac.gpt.mlx_gpt"
PACKED = "nanogpt_mac.gpt.packed"
TORCH, MLX = "nanogpt_mac.backends.torch_backend", "nanogpt_mac.backends.mlx_backend"
JAX_GPT, JAX = "nanogpt_mac.gpt.jax_gpt", "nanogpt_mac.backends.jax_backend"
TINY_GPT, TINY = "nanogpt_mac.gpt.tinygrad_gpt", "nanogpt_mac.backends.tinygrad_backend"
ADAMW = "nanogpt_mac.backends.torch_adamw"
SDPA = "F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)"

# name: (module, what its source says, what the mutant says)
MUTANTS = {
    # the model, torch
    "torch: no causal mask": (TORCH_GPT, "is_causal=T > 1", "is_causal=False"),
    "torch: mask one token late": (
        TORCH_GPT,
        SDPA,
        "F.scaled_dot_product_attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril(1))",
    ),
    "torch: attention scale": (TORCH_GPT, "is_causal=T > 1)", "is_causal=T > 1, scale=self.n_head / C)"),
    "torch: attention dropout left on": (TORCH_GPT, "self.dropout if self.training else 0.0", "0.05"),
    "torch: residual dropout left on": (
        TORCH_GPT,
        "F.dropout(y, self.dropout, self.training)",
        "F.dropout(y, 0.01)",
    ),
    "torch: evaluates in training mode": (
        TORCH,
        'self._mode(training=False)\n        with self.phase("evaluation"):\n            total',
        'self._mode(training=True)\n        with self.phase("evaluation"):\n            total',
    ),
    "torch: logits in training mode": (
        TORCH,
        "self._mode(training=False)\n        with self.autocast():\n            logits = self.model(",
        "self._mode(training=True)\n        with self.autocast():\n            logits = self.model(",
    ),
    "torch: attention dropout in evaluation": (TORCH_GPT, "self.dropout if self.training else 0.0", "self.dropout"),
    "torch: evaluates one batch of many": (
        TORCH,
        "for batch_starts in starts[whole:]:",
        "for batch_starts in starts[:1]:",
    ),
    "torch: other gelu": (TORCH_GPT, '"none" if spec.gelu == "exact"', '"none" if spec.gelu == "tanh"'),
    "torch: layer norm eps 1e-6": (TORCH_GPT, "self.bias, 1e-5", "self.bias, 1e-6"),
    "torch: no norm before attention": (TORCH_GPT, "self.attn(self.ln_1(x), cache, few)", "self.attn(x, cache, few)"),
    "torch: ln_1 twice": (TORCH_GPT, "self.mlp(self.ln_2(x))", "self.mlp(self.ln_1(x))"),
    "torch: q and k swapped": (TORCH_GPT, "q, k, v = (t.view", "k, q, v = (t.view"),
    "torch: heads mixed": (
        TORCH_GPT,
        "t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)",
        "t.reshape(B, self.n_head, T, C // self.n_head)",
    ),
    "torch: positions reversed": (TORCH_GPT, "weight[: idx.shape[1]]", "weight[: idx.shape[1]].flip(0)"),
    "torch: head detached": (TORCH_GPT, "F.linear(x, weight).float()", "F.linear(x, weight.detach()).float()"),
    "torch: a token ignored": (TORCH_GPT, "targets.reshape(-1))", "targets.reshape(-1), ignore_index=1)"),
    "torch: label smoothing": (TORCH_GPT, "targets.reshape(-1))", "targets.reshape(-1), label_smoothing=1e-3)"),
    # the model in few kernels, torch
    "packed: no causal mask": (TORCH_GPT, "self.causal[:T, :T]", "0 * self.causal[:1, :1].expand(T, T)"),
    "packed: mask one token late": (TORCH_GPT, ".triu(1)", ".triu(2)"),
    "packed: attention scale": (PACKED, "scale = 1.0 / math.sqrt(hs)", "scale = 1.0 / hs"),
    "packed: scale of the gradient": (
        PACKED,
        "torch.float32), 1.0 / math.sqrt(hs)",
        "torch.float32), 1.03 / math.sqrt(hs)",
    ),
    "packed: dq and dk swapped": (PACKED, "dq, dk, dv = packed", "dk, dq, dv = packed"),
    "packed: softmax not differentiated": (
        PACKED,
        "SOFTMAX_BACKWARD(dweights, weights, -1, torch.float32)",
        "dweights",
    ),
    "packed: heads mixed": (PACKED, ".view(B, n_head, T, hs).transpose(1, 2)", ".view(B, T, n_head, hs)"),
    "packed: residual gradient lost": (PACKED, "return grad, (grad * keep)", "return 0.99 * grad, (grad * keep)"),
    "packed: masks not scaled": (TORCH_GPT, ".div_(keep)", ""),
    "packed: dropout in evaluation": (TORCH_GPT, "not self.training or spec.dropout == 0", "spec.dropout == 0"),
    # the step, torch
    "torch: decay on vectors": (ADAMW, "(no_decay, 0.0)", "(no_decay, weight_decay)"),
    "torch: no decay": (ADAMW, "(decay, weight_decay)", "(decay, 0.0)"),
    "torch: Adam for AdamW": (ADAMW, "torch._fused_adamw_ if", "torch._fused_adam_ if"),
    "torch: AdamW eps 1e-6": (ADAMW, "EPS = 1e-8", "EPS = 1e-6"),
    "torch: other beta2": (TORCH, "(options.beta1, options.beta2)", "(options.beta1, 0.999)"),
    "torch: no bias correction": (TORCH, "float(state.optimizer_steps)", "float(state.optimizer_steps + 5000)"),
    "torch: no clipping": (TORCH, "clip(self.options.grad_clip)", "clip(0.0)"),
    "torch: clip 1 % off": (TORCH, "clip(self.", "clip(1.01 * self."),
    "torch: accumulation not divided": (TORCH, "loss = loss / len(windows)", "pass"),
    "torch: one micro-batch": (TORCH, "in enumerate(windows):", "in enumerate(windows[:1]):"),
    "torch: gradients kept": (TORCH, "add=number > 0", "add=True"),
    "torch: lr of the first step": (ADAMW, '"lr": lr', '"lr": 1e-3'),
    "torch: targets are the tokens": (TORCH, "window[:, :-1], window[:, 1:]", "window[:, :-1], window[:, :-1]"),
    "torch: lower precision unasked": (TORCH, "self.dtype, enabled=self.dtype != torch.float32", "torch.bfloat16"),
    "torch: norm misreported": (TORCH, "torch.stack((total, norm", "torch.stack((total, norm * 1.01"),
    # the model, MLX
    "mlx: no causal mask": (MLX_GPT, 'else "causal")', "else None)"),
    "mlx: no causal mask with dropout": (MLX_GPT, "mx.where(seen, 0.0, -mx.inf)", "mx.where(seen, 0.0, 0.0)"),
    "mlx: mask one token late with dropout": (MLX_GPT, "spec.block_size, dtype=mx", "spec.block_size, k=1, dtype=mx"),
    "mlx: no scale with dropout": (MLX_GPT, "alpha=scale", "alpha=1.0"),
    "mlx: attention scale": (MLX_GPT, "1.0 / math.sqrt(q.shape[-1])", "1.0 / q.shape[-1]"),
    "mlx: evaluation drops": (
        MLX,
        "self.model.loss(windows[:, :-1], windows[:, 1:])",
        "self.model.loss(windows[:, :-1], windows[:, 1:], self._masks(len(windows), mx.random.key(0)))",
    ),
    "mlx: other gelu": (MLX_GPT, '"none" if spec.gelu == "exact"', '"none" if spec.gelu == "tanh"'),
    "mlx: layer norm eps 1e-6": (MLX_GPT, "self.bias, 1e-5", "self.bias, 1e-6"),
    "mlx: no norm before attention": (MLX_GPT, "self.attn.before(self.ln_1(x))", "self.attn.before(x)"),
    "mlx: q and k swapped": (MLX_GPT, "q, k, v = (part", "k, q, v = (part"),
    "mlx: q and k swapped with dropout": (MLX_GPT, "q, k, v = mx.contiguous", "k, q, v = mx.contiguous"),
    "mlx: dq and dk swapped": (MLX_GPT, "@ k, scores.swapaxes(-1, -2) @ q", "@ q, scores.swapaxes(-1, -2) @ k"),
    "mlx: softmax not differentiated": (MLX_GPT, "(of_weights - mean)", "of_weights"),
    "mlx: slope of gelu without density": (MLX_GPT, "integral + wide * density", "integral"),
    "mlx: gradient of linear weights 3 % off": (MLX_GPT, "cotangent.T @ x", "1.03 * cotangent.T @ x"),
    "mlx: residual scaled": (MLX_GPT, "drop(self.c_proj", "0.98 * drop(self.c_proj"),
    "mlx: bias forgotten": (MLX_GPT, "else y + bias.astype", "else y + 0 * bias.astype"),
    "mlx: head detached": (MLX_GPT, 't["wte"].weight, None', 'mx.stop_gradient(t["wte"].weight), None'),
    # the step, MLX
    "mlx: decay on vectors": (MLX, "if decays else 1.0", "if True else 1.0"),
    "mlx: no decay": (MLX, "if decays else 1.0", "if False else 1.0"),
    "mlx: AdamW eps 1e-6": (MLX, "/ correction2) + 1e-8)", "/ correction2) + 1e-6)"),
    "mlx: no bias correction of m": (MLX, "(m / correction1)", "m"),
    "mlx: no bias correction of v": (MLX, "mx.sqrt(v / correction2)", "mx.sqrt(v)"),
    "mlx: no clipping": (MLX, "if self.options.grad_clip:", "if False:"),
    "mlx: always scaled to the clip": (
        MLX,
        "mx.minimum(self.options.grad_clip / (norm + 1e-6), 1.0)",
        "self.options.grad_clip / (norm + 1e-6)",
    ),
    "mlx: accumulation not divided": (MLX, "if count > 1:", "if False:"),
    "mlx: targets are the tokens": (
        MLX,
        "self._gradients(windows[:, :-1], windows[:, 1:]",
        "self._gradients(windows[:, :-1], windows[:, :-1]",
    ),
    "mlx: update 0.1 % off": (MLX, "decay - lr * update", "decay - 1.001 * lr * update"),
    "mlx: norm of the clipped": (MLX, "return total, norm", "return total, mx.minimum(norm, self.options.grad_clip)"),
    "mlx: loss scale left in": (
        MLX,
        'grads = [g / self.trained["loss_scale"] for g in grads]',
        "pass",
    ),
    # the model, JAX
    "jax: no causal mask": (JAX_GPT, "mask = jnp.tri(T, dtype=bool)", "mask = jnp.ones((T, T), bool)"),
    "jax: mask one token late": (JAX_GPT, "jnp.tri(T, dtype=bool)", "jnp.tri(T, k=1, dtype=bool)"),
    "jax: attention scale": (JAX_GPT, "1.0 / math.sqrt(q.shape[-1])", "1.0 / q.shape[-1]"),
    "jax: evaluation drops": (
        JAX,
        "self.model.loss(weights, windows[:, :-1], windows[:, 1:])",
        "self.model.loss(weights, windows[:, :-1], windows[:, 1:], dropout_masks(self.spec, len(windows), "
        "self.spec.block_size, jnp.zeros(2, jnp.uint32)))",
    ),
    "jax: other gelu": (JAX_GPT, '"none" if self.spec.gelu == "exact"', '"none" if self.spec.gelu == "tanh"'),
    "jax: layer norm eps 1e-6": (JAX_GPT, "variance + 1e-5", "variance + 1e-6"),
    "jax: no norm before attention": (JAX_GPT, 'self.norm(w, f"{name}.ln_1", x), mask', "x, mask"),
    "jax: ln_1 twice": (JAX_GPT, 'f"{name}.ln_2"', 'f"{name}.ln_1"'),
    "jax: q and k swapped": (JAX_GPT, "q, k, v = jnp.split", "k, q, v = jnp.split"),
    "jax: residual scaled": (JAX_GPT, "x = x + self.mlp(", "x = x + 0.98 * self.mlp("),
    "jax: bias forgotten": (JAX_GPT, "else y + bias.astype", "else y + 0 * bias.astype"),
    "jax: head detached": (
        JAX_GPT,
        'self.linear(w, "transformer.wte", x)',
        'self.linear({n: jax.lax.stop_gradient(a) for n, a in w.items() if "wte" in n}, "transformer.wte", x)',
    ),
    # the step, JAX
    "jax: decay on vectors": (JAX, "if w.ndim >= 2 else 1.0", "if True else 1.0"),
    "jax: no decay": (JAX, "if w.ndim >= 2 else 1.0", "if False else 1.0"),
    "jax: AdamW eps 1e-6": (JAX, "/ correction2) + 1e-8)", "/ correction2) + 1e-6)"),
    "jax: no bias correction of m": (JAX, "(m / correction1)", "m"),
    "jax: no bias correction of v": (JAX, "jnp.sqrt(v / correction2)", "jnp.sqrt(v)"),
    "jax: no clipping": (JAX, "if self.options.grad_clip:", "if False:"),
    "jax: always scaled to the clip": (
        JAX,
        "jnp.minimum(self.options.grad_clip / (norm + 1e-6), 1.0)",
        "self.options.grad_clip / (norm + 1e-6)",
    ),
    "jax: accumulation not divided": (JAX, "y, keep) / count", "y, keep)"),
    "jax: targets are the tokens": (JAX, "windows[:, 1:], key, count)", "windows[:, :-1], key, count)"),
    "jax: update 0.1 % off": (JAX, "w * decay - lr * update", "w * decay - 1.001 * lr * update"),
    "jax: norm misreported": (JAX, "jnp.stack([total, norm])", "jnp.stack([total, 1.01 * norm])"),
    "jax: loss scale left in": (JAX, 'g / now["loss_scale"] for', "g for"),
    # tinygrad
    "tinygrad: no causal mask": (TINY_GPT, ".tril() if cache", " if cache"),
    "tinygrad: mask one token late": (TINY_GPT, ".tril() if cache", ".tril(1) if cache"),
    "tinygrad: attention scale": (TINY_GPT, "1.0 / math.sqrt(q.shape[-1])", "1.0 / q.shape[-1]"),
    "tinygrad: other gelu": (TINY_GPT, '"none" if spec.gelu == "exact"', '"none" if spec.gelu == "tanh"'),
    "tinygrad: layer norm eps 1e-6": (TINY_GPT, "layernorm(eps=1e-5)", "layernorm(eps=1e-6)"),
    "tinygrad: no norm before attention": (TINY_GPT, "self.attn(self.ln_1(x), mask", "self.attn(x, mask"),
    "tinygrad: q and k swapped": (TINY_GPT, "q, k, v = self.c_attn", "k, q, v = self.c_attn"),
    "tinygrad: bias forgotten": (TINY_GPT, "y + bias.cast(dtype)", "y + 0 * bias.cast(dtype)"),
    "tinygrad: decay on vectors": (TINY, "if w.ndim >= 2 else 0.0", "if True else 0.0"),
    "tinygrad: no decay": (TINY, "o.weight_decay if w.ndim >= 2 else 0.0", "0.0"),
    "tinygrad: no bias correction of m": (TINY, "(m / correction1)", "m"),
    "tinygrad: no bias correction of v": (TINY, "(v / correction2).sqrt()", "v.sqrt()"),
    "tinygrad: no clipping": (TINY, "if self.options.grad_clip:", "if False:"),
    "tinygrad: accumulation not divided": (TINY, "y, keep) / count", "y, keep)"),
    "tinygrad: targets are the tokens": (TINY, "batch[:, :-1], batch[:, 1:]", "batch[:, :-1], batch[:, :-1]"),
    "tinygrad: norm misreported": (TINY, "self.loss.cat(norm)", "self.loss.cat(norm * 1.01)"),
    "tinygrad: loss scale left in": (TINY, "[g / self.scale for g in grads]", "[g for g in grads]"),
}


@contextmanager
def changed(name):
    """The product with one source text changed: fresh modules in which the rest of the product finds each other."""
    module, old, new = MUTANTS[name]
    one_of = ((MLX_GPT, MLX), (JAX_GPT, JAX), (TINY_GPT, TINY), (PACKED, TORCH_GPT, ADAMW, TORCH))
    parts = next(parts for parts in one_of if module in parts)
    before = {part: sys.modules.pop(part, None) for part in parts}
    try:
        for part in parts:
            spec = importlib.util.find_spec(part)
            source = Path(spec.origin).read_text()
            if part == module:
                assert old in source, f"{name}: {part} no longer says {old!r}"
                source = source.replace(old, new)
            sys.modules[part] = importlib.util.module_from_spec(spec)
            exec(compile(source, spec.origin, "exec"), vars(sys.modules[part]))
        yield
    finally:
        for part in parts:
            sys.modules.pop(part, None)
        sys.modules.update({part: found for part, found in before.items() if found is not None})


@contextmanager
def planted(what):
    from nanogpt_mac import simulator

    if what in ("", "clean"):
        yield
    elif what.startswith("op:"):
        with simulator.planted(what.removeprefix("op:"), "wrong", 1.01):
            yield
    else:
        with changed(what):
            yield


def many(document, names):
    """The answer to a task once for each fault, in this process."""
    from nanogpt_mac import simulator
    from nanogpt_mac.errors import InputError
    from nanogpt_mac.parity import check

    simulator.install_if_asked()
    found = {}
    for name in names:
        try:
            with planted(name):
                found[name] = check.answer(document)["checks"]
        except InputError as error:
            found[name] = str(error)
    return found


def answer(document):
    from nanogpt_mac.parity import check

    what = document["config"]["wandb"]["name"] or ""
    if document["role"] == "variant":
        if what == "crash":
            os.abort()
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(600)
        if what == "raise":
            raise RuntimeError("two lines\nof it")
        if what.startswith("all:"):
            return many(document, what.removeprefix("all:").split(","))
        if what.startswith("op:"):
            from nanogpt_mac import simulator

            simulator.install_if_asked()
        with planted(what):
            return check.answer(document)
    return check.answer(document)


if __name__ == "__main__":
    from nanogpt_mac import child

    child.answer(answer)
