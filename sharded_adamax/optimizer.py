"""`ShardedAdamax`: the optimizer as the user meets it. What happens in a step is in engine.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from sharded_adamax import agreement, arguments, loading
from sharded_adamax.collectives import control_plane, data_plane
from sharded_adamax.consolidation import gather_state
from sharded_adamax.engine import Engine
from sharded_adamax.logs import log_for_all
from sharded_adamax.members import ParamGroup
from sharded_adamax.observing import Observed
from sharded_adamax.reduction import BackwardReduction
from sharded_adamax.scaling import teach_grad_scaler

StateDict = dict[str, Any]
logger = logging.getLogger(__name__)


class ShardedAdamax(Observed, torch.optim.Adamax):
    """torch.optim.Adamax with its state, its gradients and its work sharded over the ranks of a data-parallel job.

        g = mean of the ranks' gradients + weight_decay * p
        m = beta1 * m + (1 - beta1) * g                      # exp_avg
        u = max(beta2 * u, |g| + eps)                        # exp_inf
        p = p - lr / (1 - beta1**t) * m / u                  # in step t

    Construction flattens the parameters into buckets, one bucket at a time, and overwrites them with those of the
    group's first rank. From then on ``p.data`` is a view of a bucket: change values in place, and move or cast the
    model before.

    In backward the gradients of a bucket are moved out of ``p.grad`` (it becomes None) and reduce-scattered as soon as
    all of them are there. `step` waits for bucket k, updates this rank's shard of it, launches its all-gather and goes
    on to bucket k + 1; all parameters are complete when it returns, or, after `overlap_forward`, when they are used.

    Memory per rank, N ranks, P parameters of 4 bytes: 4P parameters + 4P/N gradient shard + 8P/N state + buckets in
        flight.

    All ranks construct the optimizer with the same parameters in the same order, run backward, and call `step`,
    `zero_grad`, `add_param_group` and `full_state_dict` together.

    Args:
        params: Tensors, ``(name, tensor)`` pairs or group dicts. Names make errors readable.
        lr, betas, eps, weight_decay, foreach, maximize: As in torch.optim.Adamax. ``foreach=None`` is the plain loop
            on the CPU (in chunks that stay in the cache; the same bits) and foreach on CUDA, as there.
        differentiable: Refused: autograd cannot follow the update through a reduce-scatter.
        capturable: As in torch.optim.Adamax, for all groups alike: ``step`` lives on the device, and `step` of the
            optimizer can be captured in a CUDA graph, together with backward. Designed for it, never run on a GPU; what
            a captured step means here is in docs/design/kernels.md. On a CPU it can be given, but not stepped with.
        fused: True updates in one pass over memory: on the CPU compiled by torch's Inductor when the optimizer is
            built (seconds; needs a C++ compiler) and used only if its bits are those of the plain loop; on CUDA by
            Triton (never run on a GPU so far). Where there is no such kernel the update runs as without it, and a
            warning says so. Not together with ``foreach=True``.
        process_group: The ranks that share the state. Default: all. Not initialised: a world of one.
        mesh: A 1-D DeviceMesh instead of ``process_group``.
        reduce_gradients: True: this optimizer averages the gradients over the ranks; do not wrap the model in
            DistributedDataParallel. False: they arrive averaged (DDP, Hugging Face Trainer, Lightning) and stay in
            ``p.grad``.
        reduce_dtype: The dtype in which gradients travel and are summed; None is that of the parameters.
        master_dtype: torch.float32 keeps parameters of 16 bits a second time, sharded, in float32, and m and u with
            them; the parameters are that master, rounded. What is written to a parameter in place (a loaded checkpoint)
            goes into the master with the next step. None: everything in the dtype of the parameter, as in torch.
        state_format: Only "full" so far.
        bucket_mib: Size of a bucket in MiB. A larger parameter has a bucket of its own.
        skip_nonfinite: Skip a step, on all ranks together, when the mean gradient has Inf or NaN anywhere; nothing is
            changed and `skipped_steps` counts it. Without it one Inf makes a parameter NaN for ever.

    Raises:
        ValueError: Bad hyper-parameters, in torch's words. On every rank: the ranks disagree; the message names the
            first difference.
        NotImplementedError: An argument whose capability does not exist yet.

    Example:
        >>> context = init_distributed()
        >>> model = torch.nn.Linear(10, 10).to(context.device)
        >>> optimizer = ShardedAdamax(model.named_parameters(), lr=2e-3)
        >>> model(torch.randn(4, 10, device=context.device)).square().mean().backward()
        >>> optimizer.step()

    Source: torch/optim/adamax.py, to the last bit given the same mean gradient (fp32 and fp64 on the CPU).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        reduce_gradients: bool = True,
        reduce_dtype: torch.dtype | None = None,
        master_dtype: torch.dtype | None = None,
        state_format: str = "full",
        bucket_mib: float = 25,
        skip_nonfinite: bool = False,
    ) -> None:
        self._engine: Engine | None = None  # while it is None, add_param_group only collects
        self._consolidated: StateDict | None = None
        process_group = arguments.process_group_of(process_group, mesh)
        control = control_plane(process_group)

        chosen: dict[str, Any] = {  # what the ranks have to agree on
            "reduce_gradients": reduce_gradients,
            "bucket_mib": bucket_mib,
            "reduce_dtype": reduce_dtype,
            "master_dtype": master_dtype,
            "skip_nonfinite": skip_nonfinite,
            "capturable": capturable,
        }

        def build() -> None:
            arguments.refuse_unsupported(state_format=state_format)
            settings = arguments.checked_settings(**chosen, fused=fused)
            # torch's own constructor: its checks, its messages, its defaults.
            super(ShardedAdamax, self).__init__(
                params,
                lr,
                betas,
                eps,
                weight_decay,
                foreach,
                maximize=maximize,
                differentiable=differentiable,
                capturable=capturable,
            )
            arguments.check_groups(self.param_groups, 0, settings)
            device = arguments.common_device(self.param_groups)
            self._engine = Engine(control, data_plane(process_group, device), settings)

        agreement.run_together(control, build, "building ShardedAdamax")
        self._get_engine().group.meet(control)
        self._adopt(first_group=0, settings=[f"{name}={value}" for name, value in chosen.items()])
        teach_grad_scaler()

    def _adopt(self, first_group: int, settings: list[str]) -> None:
        """Compare the groups from ``first_group`` on between the ranks and take over their parameters. Collective."""
        engine = self._get_engine()
        members = arguments.members_of(self.param_groups, first_group)
        agreement.compare(
            engine.control,
            settings + arguments.describe(self.param_groups, members, first_group),
            "the arguments and parameters of ShardedAdamax",
        )
        engine.frozen += [m for m in members if not m.param.requires_grad]
        engine.extend([m for m in members if m.param.requires_grad], self.state)
        engine.prepare_kernels(self.param_groups)
        log_for_all(logger, engine.group.rank, logging.INFO, "%s", lambda: self.summary().headline)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group as torch.optim.Optimizer does. Collective after construction.

        Raises:
            ValueError, TypeError: In torch's words; or the ranks add different groups. The group is then not added.
        """
        engine = self._engine
        if engine is None:
            super().add_param_group(param_group)
            return
        first_group = len(self.param_groups)

        def add() -> None:
            super(ShardedAdamax, self).add_param_group(param_group)
            arguments.check_groups(self.param_groups, first_group, engine.settings)
            arguments.common_device(self.param_groups)

        try:
            agreement.run_together(engine.control, add, "adding a parameter group")
            self._adopt(first_group, settings=[])
        except Exception:
            del self.param_groups[first_group:]
            raise
        self._consolidated = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one optimization step. Collective: all ranks take it, or none does.

        Args:
            closure: Reevaluates the model, runs backward and returns the loss.

        Raises:
            RuntimeError: On every rank, with nothing changed: a parameter was moved after construction, a gradient is
                sparse, hyper-parameters or (``reduce_gradients=False``) gradients differ between ranks, or this
                optimizer and another wrapper both reduce gradients.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._consolidated = None
        self._get_engine().step(self.param_groups, self.state)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also those that backward has handed over since the last step.

        Collective where backward ran since the last step: what was launched is completed first.
        """
        super().zero_grad(set_to_none)
        self._get_engine().discard(set_to_none=set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients in ``p.grad`` of this rank; the first backward outside reduces the sum.

        With ``reduce_gradients=False`` use DistributedDataParallel's own no_sync.
        """
        source = self._get_engine().source
        if not isinstance(source, BackwardReduction):
            raise RuntimeError(
                "no_sync() is for reduce_gradients=True; under DistributedDataParallel use model.no_sync()"
            )
        before, source.enabled = source.enabled, False
        try:
            yield
        finally:
            source.enabled = before

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients so that their norm over all parameters and ranks is at most ``max_norm``. Collective.

        Takes the place of torch.nn.utils.clip_grad_norm_ between backward and `step`. Completes the reduction of the
        gradients; with ``reduce_gradients=False`` it scales ``p.grad``.

        Returns:
            The norm before clipping, 0-d, the same bits on all ranks.

        Raises:
            RuntimeError: As `step`; or the norm is not finite, with ``error_if_nonfinite``.

        Source: torch/nn/utils/clip_grad.py; equal to it up to the rounding of sums, see [Note: bound] in clipping.py.
        """
        return self._get_engine().clip_(
            self.param_groups, self.state, float(max_norm), float(norm_type), error_if_nonfinite
        )

    @property
    def skip_grad_norm_above(self) -> float | None:
        """Steps whose mean gradient has an L2 norm above this limit, or NaN, before clipping, are skipped by all ranks.

        None, the default: none is. May be set at any time, to the same on all ranks; math.inf skips NaN only.

        Source: Hazami et al., Efficient-VDVAE: Less is more, which trains so.
        """
        return self._get_engine().guards.skip_norm_above

    @skip_grad_norm_above.setter
    def skip_grad_norm_above(self, limit: float | None) -> None:
        self._get_engine().guards.set_norm_limit(limit)

    def unscale_for_grad_scaler(
        self, inv_scale: Tensor, found_inf: Tensor, *, allow_fp16: bool
    ) -> dict[torch.device, Tensor] | None:
        """Unscale the gradients for torch.amp.GradScaler, which calls this by itself. Collective.

        See [Note: GradScaler] in scaling.py.
        """
        engine = self._get_engine()
        if not engine.settings.reduce_gradients:
            return None
        device = arguments.common_device(self.param_groups)
        found = engine.unscale_(
            self.param_groups, self.state, inv_scale.to(device), found_inf.to(device), allow_fp16=allow_fp16
        )
        return {} if found is None else {device: found}

    def overlap_forward(self, model: torch.nn.Module) -> None:
        """Let `step` return while parameters are still being gathered; the next forward awaits them module by module.

        The gathers go in the order in which the forward pass needs them. Nothing can read a parameter that is partly
        old: whoever looks at one earlier (``p.data``, ``state_dict()``, evaluation, `save`, a copy) waits for it then.
        Only a tensor that was made from ``p.data`` before the step shows old values for a moment. On a GPU the modules
        may run on several streams; other code that reads parameters waits for the forward's stream, or uses it.

        Called once, on all ranks, before or after ``torch.compile``: a compiled model awaits all parameters at its
        entrance, compiled parts of a model each their own. Part of torch.nn.TransformerEncoder's inference shortcut is
        off for modules with hooks, which these are.

        Raises:
            ValueError: ``model`` has no parameter of this optimizer.
            NotImplementedError: It contains TorchScript.
        """
        self._get_engine().overlap_forward(model)

    def join_hook(self, **kwargs: Any) -> Any:
        """Refuse torch.distributed.algorithms.Join, and say what to do instead."""
        raise NotImplementedError(
            "Join is not supported: its hooks would have to know how many collectives the backward passes of the other "
            "ranks begin. With uneven inputs, let a rank that has no more data go on calling step() and zero_grad() "
            "without backward, as often as the others do: its gradients then count as zero. Or stop all ranks at the "
            "shortest"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "ShardedAdamax cannot be pickled or deep-copied: it owns the memory of its parameters and takes part in a "
            "process group. Save it with sharded_adamax.save on all ranks, or full_state_dict() and torch.save; for a "
            "second optimizer, build one"
        )

    def state_dict(self) -> StateDict:
        """Return the state as torch.optim.Optimizer does, its tensors sharded. Never communicates.

        On the rank that `consolidate_state_dict` gathered to, until the next step: the whole state, as plain tensors.
        """
        if self._consolidated is not None:
            return self._consolidated
        self._get_engine().refresh_masters()
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a sharded state dict of this layout, or a plain torch.optim.Adamax one given to every rank. Local.

        Raises:
            ValueError: Groups or shapes that do not fit (in torch's words where torch has them), a missing state, or
                shards of another layout. Nothing was changed.
        """
        loading.load_state_dict(self, state_dict)
        self._consolidated = None

    def full_state_dict(self, to: int = 0) -> StateDict | None:
        """Gather a plain torch.optim.Adamax state dict on rank ``to`` of the group. Collective.

        Rank ``to`` holds the whole state in host memory, and one bucket of it on the device while gathering.

        Returns:
            On rank ``to`` a dict that torch.optim.Adamax loads, CPU tensors; None on the others.
        """
        state = gather_state(self._get_engine(), self, to)
        return None if state is None else {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the state on rank ``to``, where `state_dict` then returns it whole. Collective.

        It does so until the next `step`, `load_state_dict`, `add_param_group` or sharded `save` or `load`. The name and
        contract of torch.distributed.optim.ZeroRedundancyOptimizer.
        """
        self._consolidated = self.full_state_dict(to)

    def forget_consolidated_state(self) -> None:
        """Free what `consolidate_state_dict` gathered; `state_dict` is sharded again on every rank. Local."""
        self._consolidated = None
