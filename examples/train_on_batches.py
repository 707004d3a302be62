"""Way (a) into a training loop: restain whole batches after collation, on the device.

usage: python examples/train_on_batches.py [--data BRCA_M2C] [--loop plain|lightning] [--epochs 4]
       [--seeds 1]
Trains a small classifier without and with restaining and prints its accuracy on tiles of other
laboratories (examples/tumour_tiles.py). Restaining is the three marked lines.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tumour_tiles import Task, accuracy, build_classifier, load_task, print_accuracy

import cytosyn_aug as ca
from cytosyn_aug.demo import load_laboratories


def make_transform(device: str) -> ca.StainTransfer:
    """Return a transform to the three laboratories of the sample tiles, stronger by the epoch."""
    generator = ca.TileGenerator.from_pretrained(device=device)  # (1) on the training device
    references = [
        ca.StainReference.fit(generator, tiles, laboratory=name)
        for name, tiles in load_laboratories().items()
    ]
    return ca.StainTransfer(generator, references, p=0.5, strength=ca.Ramp(0.5, 1.0, 3))  # (2)


def train_plain(
    task: Task, transform: ca.StainTransfer | None, epochs: int, device: str, seed: int
) -> nn.Module:
    """Train in a loop of your own."""
    torch.manual_seed(seed)
    classifier = build_classifier().to(device)
    optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3)
    for epoch in range(epochs):
        if transform is not None:
            transform.set_epoch(epoch)
        for images, labels in make_loader(task):
            images, labels = images.to(device), labels.to(device)
            if transform is not None:
                images = transform(images)  # (3) uint8 in, uint8 out; half of the tiles changed
            loss = nn.functional.cross_entropy(classifier(images / 255), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return classifier.cpu()


def train_lightning(
    task: Task, transform: ca.StainTransfer | None, epochs: int, device: str, seed: int
) -> nn.Module:
    """Train with Lightning, which moves a batch to the device and then hands it over."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = build_classifier()

        def on_train_epoch_start(self) -> None:
            if transform is not None:
                transform.set_epoch(self.current_epoch)

        def on_after_batch_transfer(
            self, batch: tuple[Tensor, Tensor], dataloader_idx: int
        ) -> tuple[Tensor, Tensor]:
            images, labels = batch
            if transform is not None and self.trainer.training:
                images = transform(images)  # (3)
            return images, labels

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self.network(images / 255), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 2e-3)

    torch.manual_seed(seed)
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto" if device != "cpu" else "cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, make_loader(task))
    return module.network.cpu()


def make_loader(task: Task) -> DataLoader:
    """Return shuffled batches of the tiles that are trained on."""
    kept = ~task.is_held_out
    dataset = TensorDataset(task.images[kept], task.labels[kept])
    return DataLoader(dataset, batch_size=16, shuffle=True)


def main() -> None:
    """Train twice and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of BRCA-M2C; default: sample tiles")
    parser.add_argument("--loop", choices=("plain", "lightning"), default="plain")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trained N times")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    task = load_task(args.data)
    train = train_plain if args.loop == "plain" else train_lightning
    print(f"{int((~task.is_held_out).sum())} tiles to train on, {args.loop} loop")
    for name, transform in (("as they are", None), ("restained", make_transform(args.device))):
        began = time.perf_counter()
        found = [
            accuracy(train(task, transform, args.epochs, args.device, seed), task)
            for seed in range(args.seeds)
        ]
        print_accuracy(name, found, time.perf_counter() - began)


if __name__ == "__main__":
    main()
