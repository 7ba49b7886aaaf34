"""What the compiler makes of every kernel in every shipped configuration, without a GPU.

Each is compiled for five targets; registers, shared memory, spills and the instructions that matter are read from
the machine code. Exits with 1 if a configuration spills, exceeds the target's shared memory, multiplies
bfloat16 or float16 outside the tensor cores, or loads less than 128 bits at a time.

    python -m benchmarks.static
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import record
from eaptk.kernels import block, expand, head, norm, reduction, row_kernels, scale, tuning
from eaptk.kernels.tables import TRITON_DTYPES
from eaptk.kernels.target import Target

SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = {name: Target("cuda", int(name[3:])) for name in ("sm_80", "sm_90", "sm_100", "sm_120")}
TARGETS["gfx942"] = Target("hip", 0)
#: Instructions of each kind, as they are written in SASS and in CDNA's assembly.
INSTRUCTIONS = {
    "tensor": r"\b(?:HMMA|HGMMA|UTC\w*MMA|v_mfma)\w*",
    "load_128": r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128|(?:global|buffer)_load_dwordx4)",
    "load": r"\b(?:LDG|LDGSTS|(?:global|buffer)_load)[._]",
    "spill": r"\b(?:LDL|STL|scratch_(?:load|store))[._]?",
    "float_atomic": r"\b(?:(?:RED|ATOM|ATOMG)\.\S*F(?:16|32|64)|global_atomic_(?:pk_)?add_b?f)",
}
#: Sizes that differ from model to model but are multiples of 16 in all of them.
MULTIPLES = (
    "width",
    "row_size",
    "inner",
    "part",
    "columns",
    "head_dim",
    "weight_stride_h",
    "weight_stride_d",
)
FLOATS = {"statistics": "*fp32", "partials": "*fp32", "eps": "*fp32", "scores": "*fp32"}
TABLES = {"table": "*i64", "sources": "*i64", "destinations": "*i64"}
INDICES = dict.fromkeys(
    (
        "tiles",
        "pieces",
        "indices",
        "lengths",
        "first_piece",
        "exponents",
        "gradient_exponents",
        "written_exponents",
    ),
    "*i32",
)


@dataclass(frozen=True)
class Configuration:
    """A kernel, its constants and what it must hold to: `tensor` cores, or none; `wide` loads of operands."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    pointers: dict[str, str]
    tensor: bool
    wide: bool


def configurations(target: Target) -> Iterator[Configuration]:
    """Everything that is launched on `target`."""
    for dtype in TRITON_DTYPES:
        yield from _of_dtype(dtype, target)
    shapes = {(c.block_d, c.block_s) for c in _block_configs(target)}
    shapes |= {
        (c.block_d, s) for c in (tuning.head_config(d, target) for d in TRITON_DTYPES) for s in c.widths
    }
    for block_d, block_s in sorted(shapes):
        constants = {"NEGATED": True, "BLOCK_D": block_d, "BLOCK_S": block_s, "ROWS": reduction.ROWS}
        name = f"reduce {block_d}x{block_s}"
        yield Configuration(name, reduction._reduce_kernel, constants, 4, {}, False, False)
    doubles = {"rows": "*fp32", "edges": "*fp64", "partials": "*fp64", "slots": "*i64", "out": "*fp64"}
    for kind, counted in (("rows", False), ("rows+histogram", True)):
        constants = {"COUNTED": counted, "BLOCK": row_kernels.BLOCK}
        kernel = row_kernels._row_kernel
        yield Configuration(kind, kernel, constants, row_kernels.WARPS, doubles, False, False)
    constants = {"BLOCK": row_kernels.BLOCK, "LANES": row_kernels.LANES}
    yield Configuration("rows merged", row_kernels._merge_kernel, constants, 4, doubles, False, False)


def _block_configs(target: Target) -> Iterator[tuning.BlockConfig]:
    for dtype in TRITON_DTYPES:
        for normed in (False, True):
            for patched in (False, True):
                yield tuning.block_config(dtype, normed, patched, target)


def _of_dtype(dtype: torch.dtype, target: Target) -> Iterator[Configuration]:
    name, triton_dtype, tensor = str(dtype).removeprefix("torch."), TRITON_DTYPES[dtype], dtype.itemsize == 2
    for normed in (False, True):
        for patched in (False, True):
            config = tuning.block_config(dtype, normed, patched, target)
            constants = {
                "DTYPE": triton_dtype,
                "REPLACEMENT_DTYPE": triton_dtype,
                "PATCHED": patched,
                "NORMED": normed,
                "ALIGNED": True,
                "BLOCK_D": config.block_d,
                "BLOCK_S": config.block_s,
                "BLOCK_K": config.block_k,
                "STAGES": config.stages,
            }
            kind = "+".join(["block", *["norm"] * normed, *["patch"] * patched])
            yield Configuration(
                f"{kind} {name}", block._block_kernel, constants, config.warps, {}, tensor, True
            )
    scratch = tl.float16 if tensor else triton_dtype
    common = {"DTYPE": triton_dtype, "CENTRED": True, "ALIGNED": True}
    yield Configuration(
        f"norm {name}",
        norm._norm_kernel,
        {**common, "BLOCK": norm.ROW_BLOCK},
        4,
        {"out": "*fp32"},
        False,
        True,
    )
    for head_dim in tuning.HEAD_WIDTHS:
        config_norm = tuning.projection_config(dtype, head_dim, target)
        blocks = {
            "BLOCK_T": config_norm.block_t,
            "BLOCK_H": config_norm.block_h,
            "BLOCK_K": config_norm.block_k,
        }
        constants = {**common, **blocks, "weight_stride_d": 1}
        yield Configuration(
            f"norm of {head_dim} {name}",
            norm._head_norm_kernel,
            constants,
            config_norm.warps,
            {"out": "*fp32"},
            tensor,
            True,
        )
    for kind, normed, patched, stride in (
        ("source", False, False, "weight_stride_h"),
        ("source+patch", False, True, "weight_stride_h"),
        ("destination", True, False, "weight_stride_d"),
        ("destination beside patch", True, False, "weight_stride_d"),
    ):
        tile = tuning.expand_config(dtype, kind.endswith("patch"), target)
        common = {
            "DTYPE": triton_dtype,
            "OTHER_DTYPE": triton_dtype,
            "PATCHED": patched,
            "NORMED": normed,
            "ALIGNED": True,
            stride: 1,
        }
        if tensor:
            constants = {**common, "BLOCK_T": scale.BLOCK_T, "BLOCK_K": scale.BLOCK_K}
            yield Configuration(f"scale {kind} {name}", scale._scale_kernel, constants, 4, {}, False, True)
        constants = {
            **common,
            "OUT_DTYPE": scratch,
            "SCALED": tensor,
            "BLOCK_T": tile.block_t,
            "BLOCK_C": tile.block_c,
            "BLOCK_H": tile.block_h,
        }
        pointers = {"out": f"*{scratch}"}
        yield Configuration(
            f"expand {kind} {name}", expand._expand_kernel, constants, tile.warps, pointers, tensor, True
        )
    config_head = tuning.head_config(dtype, target)
    for width in config_head.widths:
        constants = {
            "SCALED": tensor,
            "FIRST": False,
            "BLOCK_D": config_head.block_d,
            "BLOCK_S": width,
            "BLOCK_K": config_head.block_k,
            "STAGES": config_head.stages,
        }
        pointers = {"gradients": f"*{scratch}", "written": f"*{scratch}"}
        yield Configuration(
            f"head x{width} {name}", head._head_kernel, constants, config_head.warps, pointers, tensor, True
        )


def measure(job: tuple[str, int]) -> dict[str, Any]:
    """Compile one configuration, by place in the list, for the target named, and read its machine code."""
    target_name, place = job
    target = TARGETS[target_name]
    found = list(configurations(target))[place]
    types = {**FLOATS, **TABLES, **INDICES, **found.pointers}
    names = found.kernel.arg_names
    signature = {n: "constexpr" if n in found.constants else types.get(n, "i32") for n in names}
    divisible = [n for n in names if signature[n].startswith("*") or n in MULTIPLES]
    source = ASTSource(
        fn=found.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in found.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible if n not in found.constants},
    )
    hip = target.backend == "hip"
    gpu = GPUTarget("hip", target_name, 64) if hip else GPUTarget("cuda", target.capability, 32)
    compiled = triton.compile(
        source, target=gpu, options={"num_warps": found.warps, "enable_fp_fusion": True}
    )
    code, registers = _amd(compiled.asm["amdgcn"]) if hip else _nvidia(compiled.asm["cubin"])
    row = {
        "kernel": found.name,
        "target": target_name,
        "registers": registers,
        "shared": compiled.metadata.shared,
        **{kind: len(re.findall(pattern, code)) for kind, pattern in INSTRUCTIONS.items()},
    }
    return {**row, "faults": _faults(found, row)}


def _faults(found: Configuration, row: dict[str, Any]) -> list[str]:
    faults = []
    if row["spill"]:
        faults.append(f"{row['spill']} spill instructions")
    if row["shared"] > SHARED_LIMIT[row["target"]]:
        faults.append(f"{row['shared']} bytes of shared memory")
    if found.tensor and not row["tensor"]:
        faults.append("no tensor-core instruction")
    if found.wide and not row["load_128"]:
        faults.append("no 128-bit load")
    if row["float_atomic"]:
        faults.append("floating-point atomics, whose order is not the same each time")
    return faults


def _nvidia(cubin: bytes) -> tuple[str, int]:
    """SASS and registers a thread, from the disassembler in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text, int(re.findall(r"REG:(\d+)", text)[0])


def _amd(code: str) -> tuple[str, int]:
    return code, int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[0])


def run(targets: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    """Every configuration of `dtypes` on `targets`."""
    jobs = [
        (name, i)
        for name in targets
        for i, found in enumerate(configurations(TARGETS[name]))
        if found.name.split()[-1] in dtypes or not found.wide
    ]
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(measure, jobs, chunksize=4))


def main() -> None:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES]
    parser = argparse.ArgumentParser(description="Compile every kernel for every target and read its code.")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--out", type=Path, help="where to write the rows, instead of benchmarks/results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = run(arguments.targets, arguments.dtypes)
    columns = [name for name in rows[0] if name != "faults"]
    table = Table(*columns, "faults")
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns), "; ".join(row["faults"]))
    Console(width=140).print(table)
    result = {"triton": triton.__version__, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result))
    else:
        Console().print(str(record.write("static", result)))
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
