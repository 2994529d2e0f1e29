"Figures of what a method looks at: of files, batches and tensors."
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from PIL import Image

from fd_focus.draw import VEIL, _wrapped, plot_attention, plot_focus, plot_regions, plot_zooms, spotlight


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
    pictures, look = learn.see(items)
    look = replace(look, boxes=look.boxes.repeat(1, 2, 1))          # eight
    for k in (2, 6): assert len(plot_regions(pictures, look, k=k).axes[0].patches) == k
    assert len(plot_focus(learn, items).axes) == 2


def test_attention_has_a_scale(learn):
    items = list(learn.dls.valid_ds.items)[:1]
    attention = learn.see(items)[1].attention[0]
    bar = next(ax for ax in plot_attention(learn, items).axes if ax.get_label() == "<colorbar>")
    assert np.allclose(bar.get_ylim(), (attention.min(), attention.max()), atol=1e-5)


def test_the_veil_keeps_the_colours_of_what_was_attended_to():
    picture = Image.new("RGB", (96, 96), (200, 40, 90))
    attention = torch.zeros(6, 6)
    attention[1, 4] = 3.
    lit = np.asarray(spotlight(picture, attention)).astype(int)
    assert np.abs(lit[24, 72] - (200, 40, 90)).max() <= 12                 # the middle of its cell
    assert np.abs(lit[90, 5] - VEIL).max() < np.abs(np.array((200, 40, 90)) - VEIL).max() / 4
    for odd in (torch.zeros(3, 3), torch.full((3, 3), torch.nan), torch.ones(1, 1), torch.tensor([[1., torch.inf]])):
        assert spotlight(picture, odd).size == (96, 96)
    assert spotlight(picture.resize((1, 1)), attention).size == (1, 1)


def test_long_titles_wrap_and_keep_their_end(learn):
    items, name = list(learn.dls.valid_ds.items)[:2], "044.Bentley_Continental_Flying_Spur_Sedan_200"
    for draw in (plot_regions, plot_attention, plot_focus):
        figure = draw(learn, items, titles=[name + "6", name + "7\n(is another)"])
        figure.canvas.draw()
        titles = [ax.title for ax in figure.axes if ax.get_title()]
        assert [t.get_text().replace("\n", "") for t in titles] == [name + "6", name + "7(is another)"]
        boxes = [t.get_window_extent() for t in titles]
        assert boxes[0].x1 <= boxes[1].x0 and boxes[1].x1 <= figure.bbox.x1, "titles overlap or leave the figure"
    assert _wrapped("", 2.) == "" and _wrapped("a\nb", 2.) == "a\nb"
    assert _wrapped("W" * 100, 1.).replace("\n", "") == "W" * 100


@pytest.mark.parametrize("name", ["Ba$$in", "$5 to $_10", "$^$", "a$\\frac$"])
def test_dollar_signs_are_no_formula(learn, name):
    items, names = list(learn.dls.valid_ds.items)[:2], [name, "plain"]
    figures = [draw(learn, items, titles=names) for draw in (plot_regions, plot_attention, plot_focus)]
    for figure in figures:
        figure.canvas.draw()
        assert name in [ax.get_title() for ax in figure.axes]


def test_dollar_signs_in_figures_of_a_learner(tmp_path, monkeypatch):
    from conftest import photograph

    from fd_focus.data.loaders import FocusDataLoaders
    from fd_focus.evidence import calibration
    from fd_focus.training.learner import focus_learner
    names = ["$5 to $_10", "Ba$$in", "$^$"]
    for i in range(24):
        (tmp_path / names[i % 3]).mkdir(exist_ok=True)
        photograph(i).save(tmp_path / names[i % 3] / f"{i}.png")
    dls = FocusDataLoaders.from_folder(tmp_path, .5, image_size=48, bs=4, num_workers=0)
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    truth = torch.tensor([int(y) for y in dls.valid_ds.tls[1]])
    monkeypatch.setattr(calibration, "predictions", lambda learn: (torch.eye(3)[(truth + 1) % 3], truth))
    figures = [dls.show_batch("valid"), dls.show_counts(), learn.show_results(), calibration.plot_confused(learn)]
    for figure in figures: figure.canvas.draw()
    said = [text.get_text() for text in figures[1].axes[0].get_yticklabels()]
    assert sorted(said) == sorted(names)


def test_a_figure_that_fails_loses_no_run(tmp_path):
    from fd_focus.training.run import save_figure
    file, before = tmp_path / "curves.png", plt.get_fignums()
    def broken():
        plt.figure().suptitle("$^$")
        return plt.gcf()
    def full():
        raise OSError(28, "No space left on device", str(file))
    save_figure(file, plt.figure)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.warns(RuntimeWarning, match="curves.png was not drawn .ValueError"): save_figure(file, broken)
    assert not file.exists() and plt.get_fignums() == before
    with pytest.raises(OSError, match="No space"): save_figure(file, full)


@pytest.mark.parametrize("asked,grid", [(dict(), (1, 4)), (dict(nrows=2), (2, 2)), (dict(ncols=3), (2, 3)),
                                        (dict(nrows=1, ncols=4, figsize=(7, 2)), (1, 4))])
def test_rows_columns_and_size_as_in_fastai(learn, asked, grid):
    learn.show_results(max_n=4, **asked)
    figure = plt.gcf()
    assert figure.axes[0].get_gridspec().get_geometry() == (2 * grid[0], grid[1])
    shown = learn.dls.show_batch("valid", max_n=4, **asked)
    assert shown.axes[0].get_gridspec().get_geometry() == grid
    if "figsize" in asked: assert tuple(figure.get_size_inches()) == tuple(shown.get_size_inches()) == (7, 2)
