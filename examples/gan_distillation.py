"""A plain pix2pix script that trains a small student as well; its lines are marked `# student`.

    python examples/gan_distillation.py

Edge maps become patches of the photos inside scikit-image. Generator, discriminator and their
training are the script's own; DCD and CRD let a generator of a third of the filters imitate the
large one while that one learns. Nothing of tenfold's engine is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.data import TranslationData, create_translation
from tenfold.methods import CRD, DCD  # student

EPOCHS = 4


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.InstanceNorm2d(outputs), nn.ReLU()
    )


class Generator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = block(3, width)
        self.down = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 4 * width, 2))
        self.middle = nn.Sequential(block(4 * width, 4 * width), block(4 * width, 4 * width))
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), block(4 * width, 2 * width),
            nn.Upsample(scale_factor=2), block(2 * width, width),
        )  # fmt: skip
        self.last = nn.Sequential(nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.middle(self.down(self.first(x)))))


class Discriminator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.InstanceNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.InstanceNorm2d(4 * width),
            nn.LeakyReLU(0.2), nn.Conv2d(4 * width, 1, 4, 1, 1),
        )  # fmt: skip

    def forward(self, source: Tensor, image: Tensor) -> Tensor:
        return self.model(torch.cat([source, image], 1))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))


@torch.no_grad()
def distance(generator: nn.Module, data: TranslationData) -> float:
    """Return the mean L1 distance of held-out images to their targets."""
    batch = next(iter(data.test_loader(batch_size=data.test_size)))
    made = generator(data.normalize(batch["source"]))
    return (made - data.normalize(batch["target"])).abs().mean().item()


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    data = create_translation({"name": "edges2photo", "limit": 48})
    loader = data.train_loader(batch_size=4, seed=0)
    generator, discriminator = Generator(12), Discriminator(12)
    making, judging = adam(list(generator.parameters())), adam(list(discriminator.parameters()))
    real_or_made, l1 = nn.BCEWithLogitsLoss(), nn.L1Loss()

    steps = EPOCHS * len(loader)
    dcd, crd = DCD(taps=["down", "middle"]), CRD(weight=5)  # student
    dcd.use_network("teacher", generator)  # student
    dcd.use_network("discriminator", discriminator)  # student
    student = crd.attach(dcd.attach(Generator(4), total_steps=steps), total_steps=steps)  # student
    imitating = adam(dcd.parameters_for(student))  # student
    before = distance(student, data)

    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            source, target = data.normalize(batch["source"]), data.normalize(batch["target"])
            made = generator(source)

            judging.zero_grad()
            real, fake = discriminator(source, target), discriminator(source, made.detach())
            loss = real_or_made(real, torch.ones_like(real))
            (loss + real_or_made(fake, torch.zeros_like(fake))).backward()
            judging.step()

            discriminator.requires_grad_(False)
            making.zero_grad()
            fake = discriminator(source, made)
            loss = real_or_made(fake, torch.ones_like(fake)) + 100 * l1(made, target)
            loss.backward()
            making.step()

            image, loss = dcd.loss(source)  # student
            loss = loss + crd.loss(image, made) + 100 * l1(image, target)  # student
            loss = loss + real_or_made(
                discriminator(source, image), torch.ones_like(fake)
            )  # student
            loss.backward()  # student
            imitating.step(), imitating.zero_grad(), dcd.step(), crd.step()  # student
            discriminator.requires_grad_(True)
        print(f"epoch {epoch + 1}: the student's loss {loss.item():.2f}")

    student = crd.finalize(dcd.finalize(student))  # student
    after = distance(student, data)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (generator, student)]
    print(f"generator of {sizes[0]:,} parameters: L1 {distance(generator, data):.3f}")
    print(f"student of {sizes[1]:,}: L1 {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
