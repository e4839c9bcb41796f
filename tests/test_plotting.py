"""Pictures are saved whole or refused in one line, and a run's curves show its own metric."""

from unittest import mock

import pytest

from dropkey import plotting
from dropkey.errors import ConfigError, StorageError
from dropkey.metrics import Metric

ERROR = Metric("mae", "absolute error", "mm", higher_is_better=False)


def figure_of():
    with plotting.style():
        figure, axes = plotting.subplots(1, 2, (4, 2))
        axes[0, 0].plot([1, 2], color=plotting.COLORS[0])
    return figure


def test_svg_is_the_same_text_every_time():
    first = plotting.save(figure_of())
    assert first == plotting.save(figure_of()) and "</svg>" in first


def test_no_name_within_svg_is_a_hash_of_places():
    """Their last digits differ between processes, unseen in the text."""
    salted = plotting.save(figure_of())
    with mock.patch.dict(plotting.STYLE, {"svg.hashsalt": "another"}):
        assert plotting.save(figure_of()) == salted


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.jpg", b"\xff\xd8"), ("a.pdf", b"%PDF")])
def test_the_suffix_gives_the_format_and_nothing_else_is_left_behind(tmp_path, name, begin):
    assert plotting.save(figure_of(), tmp_path / "new" / name) is None
    assert (tmp_path / "new" / name).read_bytes().startswith(begin)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        plotting.save(figure_of(), tmp_path / "a.bmp")


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*output="):
        plotting.save(figure_of(), tmp_path / "file" / "a.png")


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        (ERROR, "last absolute error 3.00 mm, best absolute error 2.00 mm (epoch 2)"),
        (Metric("top1", "top-1", "%"), "last top-1 30.00 %, best top-1 40.00 % (epoch 1)"),
    ],
)
def test_curves_show_the_best_epoch_of_the_metric(tmp_path, metric, title):
    values = {"mae": (4.0, 2.0, 3.0), "top1": (40.0, 20.0, 30.0)}[metric.key]
    records = [{"kind": "step", "loss": 1.0}]
    records += [
        {"kind": "epoch", "epoch": epoch, "train_loss": 1 / epoch, f"eval_{metric.key}": value}
        for epoch, value in enumerate(values, start=1)
    ]
    plotting.curves(records, "a run", tmp_path / "curves.svg", "validation", metric)
    text = (tmp_path / "curves.svg").read_text()
    assert title in text and f"{metric.label} on the validation split ({metric.unit})" in text


def test_curves_of_a_run_that_was_never_evaluated(tmp_path):
    plotting.curves([{"kind": "epoch", "epoch": 1, "train_loss": 2.0}], "a run", tmp_path / "a.png", "test", ERROR)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("count", [1, 4, 10, 11, 40])
def test_no_colour_is_repeated(count):
    looks = plotting.looks(count)
    assert len(looks) == len({str(look["color"]) for look in looks}) == count


LONG = "dropkey_cross 0.3 decreasing (window full), t2t_vit_small_image, max_train_samples 1000"


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], [LONG + str(i) for i in range(12)], [LONG * 3, "a"]])
def test_a_legend_lies_within_the_figure_and_leaves_the_axes_their_height(labels):
    with plotting.style():
        figure, axes = plotting.subplots(1, 1, (4.8, 3.2))
        for label in labels:
            axes[0, 0].plot([0, 1], label=label)
        plotting.legend_below(figure, axes.flat)
        figure.draw_without_rendering()
    frame, legend, panel = figure.bbox, figure.legends[0].get_window_extent(), axes[0, 0].get_window_extent()
    assert frame.x0 <= legend.x0 and legend.x1 <= frame.x1 and frame.y0 <= legend.y0
    assert legend.y1 <= panel.y0 and panel.height > 2 * figure.dpi
    assert [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()] == labels


def test_panels_have_one_scale_and_each_column_has_numbers_below():
    figure = plotting.new_figure((8, 4))
    axes = plotting.panels(figure, 6)
    axes[0].plot([0, 5], [0, 7])
    assert len({axis.get_ylim() for axis in axes}) == 1 and len(figure.get_axes()) == 6
    assert [axis.xaxis.get_tick_params()["labelbottom"] for axis in axes] == [False, False, True, True, True, True]
