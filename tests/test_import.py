"""Importing fastsae is free: no print, no GPU, no network, hardly any time beyond torch's own."""

import subprocess
import sys

CHECK = """
import sys, time, torch
sys.modules["socket"].socket.connect = None  # a connection would raise
start = time.process_time()
import fastsae
from fastsae import FastSae, SaeConfig
seconds = time.process_time() - start
assert not torch.cuda.is_initialized()
assert "transformers" not in sys.modules and "datasets" not in sys.modules and "triton.language" not in sys.modules
assert seconds < 0.5, seconds
"""


def test_import_is_free():
    done = subprocess.run(
        [sys.executable, "-c", "import socket\n" + CHECK], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_loads():
    import fastsae

    for name in fastsae.__all__:
        assert getattr(fastsae, name) is not None
    assert fastsae.TrainConfig().sae == fastsae.SaeConfig()
