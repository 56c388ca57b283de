"""Another number of tokens compiles nothing anew: Triton's own keys of every launcher, for batches of many sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

KERNELS = {
    "encode fused": {"_encode_kernel", "_resolve_kernel"},
    "encode fused 16 bit": {"_encode_kernel", "_resolve_kernel"},
    "encode fused masked": {"_encode_kernel", "_resolve_kernel"},
    "encode chunked": {"_select_kernel"},
    "groupmax fused": {"_groupmax_encode_kernel"},
    "groupmax chunked": {"_groupmax_select_kernel"},
    "select": {"_select_kernel"},
    "decode": {"_decode_kernel"},
    "decode residual": {"_decode_kernel"},
    "decode multi": {"_decode_kernel"},
    "act_grad": {"_act_grad_kernel"},
    "decode_backward": {"_latent_grad_kernel"},
    "encode_backward": {"_latent_grad_kernel"},
    "coder_backward": {"_latent_grad_kernel"},
    "coder_step": {"_center_kernel", "_select_kernel", "_decode_kernel", "_latent_grad_kernel", "_latent_step_kernel"},
    "row_update": {"_row_update_kernel"},
}
"""What each launcher of `launch_keys.py` launches."""


@pytest.fixture(scope="module")
def keys() -> dict[str, dict[str, list[str]]]:
    """By launcher and number of tokens."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launch_keys.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("launcher", KERNELS)
def test_every_number_of_tokens_has_the_same_keys(keys, launcher):
    of_many = keys[launcher]["1048576"]
    assert {key.split()[0] for key in of_many} == KERNELS[launcher]
    for tokens, found in keys[launcher].items():
        # few pairs have no full chunk of a hot latent: one kernel less is launched, and none is another
        assert set(found) <= set(of_many), f"{tokens} tokens"
        only_chunks = {"_latent_grad_kernel"} if launcher == "coder_step" else set()
        assert {key.split()[0] for key in found} | only_chunks == KERNELS[launcher]
    assert keys[launcher]["4096"] == of_many


def test_a_kernel_that_specialises_on_its_tokens_is_seen(keys):
    found = keys.pop("forgotten")
    assert len({tuple(of_n) for of_n in found.values()}) == 3  # 1, multiples of 16, the others
    assert keys.keys() == KERNELS.keys()
