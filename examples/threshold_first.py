"""Drive a stack that clips by itself: give it the threshold, observe its norm.

DeepSpeed, Megatron and the Hugging Face Trainer measure and clip inside their own step.
What they accept is a limit before the step; what they tell is a norm after it. Here
`Engine` stands where DeepSpeed's would: a plain loop with `clip_grad_norm_`.
docs/trainers.md has the same lines for each of them.
"""

import torch

from autoclip_torch import QuantileClip


class Engine:
    """Updates after every second micro-batch, clips by itself, tells the norm."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.clip_grad, self.micro_batches = model, 1.0, 2
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        self._norm: float | None = None
        self._steps, self._applied = 0, False

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.micro_batches).backward()

    def step(self) -> None:
        self._steps += 1
        self._applied = self._steps % self.micro_batches == 0
        if self._applied:
            self.update()

    def update(self) -> None:
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # DeepSpeed tells -1, too, where a norm is not finite. To go on after it, here
        # nothing is stepped.
        self._norm = float(norm) if norm.isfinite() else -1.0
        if self._norm >= 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return self._applied

    def get_global_grad_norm(self) -> float | None:
        """Return the norm of the last update, also long after it; None before one."""
        return self._norm


def main(steps: int = 200) -> QuantileClip:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    engine = Engine(model)
    clipper = QuantileClip(model, quantile=0.9, history_length=100, scope="global")
    for step in range(steps * engine.micro_batches):
        x = torch.randn(16, 8) * (float("nan") if step == 100 else 1.0)
        engine.clip_grad = min(clipper.threshold().item(), 1e9)  # before: the limit
        engine.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
        engine.step()
        if engine.was_step_applied():  # else the norm is that of an earlier update
            clipper.observe(engine.get_global_grad_norm())  # after: the norm
    return clipper


if __name__ == "__main__":
    for name, value in main().metrics().items():
        print(f"{name:22} {value:10.4f}")
