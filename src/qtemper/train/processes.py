"""Several processes: what they share out, what they must agree on.

Devices, launching and the gradient all-reduce are lightning-fabric's. Ours: noise that does not depend on the number
of processes, statistics and decisions that all ranks share, batch norm over the global batch on any device.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

from qtemper.counter import NoiseSource
from qtemper.layers import QuantLayer
from qtemper.quantizer import Quantizer, quantizers


class ProcessLostError(RuntimeError):
    """Another process of a distributed training died, or did not answer in time; this one cannot go on alone."""


@contextlib.contextmanager
def report_lost_process(timeout: float) -> Iterator[None]:
    """Turn what gloo, NCCL or the store raise when a process is gone into one line.

    Args:
        timeout: what the processes were given to answer, in seconds.

    Raises:
        ProcessLostError: in place of theirs.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        # gloo has no type of its own; its messages name its source files.
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in text):
            raise
        if "timed out" in text or "timeout" in text:
            what = f"another process did not answer within train.timeout ({timeout:g} s): it hangs, or is only slow"
            remedy = "look at the processes' output, raise train.timeout if one needs longer"
        else:
            what = "another process died, or the connection to it broke"
            remedy = "its own output says why, put that right"
        rank, size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        raise ProcessLostError(f"process {rank} of {size} stops: {what}; {remedy}, and go on with --resume.") from error


class _RestartableDDP(DDPStrategy):
    """DistributedDataParallel whose processes find each other again after a restart by torchrun."""

    def setup_environment(self) -> None:
        """Join the others, then do what the strategy does."""
        env = os.environ
        attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
        shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # torchrun's agent keeps one store for all attempts, without a prefix for each (pytorch issue 135712): a process
        # could read where another one listened before the restart, and wait there. On several nodes the agents may
        # count their attempts differently, so there it is left to TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if attempt and shared and env.get("GROUP_WORLD_SIZE", "1") == "1":
            timeout = self._timeout or datetime.timedelta(minutes=30)
            address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
            store = TCPStore(*address, is_master=False, timeout=timeout)
            torch.distributed.init_process_group(
                "nccl" if self.root_device.type == "cuda" else "gloo",
                store=PrefixStore(f"qtemper/attempt-{attempt}", store),
                rank=int(env["RANK"]),
                world_size=int(env["WORLD_SIZE"]),
                timeout=timeout,
                device_id=self.root_device if self.root_device.type == "cuda" else None,
            )
        super().setup_environment()


def make_fabric(*, timeout: float = 1800.0) -> Fabric:
    """A Fabric for the processes that torchrun (or Slurm) started, or for this one alone.

    Args:
        timeout: seconds after which a collective that some rank does not join ends the training.
    """
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if world_size == 1:
        return Fabric(accelerator="auto", devices=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world_size)))
    strategy = _RestartableDDP(timeout=datetime.timedelta(seconds=timeout))
    fabric = Fabric(accelerator="auto", devices=local, num_nodes=world_size // local, strategy=strategy)
    fabric.launch()
    return fabric


def share_noise(model: nn.Module, rank: int) -> None:
    """Let activation noise count over the global batch, of which this process has the `rank`-th part."""
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and layer.act_quantizer is not None:
            for module in layer.act_quantizer.modules():
                if isinstance(module, NoiseSource):
                    module.part = rank


def share_state(model: nn.Module, fabric: Fabric) -> None:
    """Give every process the first one's parameters, buffers and calibrated grids."""
    if fabric.world_size > 1:
        # By way of the host: a tensor of the first one's GPU would come to life there in every process.
        model.load_state_dict(fabric.broadcast({key: value.cpu() for key, value in model.state_dict().items()}))


def share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Give every process the first one's buffers, as DistributedDataParallel does before each forward pass."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def add_up_statistics(model: nn.Module, fabric: Fabric) -> None:
    """Combine the roundings' statistics of the step from all processes, in one message.

    Those of activations are sums over the batch, of which every process has a part: they add up. A weight and its noise
    are the same in every process: counted once for each, they would look more certain than they are, so there it is the
    mean.
    """
    if fabric.world_size == 1:
        return
    buffers = [buffer for _, q in quantizers(model) for buffer in q.rounding.statistics()]
    if buffers:
        total = torch.cat(buffers)
        torch.distributed.all_reduce(total)
        for buffer, part in zip(buffers, torch.split(total, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(part)
        for layer in model.modules():
            if isinstance(layer, QuantLayer) and isinstance(layer.weight_quantizer, Quantizer):
                for buffer in layer.weight_quantizer.rounding.statistics():
                    buffer.div_(fabric.world_size)


class Agreement:
    """The largest of all processes' numbers in every step, without making an accelerator wait for its answer.

    On a CPU the answer is of the same step. An accelerator has yet to compute it, and would be idle for as long as the
    host waited; there each answer is the previous step's, which arrived meanwhile.

    Args:
        fabric: the processes.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.late = fabric.device.type != "cpu"
        self._pending: tuple[Tensor, torch.Event | None] | None = None

    def ask(self, value: Tensor) -> float:
        """Share this step's number, a scalar on the device; returns the largest of this step, or of the one before.

        In the first step, whose predecessor there is not, 0.
        """
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        if not self.late:
            return value.item()
        answer = self.settle()
        event = None if value.device.type == "cpu" else torch.Event(value.device)
        self._pending = value.to("cpu", non_blocking=True), event
        if event is not None:
            event.record(torch.accelerator.current_stream(value.device))  # by itself it takes the current device's
        return answer

    def settle(self) -> float:
        """The answer that was not given yet, waited for; 0 if there is none."""
        if self._pending is None:
            return 0.0
        (value, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        return value.item()


def total(values: Tensor, fabric: Fabric) -> Tensor:
    """Sum over all processes."""
    if fabric.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; so is its gradient, since every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, on any device; put in place by `synchronize_batch_norm`."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the global batch in training, by the running statistics in evaluation."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        local = x.float()
        # In double precision, where the difference of two sums is harmless.
        wide = torch.float64
        count = torch.full((1,), float(x.numel() // x.shape[1]), dtype=wide, device=x.device)
        sums = torch.cat([local.sum(dims, dtype=wide), local.square().sum(dims, dtype=wide), count])
        sums = _AllReduceSum.apply(sums)  # type: ignore[no-untyped-call]
        assert isinstance(sums, Tensor)
        mean, square = sums[:-1].div(sums[-1]).chunk(2)
        variance = (square - mean**2).clamp_min(0)
        mean, variance = mean.float(), variance.float()
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is not None and self.running_var is not None:
            # None asks for the plain average of all batches.
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked or 1)
            n = sums[-1].detach().float()
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * n / (n - 1), momentum)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = torch.rsqrt(variance + self.eps) * (1.0 if self.weight is None else self.weight)
        shift = -mean * scale + (0.0 if self.bias is None else self.bias)
        return (local * scale.view(shape) + shift.view(shape)).to(x.dtype)


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Let every batch norm use the global batch; torch's SyncBatchNorm on CUDA, which has no CPU form."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.__class__ = _GlobalBatchNorm  # type: ignore[assignment]
    return model
