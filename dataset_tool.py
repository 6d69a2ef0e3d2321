"""Converts a folder or ZIP of images into a data set that train.py reads."""

import collections
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib.cli import user_errors

if TYPE_CHECKING:  # imported late: help is instant
    from training.conversion import Outcome, Source

_MAX_CLASS_LINES = 40


def _parse_resolution(ctx, param, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)[x,]([1-9]\d*)", value)
    if not match:
        raise click.BadParameter(f"{value}: must be WxH or W,H, such as 64x64")
    return int(match[1]), int(match[2])


def _parse_classes(ctx, param, value: str | None) -> list[int] | None:
    if value is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise click.BadParameter(f"{value}: must be class numbers such as 6,1,3")
    classes = [int(number) for number in value.split(",")]
    if len(set(classes)) != len(classes):
        raise click.BadParameter(f"{value}: a class is listed twice")
    return classes


def _parse_color(ctx, param, value: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        color = ImageColor.getrgb(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if len(color) != 3:
        raise click.BadParameter(f"{value}: must be opaque")
    return color


def _check_geometry(transform: str | None, size: tuple[int, int] | None) -> None:
    if size is None:
        if transform is not None:
            raise click.UsageError(f"--transform={transform}: needs --resolution=WxH")
        return
    width, height = size
    if transform == "center-crop-wide" and height > width:
        raise click.UsageError(f"--resolution={width}x{height}: must be wide, W >= H, "
                               "for --transform=center-crop-wide")
    if transform != "center-crop-wide" and width != height:
        raise click.UsageError(f"--resolution={width}x{height}: must be square, W = H, "
                               "except for --transform=center-crop-wide")


def _summarise(dest: str, source: "Source", outcome: "Outcome", classes: list[int] | None) -> None:
    """Prints what was written, and what a user may not expect."""
    mode, width, height = outcome.kind
    label = outcome.entries[0][1]
    counts = collections.Counter(label for _, label in outcome.entries if type(label) is int)
    labels = f"label vectors of {len(label)}" if isinstance(label, list) else \
        f"{len(counts)} classes" if counts else "no labels"
    click.echo(f"{dest}: {len(outcome.entries)} images, {width}x{height}, "
               f"{'1 channel' if mode == 'L' else '3 channels'}, {labels}")
    if len(counts) > _MAX_CLASS_LINES:
        click.echo(f"  {min(counts.values())} to {max(counts.values())} images a class")
    else:
        for label, count in sorted(counts.items()):
            click.echo(f"  class {label}{_origin(label, source, classes)}: {count}")
    if outcome.too_small:
        click.echo(f"Left out: {len(outcome.too_small)} images smaller than --resolution, "
                   f"the first {outcome.too_small[0]}")
    if outcome.cmyk:
        click.echo(f"Warning: {len(outcome.cmyk)} CMYK images were converted without a colour "
                   f"profile, the first {outcome.cmyk[0]}", err=True)


def _origin(label: int, source: "Source", classes: list[int] | None) -> str:
    """Returns what a class was in the source, in brackets, where that is another name."""
    old = classes[label] if classes else label
    if source.class_names:
        return f" ({source.class_names[old] or 'top folder'})"
    return f" (was {old})" if classes else ""


def _tell_unused(source: "Source", max_images: int | None, num_selected: int) -> None:
    """Prints how many files of the source were not looked at, and why."""
    num_used = len(source.names[:max_images])
    for number, reason in [(source.num_others, "files that aren't images"),
                           (len(source.names) - num_used, "images beyond --max-images"),
                           (num_used - num_selected, "images of other classes")]:
        if number:
            click.echo(f"Left out: {number} {reason}")


@click.command(context_settings={"show_default": True})
@click.option("--source",       metavar="DIR|ZIP", required=True,
              help="Images to convert")
@click.option("--dest",         metavar="DIR|ZIP", required=True,
              help="Data set to write; a ZIP is replaced, a folder must be empty")
@click.option("--max-images",   metavar="INT", type=click.IntRange(min=1),
              help="Use the first INT images of the source only  [default: all]")
@click.option("--transform",    type=click.Choice(["center-crop", "center-crop-wide"]),
              help="How to crop  [default: none]")
@click.option("--resolution",   metavar="WxH", callback=_parse_resolution,
              help="Size to resize to  [default: as it is]")
@click.option("--classes",      metavar="LIST", callback=_parse_classes,
              help="Keep these classes only and number them from 0 in this order, such as 6,1,3")
@click.option("--background",   metavar="COLOR", default="white", callback=_parse_color,
              help="What shows through transparent images: a name or #rrggbb")
@click.option("--first-frame",  is_flag=True,
              help="Take the first frame of animations instead of refusing them")
@click.option("--workers",      metavar="INT", type=click.IntRange(min=1),
              help="Processes that convert  [default: one a core]")
def main(source: str, dest: str, max_images: int | None, transform: str | None,
         resolution: tuple[int, int] | None, classes: list[int] | None,
         background: tuple[int, int, int], first_frame: bool, workers: int | None) -> None:
    """Converts a folder or ZIP of images into a data set for train.py.

    Labels come from dataset.json, {"labels": [["NAME", 6], ...]} with class numbers or vectors,
    or else from the folders at the top of --source DIR, numbered in the order of their names.

    Without --transform, --resolution ignores the aspect. center-crop takes the central square;
    center-crop-wide crops rows to W:H, puts them on a black WxW square, and leaves out images
    smaller than that. Both make gray images RGB.

    Images are turned as their EXIF data says, palettes and CMYK become RGB, transparency shows
    --background, and of 16 bits the upper 8 are kept. All images must come out square, of one
    size, and gray or RGB throughout.
    """
    _check_geometry(transform, resolution)
    workers = workers or len(os.sched_getaffinity(0))
    with user_errors():
        from training.conversion import (
            Settings,
            convert_all,
            open_dest,
            open_source,
            select_images,
        )
        settings = Settings(transform, resolution, background, first_frame)
        if os.path.exists(dest) and os.path.exists(source) and os.path.samefile(source, dest):
            raise ValueError(f"--dest={dest}: is the source itself")
        with open_source(Path(source)) as images:
            names, labels = select_images(images, max_images, classes)
            with open_dest(Path(dest)) as write:
                outcome = convert_all(images, names, labels, settings, write, workers)
            _summarise(dest, images, outcome, classes)
            _tell_unused(images, max_images, len(names))


if __name__ == "__main__":
    main()
