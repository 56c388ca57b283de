"""The decoder's and the backward's cases for :mod:`aot`.

One width for each config. The backward comes as the training step launches it (both sides), and as autograd does, one
side at a time.
"""

from __future__ import annotations

from aot import Case
from fastsae_kernels import act_grad, decode, latent_grad, sparse_configs

LATENTS = {768: 24576, 2048: 65536, 2304: 65536, 4096: 131072, 8192: 131072, 14336: 65536}  # by width
K = 64
DECODED = (768, 2304, 4096)  # whole slabs of 256, a remainder, slabs of 128
HELD = (768, 2048, 2304, 8192, 14336)  # one for each size of row in registers, and slabs


def decode_cases(target: str) -> list[Case]:
    """Decoded tokens; residuals after k and after all slots."""

    def case(D: int, w: str, *, residual: bool) -> Case:
        config = sparse_configs.decode_config(D, LATENTS[D], K, 4 if w == "fp32" else 2)
        types = {"acts_ptr": "*fp32", "indices_ptr": "*i64", "W_ptr": f"*{w}", "out_ptr": f"*{w}", "N": "i32"}
        extra = {"bias_ptr": "*fp32", "target_ptr": f"*{w}", "sse_ptr": "*fp32"}
        return Case(
            name=f"decode{' residual' if residual else ''} {D} {w}",
            kernel=decode._decode_kernel,
            types=types | (extra if residual else {}),
            constexprs=({} if residual else dict.fromkeys(extra))
            | {"D": D, "K": K, "FIRST_K": K // 4 if residual else 0}
            | {"BLOCK_K": config.BLOCK_K, "BLOCK_D": config.BLOCK_D},
            options={"num_warps": config.num_warps},
            unaligned=frozenset({"N"}),
        )

    return (
        [case(D, "bf16", residual=True) for D in DECODED]
        + [case(D, "bf16", residual=False) for D in DECODED]
        + [case(D, "fp32", residual=False) for D in (768, 4096)]
    )


def act_grad_cases(target: str) -> list[Case]:
    """Gradients of the activations where rows are too wide for the latent-major pass."""
    D = 14336
    config = sparse_configs.decode_config(D, LATENTS[D], K, 2)
    return [
        Case(
            name=f"act_grad {D} bf16",
            kernel=act_grad._act_grad_kernel,
            types={"grad_ptr": "*bf16", "indices_ptr": "*i64", "W_ptr": "*bf16", "d_acts_ptr": "*fp32", "N": "i32"},
            constexprs={"scale_ptr": None, "D": D, "K": K, "FIRST_K": 0}
            | {"BLOCK_K": config.BLOCK_K, "BLOCK_D": config.BLOCK_D},
            options={"num_warps": config.num_warps},
            unaligned=frozenset({"N"}),
        )
    ]


INDEX = {"pairs_ptr": "*i64", "offsets_ptr": "*i64", "chunk_offsets_ptr": "*i64", "chunk_latents_ptr": "*i64"}
COUNTS = {"split": "i32", "N": "i32", "L": "i32"}
DECODER_SIDE = {"acts_ptr": "*fp32", "dW_dec_ptr": "*fp32", "part_dec_ptr": "*fp32"}
ENCODER_SIDE = {"dW_enc_ptr": "*fp32", "db_enc_ptr": "*fp32", "part_enc_ptr": "*fp32", "part_db_ptr": "*fp32"}


def latent_grad_cases(target: str) -> list[Case]:
    """Latents and chunks of hot latents."""

    def case(side: str, D: int, w: str, *, chunks: bool = False) -> Case:
        config = sparse_configs.latent_grad_config(D, 4 if w == "fp32" else 2)
        pointers = DECODER_SIDE | {"grad_ptr": f"*{w}"} if side != "encoder" else {}
        pointers |= ENCODER_SIDE | {"x_ptr": f"*{w}"} if side != "decoder" else {}
        if side == "coder":
            pointers |= {"scale_ptr": "*fp32"}
        if side != "encoder" and config.BLOCK_D >= D:
            pointers |= {"W_ptr": f"*{w}"}
        if side != "coder" or config.BLOCK_D < D:
            pointers |= {"d_acts_ptr": "*fp32"}
        optional = (*DECODER_SIDE, *ENCODER_SIDE, "grad_ptr", "x_ptr", "scale_ptr", "W_ptr", "d_acts_ptr")
        return Case(
            name=f"latent_grad {side}{' chunks' if chunks else ''} {D} {w}",
            kernel=latent_grad._latent_grad_kernel,
            types=INDEX | COUNTS | pointers,
            constexprs={name: None for name in optional if name not in pointers}
            | {"D": D, "K": K, "FIRST_K": 0, "CHUNKS": chunks}
            | {"BLOCK_P": config.BLOCK_P, "BLOCK_D": config.BLOCK_D, "STAGES": config.STAGES},
            options={"num_warps": config.num_warps},
            unaligned=frozenset(COUNTS),
        )

    return (
        [case("coder", D, "bf16") for D in HELD]
        + [case("coder", D, "fp32") for D in (768, 4096, 8192)]
        + [case(side, D, "bf16") for side in ("decoder", "encoder") for D in (768, 4096)]
        + [case("coder", 4096, "bf16", chunks=True)]
    )
