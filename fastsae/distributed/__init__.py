"""Several processes that train one run together, through torchrun and torch.distributed: NCCL on GPUs, gloo on CPUs."""
