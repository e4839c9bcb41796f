"""What stands in for ImageNet weights where a backbone starts from random ones: it learns from the training images
alone, before the detector and its regularizer, to say what each cell of its feature map shows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkey.data import epoch_order
from dropkey.detection.scenes import SceneBatch, Split, batched

BATCH, LR = 32, 2e-3


def warm_up(backbone: nn.Module, split: Split, normalize, labels: int, steps: int, seed: int) -> float:
    """Trains `backbone` in place, on the device it is on; returns the share of cells with an object that were right
    over the last tenth of the steps. A function of its arguments and of torch's generator."""
    device = next(backbone.parameters()).device
    head = nn.Conv2d(backbone.num_channels, labels + 1, 1).to(device)
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=max(steps, 2))
    size, right, cells = min(BATCH, len(split)), 0, 0
    for step in range(steps):
        epoch, place = divmod(step, len(split) // size)
        ids = epoch_order(len(split), seed, epoch)[place * size : (place + 1) * size]
        batch = batched(split, ids, lambda sample, _: sample, normalize, device)
        scores = head(backbone(batch.images))
        wanted = shown(batch, scores.shape[-2:], labels)
        F.cross_entropy(scores, wanted).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= 0.9 * steps:
            objects = wanted < labels
            right, cells = right + (scores.argmax(1) == wanted)[objects].sum().item(), cells + objects.sum().item()
    return right / max(cells, 1)


def shown(batch: SceneBatch, grid: tuple[int, int], nothing: int) -> Tensor:
    """int64 B h w: the label of the last box that covers a cell's centre, or `nothing`. For images without padding."""
    found = torch.full((len(batch), *grid), nothing, device=batch.images.device)
    rows, columns = ((torch.arange(count, device=found.device) + 0.5) / count for count in grid)
    for cells, boxes, labels in zip(found, batch.boxes, batch.labels, strict=True):
        for (x, y, width, height), label in zip(boxes, labels, strict=True):
            cells[((rows - y).abs() < height / 2)[:, None] & ((columns - x).abs() < width / 2)] = label
    return found
