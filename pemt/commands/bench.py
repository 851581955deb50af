"""`pemt bench`: the fused op, a training step and answering, timed.

The command lines stand here and not beside what they time, which takes seconds to import: a shell completes
them at once. An option that is left out has the default of `OpBench`, `StepBench` or `GenerateBench`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pemt.config import Parser, PemtError, command_parser, count, verb_parser
from pemt.plan import CHIPS, KNOWN

# Options of `pemt bench step` by name.
# lorahub: the T5 and the layers of LoraHub's adapters, and as many as its paper composes.
ROWS = {"lorahub": "--size flan-t5-large --sites q v --rank 16 --experts 20"}
OP = """
    loop     the reference: a loop over experts, again for the cosines, autograd's own backward
    stacked  the same with the K outputs made once and kept
    packed   concatenated matrix products in plain PyTorch
    fused    the compiled kernels
    floor    bare matrix products of the FLOPs that packed and fused do, by the libraries that fused has them by
    frozen   no experts: wo and the target adapter alone

All variants run in every round, in turn, and a ratio is the median of the rounds' ratios."""
STEP = """
    adapter  the same model without experts: target adapter, prompt and layer norms alone
    loop     a loop over the K experts (`pemt.ops.reference`), by autograd; with experts on wo alone
    packed   few matrix products in plain PyTorch
    fused    the compiled kernels

A random T5 of the named size, K random experts, random tokens; forward, backward and AdamW, in half
precision on fp32 masters. On a CPU all variants run in every round, in turn; what the mixture costs
is the median of the rounds' differences to `adapter`. On a GPU they run one after another, so that it
holds one model at a time. FLOPs are those of `pemt plan`'s formula, matrix products that the step
needs, the same for all that mix experts; `--chip` holds them against the chip's dense bf16 rate on its
data sheet. Peak is what a step takes above what is held between steps; total is both."""
GENERATE = """
    plain    the base model alone on the same tokens
    longer   the base model alone on as many more tokens as PEMT's prompt has
    pemt     prompt, experts, gates and target adapter in it; on a CPU in float32 its linear layers are
             ours and oneDNN's (`pemt.ops.linear`)

A random T5 of the named size, random experts and tokens, answers of a fixed length; greedy or beams.
All variants run in every round, in turn; the ratios are medians over the rounds, of the time on the
clock and of the time that the process's threads computed."""


def run(arguments: list[str]) -> None:
    """`pemt bench op`, `pemt bench step` and `pemt bench generate`."""
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    if row := options.pop("row", None):
        options = {**vars(parser.parse_args(["step", *ROWS[row].split()])), **options}
    verb, threads = options.pop("verb"), options.pop("threads", None)
    as_json, shapes = options.pop("json", False), options.pop("shape", [])
    if options.get("cuda_graph") and options.get("device") != "cuda":
        raise PemtError("pemt bench op: --cuda_graph needs --device cuda")
    import torch

    from pemt.bench import generate, layer, op, step

    if threads is not None:
        torch.set_num_threads(threads)
    kinds: dict[str, tuple[Any, Any]] = {
        "op": (op, layer.OpBench),
        "step": (step, step.StepBench),
        "generate": (generate, generate.GenerateBench),
    }
    module, kind = kinds[verb]
    for each in [{"shape": shape, **options} for shape in shapes] or [options]:
        result = module.measure(kind(**each))
        print(json.dumps(result) if as_json else module.table(result))


def make_parser() -> Parser:
    """The command line of `pemt bench`."""
    parser = command_parser(
        "bench",
        "Time the fused op, a whole training step, or answering.",
        "pemt bench step --size t5-small",
        "pemt bench op --help",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    about = "one FFN's mixture, target adapter and sparsity loss, forward and backward"
    op = _verb(verbs, "op", about, OP, "--shape t5-base t5-large --rounds 20", ("float16",))
    op.add_argument("--shape", nargs="+", choices=list(KNOWN), default=["t5-large"])
    op.add_argument("--tokens", type=count, help="per sample")
    op.add_argument("--forward_only", action="store_true", help="no gradients, no sparsity loss")
    op.add_argument(
        "--cuda_graph", action="store_true", help="each variant as a graph: the device's time alone"
    )
    about = "a whole training step of stage 2, with the experts mixed in three ways and without any"
    step = _verb(verbs, "step", about, STEP, "--size t5-base --rounds 10")
    step.add_argument(
        "--sites", nargs="+", metavar="NAME", help="where the experts are, as expert.target_modules"
    )
    step.add_argument("--experts", type=count, help="how many")
    step.add_argument("--rank", type=count, help="of each expert")
    rows = "; ".join(f"{name} is {line}" for name, line in ROWS.items())
    step.add_argument("--row", choices=list(ROWS), help=f"other defaults: {rows}")
    step.add_argument("--chip", choices=list(CHIPS), help="tell the share of its rate")
    about = "answering with PEMT beside the base model's own"
    example = "--size t5-small --batch 8 --num_beams 4"
    generate = _verb(verbs, "generate", about, GENERATE, example)
    generate.add_argument("--num_beams", type=count)
    for each in (step, generate):
        each.add_argument("--size", choices=list(KNOWN))
        each.add_argument("--layers", type=count, help="of each stack; by default the size's own")
        each.add_argument("--source", type=count)
        each.add_argument("--target", type=count)
    return parser


def _verb(
    verbs: Any, name: str, about: str, method: str, example: str, more_dtypes: tuple[str, ...] = ()
) -> Parser:
    """A verb's parser with the options of all verbs; it leaves out of its result what is not given."""
    parser = verb_parser(verbs, name, about, f"pemt bench {name} {example}")
    parser.description = f"{parser.description}\n{method}"
    parser.argument_default = argparse.SUPPRESS
    for number in ("batch", "rounds", "threads"):
        parser.add_argument(f"--{number}", type=count)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", *more_dtypes])
    parser.add_argument("--json", action="store_true", help="as JSON, one object per line")
    return parser
