"""Training of the network that predicts noise."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from moectl import __version__
from moectl.diffusion.data import Data, load
from moectl.diffusion.losses import diffusion_loss, loss_weights
from moectl.diffusion.measures import by_step, measure
from moectl.diffusion.model import UNet, build
from moectl.diffusion.pictures import write_samples
from moectl.diffusion.process import GaussianDiffusion
from moectl.diffusion.report import report
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.usage import Usage
from moectl.diffusion.variants import arguments_of
from moectl.engine.loop import Loop, Step
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.run import Run
from moectl.engine.seeding import key, seed_all
from moectl.engine.settings import dump

log = logging.getLogger(__name__)

Tensors = list[Tensor] | tuple[Tensor, ...]

_HELD_OUT = 1000  # images that the loss is measured on after an epoch


def train(settings: DiffusionSettings, run: Run[DiffusionSettings]) -> None:
    """Train the network, measure it on held-out images, and write samples and the report.

    Args:
        settings: of the run.
        run: the run.
    """
    data = load(settings.data)
    run.keep_to(data.facts)
    arguments = arguments_of(settings, len(data.class_names))
    seed_all(settings.train.seed, "init")
    model = build(arguments)
    diffusion = GaussianDiffusion(**_process(settings)).to(run.device)
    averaged = average(model, settings.train.ema_decay, run.device)
    world = run.accelerator.num_processes
    shape = (len(model.blocks), model.num_experts)
    usage = Usage(shape, model.k_active, world, settings.train.accumulate).to(run.device)
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = build_optimizer(settings.optim, trained, fused=True)
    schedule = build_schedule(settings.schedule, settings.optim.lr, settings.train.epochs)
    # Without patience nothing asks for the best epoch, whose checkpoints would only be kept.
    monitor = "val/score" if settings.train.patience else ""
    loop = run.loop(model, data.train, optimizer, schedule, monitor)
    loop.track(ema=averaged, usage=usage)
    weights = loss_weights(
        diffusion.alphas, settings.loss.weight, diffusion.prediction, settings.loss.gamma
    )
    balance = settings.loss.model_dump(include={"balance", "lambda_load"})
    _introduce(run, model, data)
    loop.rehearse(lambda: _measure(loop, averaged, diffusion, data, limit=1))

    for step in loop:
        images, labels = step.batch
        t, noise, labels = draw(settings, step, images, labels, model)
        x = diffusion.add_noise(images, t, noise)
        predicted, logits = loop.model(x, t, labels)
        target = diffusion.target(images, t, noise)
        shares = usage.add(logits, ends_update=step.ends_update)
        loss, dm_loss, load_loss = diffusion_loss(
            predicted, target, logits, shares, weights=weights[t], **balance
        )
        error = diffusion.noise(x, t, predicted.detach().float()) - noise
        step.update(loss, dm_loss=dm_loss, load_loss=load_loss, noise_loss=error.square().mean())
        if step.ends_update:
            averaged.update_parameters(model)
            _say(loop, step)
        if step.ends_epoch:
            if logits:
                _report_load(loop, step, usage, model)
            step.score(_measure(loop, averaged, diffusion, data))
            _keep(loop, averaged, diffusion, data, arguments, step.epoch + 1)

    _finish(loop)


def _process(settings: DiffusionSettings) -> dict[str, Any]:
    return settings.process.model_dump()


def average(model: UNet, decay: float, device: torch.device) -> AveragedModel:
    """Return a copy of a network that follows it: slowly, but not in the first updates.

    Args:
        model: the network.
        decay: of the average after many updates; after n it is at most (1 + n) / (10 + n). With 0
            the copy is the network as it is.
        device: of the copy.
    """

    def follow(averages: Tensors, current: Tensors, _: Tensor | int) -> None:
        done = int(averaged.n_averaged)  # on the CPU, unlike what is given: no device must wait
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + done) / (10 + done)))

    averaged = AveragedModel(model, multi_avg_fn=follow)
    averaged.module.to(device)
    return averaged


def _bare(averaged: AveragedModel) -> UNet:
    """Return the averaged network, in evaluation mode."""
    model = averaged.module.eval()
    assert isinstance(model, UNet)
    return model


def draw(
    settings: DiffusionSettings, step: Step, images: Tensor, labels: Tensor, model: UNet
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw step and noise of each image, and hide some of the classes.

    The whole batch is drawn in every process: the numbers do not depend on how it is dealt out.

    Returns:
        (B,) steps, noise of the size of the images, and (B,) classes.
    """
    device = images.device
    generator = torch.Generator(device).manual_seed(key(settings.train.seed, "noise", step.index))
    t = torch.randint(settings.process.steps, (step.size,), generator=generator, device=device)
    hidden = torch.rand(step.size, generator=generator, device=device) < settings.loss.p_uncond
    noise = torch.randn(step.size, *images.shape[1:], generator=generator, device=device)
    slots = step.slots.to(device, non_blocking=True)
    return t[slots], noise[slots], labels.masked_fill(hidden[slots], model.num_classes)


def _introduce(run: Run[Any], model: UNet, data: Data) -> None:
    settings = run.settings.model
    switches = ", ".join(
        f"{name} {'on' if on else 'off'}"
        for name, on in (
            ("MoE", settings.moe),
            ("Freq", settings.freq),
            ("DS-Conv", settings.dsconv),
        )
    )
    count = sum(weights.numel() for weights in model.parameters())
    log.info(
        "%s: %s; %s; %.2fM parameters; %d images of %d classes, %d held out",
        run.folder, switches, run.device, count / 1e6, len(data.train), len(data.class_names),
        len(data.test),
    )  # fmt: skip
    process = run.settings.process
    if process.schedule == "cosine" and process.prediction == "epsilon":
        log.warning(
            "process.schedule = cosine with process.prediction = epsilon: at the last steps noise"
            " is all there is, and samplers that begin there magnify its error; v_prediction does"
            " not suffer from that"
        )


def _say(loop: Loop, step: Step) -> None:
    """Write the means so far, in the words of the original."""
    if step.ends_epoch:
        means = loop.means("epoch")
        place, words = f"[Epoch {step.epoch + 1}/{loop.settings.epochs}]", "Avg "
    elif (every := loop.settings.log_every) and (step.index + 1) % every == 0:
        means = loop.means("window")
        place, words = f"[Epoch {step.epoch + 1}, Step {step.index + 1}]", ""
    else:
        return
    log.info(
        "%s %sLoss: %.4f, %sDM Loss: %.4f, %sLoad Loss: %.4f",
        place, words, means["loss"], words, means["dm_loss"], words, means["load_loss"],
    )  # fmt: skip


def _report_load(loop: Loop, step: Step, usage: Usage, model: UNet) -> None:
    found, epoch, epochs = usage.summary(model.blocks), step.epoch + 1, loop.settings.epochs
    step.log(**found)
    most = model.num_experts / model.k_active
    asked = epochs >= 10 and epoch in (epochs // 10, epochs)
    if found["load/dead"]:
        log.warning("experts without an image in epoch %d: %d", epoch, found["load/dead"])
    elif asked and 0.99 * most < found["load/largest"] > 1:
        log.warning(
            "one expert of a block gets every image in epoch %d (load/largest of metrics.csv);"
            " a larger --lambda-load balances them",
            epoch,
        )


def _measure(
    loop: Loop, averaged: AveragedModel, diffusion: GaussianDiffusion, data: Data, limit: int = 0
) -> dict[str, float | None]:
    """Measure the averaged weights on held-out images, at all steps and in tenths of them."""
    model = _bare(averaged)
    if loop.accelerator.num_processes > 1:  # running averages of batch norm are each process's own
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    held = measure(
        model,
        diffusion,
        data.test,
        loop.accelerator,
        batch_size=max(loop.settings.batch_size // loop.settings.accumulate, 32),
        limit=limit or _HELD_OUT,
    )
    loss, spans = float(held.errors.mean()), by_step(held, diffusion.steps)
    return {
        "val/loss": loss,
        **({loop.monitor: -loss} if loop.monitor else {}),  # the largest is best
        **{f"loss_by_step/{number}": value for number, value in enumerate(spans)},
    }


def _keep(
    loop: Loop,
    averaged: AveragedModel,
    diffusion: GaussianDiffusion,
    data: Data,
    arguments: dict[str, Any],
    epoch: int,
) -> None:
    """Write weights and pictures of samples, where an epoch is due."""
    run, settings = loop.run, loop.run.settings
    last = epoch == settings.train.epochs or loop.patience_ends
    every = settings.train.sample_every
    if run.is_main and every and (last or epoch % every == 0):
        path = run.folder / "samples" / f"epoch_{epoch}.png"
        classes = len(data.class_names)
        model = _bare(averaged)
        write_samples(path, model, diffusion, run.accelerator, classes, settings)
    if not last and epoch % settings.train.save_every:
        return
    facts = {
        "model": "UNet",
        "arguments": arguments,
        "process": _process(settings),
        "class_names": data.class_names,
        **data.facts,
        "moectl": __version__,
    }
    payload = {
        "epoch": epoch - 1,  # as the original counts
        "model_state_dict": loop.module.state_dict(),
        "optimizer_state_dict": loop.optimizer.state_dict(),
        "loss": loop.means("epoch")["loss"],
        "config": dump(settings),
        "format_version": 1,
    }
    if settings.train.ema_decay:
        payload["ema_state_dict"] = averaged.module.state_dict()
    name = f"checkpoint_epoch_{epoch}.pth"
    run.save_weights(name, payload, facts, epoch=epoch)
    log.info("Saved checkpoint: %s", run.folder / name)


def _finish(loop: Loop) -> None:
    run = loop.run
    rows = [row for row in loop.metrics.rows() if row.get("val/loss")]
    last = {name: float(rows[-1][name]) for name in ("train/loss", "train/dm_loss", "val/loss")}
    run.note(
        scores={"last": {"epoch": loop.epoch, **last}},
        wall_seconds=round(run.elapsed_seconds, 3),
    )
    if run.is_main:
        report(run.folder)
    log.info("held-out loss %.4f after %d epochs", last["val/loss"], loop.epoch)
