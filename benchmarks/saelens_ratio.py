"""fastsae's TopK inside SAELens beside SAELens' own: one training step and one forward, interleaved in one process.

    python benchmarks/saelens_ratio.py [--tokens 1024 --width 768 --latents 12288 --k 32 --repeats 7]

Prints medians in milliseconds and their ratio (below 1: fastsae is faster). First both must give the same loss.
"""

import argparse
import statistics
import time

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from fastsae.compat.saelens import FastTopKTrainingSAE, FastTopKTrainingSAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 1024, "width": 768, "latents": 12288, "k": 32, "repeats": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {"d_in": options.width, "d_sae": options.latents, "k": options.k}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    coders = {
        "SAELens": TopKTrainingSAE(TopKTrainingSAEConfig(**shape, device=device)),
        "fastsae": FastTopKTrainingSAE(FastTopKTrainingSAEConfig(**shape, device=device)),
    }
    coders["fastsae"].load_state_dict(coders["SAELens"].state_dict())
    x = torch.randn(options.tokens, options.width, device=device)
    step = TrainStepInput(x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)

    losses = [coder.training_forward_pass(step).loss.item() for coder in coders.values()]
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0]):
        raise SystemExit(f"expected equal losses, got {losses}: no speed is reported")

    def train(coder) -> None:
        coder.zero_grad(set_to_none=True)
        coder.training_forward_pass(step).loss.backward()

    @torch.no_grad()
    def infer(coder) -> None:
        coder(x)

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {shape}, {options.tokens} tokens, medians of {options.repeats}")
    for name, run in {"forward and backward": train, "inference forward": infer}.items():
        times = {coder: [] for coder in coders}
        for _ in range(options.repeats + 1):
            for coder, module in coders.items():
                times[coder].append(timed(run, module))
        medians = {coder: 1000 * statistics.median(values[1:]) for coder, values in times.items()}
        ratio = medians["fastsae"] / medians["SAELens"]
        print(f"{name}: fastsae {medians['fastsae']:.0f} ms, SAELens {medians['SAELens']:.0f} ms, ratio {ratio:.2f}")


def timed(run, coder) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(coder)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
