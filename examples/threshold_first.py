"""Drive a stack that clips by itself: give it the threshold, observe its norm.

DeepSpeed, Megatron and the Hugging Face Trainer measure and clip inside their own step.
What they accept is a limit before the step; what they tell is a norm after it. Here
`Engine` stands where theirs would: a plain loop with `clip_grad_norm_`.
docs/stacks.md has the same three lines for each of them.
"""

import torch

from autoclip_torch import QuantileClip


class Engine:
    """Clips at `clip_grad` in its own step and says afterwards what the norm was."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.clip_grad, self.norm = model, 1.0, -1.0
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # As DeepSpeed does: a norm that is not finite is -1, and nothing is stepped.
        self.norm = float(norm) if norm.isfinite() else -1.0
        if self.norm >= 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
            self.optimizer.step()


def main(steps: int = 200) -> QuantileClip:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    engine = Engine(model)
    clipper = QuantileClip(model, quantile=0.9, history_length=100, scope="global")
    for step in range(steps):
        x = torch.randn(16, 8) * (float("nan") if step == 50 else 1.0)
        engine.clip_grad = min(clipper.threshold().item(), 1e9)  # before: the limit
        engine.step((model(x) - x.sum(1, keepdim=True)).square().mean())
        clipper.observe(engine.norm)  # after: the norm; -1 is a non-finite step
    return clipper


if __name__ == "__main__":
    for name, value in main().metrics().items():
        print(f"{name:22} {value:10.4f}")
