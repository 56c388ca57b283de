"""The house rule, checked: every module imports only from floors strictly below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "fastsae_kernels": [
        "gpu keys ranks tuning reference cpu_linear cpu_sampled cpu_bound gemm_tile by_latent rules step_sizes "
        "pair_sums",
        "configs sparse_configs cpu_select cpu_candidates split row_best row_candidates",
        "auxk batch_topk center",
        "encoder_choice fused_product groupmax decode cpu_screen step_parts",
        "select act_grad cpu reference_step dense_step prefixes",
        "resolve latent_grad cpu_step row_update",
        "encode backward cpu_memory gpu_memory",
        "launch latent_step update reference_memory",
        "operators step",
        "autograd graphed_step",
        "varying",
        "__init__",
        "testing",
    ],
    "fastsae": [
        "errors interrupt version demo token_text deferred",
        "collation fields finetune hub integrity memmap ops origin placement tensor_parallel token_shuffle",
        "coder_config coder_inputs encode_config coder_folders rows",
        "config_checks",
        "config run_config stream state_files",
        "arguments tokens training_state devices",
        "options",
        "loss checkpoint overrides resume run_lock run_file run_folder tracking progress sources batches model_loss",
        "coder_files hooks data model retention",
        "sae hookpoints",
        "shards",
        "activations coders row_optimizer compat saving error_sums",
        "joint muon",
        "optim",
        "metrics saved model_card held_out",
        "micro_batches pretrained trainer_state distributed",
        "first_batch",
        "end_to_end",
        "train_step",
        "saving_trainer",
        "trainer eval encode push",
        "report activation_cache",
        "run bench compat.sparsify",
        "resume_run planning",
        "cli __init__",
        "__main__",
    ],
    "bench": ["__init__", "shapes timing exact", "problem", "truth", "cases record report", "run"],
    "compat": [
        "__init__ hook_names files sparsify_flags",
        "coder",
        "fitting",
        "formats",
        "convert",
        "info saelens_topk dense",
        "saelens_transcoder saebench delphi dictionary_learning sparsify",
        "saelens",
    ],
    "sparsify": ["config data", "trainer", "__init__"],
    "formats": ["__init__ sparsify saelens dictionary_learning openai circuit_tracer"],
    "eval": [
        "__init__ config estimate batches subjects",
        "result",
        "reconstruction cross_entropy table",
        "evaluate tokens",
        "run",
    ],
    "activation_cache": ["__init__ config index order", "read write options", "training", "run"],
    "distributed": [
        "__init__ world balance",
        "reduction exchange latent_peers joining",
        "strategy row_file",
        "modules latent_slice",
        "latents",
        "shared_model",
        "strategies",
    ],
    "report": ["__init__ config codes curves lens", "latents page", "run"],
    "planning": [
        "__init__ config live_bytes",
        "structure kept work layout",
        "disk",
        "result",
        "memory table",
        "speed measure advice",
        "modes",
        "make",
        "run",
    ],
    "cli": ["app", "train plan look convert", "__init__"],
}
WITHIN = {
    "bench": ["fastsae"],
    "compat": ["fastsae"],
    "formats": ["compat", "fastsae"],
    "sparsify": ["compat", "fastsae"],
    "eval": ["fastsae"],
    "report": ["fastsae"],
    "distributed": ["fastsae"],
    "activation_cache": ["fastsae"],
    "planning": ["fastsae"],
    "cli": ["fastsae"],
}
PACKAGES = {
    "fastsae_kernels": ROOT / "kernels/fastsae_kernels",
    "fastsae": ROOT / "fastsae",
    "bench": ROOT / "fastsae/bench",
    "compat": ROOT / "fastsae/compat",
    "formats": ROOT / "fastsae/compat/formats",
    "sparsify": ROOT / "fastsae/compat/sparsify",
    "eval": ROOT / "fastsae/eval",
    "report": ROOT / "fastsae/report",
    "distributed": ROOT / "fastsae/distributed",
    "activation_cache": ROOT / "fastsae/activation_cache",
    "planning": ROOT / "fastsae/planning",
    "cli": ROOT / "fastsae/cli",
}
KERNELS_MAY_IMPORT = {
    *("__future__", "torch", "triton", "typing", "os", "functools", "math", "dataclasses", "collections"),
    *("contextlib", "types", "json", "logging", "pathlib", "tempfile", "threading", "warnings"),
}
MAY_IMPORT_KERNELS = {"ops.py", "row_optimizer.py", "bench/cases.py", "planning/work.py"}
MAY_IMPORT_HUGGING_FACE = {
    *("activations.py", "coders.py", "data.py", "devices.py", "hookpoints.py", "hooks.py", "model.py", "run.py"),
    *("sources.py", "stream.py", "tensor_parallel.py", "tokens.py", "train_step.py"),
    *("cli/app.py", "demo/build.py", "eval/evaluate.py", "eval/tokens.py"),
    *("compat/sparsify/data.py", "compat/sparsify/trainer.py"),
}
PEERS = {
    "sae_lens": {f"compat/{room}.py" for room in ("saelens", "saelens_topk", "saelens_transcoder")},
    "dictionary_learning": {"compat/dictionary_learning.py"},
    **dict.fromkeys(("sparsify", "sae_bench", "delphi", "circuit_tracer", "nnsight", "transformer_lens"), ()),
}


def imports(path: Path):
    """(relative level, first part of the module, names) of every import that is not for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            high = module.startswith("compat.sparsify")  # a room with a floor of its own: it trains
            yield node.level, "compat.sparsify" if high else module.split(".")[0], [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")[0], []) for alias in node.names)


def floors(package: str) -> dict[str, int]:
    return {module: i for i, row in enumerate(FLOORS[package]) for module in row.split()}


@pytest.mark.parametrize("package", FLOORS)
def test_imports_point_down(package):
    floor, chain = floors(package), [package, *WITHIN.get(package, [])]
    for path in PACKAGES[package].glob("*.py"):
        assert path.stem in floor, f"{path.name} has no floor; give it one"
        for level, module, names in imports(path):
            for target in [module] if module else names:
                if level == 1:
                    assert floor[target] < floor[path.stem], f"{package}: {path.stem} -> {target} points up"
                elif level > 1:
                    outer, inner = chain[level - 1], chain[level - 2]
                    above = floors(outer)
                    height = above.get(f"{inner}.{package}", above[inner])
                    assert above[target] < height, f"{package}: {path.stem} -> {outer}.{target} points up"


def test_kernels_stand_alone():
    for path in PACKAGES["fastsae_kernels"].glob("*.py"):
        for level, module, _ in imports(path):
            assert level or module in KERNELS_MAY_IMPORT, f"{path.name} imports {module}"


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [({"fastsae_kernels"}, MAY_IMPORT_KERNELS), ({"transformers", "datasets"}, MAY_IMPORT_HUGGING_FACE)],
)
def test_only_some_rooms_know_the_kernels_or_hugging_face(modules, allowed):
    for path in PACKAGES["fastsae"].rglob("*.py"):
        met = {module for level, module, _ in imports(path) if not level} & modules
        name = path.relative_to(PACKAGES["fastsae"]).as_posix()
        assert not met or name in allowed, f"{name} imports {met}"


def test_other_libraries_stay_in_their_rooms():
    for path in PACKAGES["fastsae"].rglob("*.py"):
        met = {module for level, module, _ in imports(path) if not level} & set(PEERS)
        room = path.relative_to(PACKAGES["fastsae"]).as_posix()
        assert all(room in PEERS[module] for module in met), f"{room} imports {met}"


def test_kernels_folder_is_not_a_package():
    """A kernels/__init__.py would shadow Hugging Face's `kernels` whenever the repo root is on sys.path."""
    assert not any((ROOT / folder / "__init__.py").exists() for folder in ("kernels", "tests", "benchmarks"))


def test_no_module_shadows_a_public_function():
    """Importing a submodule binds its name in the package, over a function of that name."""
    import fastsae_kernels

    assert not {path.stem for path in PACKAGES["fastsae_kernels"].glob("*.py")} & set(fastsae_kernels.__all__)


def test_no_module_is_called_utils():
    assert not [path for package in PACKAGES.values() for path in package.rglob("util*.py")]
