"""A sampled token: our generate beside the peer's, in ms, in a fresh process and repeated in it.

    python benchmarks/decode.py --peer nanoGPT --device cuda --dtype bfloat16
    python benchmarks/decode.py --peer SITE_PACKAGES_WITH_MLX_LM --device mlx --compile

torch: nanoGPT's GPT.generate as its sample.py calls it, without a cache of keys and values. MLX: mlx-lm's generate_step
on its own GPT-2, with its cache; both then have biases and the tanh GELU, which is all that mlx-lm's has. Temperature
0.8, top 200. Every run is a process of its own; what is compared first is the logits of one prompt.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _side_by_side as beside
import numpy as np
from _sides import DTYPES, RECIPES, SEED, TOLERANCES, nanogpt

from nanogpt_mac.backends import kinds
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec

VOCABULARY = 65
PROMPT = [index % VOCABULARY for index in range(1, 17)]
Draw = Callable[[int], Iterator[int]]  # how many tokens after PROMPT[:1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=3)
    parser.add_argument("--peer", type=Path, required=True, help="nanoGPT's checkout, or the folder that has mlx_lm")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps", "mlx"), default="cpu")
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3, help="in the same process, after the first")
    parser.add_argument("--compile", action="store_true", help="ours, as train.py's compile=true")
    parser.add_argument("--blas", help="backend.blas of both, with --device mlx")
    parser.add_argument("--child", choices=("ours", "peer"), help="be one of the processes")
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    kinds.resolve(args.device)
    recipe, mlx = RECIPES[args.recipe], args.device == "mlx"
    if mlx and args.tokens >= recipe.block_size:
        raise InputError(f"--tokens {args.tokens}: mlx-lm cannot pass block_size; use at most {recipe.block_size - 1}")
    sizes = recipe.n_layer, recipe.n_head, recipe.n_embd, recipe.block_size, VOCABULARY
    spec = GPTSpec(*sizes, bias=mlx, gelu="tanh" if mlx else "exact")
    if args.child:
        print(json.dumps(child(args, spec)))
        return 0

    seen: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}

    def run(who: str) -> list[float]:
        seen[who].append(_process([*(argv if argv is not None else sys.argv[1:]), "--child", who]))
        return [float(seen[who][-1]["ms"][0])]

    firsts = [beside.Side(who, partial(run, who), unit="ms a token, the first time") for who in seen]
    beside.interleave(firsts, args.rounds, deadline)
    repeated = [beside.Side(who, list, unit="ms a token, repeated") for who in seen]
    for side in repeated:
        side.rounds = [answer["ms"][1:] for answer in seen[side.name]]
        side.facts = {"first_token_ms": [answer["first_token_ms"] for answer in seen[side.name]]}
    worst = float(np.abs(np.subtract(seen["ours"][0]["logits"], seen["peer"][0]["logits"])).max())
    check = {"logits_differ_by": worst, "tolerance": TOLERANCES[args.dtype], "same": worst <= TOLERANCES[args.dtype]}
    found = {"first": beside.compared(firsts), "repeated": beside.compared(repeated)}
    beside.finish("decode", args, {"check": check, "tokens": args.tokens, **found})
    return 0 if check["same"] else 1


def _process(argv: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"decode.py --child ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(args: Any, spec: GPTSpec) -> dict[str, Any]:
    """ms a token of each repetition, the wait for the very first token, and the logits after PROMPT."""
    weights = spec.init_weights(SEED)
    if args.child == "ours":
        draw, logits = _ours(args, spec, weights)
    elif args.device == "mlx":
        draw, logits = _mlx_lm(args, spec, weights)
    else:
        draw, logits = _nanogpt(args, spec, weights)
    times, first = [], None
    for _ in range(1 + args.repeats):
        begin = time.perf_counter()
        drawn = 0
        for drawn, _ in enumerate(draw(args.tokens), 1):  # noqa: B007 (read below)
            first = first or (time.perf_counter() - begin) * 1e3
        assert drawn == args.tokens
        times.append((time.perf_counter() - begin) / args.tokens * 1e3)
    return {"ms": times, "first_token_ms": first, "logits": logits().tolist()}


def _ours(args: Any, spec: GPTSpec, weights: dict[str, np.ndarray]) -> tuple[Draw, Callable[[], np.ndarray]]:
    from nanogpt_mac.backends.base import BackendOptions, Tokens
    from nanogpt_mac.backends.generate import generate

    settings = {"blas": args.blas} if args.blas else {}
    options = BackendOptions(
        args.device, args.compile, args.dtype, "highest", SEED, 0.1, 0.9, 0.99, 1.0, settings=settings
    )
    backend = kinds.create(spec, options, Tokens(block_size=spec.block_size))
    backend.load(weights)
    draw = lambda count: generate(backend, spec, PROMPT[:1], count, 0.8, 200, SEED, VOCABULARY)  # noqa: E731
    return draw, lambda: backend.logits(np.array([PROMPT]))[0, -1]


def _nanogpt(args: Any, spec: GPTSpec, weights: dict[str, np.ndarray]) -> tuple[Draw, Callable[[], np.ndarray]]:
    import torch

    module = nanogpt(args.peer)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype != "float32"
    sizes = {key: getattr(spec, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    with contextlib.redirect_stdout(sys.stderr):
        model = module.GPT(module.GPTConfig(dropout=0.0, **sizes))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    model.eval()
    model.to(args.device)
    cuda = args.device == "cuda"

    def context() -> Any:  # as sample.py
        return torch.amp.autocast("cuda", getattr(torch, args.dtype)) if cuda else contextlib.nullcontext()

    def draw(count: int) -> Iterator[int]:
        x = torch.tensor([PROMPT[:1]], dtype=torch.long, device=args.device)
        with torch.no_grad(), context():
            y = model.generate(x, count, temperature=0.8, top_k=200)
        yield from y[0, 1:].tolist()  # all at once: its first token comes with its last

    def logits() -> np.ndarray:
        with torch.no_grad(), context():
            found, _ = model(torch.tensor([PROMPT], device=args.device))
        array: np.ndarray = found[0, -1].float().cpu().numpy()
        return array

    return draw, logits


def _mlx_lm(args: Any, spec: GPTSpec, weights: dict[str, np.ndarray]) -> tuple[Draw, Callable[[], np.ndarray]]:
    from nanogpt_mac.backends.base import BackendOptions
    from nanogpt_mac.backends.kinds import KINDS

    settings = {"blas": args.blas} if args.blas else {}
    options = BackendOptions("mlx", False, args.dtype, "highest", SEED, 0.1, 0.9, 0.99, 1.0, settings=settings)
    KINDS["mlx"].prepare(options)  # the same BLAS and precision as ours
    sys.path.insert(0, str(args.peer))
    import mlx.core as mx
    from mlx.utils import tree_unflatten
    from mlx_lm.generate import generate_step
    from mlx_lm.models.gpt2 import Model, ModelArgs
    from mlx_lm.sample_utils import make_sampler

    context = spec.block_size
    model = Model(ModelArgs("gpt2", context, spec.n_embd, spec.n_head, spec.n_layer, context, 1e-5, VOCABULARY))
    dtype = getattr(mx, args.dtype)
    renamed = {name.replace("transformer.", "model.", 1): mx.array(array) for name, array in weights.items()}
    model.update(tree_unflatten([(name, array.astype(dtype)) for name, array in renamed.items()]))
    mx.eval(model.parameters())
    sampler = make_sampler(temp=0.8, top_k=min(200, VOCABULARY - 1))

    def draw(count: int) -> Iterator[int]:
        for token, _ in generate_step(mx.array(PROMPT[:1]), model, max_tokens=count, sampler=sampler):
            yield int(token)

    return draw, lambda: np.array(model(mx.array([PROMPT]))[0, -1].astype(mx.float32))


if __name__ == "__main__":
    beside.run(main)
