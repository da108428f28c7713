"""A picture of RazorAttention's calibration: layers down, KV heads across, a panel per score, retrieval heads framed."""

from __future__ import annotations

from pathlib import Path

from kvloom.engine.calibration import HeadClasses, RazorCalibration


def draw(path: Path, calibration: RazorCalibration, classes: HeadClasses) -> None:
    """Write the PNG. Framed in a panel: the retrieval heads, whichever score chose them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    layers, heads = calibration.layers, calibration.kv_heads
    size = (2.4 + 2 * min(6.0, 0.9 + 0.35 * heads), 1.8 + min(14.0, 0.22 * layers))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, name, scores in zip(axes, ("induction", "echo"), (calibration.induction, calibration.echo)):
        norm = PowerNorm(0.5, vmin=0, vmax=1)  # most scores are small: what is a hundredth should be seen
        image = axis.imshow(scores, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        frames = [Rectangle((head - 0.46, layer - 0.44), 0.92, 0.88) for layer, head in classes.heads]
        axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#ff5a36", linewidth=1.4))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("KV head", fontsize=9)
        axis.set_xticks(range(0, heads, max(1, heads // 8)))
        axis.set_yticks(range(0, layers, max(1, layers // 16)))
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("layer", fontsize=9)
    title = f"{calibration.model}\n{classes.count} retrieval heads of {layers * heads} (framed)"
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="mean attention", shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
