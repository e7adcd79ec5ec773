"""DeepSpeed's ZeRO under the trainer: its engine adds up gradients, clips and steps, each process on its own piece.

Stage 2: gradients and optimizer state of the adapter lie in pieces. Stage 3: so do the adapter and the decoder layers;
a layer is gathered as a whole when it runs (a "leaf module"), since our LoRA forward reads its weights itself.
Embeddings, head and last norm stay whole, as with --fsdp: the head runs as often as a pack needs, which differs by
process. The engine is given a module of these layers only, and each micro-step runs inside that module's forward.

All processes call every method of `Zero` together, in the same order. Gradients are collected in each backward, so
micro-steps must be as many on every process.
"""

from __future__ import annotations

import copy
import io
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from espalier.model.quantized import num_weights
from espalier.model.shard import decoder_layers, move_rest
from espalier.tree.loss import LossOutput, base_of


class _Engaged(nn.Module):
    """What the engine knows of the model; its forward runs a micro-step of the whole model."""

    def __init__(self, layers: list[nn.Module], parameters: list[nn.Parameter]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for number, parameter in enumerate(parameters):
            self.register_parameter(f"parameter_{number}", parameter)

    def forward(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        return run()


class Zero:
    """A model's adapter and its optimizer in DeepSpeed's hands.

    optimizer: of the adapter; it steps on pieces of flattened parameters from now on, so it must treat each element by
    itself. settings: DeepSpeed's configuration, see zero_settings.engine_settings. device: where the model computes.
    """

    described: str  # one line for the header

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: str):
        deepspeed = _deepspeed(device)
        self.stage: int = settings["zero_optimization"]["stage"]
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._shown = optimizer
        # The engine's own, which steps on pieces; the one that the schedule knows keeps its groups and parameters.
        self._stepping = copy.copy(optimizer)
        self._stepping.state = defaultdict(dict)
        self._stepping.param_groups = [dict(group) for group in optimizer.param_groups if group["params"]]
        layers = decoder_layers(base_of(model)) if self.stage == 3 else []
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        engaged = _Engaged(layers, [parameter for parameter in self._trained if parameter not in inside])
        if self.stage == 3:
            # A layer's gradients are collected when those of its input are there, so there must be some.
            base_of(model).enable_input_require_grads()
            deepspeed.utils.set_z3_leaf_modules(engaged, list({type(layer) for layer in layers}))
            deepspeed.zero.Init(module=engaged, config_dict_or_path=settings)  # layer by layer: never whole on a device
            move_rest(model, set(engaged.parameters()), device)
        self._engine = deepspeed.initialize(
            model=engaged, optimizer=self._stepping, config=settings, dist_init_required=False
        )[0]
        self._world = torch.distributed.get_world_size()
        frozen = {parameter for parameter in inside if not parameter.requires_grad}
        pieces = f"optimizer state and gradients of the adapter in {self._world} pieces"
        if self.stage == 3:
            size = sum(num_weights(parameter) * parameter.element_size() for parameter in frozen)
            base = f"{len(layers)} layers of {size / 1e6:,.1f} MB, the adapter"
            pieces = f"{base}, {pieces}; embeddings and head whole on every process"
        self.described = f"{pieces} (DeepSpeed {deepspeed.__version__}, ZeRO stage {self.stage})"

    # ---- the step ------------------------------------------------------------------------------------------------

    def forward(self, run: Callable[[], LossOutput]) -> LossOutput:
        """What `run`, a micro-step's forward of the whole model, gives."""
        output: LossOutput | None = None

        def loss_of() -> torch.Tensor:
            nonlocal output
            output = run()
            return output.loss_sum

        loss_sum = self._engine(loss_of)
        assert output is not None
        return replace(output, loss_sum=loss_sum)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, this process's share of a sum over all, to those of the step."""
        self._engine.backward(loss * self._world)  # DeepSpeed averages, and a step is a sum

    def step(self) -> float:
        """Clip, step and forget the gradients. Returns their norm before clipping: where it is not finite (inf), no
        weight was changed."""
        self._take_rates()
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def discard(self, run: Callable[[], LossOutput]) -> None:
        """Forget the step's gradients: with one that is not finite among them, the engine steps over it.

        run: any micro-step's forward.
        """
        self.backward(self.forward(run).loss_sum * float("nan"))
        self._engine.step()

    def gradients(self, parts: Sequence[Callable[[], LossOutput]]) -> tuple[float, list[torch.Tensor]]:
        """(the sum of the losses of `parts`, its gradient by each parameter of the adapter), in stage 3, for the same
        parts on all processes. They are those of no step: nothing of them is left."""
        from deepspeed.utils import safe_get_full_grad

        loss = 0.0
        for part in parts:
            loss_sum = self.forward(part).loss_sum
            self.backward(loss_sum / self._world)
            loss += float(loss_sum.detach())
        grads = [safe_get_full_grad(parameter).clone() for parameter in self._trained]
        self.discard(parts[0])
        return loss, grads

    def make_state(self, run: Callable[[], LossOutput]) -> None:
        """Have the optimizer's tensors before the first step: its first step makes them, so one is done that changes
        nothing. run: a micro-step's forward whose loss is 0."""
        for group in self._stepping.param_groups:
            group["lr"] = 0.0
            for piece in group["params"]:
                piece.grad = torch.zeros_like(piece)
        self._stepping.step()  # all groups at once: the engine asks whose tensors are whose after its first group only
        for group in self._stepping.param_groups:
            for piece in group["params"]:
                piece.grad = None
        self.backward(self.forward(run).loss_sum)
        self._engine.step()
        for state in self._stepping.state.values():
            state["step"].zero_()

    def _take_rates(self) -> None:
        shown = [group for group in self._shown.param_groups if group["params"]]
        for group, of_schedule in zip(self._stepping.param_groups, shown, strict=True):
            group["lr"] = of_schedule["lr"]

    # ---- whole again ---------------------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The adapter is whole on every process, to be read."""
        with self._gathered(None):
            yield

    @contextmanager
    def written(self) -> Iterator[None]:
        """The adapter is whole on every process, and all write the same values into it, in place."""
        from deepspeed.utils import safe_set_full_fp32_param

        with self._gathered(0):
            yield
            for parameter in self._trained:  # what the optimizer steps on is a copy
                safe_set_full_fp32_param(parameter, parameter.data.float())

    def _gathered(self, writer: int | None) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(self._trained, modifier_rank=writer, enabled=self.stage == 3)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by whole parameters: what its state_dict() would be without ZeRO."""
        from deepspeed.utils import safe_get_full_optimizer_state

        of_a_piece: dict[str, Any] = next(iter(self._stepping.state.values()))
        whole = self._shown.state_dict()
        for number, parameter in enumerate(self._parameters()):
            whole["state"][number] = {
                key: safe_get_full_optimizer_state(parameter, key) if _is_by_element(value) else copy.deepcopy(value)
                for key, value in of_a_piece.items()
            }
        return whole

    def _parameters(self) -> list[nn.Parameter]:
        """In the order of their numbers in the state."""
        return [parameter for group in self._shown.param_groups for parameter in group["params"]]

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what `optimizer_state`, or an optimizer's state_dict() without ZeRO, gave."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._shown.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
        parameters = self._parameters()
        for number, values in state["state"].items():
            for key, value in values.items():
                if _is_by_element(value):
                    parameter = parameters[number]
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
                else:
                    for piece in self._stepping.state.values():
                        piece[key] = copy.deepcopy(value)


def _is_by_element(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def tell_device(device: str) -> None:
    """Tell DeepSpeed which device is used, before anything imports it: accelerate does where it is installed."""
    os.environ.setdefault("DS_ACCELERATOR", torch.device(device).type)


def _deepspeed(device: str) -> Any:
    """The package, told to be quiet: our own header says what is done."""
    tell_device(device)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # it prints that a kernel of its own was compiled
        deepspeed.init_distributed(verbose=False)  # takes the process group that there is
    return deepspeed
