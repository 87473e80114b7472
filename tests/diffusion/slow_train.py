"""Training of the network in plain torch, an update after the other."""

from typing import Any

import torch
from torch import Tensor, nn

from moectl.diffusion.model import UNet

ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()


def balance(logits: list[Tensor], kind: str) -> Tensor:
    found = torch.tensor(0.0)
    for one in logits:
        chances = one.softmax(1)
        if kind == "variance":
            found = found + chances.var(1).mean() / len(logits)
        elif kind == "switch":
            chosen = one.topk(2).indices.flatten().tolist()
            shares = torch.tensor([chosen.count(expert) / len(chosen) for expert in range(3)])
            found = found + 3 * (shares * chances.mean(0)).sum() / len(logits)
    return found


def losses(model: UNet, seen: Any, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """Whole loss, loss of the noise and balance of one batch."""
    images, t, noise, labels = seen
    alpha = ALPHAS[t].view(-1, 1, 1, 1)
    predicted, logits = model(alpha.sqrt() * images + (1 - alpha).sqrt() * noise, t, labels)
    target, weight = noise, torch.ones(len(t))
    if settings.get("process__prediction"):
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * images
    if settings.get("loss__weight"):
        ratio = ALPHAS[t] / (1 - ALPHAS[t])
        weight = ratio.clamp(max=5) / ratio
    errors = (predicted - target).square().flatten(1).mean(1)
    dm = (weight * errors).mean()
    load = balance(logits, settings.get("loss__balance", "switch"))
    return dm + settings.get("loss__lambda_load", 0.01) * load, dm, load


def trained(model: UNet, seen: list[Any], settings: dict[str, Any]) -> list[float]:
    """Train in plain torch; return the means of the losses."""
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0)
    if settings.get("optim__name") == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = []
    for batch in seen:
        terms = losses(model, batch, settings)
        optimizer.zero_grad()
        torch.autograd.backward(terms[0])
        if clip := settings.get("optim__clip_norm", 1.0):
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        found.append(torch.stack(terms).detach())
    means: list[float] = torch.stack(found).mean(0).tolist()
    return means
