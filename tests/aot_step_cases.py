"""The training step's own kernels as cases for :mod:`aot`: the optimizer alone, and behind the backward."""

from __future__ import annotations

from aot import Case
from fastsae_kernels import center, latent_step, row_update, sparse_configs

K = 64
STATES = {  # what a rule's state looks like: first, second, and their scales
    "adam": {"first": "*fp32", "second": "*fp32"},
    "adam8bit": {"first": "*i8", "second": "*u8", "first_scale": "*fp32", "second_scale": "*fp32"},
    "signum": {"first": "*fp32"},
}
PARTS = ("first", "second", "first_scale", "second_scale")
SCALARS = {name: "fp32" for name in ("lr", "beta1", "beta2", "eps", "correction1", "correction2")}


def _state(rule: str, prefix: str = "") -> tuple[dict[str, str], dict[str, None]]:
    """Pointers that the rule has, and those that it has not."""
    have = {f"{prefix}{part}_ptr": kind for part, kind in STATES[rule].items()}
    return have, {f"{prefix}{part}_ptr": None for part in PARTS if part not in STATES[rule]}


def center_cases(_target: str) -> list[Case]:
    """Activations less a row, and their squared distance from it."""

    def case(D: int, asked: str, other: str) -> Case:
        return Case(
            name=f"center {D} {asked} bf16",
            kernel=center._center_kernel,
            types={"x_ptr": "*bf16", "shift_ptr": "*fp32", "N": "i32"}
            | {f"{asked}_ptr": "*bf16" if asked == "out" else "*fp32"},
            constexprs={f"{other}_ptr": None, "D": D, "BLOCK_N": center.BLOCK_N, "BLOCK_D": center.BLOCK_D},
            options={"num_warps": 4},
            unaligned=frozenset({"N"}),
        )

    return [case(D, *asked) for D in (768, 4096) for asked in (("out", "sums"), ("sums", "out"))]


def row_update_cases(target: str) -> list[Case]:
    """The separate pass."""

    def case(D: int, rule: str) -> Case:
        have, without = _state(rule)
        BLOCK_D = max(16, 1 << (D - 1).bit_length())
        return Case(
            name=f"row_update {rule} {D}",
            kernel=row_update._row_update_kernel,
            types={"weight_ptr": "*fp32", "grad_ptr": "*fp32", "low_ptr": "*bf16"} | have | SCALARS,
            constexprs=without | {"D": D, "RULE": row_update.CODES[rule], "UNIT_ROWS": True, "BLOCK_D": BLOCK_D},
            options={"num_warps": sparse_configs.update_warps(BLOCK_D, target)},
        )

    return [case(D, rule) for D in (768, 4096) for rule in STATES] + [case(8192, "adam")]


def latent_step_cases(target: str) -> list[Case]:
    """The backward with an optimizer behind it, AuxK's rows and Multi-TopK included."""
    pointers = {"pairs_ptr": "*i64", "offsets_ptr": "*i64", "chunk_offsets_ptr": "*i64", "split": "i32"}
    pointers |= {"acts_ptr": "*fp32", "grad_ptr": "*bf16", "scale_ptr": "*fp32", "x_ptr": "*bf16"}
    pointers |= {"part_dec_ptr": "*fp32", "part_enc_ptr": "*fp32", "part_db_ptr": "*fp32", "aux_row_ptr": "*i32"}
    pointers |= {"aux_dec_ptr": "*fp32", "aux_enc_ptr": "*fp32", "aux_db_ptr": "*fp32", "db_ptr": "*fp32"}
    pointers |= {"through_ptr": "*fp32", "N": "i32", "L": "i32", "scalars_ptr": "*fp32"} | SCALARS
    for side in ("enc", "dec"):
        pointers |= {f"W_{side}_ptr": "*fp32", f"{side}_low_ptr": "*bf16"}

    def case(D: int, rule: str) -> Case:
        config = sparse_configs.latent_step_config(D, target)
        have, without = {}, {}
        for prefix in ("enc_", "dec_"):
            mine, missing = _state(rule, prefix)
            have, without = have | mine, without | missing
        return Case(
            name=f"latent_step {rule} {D} bf16",
            kernel=latent_step._latent_step_kernel,
            types=pointers | have,
            constexprs=without
            | {"D": D, "K": K, "FIRST_K": K // 4, "RULE": row_update.CODES[rule]}
            | {"ENC_UNIT_ROWS": False, "DEC_UNIT_ROWS": True}
            | {"LATENTS": config.LATENTS, "BLOCK_P": config.BLOCK_P, "BLOCK_D": config.BLOCK_D}
            | {"STAGES": config.STAGES},
            options=config.options,
            unaligned=frozenset({"N", "L", "split"}),
        )

    widths = (768, 1024, 2048, 2304, 4096, 8192) if target == "sm_90" else (768, 4096)
    return [case(D, "adam") for D in widths] + [case(4096, rule) for rule in ("adam8bit", "signum")]
