"Figures of what a method looks at: of files, batches and tensors."
import matplotlib.pyplot as plt
import numpy as np
import pytest

from fd_focus.draw import plot_attention, plot_focus, plot_regions, plot_zooms


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("draw,per_picture", [(plot_regions, 1), (plot_attention, 1), (plot_zooms, 5)])
def test_figures_of_files_batches_and_tensors(learn, tmp_path, draw, per_picture):
    items = list(learn.dls.valid_ds.items)[:2]
    pictures, focus = learn.see(items)
    x = learn.dls.test_dl(items).one_batch()[0]
    file = tmp_path / "bird.png"
    from PIL import Image
    Image.fromarray((pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    for arguments, n in (((pictures, focus), 2), ((learn, items), 2), ((learn, x), 2), ((learn, file), 1),
                         ((learn, [file, str(file)]), 2)):
        figure = draw(*arguments)
        assert len([ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]) == n * per_picture
    figure, axes = plt.subplots(1, 2 * per_picture)
    assert draw(learn, items, axes=axes) is figure
    with pytest.raises(ValueError, match=f"{2 * per_picture} axes given, {3 * per_picture} needed"):
        draw(learn, list(learn.dls.valid_ds.items)[:3], axes=axes)


def test_regions_have_the_colours_of_the_paper(learn):
    items = list(learn.dls.valid_ds.items)[:1]
    boxes = learn.see(items)[1].boxes[0]
    patches = plot_regions(learn, items).axes[0].patches[::-1]          # the best lies on top
    colours = [plt.matplotlib.colors.to_hex(p.get_edgecolor()) for p in patches]
    assert colours == ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    assert [p.get_bbox().extents.tolist() for p in patches] == boxes[:4].tolist()
    for k in (2, 6): assert len(plot_regions(learn, items, k=k).axes[0].patches) == k
    assert len(plot_focus(learn, items).axes) == 2


def test_attention_has_a_scale(learn):
    items = list(learn.dls.valid_ds.items)[:1]
    attention = learn.see(items)[1].attention[0]
    bar = next(ax for ax in plot_attention(learn, items).axes if ax.get_label() == "<colorbar>")
    assert np.allclose(bar.get_ylim(), (attention.min(), attention.max()), atol=1e-5)
