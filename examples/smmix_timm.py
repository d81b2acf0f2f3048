"""A timm training script with SMMix in CutMix's place; the lines it takes are marked `# SMMix`.

    python examples/smmix_timm.py

A small vision transformer learns the handwritten digits inside scikit-learn. The script is timm's
and PyTorch's own; nothing of tenfold's engine is used.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, TensorDataset

from tenfold.methods import SMMix  # SMMix

EPOCHS = 15


def main() -> float:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(
        (images - 0.3) / 0.38, torch.tensor(targets), test_size=0.2, random_state=0
    )
    data = TensorDataset(x_train, y_train)
    loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)

    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=8, patch_size=2,
        embed_dim=48, depth=3, num_heads=3,
    ).to(device)  # fmt: skip
    mixer = SMMix()  # SMMix
    model = mixer.attach(model, total_steps=EPOCHS * len(loader))  # SMMix
    optimizer = create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS, warmup_t=2, warmup_lr_init=1e-4)

    for epoch in range(EPOCHS):
        model.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = mixer.loss(model, x, y)  # SMMix
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mixer.step()  # SMMix
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model = mixer.finalize(model)  # SMMix
    with torch.inference_mode():
        answers = model.eval()(x_test.to(device)).argmax(dim=1).cpu()
    accuracy = (answers == y_test).float().mean().item()
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
