"""Converts images into a data set that train.py reads; verifies, shows and splits data sets.

Its commands also list and empty the cache folder.
"""

import collections
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib import console
from dnnlib.cli import (
    HELP_NAMES,
    Range,
    Window,
    cache_dir_option,
    run,
    two_numbers,
    user_errors,
    verbosity_options,
)
from dnnlib.util import counted

if TYPE_CHECKING:  # imported late at run time, so that help is instant
    from images.conversion import Outcome
    from images.image_files import ImageFormat
    from images.scaling import Moments, Scaling
    from images.sources import Source
    from images.splitting import Split

_MAX_CLASS_LINES = 40
_MAX_LISTED = 50  # damaged images to list
_MAX_KINDS = 8  # extensions of other files to list


def _parse_resolution(ctx, param, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:[x,]([1-9]\d*))?", value)
    if not match:
        raise click.BadParameter(f"{value}: must be WxH, such as 64x48, or the side of a square")
    return int(match[1]), int(match[2] or match[1])


def _parse_classes(ctx, param, value: str | None) -> list[int] | None:
    if value is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise click.BadParameter(f"{value}: must be class numbers such as 6,1,3")
    classes = [int(number) for number in value.split(",")]
    if len(set(classes)) != len(classes):
        raise click.BadParameter(f"{value}: a class is listed twice")
    return classes


def _parse_columns(ctx, param, value: str | None) -> tuple[str, ...] | None:
    """Returns names of columns, or () for 'none'."""
    if value in (None, "none"):
        return None if value is None else ()
    columns = tuple(name.strip() for name in value.split(","))
    if not all(columns) or len(set(columns)) != len(columns):
        raise click.BadParameter(f"{value}: must be different column names separated by commas, "
                                 "or none")
    return columns


def _parse_labels(ctx, param, value: str | None) -> Path | None:
    if value is None:
        return None
    from images.label_tables import SUFFIXES

    if not value.lower().endswith(SUFFIXES):
        raise click.BadParameter(f"{value}: must end in {', '.join(SUFFIXES)}")
    return Path(value)


def _parse_color(ctx, param, value: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        color = ImageColor.getrgb(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if len(color) != 3:
        raise click.BadParameter(f"{value}: must be opaque")
    return color


def _parse_scale(ctx, param, value: str | None) -> str | tuple[float, float] | None:
    if value in (None, "minmax", "std"):
        return value
    low, high = two_numbers(value)
    if not -math.inf < low < high < math.inf:
        raise click.BadParameter(f"{value}: must be minmax, std, or LO,HI with LO < HI, such as "
                                 "0,65535")
    return low, high


def _parse_channels(ctx, param, value: str | None) -> str | dict[str, tuple[int, ...]] | None:
    """Returns 'rgb' or 'gray', or the channels of images and, if given, of conditions."""
    if value in (None, "rgb", "gray"):
        return value
    parts = [part.partition(":") for part in value.split(",")]
    names = [name for name, _, _ in parts]
    if sorted(names) not in (["image"], ["cond", "image"]) or not all(
            re.fullmatch(r"\d{1,5}(\+\d{1,5})*", numbers) for _, _, numbers in parts):
        raise click.BadParameter(f"{value}: must be rgb, gray, or channels of arrays such as "
                                 "cond:0,image:1 or cond:0+1,image:2 or image:1")
    picked = {name: tuple(map(int, numbers.split("+"))) for name, _, numbers in parts}
    every = [number for numbers in picked.values() for number in numbers]
    if twice := [number for number in every if every.count(number) > 1]:
        raise click.BadParameter(f"{value}: channel {twice[0]} is named twice")
    return picked


def _parse_pair(ctx, param, value: str | None) -> str | re.Pattern[str] | None:
    if value in (None, "order"):
        return value
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value}: is not a regular expression ({error})") from error
    if "|" not in value or not pattern.groups or pattern.groups % 2:
        raise click.BadParameter(f"{value}: must be order, or two alternatives with equally many "
                                 "groups, for conditions and images, such as '(.*)_QD_|(.*)_FD_'")
    return pattern


def _parse_val(ctx, param, value: str) -> int | float:
    try:
        number = int(value) if value.isdecimal() else float(value)
    except ValueError:
        number = math.nan
    if not (number >= 1 if isinstance(number, int) else 0 < number < 1):
        raise click.BadParameter(f"{value}: must be a share between 0 and 1, such as 0.1, or a "
                                 "whole number of images")
    return number


def _check_geometry(transform: str | None, size: tuple[int, int] | None) -> None:
    if size is None:
        if transform is not None:
            raise click.UsageError(f"--transform={transform}: needs --resolution=WxH")
        return
    width, height = size
    if transform == "center-crop-wide" and height > width:
        raise click.UsageError(f"--resolution={width}x{height}: must be wide, W >= H, "
                               "for --transform=center-crop-wide")
    if transform == "center-crop" and width != height:
        raise click.UsageError(f"--resolution={width}x{height}: must be square, W = H, "
                               "for --transform=center-crop")


def _summarise(dest: str, source: "Source", outcome: "Outcome", classes: list[int] | None,
               names: Sequence[str] | None, are_names_kept: bool) -> None:
    """Prints what was written, what was skipped, and anything unexpected."""
    def origin(label):
        if names:
            return f" ({_shown_name(names[label])})"
        return f" (was {classes[label]})" if classes else ""

    _print_counts(dest, outcome.num_images, outcome.format, outcome.label_dim, outcome.classes, origin)
    _tell_empty_classes(outcome.classes)
    for name, damage in outcome.damaged[:_MAX_LISTED]:
        click.echo(f"Damaged: {name}: {damage}", err=True)
    if len(outcome.damaged) > _MAX_LISTED:
        click.echo(f"... and {len(outcome.damaged) - _MAX_LISTED} more", err=True)
    if outcome.damaged:
        click.echo(f"Left out: {counted(len(outcome.damaged), 'damaged image')}")
    if outcome.scaling:
        _print_statistics(outcome.moments, outcome.scaling)
        _print_clipped(outcome)
    if outcome.conditions:
        _print_conditions(outcome.conditions.format, outcome.num_images)
        if outcome.conditions.scaling:
            _print_statistics(outcome.conditions.moments, outcome.conditions.scaling, is_data=False)
            _print_clipped(outcome.conditions)
    if outcome.too_small.count:
        click.echo(f"Left out: {counted(outcome.too_small.count, 'image')} smaller than --resolution, "
                   f"the first {outcome.too_small.first}")
    if outcome.misnamed.count:
        images = counted(outcome.misnamed.count, "image has another format than its name says",
                         "images have another format than their names say")
        click.echo(f"Note: {images}, the first {outcome.misnamed.first}")
    for images in filter(None, (outcome, outcome.conditions)):
        _tell_profiles(images)
    for fact in _facts_of(source, are_names_kept):
        click.echo(f"Note: {fact}")
    for doubt in source.doubts:
        click.echo(f"Warning: {doubt}", err=True)
    if source.note:
        click.echo(f"Warning: {source.note}", err=True)
    if outcome.cmyk.count:
        images = counted(outcome.cmyk.count, "CMYK image was", "CMYK images were")
        click.echo(f"Warning: {images} converted without a colour profile, the first "
                   f"{outcome.cmyk.first}", err=True)


def _facts_of(source: "Source", are_names_kept: bool) -> list[str]:
    """Returns notes about a source, including how its slices are ordered."""
    if not source.is_dicom:
        return list(source.facts)
    order = "their names" if are_names_kept else source.order  # data sets are read sorted by name
    return [f"{source.facts[0]}, in the order of {order}", *source.facts[1:]]


def _tell_profiles(outcome: "Outcome") -> None:
    """Prints how many images had a colour profile that was applied, or that can't be used."""
    if outcome.recolored.count:
        is_one = outcome.recolored.count == 1
        click.echo(f"Note: {counted(outcome.recolored.count, 'image')} had a colour profile other "
                   f"than sRGB and {'was' if is_one else 'were'} converted to sRGB, the first "
                   f"{outcome.recolored.first}; --icc=keep keeps pixels unchanged")
    if outcome.bad_profiles.count:
        images = counted(outcome.bad_profiles.count, "image has", "images have")
        click.echo(f"Warning: {images} a colour profile that can't be used, so pixels are kept "
                   f"unchanged, the first {outcome.bad_profiles.first}", err=True)


def _print_counts(path: str, num_images: int, image_format: "ImageFormat", label_dim: int | None,
                  classes: collections.Counter, origin: Callable[[int], str] = lambda _: "") -> None:
    """Prints the number of images, their format and their classes."""
    labels = f"label vectors of {label_dim}" if label_dim else \
        counted(len(classes), "class", "classes") if classes else "no labels"
    console.result(f"{path}: {counted(num_images, 'image')}, {_shown_format(image_format)}, {labels}")
    if len(classes) > _MAX_CLASS_LINES:
        click.echo(f"  {min(classes.values())} to {max(classes.values())} images per class")
        return
    for label, count in sorted(classes.items()):
        click.echo(f"  class {label}{origin(label)}: {count}")


def _shown_name(name: str) -> str:
    """Returns the name of a class on one line, with unprintable letters escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _shown_format(image_format: "ImageFormat") -> str:
    channels = "1 channel" if image_format.channels == 1 else f"{image_format.channels} channels"
    dtype = "" if image_format.dtype == "uint8" else f" of {image_format.dtype}"
    return f"{image_format.width}x{image_format.height}, {channels}{dtype}"


def _print_conditions(image_format: "ImageFormat", num_images: int) -> None:
    click.echo(f"  {counted(num_images, 'condition image')}, {_shown_format(image_format)}")


def _print_statistics(moments: "Moments", scaling: "Scaling", is_data: bool = True,
                      say: Callable[[str], None] = click.echo) -> None:
    """Prints each channel's mean and deviation in the network's scale, and the scale itself."""
    scaled, gains = moments.scaled(scaling), scaling
    names = {1: ("gray",), 3: ("red", "green", "blue")}.get(len(scaled.mean), ())
    for i, (mean, std) in enumerate(zip(scaled.mean, scaled.std, strict=True)):
        name = names[i] if names and scaling.is_8bit else f"channel {i}"
        one = i if len(gains.center) > 1 else 0
        text = "" if scaling.is_8bit else \
            f" of (v - {gains.center[one]:.7g}) / {gains.spread[one]:.7g}"
        say(f"{name:6s} mean {mean:+.4f}, standard deviation {std:.4f}{text}")
    if is_data:
        overall = scaled.overall_std()
        hint = "" if scaling.is_8bit else f", or train.py --sigma-data={overall:.4g}"
        say(f"all    standard deviation {overall:.4f} in the scale of training, where sigma_data is "
            f"0.5{hint}")


def _print_clipped(outcome: "Outcome") -> None:
    """Prints how many values --clip has changed."""
    if outcome.clip:
        share = outcome.num_clipped / outcome.num_values
        click.echo("clipped to {:g}..{:g}: {:.3g}% of the values".format(*outcome.clip,
                                                                          100 * share))


def _tell_unused(source: "Source", max_images: int | None, num_selected: int) -> None:
    """Prints how many files of the source were not used, and why."""
    from images.sources import shown_some

    num_used = len(range(source.num_images)[:max_images])
    _tell_others(source)
    for number, reason in [(len(source.unmatched), "that --pair matches neither way, such as "
                                                   f"{shown_some(source.unmatched)}"),
                           (source.num_conditions, "under cond/, for conditions; --cond-source "
                                                   "adds condition images"),
                           (source.num_images - num_used, "beyond --max-images"),
                           (num_used - num_selected, "of other classes")]:
        if number:
            click.echo(f"Left out: {counted(number, 'image')} {reason}")


def _tell_others(source: "Source | Split") -> None:
    """Prints how many files of a source do not belong to a data set."""
    kinds = collections.Counter(os.path.splitext(name)[1].lower() or "no extension"
                                for name in source.others).most_common(_MAX_KINDS)
    shown = ", ".join(kind for kind, _ in kinds)
    for number, one, several in [
            (len(source.others), f"file that isn't an image ({shown})",
             f"files that aren't images ({shown})"),
            (source.num_hidden, "hidden or system file", ""),
            (source.num_pictures, "picture or deviation of generate.py under vis/ or std/",
             "pictures and deviations of generate.py under vis/ and std/")]:
        if number:
            click.echo(f"Left out: {counted(number, one, several)}")


def _require(**given: str | None) -> None:
    missing = " and ".join(f"--{name}" for name, value in given.items() if value is None)
    if missing:
        raise click.UsageError(f"{missing}: missing; or name a command: "
                               f"{', '.join(sorted(main.commands))}")


@click.group(context_settings={"show_default": True, **HELP_NAMES}, invoke_without_command=True,
             options_metavar="--source=PATH --dest=DIR|ZIP [OPTIONS]",
             subcommand_metavar="| COMMAND DATA")
@click.option("--source",       metavar="PATH",
              help="Images to convert: a folder, ZIP or published archive  [required]")
@click.option("--dest",         metavar="DIR|ZIP",
              help="Data set to write; an existing ZIP is replaced, a folder must be empty  [required]")
@click.option("--max-images",   metavar="INT", type=click.IntRange(min=1),
              help="Use only the first INT images of the source  [default: all]")
@click.option("--transform",    type=click.Choice(["center-crop", "center-crop-wide"]),
              help="How to crop  [default: none]")
@click.option("--resolution",   metavar="WxH|SIDE", callback=_parse_resolution,
              help="Size to resize to  [default: unchanged]")
@click.option("--scale",        metavar="minmax|std|LO,HI", callback=_parse_scale,
              help="Keep the values of floating-point and 16-bit images. -1 and 1 stand for "
                   "the smallest and largest value of each channel (minmax), its mean -+ 2 "
                   "standard deviations (std), or LO and HI  [default: 16 bits become 8]")
@click.option("--cond-source",  metavar="PATH",
              help="Condition images, one per image, with the same names except for the extension")
@click.option("--cond-scale",   metavar="minmax|std|LO,HI", callback=_parse_scale,
              help="Like --scale, for the condition images")
@click.option("--pair",         metavar="order|PATTERN", callback=_parse_pair,
              help="Pair --cond-source by order instead of by name; or find both kinds in --source by a regular expression with two alternatives, for the names of condition images and of images. Their groups hold the same text for a pair, e.g. '(.*)_QD_|(.*)_FD_'")
@click.option("--clip",         metavar="LO,HI", type=Range(),
              help="Clip values to LO..HI, in the data's units, before anything else; needs --scale")
@click.option("--cond-clip",    metavar="LO,HI", type=Range(),
              help="Like --clip, for the condition images; needs --cond-scale  [default: --clip]")
@click.option("--labels",       metavar="FILE.csv|.jsonl", callback=_parse_labels,
              help="Labels for the files of --source: a CSV, TSV or JSON Lines table with a column file_name, filename, image, path or name and a column label, class or category")
@click.option("--label-column", metavar="NAMES", callback=_parse_columns,
              help="Label column in --labels, metadata.csv, Parquet or hf://; several columns, e.g. x,y,z, make label vectors, and none ignores labels  [default: by names or types]")
@click.option("--image-column", metavar="NAME",
              help="Image column in Parquet or hf://, or file-name column in --labels  [default: by types or names]")
@click.option("--classes",      metavar="LIST", callback=_parse_classes,
              help="Keep only these classes and renumber them from 0 in this order, e.g. 6,1,3")
@click.option("--label-set",    type=click.Choice(["fine", "coarse"]),
              help="Which labels of CIFAR-100 to use: 100 fine or 20 coarse classes  [default: fine]")
@click.option("--channels",     metavar="rgb|gray|cond:I,image:J", callback=_parse_channels,
              help="Convert all pictures to RGB or gray; or split the channels of arrays, numbered from 0, into condition images and images, e.g. cond:0,image:1 or cond:0+1,image:2; or keep only some, e.g. image:1  [default: unchanged]")
@click.option("--layout",       type=click.Choice(["chw", "hwc"]),
              help="Whether the channels of arrays come first or last  [default: by their shape]")
@click.option("--keep-names",   is_flag=True,
              help="Keep the names of the source, except for the extension, instead of numbering images")
@click.option("--skip-damaged", is_flag=True,
              help="Leave out and list images that cannot be read, instead of stopping")
@click.option("--background",   metavar="COLOR", default="white", callback=_parse_color,
              help="Background colour of transparent images: a name or #rrggbb")
@click.option("--icc",          type=click.Choice(["srgb", "keep"]), default="srgb",
              help="Convert pictures with another colour profile to sRGB, or keep their pixels unchanged")
@click.option("--first-frame",  is_flag=True,
              help="Use the first frame of animations instead of refusing them")
@click.option("--workers",      metavar="INT", type=click.IntRange(min=1),
              help="Number of converting processes  [default: one per core]")
@verbosity_options
@click.pass_context
def main(context: click.Context, source: str | None, dest: str | None, max_images: int | None,
         transform: str | None, resolution: tuple[int, int] | None,
         scale: str | tuple[float, float] | None, cond_source: str | None,
         cond_scale: str | tuple[float, float] | None, pair: str | re.Pattern[str] | None,
         clip: tuple[float, float] | None, cond_clip: tuple[float, float] | None,
         labels: Path | None, label_column: tuple[str, ...] | None, image_column: str | None,
         classes: list[int] | None, label_set: str | None,
         channels: str | dict[str, tuple[int, ...]] | None, layout: str | None,
         keep_names: bool, skip_damaged: bool, background: tuple[int, int, int], icc: str,
         first_frame: bool, workers: int | None) -> None:
    """Converts images into a data set for train.py; the commands verify, show and split data sets.

    --source is recognised by its name:

    \b
    cifar-10-python.tar.gz       CIFAR-10 or CIFAR-100, 50,000 training images with labels, or
                                 their folder cifar-10-batches-py
    train-images-idx3-ubyte.gz   MNIST, Fashion-MNIST or EMNIST, padded to 32x32, or a folder with
                                 the file; the label file must be beside it
    NAME_lmdb/                   LSUN (needs pip install lmdb)
    NAME.zip                     all images in a ZIP
    NAME.npy, NAME.pt            an array of images, [n, H, W], [n, C, H, W] or [n, H, W, C]
    NAME.npz                     such an array named arr_0, and labels named arr_1
    NAME.parquet, or a folder    tables with an image column and a label column
    of such files                (needs pip install pyarrow)
    hf://NAME[:SPLIT]            a data set from the Hugging Face hub, or a folder written by
                                 save_to_disk (needs pip install datasets)
    any other folder             all images below it, or DICOM slices (needs pip install pydicom);
                                 a ZIP may also hold slices

    Labels of folders and ZIPs come from --labels, otherwise from dataset.json, {"labels": [["NAME",
    6], ...]} with class numbers or vectors, otherwise from metadata.csv or metadata.jsonl, and
    otherwise from the top-level folders, numbered in the order of their names. If a single folder
    contains all images, the folders inside it are used.

    Without --transform, --resolution ignores the aspect ratio. center-crop takes the central
    square. center-crop-wide crops rows to W:H, puts them on a black WxW square, and leaves out
    smaller images. Both convert gray pictures to RGB.

    Condition images come from --cond-source, from other files of --source (--pair), or from other
    channels (--channels).

    Pictures are turned upright by their EXIF data and converted to sRGB by their colour profiles.
    Palettes and CMYK become RGB, transparent areas show --background, and without --scale only the
    upper 8 of 16 bits are kept. Images may also be arrays, NAME.npy of [H, W], [C, H, W] or
    [H, W, C], with any number of channels. All results must have the same size and kind.
    """  # noqa: D301 - \b is click's mark for lines to leave alone
    if context.invoked_subcommand is not None:
        _refuse_flags(context)
        return
    _require(source=source, dest=dest)
    _check_geometry(transform, resolution)
    if labels and label_column == ():
        raise click.UsageError(f"--labels={labels}: --label-column=none reads no labels; leave one "
                               "of them out")
    picked = channels if isinstance(channels, dict) else {}
    cond_flag = _conditions_flag(cond_source, pair, picked)
    _check_needs(scale, clip, cond_scale, cond_clip, cond_flag)
    with user_errors(), contextlib.ExitStack() as stack:
        from dnnlib.ordered_pool import num_cores
        from images.conversion import (
            Conditions,
            Settings,
            convert_all,
            kept_names,
            new_class_names,
            open_dest,
            select_images,
        )
        from images.label_tables import Columns
        from images.sources import (
            choose_labels,
            condition_numbers,
            open_source,
            pair_by_pattern,
        )

        columns = Columns(image_column, label_column, labels)
        settings = Settings(transform, resolution, background, first_frame, scale, clip=clip,
                            channels=None if picked else channels, picked=picked.get("image"),
                            layout=layout, to_srgb=icc == "srgb", skip_damaged=skip_damaged)
        cond_settings = dataclasses.replace(
            settings, scale=cond_scale, clip=cond_scale and (cond_clip or clip),
            flag="--cond-scale", picked=picked.get("cond"))
        for flag, path in (("source", source), ("cond-source", cond_source)):
            if path and _is_same(Path(path), Path(dest)):
                raise ValueError(f"--dest={dest}: is the {flag} itself")
        if cond_source and _is_same(Path(source), Path(cond_source)):
            raise ValueError(f"--cond-source={cond_source}: is the source itself, so the images "
                             "would be their own conditions")
        with console.timed("list of the source"):
            images = stack.enter_context(open_source(source, layout=layout, columns=columns))
        if label_set:
            choose_labels(images, label_set)
        others, partners = images, range(images.num_images)
        if cond_flag == "--pair":
            images, others = pair_by_pattern(images, pair)
            partners = range(images.num_images)
        elif cond_source:
            others = stack.enter_context(open_source(cond_source, cond_flag, layout,
                                                     Columns(labels=())))
            partners = condition_numbers(images, others, by_order=pair == "order")
        settings, cond_settings = (
            dataclasses.replace(own, can_be_checked=part.has_file_names and not part.is_dicom)
            for own, part in ((settings, images), (cond_settings, others)))
        numbers, label_list = select_images(images, max_images, classes)
        conditions = Conditions(others, [partners[i] for i in numbers], cond_settings,
                                cond_flag) if cond_flag else None
        class_names = new_class_names(images, label_list, classes)
        names = kept_names(images, numbers) if keep_names else None
        with _computing(workers or num_cores(), "conversion"), open_dest(Path(dest)) as write:
            outcome = convert_all(images, numbers, label_list, settings, write,
                                  workers or num_cores(), conditions, class_names, names)
        _summarise(dest, images, outcome, classes, class_names, names is not None)
        _tell_unused(images, max_images, len(numbers))


@contextlib.contextmanager
def _computing(num_workers: int, title: str) -> Iterator[None]:
    """With --verbose, prints the number of processes and how long they took."""
    console.detail(f"Workers    {num_workers}")
    with console.timed(title):
        yield


def _conditions_flag(cond_source: str | None, pair: str | re.Pattern[str] | None,
                     picked: dict[str, tuple[int, ...]]) -> str | None:
    """Returns the flag that condition images come from, or None if there are none.

    Raises UsageError for several such flags.
    """
    if pair == "order" and not cond_source:
        raise click.UsageError("--pair=order: needs --cond-source")
    given = {"--cond-source": cond_source, "--pair": pair not in (None, "order"),
             "--channels": "cond" in picked}
    flags = [flag for flag, is_given in given.items() if is_given]
    if len(flags) > 1:
        raise click.UsageError(f"{' and '.join(flags)}: each says where condition images come "
                               "from; choose one")
    return flags[0] if flags else None


def _check_needs(scale: object, clip: object, cond_scale: object, cond_clip: object,
                 cond_flag: str | None) -> None:
    """Raises UsageError for flags of conversions that do not take place."""
    for flag, given, needed, needs in (
            ("--clip", clip, scale, "--scale"),
            ("--cond-scale", cond_scale, cond_flag,
             "condition images: --cond-source, --pair=PATTERN or --channels=cond:I,image:J"),
            ("--cond-clip", cond_clip, cond_scale, "--cond-scale")):
        if given and not needed:
            raise click.UsageError(f"{flag}: needs {needs}")


def _refuse_flags(context: click.Context) -> None:
    """Raises UsageError for flags of the conversion that precede the name of a command."""
    command = context.invoked_subcommand
    own = {option.name for option in main.commands[command].params}
    for name in context.params:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            problem = f"must come after {command}" if name in own else f"not a flag of {command}"
            raise click.UsageError(f"--{name.replace('_', '-')}: {problem}")


@main.command(context_settings=HELP_NAMES)
@click.argument("data", metavar="DATA")
@click.option("--workers",      metavar="INT", type=click.IntRange(min=1),
              help="Number of decoding processes  [default: one per core]")
@verbosity_options
def check(data: str, workers: int | None) -> None:
    """Verifies a data set: every image decodes, all are alike, labels and names are valid.

    Lists the images with problems. The exit code is 1 if there are any, and 0 otherwise.
    """
    with user_errors():
        from dnnlib.ordered_pool import num_cores
        from images.inspection import check_dataset

        with _computing(workers or num_cores(), "images"):
            report = check_dataset(Path(data), workers or num_cores())
        for line in report.problems:
            console.result(line)
        if report.num_problems > len(report.problems):
            console.result(f"... and {report.num_problems - len(report.problems)} more")
        if report.num_problems:
            raise ValueError(f"{data}: {counted(report.num_problems, 'problem')} in "
                             f"{counted(report.num_images, 'image')}")
        from images.dataset import ImageFolderDataset

        names = report.class_names or []
        _print_counts(data, report.num_images, report.format, report.label_dim, report.classes,
                      lambda label: f" ({_shown_name(names[label])})" if label < len(names) else "")
        if report.cond_format:
            _print_conditions(report.cond_format, report.num_images)
        _tell_empty_classes(report.classes)
        with console.timed("fingerprint"):
            fingerprint = ImageFolderDataset(data).fingerprint
        console.result(f"fingerprint: {fingerprint}")


def _tell_empty_classes(classes: collections.Counter) -> None:
    empty = sorted(set(range(max(classes, default=-1) + 1)) - set(classes))
    if empty:
        numbers = counted(len(empty), "class number has", "class numbers have")
        click.echo(f"Note: {numbers} no images, the first {empty[0]}")


def _check_out(ctx, param, value: str | None) -> str | None:
    if value is not None and not value.lower().endswith(".png"):
        raise click.BadParameter(f"{value}: must end in .png")
    return value


@main.command(context_settings=HELP_NAMES)
@click.argument("data", metavar="DATA")
@click.option("--out",          metavar="FILE.png", callback=_check_out,
              help="Picture to write  [default: NAME-show.png beside DATA]")
@click.option("--window",       metavar="CENTER,WIDTH", type=Window(),
              help="Center and width of the values that the picture shows from black to white, in the data's units, e.g. 40,400  [default: what networks see as -1 to 1]")
@click.option("--workers",      metavar="INT", type=click.IntRange(min=1),
              help="Number of decoding processes  [default: one per core]")
@verbosity_options
def show(data: str, out: str | None, window: tuple[float, float] | None,
         workers: int | None) -> None:
    """Writes a picture of some images, one class per row, and prints statistics of all pixels.

    The statistics are in the scale of training, where the networks' sigma_data is 0.5: x/127.5 - 1
    for 8-bit data, otherwise as recorded in dataset.json. In the picture, -1 is black and 1 is
    white. If images do not have 3 channels, only the first one is shown. Condition images are above
    their images.
    """
    with user_errors():
        from dnnlib.ordered_pool import num_cores
        from images.grid import save_png
        from images.inspection import pixel_statistics, sample_grid, show_path

        path = show_path(Path(data), out)
        with _computing(workers or num_cores(), "statistics"):
            moments, scaling = pixel_statistics(Path(data), workers or num_cores())
        if window and scaling.is_8bit:
            raise ValueError("--window: the images have 8 bits and are shown as they are; leave "
                             "--window out")
        with console.timed("picture"):
            picture, shown = sample_grid(Path(data), window)
            save_png(path, picture)
        console.result(f"{path}: {shown}")
        _print_statistics(moments, scaling, say=console.result)


@main.command(context_settings=HELP_NAMES)
@click.argument("data", metavar="DATA")
@click.option("--val",          metavar="SHARE|INT", required=True, callback=_parse_val,
              help="Images to hold out: a share such as 0.1, or a whole number")
@click.option("--dest",         metavar="DIR|ZIP", required=True,
              help="Data set to train on; an existing ZIP is replaced, a folder must be empty")
@click.option("--val-dest",     metavar="DIR|ZIP", required=True,
              help="Held-out data set, with the same rules")
@click.option("--seed",         metavar="INT", type=int, default=0, show_default=True,
              help="Seed for choosing the held-out images")
@verbosity_options
def split(data: str, val: float, dest: str, val_dest: str, seed: int) -> None:
    """Splits a data set into one to train on and a held-out one, for train.py --val-data.

    The seed and the names of the images decide which ones are held out, about the same share of
    each class. At least one image of each class is left to train on. Files are copied unchanged,
    with labels, condition images and scales.
    """
    paths = {"--dest": Path(dest), "--val-dest": Path(val_dest)}
    _check_two_places(paths)
    with user_errors():
        from images.conversion import open_dests
        from images.inspection import DataSet
        from images.splitting import plan_split, write_split

        _check_outside(Path(data), paths)
        source = DataSet(Path(data))
        plan = plan_split(source, val, seed)
        with console.timed("both parts"), open_dests(paths) as writes:
            write_split(source, plan, *writes)
        _summarise_split(paths, plan)


def _check_two_places(paths: dict[str, Path]) -> None:
    """Raises UsageError if the destinations are the same, or if one is inside the other."""
    (flag, path), (other_flag, other) = paths.items()
    places = _place(path), _place(other)
    if places[0] == places[1]:
        raise click.UsageError(f"{other_flag}={other}: is {flag} too; name two data sets")
    if places[0] in places[1].parents or places[1] in places[0].parents:
        raise click.UsageError(f"{other_flag}={other}: one of {flag} and {other_flag} lies inside "
                               "the other; name two separate places")


def _is_same(source: Path, dest: Path) -> bool:
    """Whether writing `dest` would replace `source`. Its folder need not exist yet."""
    return _place(source) == _place(dest) or (
        source.exists() and dest.exists() and dest.samefile(source))


def _place(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _check_outside(source: Path, paths: dict[str, Path]) -> None:
    """Raises ValueError for a destination that is the source or is inside it."""
    for flag, path in paths.items():
        if _is_same(source, path):
            raise ValueError(f"{flag}={path}: is the source itself; name another data set")
        if _place(source) in _place(path).parents:
            raise ValueError(f"{flag}={path}: lies inside the data set; name a place outside of it")


def _summarise_split(paths: dict[str, Path], plan: "Split") -> None:
    """Prints how many images each part got, in all and per class."""
    train, held_out = plan.train, plan.held_out
    for path, part in zip(paths.values(), (train, held_out), strict=True):
        found = [(part.images, "image", ""), (part.classes, "class", "classes"),
                 (part.conditions, "condition image", "")]
        console.result(f"{path}: " + ", ".join(counted(len(of), one, several)
                                           for of, one, several in found if of))
    names, missing = plan.class_names or [], sorted(set(train.classes) - set(held_out.classes))
    if len(train.classes) <= _MAX_CLASS_LINES:
        for label in sorted(train.classes):
            name = f" ({_shown_name(names[label])})" if label < len(names) else ""
            click.echo(f"  class {label}{name}: {train.classes[label]} to train on, "
                       f"{held_out.classes[label]} held out")
    if missing:
        click.echo(f"Note: no image is held out of {counted(len(missing), 'class', 'classes')}, "
                   f"the first {missing[0]}")
    _tell_others(plan)


@main.group(context_settings=HELP_NAMES)
def cache() -> None:
    """Lists or removes entries of the cache folder, such as packed data sets."""


@cache.command("list", context_settings=HELP_NAMES)
@cache_dir_option
@verbosity_options
def list_cache() -> None:
    """Prints the name, size, days since the last use, and origin of each entry."""
    with user_errors():
        from dnnlib.util import cache_dir, format_table, shown_bytes
        from images.data_cache import entries, free_bytes

        with console.timed("sizes"):
            found = entries()
        if found:
            console.result(format_table([
                ("entry", "size", "days", ""),
                *((entry.name, shown_bytes(entry.num_bytes),
                   f"{max(time.time() - entry.used, 0) / 86400:.1f}", entry.about)
                  for entry in found)], left=(0, 3)))
        size = sum(entry.num_bytes for entry in found)
        console.result(f"{cache_dir()}: {shown_bytes(size)} in {len(found)} entries, "
                   f"{shown_bytes(free_bytes(cache_dir()))} free")


@cache.command("remove", context_settings=HELP_NAMES)
@click.argument("names", metavar="[NAMES]...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Remove all entries.")
@cache_dir_option
@verbosity_options
def remove_cache(names: tuple[str, ...], is_all: bool) -> None:
    """Removes entries, given by their names in the list or by the start of the name.

    Removed entries are made again when they are needed. Do not remove what a running process uses.
    """
    if is_all == bool(names):
        raise click.UsageError("name entries of the cache, or give --all")
    with user_errors():
        from dnnlib.util import shown_bytes
        from images.data_cache import entries, remove

        with console.timed("removal"):
            removed = remove([entry.name for entry in entries()] if is_all else names)
        for entry in removed:
            click.echo(f"Removed {entry.name}, {shown_bytes(entry.num_bytes)}")


def cli() -> None:
    """Runs the command, also as the console script that pip installs."""
    run(main)


if __name__ == "__main__":
    cli()
